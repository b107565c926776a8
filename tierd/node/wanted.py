"""Files that shall come to the node when their turn comes: one bounded queue for each reason.

Contract: guarded by the lock of the filler that owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum
from typing import Final, NamedTuple

QUEUE_MAX: Final = 100_000


class Priority(IntEnum):
    """Why a file is wanted, the most urgent first."""

    READER = 0
    ASKED = 1
    PREFETCH = 2


class Wanted(NamedTuple):
    """A file that shall be filled when its turn comes; `path` is relative to the source."""

    path: bytes
    model: bytes
    priority: Priority


class WantedFiles:
    """The queues. Invariant: a path waits in one of them at most, in the most urgent that it was wanted for."""

    def __init__(self) -> None:
        self._queues: dict[Priority, OrderedDict[bytes, Wanted]] = {
            Priority.ASKED: OrderedDict(),
            Priority.PREFETCH: OrderedDict(),
        }
        self._taken: set[Wanted] = set()
        self.dropped = 0
        """Files that did not fit."""

    def add(self, wanted: Wanted) -> bool:
        """Queue a file; False if it waits as urgently already, or the queue is full."""
        for priority, queue in self._queues.items():
            if wanted.path in queue:
                if priority <= wanted.priority:
                    return False
                del queue[wanted.path]
        queue = self._queues[wanted.priority]
        if len(queue) >= QUEUE_MAX:
            self.dropped += 1
            return False
        queue[wanted.path] = wanted
        return True

    def waits(self, *, prefetch: bool) -> bool:
        """True if a file waits; those of prefetch count if `prefetch`."""
        return bool(self._queues[Priority.ASKED] or (prefetch and self._queues[Priority.PREFETCH]))

    def take(self) -> Wanted | None:
        """The next file; it is listed until `taken_up`, so that whoever asks for its way misses it at no moment."""
        queue = self._queues[Priority.ASKED] or self._queues[Priority.PREFETCH]
        if not queue:
            return None
        _, wanted = queue.popitem(last=False)
        self._taken.add(wanted)
        return wanted

    def taken_up(self, wanted: Wanted) -> None:
        """A file that was taken is being filled, or will not be."""
        self._taken.discard(wanted)

    def all(self) -> list[Wanted]:
        """Those that were taken and those that wait, in order."""
        return [*self._taken, *(wanted for queue in self._queues.values() for wanted in queue.values())]

    def forget(self, model: bytes) -> None:
        """Drop what waits of a model."""
        for queue in self._queues.values():
            for path in [path for path, wanted in queue.items() if wanted.model == model]:
                del queue[path]

    def clear(self) -> None:
        """Drop what waits."""
        for queue in self._queues.values():
            queue.clear()
