"""Accesses as they happen: a bounded queue between the read path, which never waits, and the recorder.

Contract: `opened` and `closed` are called from the trio thread and never await. An open that does not
fit is dropped and counted, and its close is then not recorded either, so the two always balance;
the close of a recorded open always fits (there are at most as many as open files).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio


@dataclass(frozen=True, slots=True)
class Opened:
    """A file was opened for reading.

    `at_ns`: nanoseconds since the epoch; `pod`: its UID where visible; `from_node`: all its bytes come from the
    node tier.
    """

    fh: int
    path: bytes
    at_ns: int
    uid: int
    pod: str | None
    from_node: bool = False


@dataclass(frozen=True, slots=True)
class Closed:
    """A recorded open ended; `bytes_read` counts what the daemon itself served."""

    fh: int
    path: bytes
    at_ns: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Changed:
    """An output was written, or its name removed. `path` is relative to the outputs root.

    `ended`: the version of its object that no cold file stands for any more, since the last name of that was removed.
    """

    path: bytes
    at_ns: int
    removed: bool = False
    ended: int = 0


Event = Opened | Closed | Changed


class Journal:
    """The queue. `dropped` counts opens, and changes of outputs, that did not fit since the start."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._wakeup = trio.Event()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    def opened(self, event: Opened | Changed) -> bool:
        """Note an open, or a change; False if the queue is full and it was dropped."""
        if len(self._events) >= self._capacity:
            self.dropped += 1
            return False
        self._put(event)
        return True

    def closed(self, event: Closed) -> None:
        """Note the end of an open that `opened` accepted."""
        self._put(event)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._wakeup.set()

    async def wait(self) -> None:
        """Return once there is something to take."""
        while not self._events:
            self._wakeup = trio.Event()
            await self._wakeup.wait()

    def take(self, limit: int) -> list[Event]:
        """Up to `limit` events, the oldest first."""
        return [self._events.popleft() for _ in range(min(limit, len(self._events)))]
