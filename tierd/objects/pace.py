"""How fast one store moves bytes, and how long one try may take. Knows nothing of objects.

Contract: any thread; waiting ends when the store is closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tierd.bandwidth import Bandwidth

SLOWEST_BYTES_PER_S = 256 << 10
"""A transfer slower than this counts as one that stalls."""


class Stopping(Exception):
    """The store is being closed."""


class Throttle:
    """All transfers of a store share `bytes_per_s`; 0 means no limit."""

    def __init__(
        self, bytes_per_s: int, stopping: threading.Event, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bandwidth = Bandwidth(bytes_per_s)
        self._stopping = stopping
        self._clock = clock
        self._lock = threading.Lock()

    def wait(self, size: int) -> float:
        """Return when so many bytes may move; the seconds that took. Raises Stopping."""
        if self._stopping.is_set():
            raise Stopping
        with self._lock:
            now = self._clock()
            pause_s = self._bandwidth.pause_s(now)
            self._bandwidth.charge(size, now)  # before the wait: first come, first served
        if pause_s and self._stopping.wait(pause_s):
            raise Stopping
        return pause_s


class Deadline:
    """One try: as long as a stall may last, and what the bytes take on the slowest connection we put up with."""

    def __init__(self, stall_s: float, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed_s = stall_s + size / SLOWEST_BYTES_PER_S
        self._clock = clock
        self._began = clock()

    def extend(self, seconds: float) -> None:
        """So long we waited ourselves."""
        self._allowed_s += seconds

    def check(self) -> None:
        """Raises TimeoutError when the time is over."""
        if self._clock() - self._began > self._allowed_s:
            raise TimeoutError(f"not done after {self._allowed_s:.0f} s")
