"""How fast work that nobody waits for may move bytes: fills from the source, transfers to and from the object store.

Contract: pure, `now` is an argument (seconds of a clock that never goes back); guarded by the lock of whoever owns it.
"""

from __future__ import annotations


class Bandwidth:
    """At most `bytes_per_s` over time; 0 means no limit. Idle time is not saved up."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._not_before = 0.0

    def pause_s(self, now: float) -> float:
        """How long to wait before anything more is moved; 0 if that may be now."""
        return max(0.0, self._not_before - now) if self._bytes_per_s else 0.0

    def charge(self, size: int, now: float) -> None:
        """So many bytes are moved now."""
        if self._bytes_per_s:
            self._not_before = max(now, self._not_before) + size / self._bytes_per_s
