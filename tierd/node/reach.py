"""Reaching inodes: what every call of the overlay builds on. Names lead to inodes, inodes to the source.

Blocking calls run in worker threads: metadata, opens and data have limits of their own, so neither slow reads nor
slow opens can starve `stat`.
Names are found through directory descriptors, inodes through any name or open handle that still leads to them.

Contract: all state belongs to the trio thread. After every `await` a node may have been renamed,
retired or forgotten; so replies are built from what the source just said, never from what was
remembered.
"""

from __future__ import annotations

import errno
import math
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import trio

from tierd.node.cold_source import ColdSource
from tierd.node.handles import DirCache, Handle, close_soon
from tierd.node.inodes import InodeTable, Node, pack
from tierd.node.ledger import Ledger
from tierd.node.once import Once
from tierd.node.sources import Change, Moved, Ref, version_of

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_METADATA_THREADS = 16
_OPEN_THREADS = 16
_DATA_THREADS = 16
_GONE = frozenset({errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTDOWN})
"""What a network file system answers once it has given up, or its process has died."""
_AWAY_SECONDS = 0.05
_TRY_AGAIN_SECONDS = 1.0
_REPLACED_MAX = 1024
YOUNG_SECONDS = 2.0
"""How long a node that replaced a retired one is not itself retired: the kernel looks a name up again only
once per open (open(2) fails with ESTALE the second time), so a file that changes all the time must settle."""


class Caller(NamedTuple):
    """Who sent a request, and the unique number of one that must not be done twice (0: any other)."""

    uid: int
    gid: int
    pid: int
    unique: int = 0


class Entry(NamedTuple):
    """A node and its attributes, as a reply with an entry carries them.

    `lasting` is False if the file may be changed by way of another node: the kernel must ask each time.
    """

    node_id: int
    attributes: os.stat_result
    lasting: bool = True


class Patience:
    """How long a call waits for a source that may be gone, where there is another answer: `seconds`, but a moment
    only while the last call had no answer; every second one call tries in full whether it is back."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._away = False
        self._try_at = 0.0

    async def ask(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T | None:
        """The answer, or None if there was none in time, or only the error of a source that is gone."""
        with trio.move_on_after(self._wait_seconds()):
            try:
                return await function(*args)
            except OSError as error:
                if error.errno not in _GONE or math.isinf(self._seconds):
                    raise
            finally:
                self._away = trio.current_effective_deadline() <= trio.current_time()
        return None

    def _wait_seconds(self) -> float:
        now = trio.current_time()
        if self._away and now < self._try_at:
            return min(_AWAY_SECONDS, self._seconds)
        self._try_at = now + self._seconds + _TRY_AGAIN_SECONDS
        return self._seconds


class Reach:
    """See the module. `patience_s` is how long calls wait for the source if something else is known."""

    def __init__(
        self, source: ColdSource, patience_s: float = math.inf, ledger: Ledger | None = None, once: Once | None = None
    ) -> None:
        self.source = source
        self.patience = Patience(patience_s)
        self.ledger = ledger or Ledger()
        self.once = once or Once(self.ledger, source.key)
        self.inodes = InodeTable(source.root_inode, self.ledger)
        self.metadata_limit = trio.CapacityLimiter(_METADATA_THREADS)
        self.open_limit = trio.CapacityLimiter(_OPEN_THREADS)
        self.data_limit = trio.CapacityLimiter(_DATA_THREADS)
        self.dirs = DirCache(source, self.inodes, self._run)
        self._replaced: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        """Names, with their directory's node, that were found to mean another inode; until when an open that comes
        to that one may have been sent back for it."""

    async def _run(self, function: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter | None = None) -> T:
        limit = limiter or self.metadata_limit
        return await trio.to_thread.run_sync(function, *args, limiter=limit, abandon_on_cancel=True)

    async def _run_data(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self.data_limit, abandon_on_cancel=True)

    async def _on_node(self, node: Node, function: Callable[..., T], *args: Any) -> T:
        """Run `function(ref, *args)` on the inode, through an open handle or the first name that still means it."""
        return await (self._by_name if of_source(node) is None else self._by_handle)(node, function, *args)

    async def _by_handle(
        self, node: Node, function: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        handle = of_source(node)
        if handle is None:
            raise Moved
        with self._using(handle):
            return await self._run(function, Ref(handle.fd, None, node.key), *args, limiter=limiter)

    async def _by_name(
        self, node: Node, function: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        if node is self.inodes.root:
            return await self._run(function, Ref(self.source.root_fd, None, node.key), *args, limiter=limiter)
        while node.parent is not None:
            parent, name = node.parent, node.name
            try:
                async with self.dirs.hold(parent) as dir_fd:
                    return await self._run(function, Ref(dir_fd, name, node.key), *args, limiter=limiter)
            except Moved:
                self.inodes.drop_name(node, parent, name)
                self._note_replaced(parent, name)
                node.moved_at = trio.current_time()
        raise Moved

    def _note_replaced(self, parent: Node, name: bytes) -> None:
        self._replaced[parent.id, name] = trio.current_time() + YOUNG_SECONDS
        self._replaced.move_to_end((parent.id, name))
        if len(self._replaced) > _REPLACED_MAX:
            self._replaced.popitem(last=False)

    def _was_replaced(self, node: Node) -> bool:
        """An open that leads to this node may have been sent back once already."""
        now = trio.current_time()
        return any(self._replaced.get((parent.id, name), 0.0) > now for parent, name in node.names())

    @contextmanager
    def _using(self, handle: Handle) -> Iterator[None]:
        handle.uses += 1
        try:
            yield
        finally:
            handle.uses -= 1
            if handle.closing and handle.uses == 0:
                close_soon(handle.fd)

    # --- nodes ---

    def _carry(self, node: Node, change: Change) -> None:
        """Our own change is no reason to retire a node that was current before it."""
        if node.version == pack(version_of(change.before)):
            self.inodes.set_version(node, pack(version_of(change.after)))


def of_source(node: Node) -> Handle | None:
    """The latest handle that has a descriptor of the source (one that reads the node tier's copy has none)."""
    return next((handle for handle in reversed(node.handles or ()) if handle.fd >= 0), None)
