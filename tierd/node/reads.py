"""READ of files that the daemon serves: one read of a descriptor and one write to the device, in threads of its own.

A READ of bytes that are still on their way into the node tier is parked, and no thread waits with it. A group of
threads for each of the source and the object store, which may stall, and of this node's own disk, which does not.

Contract: `serve` and `stop` are called from the trio thread while the kernel cannot send a READ for the handle (before
the reply to OPEN, after RELEASE); everything else from any thread.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tierd.errors import TierdError
from tierd.node.messages import OUT_HEADER, READ_BYTES_MAX

_SOURCE_THREADS = 16
"""A file that the source takes long to read holds one of them."""
_LOCAL_THREADS = 8
"""For bytes of this node's own disk: they wait for no source."""


_COLD_THREADS = 8
"""For files that are not in the source: they wait for the object store."""

Reader = Callable[[memoryview, int], int]


class Gate(Protocol):
    """Says when bytes that are still on their way can be read."""

    def ready(self, offset: int, size: int, resume: Callable[[], None]) -> bool:
        """True if they are there; else `resume` is called once, from any thread, as soon as they are."""


class ReadTarget:
    """A descriptor that READs of one handle are served from, and how many bytes were.

    `gate`: not all bytes are there yet. `local`: the descriptor is of this node's own disk, so its reads do not
    queue behind those of a source that may stall. `reader`: who reads while there is no descriptor (`fd` is -1), into
    a view from an offset; how much it read. Raises OSError, or an error with an `errno`.
    """

    __slots__ = ("bytes_read", "fd", "gate", "local", "reader")

    def __init__(self, fd: int, *, local: bool = False, reader: Reader | None = None) -> None:
        self.fd = fd
        self.local = local
        self.reader = reader
        self.gate: Gate | None = None
        self.bytes_read = 0


class _Read(NamedTuple):
    """One READ request. `fd` is what `target` had when it was known that these bytes can be read there: by the time
    that a thread reads, a fill may have taken the target over, in whose draft they are still on their way."""

    unique: int
    target: ReadTarget
    fd: int
    offset: int
    size: int


class Reads:
    """See the module. `answer` writes one message to the device."""

    def __init__(self, answer: Callable[[list[memoryview]], None]) -> None:
        self._answer = answer
        self._targets: dict[int, ReadTarget] = {}
        self._source: _Queue = queue.SimpleQueue()
        self._local: _Queue = queue.SimpleQueue()
        self._cold: _Queue = queue.SimpleQueue()
        self._groups = (
            ("source", self._source, _SOURCE_THREADS),
            ("local", self._local, _LOCAL_THREADS),
            ("cold", self._cold, _COLD_THREADS),
        )
        self._parked: dict[int, _Read] = {}
        self._counting = threading.Lock()
        self.count = 0
        """READ requests that the kernel sent, whoever answered them."""

    def workers(self) -> dict[str, Callable[[], None]]:
        """The bodies of its threads, by name; they end by `close`."""
        return {
            f"seam-{name}-{number}": lambda requests=requests: self._serve(requests)  # type: ignore[misc]
            for name, requests, count in self._groups
            for number in range(count)
        }

    def close(self) -> None:
        """End the threads after what is queued."""
        for _, requests, count in self._groups:
            for _ in range(count):
                requests.put(None)

    def serve(self, fh: int, target: ReadTarget) -> None:
        """From now on READs of handle `fh` are answered from `target`."""
        self._targets[fh] = target

    def stop(self, fh: int) -> None:
        """The handle was released."""
        self._targets.pop(fh, None)

    def queued(self) -> int:
        """READs that wait for a thread."""
        return sum(requests.qsize() for _, requests, _ in self._groups)

    def parked(self) -> int:
        """READs that wait for bytes on their way."""
        return len(self._parked)

    def take(self, unique: int, fh: int, offset: int, size: int) -> bool:
        """A READ came; False if it is not of a handle that is served here."""
        target = self._targets.get(fh)
        self.count += 1
        if target is None:
            return False
        read = _Read(unique, target, target.fd, offset, size)
        gate = target.gate  # after the descriptor: whoever sets both sets the gate first
        if gate is None:
            self._queue(read)
            return True
        self._parked[unique] = read
        if gate.ready(offset, size, lambda: self._resume(unique)):
            self._resume(unique)
        return True

    def give_up(self, unique: int) -> bool:
        """Nobody waits for a READ any longer; True if it was parked, and is answered by the caller."""
        return self._parked.pop(unique, None) is not None

    def _queue(self, read: _Read) -> None:
        (self._cold if read.fd < 0 else self._local if read.target.local else self._source).put(read)

    def _resume(self, unique: int) -> None:
        """The bytes are there; the READ may have been interrupted meanwhile."""
        read = self._parked.pop(unique, None)
        if read is not None:
            self._queue(read._replace(fd=read.target.fd))

    def _serve(self, requests: _Queue) -> None:
        buffer = bytearray(OUT_HEADER.size + READ_BYTES_MAX)
        view = memoryview(buffer)
        while (request := requests.get()) is not None:
            unique, target, fd, offset, size = request
            try:
                have = _read(target, fd, view[OUT_HEADER.size : OUT_HEADER.size + size], offset)
            except (OSError, TierdError) as error:
                number = error.errno if isinstance(error, OSError) else errno.EIO
                OUT_HEADER.pack_into(buffer, 0, OUT_HEADER.size, -(number or errno.EIO), unique)
                self._answer([view[: OUT_HEADER.size]])
                continue
            OUT_HEADER.pack_into(buffer, 0, OUT_HEADER.size + have, 0, unique)
            with self._counting:
                target.bytes_read += have
            self._answer([view[: OUT_HEADER.size + have]])


_Queue = queue.SimpleQueue[_Read | None]


def _read(target: ReadTarget, fd: int, view: memoryview, offset: int) -> int:
    if fd < 0 and target.reader is not None:
        return target.reader(view, offset)
    return _read_fully(fd, view, offset)


def _read_fully(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; fewer bytes only at the end of the file."""
    have = os.preadv(fd, [target], offset)
    while 0 < have < len(target):
        more = os.preadv(fd, [target[have:]], offset + have)
        if more == 0:
            break
        have += more
    return have
