"""Open files and directories, and the bounded cache of directory descriptors that names are resolved in.

Handle numbers are counters, never descriptor numbers. A descriptor that a worker thread uses is not
closed under it: `uses` counts the users, and the last one to leave closes.

Contract: the maps are touched from the trio thread only; descriptors are closed in worker threads,
because closing a file on a stalled network file system may block.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType

import trio

from tierd.node.fill import Fill
from tierd.node.inodes import InodeTable, Node
from tierd.node.reads import ReadTarget
from tierd.node.sources import Moved, PosixSource, Ref
from tierd.node.store import Copy
from tierd.stubs import Origin


class Handle:
    """What is open of a node. `uses` counts requests that use `fd` beside the handle's own."""

    __slots__ = ("closing", "fd", "fh", "node", "uses")

    def __init__(self, fh: int, node: Node, fd: int) -> None:
        self.fh = fh
        self.node = node
        self.fd = fd
        self.uses = 0
        self.closing = False
        node.handles = [*(node.handles or ()), self]

    def leave(self) -> None:
        """The node no longer counts this handle among its open ones."""
        self.node.handles = [other for other in self.node.handles or () if other is not self] or None


class FileHandle(Handle):
    """One open file. `recorded_path` is what its open was recorded under, and its close must be; None if it was not.

    `dirty`: something was written through it; `backed`: the kernel reads by itself (passthrough).
    `model` is what it holds a lease on. One that reads the node tier's `copy`, or the object of a cold file (`origin`),
    has no descriptor of the source (`fd` is -1) and remembers its `attributes`; one with a `fill` is served as that
    lands.
    """

    __slots__ = (
        "attributes", "backed", "copy", "dirty", "fill", "model", "origin", "recorded_path", "target", "writable",
    )  # fmt: skip

    def __init__(self, fh: int, node: Node, fd: int, writable: bool) -> None:
        super().__init__(fh, node, fd)
        self.writable = writable
        self.target = ReadTarget(fd)
        self.recorded_path: bytes | None = None
        self.backed = False
        self.dirty = False
        self.model: bytes | None = None
        self.copy: Copy | None = None
        self.fill: Fill | None = None
        self.origin: Origin | None = None
        self.attributes: os.stat_result | None = None


class DirHandle(Handle):
    """One open directory: the listing it was opened with, and how many entries fit in the last reply. `told` is the
    last name before a position, where another daemon told it."""

    __slots__ = ("names", "reply_size", "told")

    def __init__(self, fh: int, node: Node, fd: int) -> None:
        super().__init__(fh, node, fd)
        self.names: list[bytes] = []
        self.told: Mapping[int, bytes] = {}
        self.reply_size = 24
        """First guess: a 4 KiB reply holds about that many READDIRPLUS entries."""


RunBlocking = Callable[..., Awaitable[int]]


class _Hold:
    """One use of a cached directory descriptor: `async with cache.hold(node) as fd`."""

    __slots__ = ("_cache", "_entry", "_node")

    def __init__(self, cache: DirCache, node: Node) -> None:
        self._cache = cache
        self._node = node

    async def __aenter__(self) -> int:
        self._entry = self._cache.peek(self._node) or await self._cache.open(self._node)
        return self._entry.fd

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.leave(self._entry)


class _DirFd:
    __slots__ = ("dropped", "fd", "uses")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.uses = 0
        self.dropped = False


class DirCache:
    """O_PATH descriptors of directories, least recently used first, at most `capacity` plus those in use.

    O_PATH descriptors hold no state on the source, so they are closed right here.
    """

    def __init__(self, source: PosixSource, inodes: InodeTable, run: RunBlocking, capacity: int = 512) -> None:
        self._source = source
        self._inodes = inodes
        self._run = run
        self._capacity = capacity
        self._fds: OrderedDict[Node, _DirFd] = OrderedDict()
        self._root = _DirFd(source.root_fd)

    def __len__(self) -> int:
        return len(self._fds)

    def hold(self, node: Node) -> _Hold:
        """A descriptor to resolve names of directory `node` in, for the length of an `async with`.

        Raises Moved if it is not where it was.
        """
        return _Hold(self, node)

    def peek(self, node: Node) -> _DirFd | None:
        """The descriptor, with one use counted, if it is there already."""
        if node is self._inodes.root:
            entry: _DirFd | None = self._root
        else:
            entry = self._fds.get(node)
        if entry is not None:
            entry.uses += 1
            if entry is not self._root:
                self._fds.move_to_end(node)
        return entry

    async def open(self, node: Node) -> _DirFd:
        """Open the directory by its latest name, from the nearest parent that is open; one use is counted."""
        missing = []
        at = node
        while (entry := self.peek(at)) is None:
            missing.append(at)
            if at.parent is None:
                raise Moved
            at = at.parent
        for child in reversed(missing):
            try:
                fd = await self._open_path(Ref(entry.fd, child.name, child.key))
            finally:
                self.leave(entry)
            entry = self._keep(child, fd)
        return entry

    async def _open_path(self, ref: Ref) -> int:
        """If whoever asks gives up, its thread goes on, and closes what it gets too late."""
        lock, given_up = threading.Lock(), False
        opened: list[int] = []

        def open_path() -> int:
            fd = self._source.open_dir(ref, os.O_PATH)
            with lock:
                opened.append(fd)
                if given_up:
                    os.close(fd)
            return fd

        try:
            return await self._run(open_path)
        except BaseException:
            with lock:
                given_up = True
                for fd in opened:
                    os.close(fd)
            raise

    def _keep(self, node: Node, fd: int) -> _DirFd:
        raced = self.peek(node)
        if raced is not None:
            os.close(fd)
            return raced
        entry = self._fds[node] = _DirFd(fd)
        entry.uses = 1
        while len(self._fds) > self._capacity:
            self._drop(self._fds.popitem(last=False)[1])
        return entry

    def leave(self, entry: _DirFd) -> None:
        """One use fewer."""
        entry.uses -= 1
        self._close_if_done(entry)

    def drop(self, node: Node) -> None:
        """The directory is gone or forgotten."""
        entry = self._fds.pop(node, None)
        if entry is not None:
            self._drop(entry)

    def _drop(self, entry: _DirFd) -> None:
        entry.dropped = True
        self._close_if_done(entry)

    def _close_if_done(self, entry: _DirFd) -> None:
        """Close a dropped descriptor once nobody uses it."""
        if entry.dropped and entry.uses == 0 and entry.fd >= 0:
            os.close(entry.fd)
            entry.fd = -1

    def close(self) -> None:
        """Drop everything (at the end)."""
        for node in list(self._fds):
            self.drop(node)


def close_soon(fd: int) -> None:
    """Close in a thread of its own: on a source that stalls it may block. An error is no news: a writer's comes out at
    its flush, close(2)."""

    def close() -> None:
        with suppress(OSError):
            os.close(fd)

    trio.lowlevel.start_thread_soon(close, lambda outcome: outcome.unwrap())
