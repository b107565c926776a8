"""Eviction: keeps the node tier within its size limit and the disk above its watermarks. `policy.py` decides."""

from __future__ import annotations

import structlog
import trio

from tierd.node.tier import NodeTier

log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 5.0


class Evictor:
    """Looks every few seconds, and at once when `needed` is called (from the trio thread)."""

    def __init__(self, tier: NodeTier) -> None:
        self._tier = tier
        self._wakeup = trio.Event()

    def needed(self) -> None:
        """Space ran out."""
        self._wakeup.set()

    async def run(self) -> None:
        """Evict until cancelled."""
        while True:
            try:
                await trio.to_thread.run_sync(self._tier.evict_surplus)
            except OSError as error:
                log.warning("eviction_failed", reason=error.strerror)
            with trio.move_on_after(_INTERVAL_SECONDS):
                await self._wakeup.wait()
            self._wakeup = trio.Event()
