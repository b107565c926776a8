"""When not to ask a server that just failed. Knows no server; time is an argument of the constructor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_PAUSE_S_MAX: Final = 5.0


class Circuit:
    """Open after a failure, for a time that doubles with each further one; then one call may try.

    Contract: one event loop. `allow` is followed by `succeeded` or `failed`, whatever happens.
    """

    def __init__(self, pause_s: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_pause_s = pause_s
        self._pause_s = pause_s
        self._clock = clock
        self._until_s: float | None = None
        """None: closed."""

    @property
    def is_open(self) -> bool:
        """The last call failed."""
        return self._until_s is not None

    def allow(self) -> bool:
        """May the server be asked now? While open, the one who may keeps the others away for another pause."""
        if self._until_s is None:
            return True
        now_s = self._clock()
        if now_s < self._until_s:
            return False
        self._until_s = now_s + self._pause_s
        return True

    def succeeded(self) -> None:
        """The server answered."""
        self._until_s, self._pause_s = None, self._first_pause_s

    def failed(self) -> None:
        """It did not, or not in time."""
        if self._until_s is not None:
            self._pause_s = min(self._pause_s * 2, _PAUSE_S_MAX)
        self._until_s = self._clock() + self._pause_s
