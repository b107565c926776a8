"""Work that comes round: every so many seconds, and at once when somebody says that it is needed."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

log = structlog.get_logger(__name__)


class Rounds:
    """Runs `work`, which blocks, in a thread; an OSError is logged as `failed`, and the next round comes as ever.

    Contract: trio thread.
    """

    def __init__(self, work: Callable[[], object], *, interval_s: float, failed: str) -> None:
        self._work = work
        self._interval_s = interval_s
        self._failed = failed
        self._wakeup = trio.Event()

    def needed(self) -> None:
        """Do not wait for the next round; if one runs, another follows it."""
        self._wakeup.set()

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await trio.to_thread.run_sync(self._work)
            except OSError as error:
                log.warning(self._failed, reason=error.strerror)
            with trio.move_on_after(self._interval_s):
                await self._wakeup.wait()
            self._wakeup = trio.Event()
