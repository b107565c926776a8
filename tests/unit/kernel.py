"""The kernel's side of the overlay: walks paths, counts each lookup it was given, and forgets them in the end."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tierd.node.ledger import ROOT_ID
from tierd.node.opens import OpenedFile
from tierd.node.overlay import Overlay
from tierd.node.reach import Caller, Entry

T = TypeVar("T")

CALLER = Caller(os.getuid(), os.getgid(), os.getpid())


class FakeKernel:
    """`lookups` is what the kernel would hold against each node; `forget_all` gives it back.

    It remembers no names: each path is walked anew, as with an entry timeout of zero.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self.lookups: Counter[int] = Counter()

    def counted(self, entry: Entry) -> Entry:
        """A reply with an entry came."""
        self.lookups[entry.node_id] += 1
        return entry

    async def entry(self, path: bytes) -> Entry:
        """Walk `path` from the root: one lookup for each name in it."""
        found = await self.overlay.getattr(ROOT_ID)
        for name in filter(None, path.split(b"/")):
            if not stat.S_ISDIR(found.attributes.st_mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            found = self.counted(await self.overlay.lookup(found.node_id, name))
        return found

    async def node(self, path: bytes) -> int:
        """The node ID of a path."""
        return (await self.entry(path)).node_id

    async def parent(self, path: bytes) -> tuple[int, bytes]:
        """The node ID of the directory that a path lies in, and the last name."""
        directory, _, name = path.rpartition(b"/")
        found = await self.entry(directory)
        if not stat.S_ISDIR(found.attributes.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return found.node_id, name

    async def retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What system calls on paths do: once more, with new lookups, after ESTALE."""
        try:
            return await attempt()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return await attempt()

    async def open(self, path: bytes, flags: int = os.O_RDONLY, mode: int = 0o644) -> OpenedFile:
        """open(2), once: ESTALE comes out."""
        try:
            found = await self.entry(path)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            return await self.create(path, flags, mode)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if stat.S_ISDIR(found.attributes.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        return await self.overlay.open(found.node_id, flags & ~(os.O_CREAT | os.O_EXCL), CALLER)

    async def create(self, path: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> OpenedFile:
        """Create and open a file that a lookup did not find."""
        opened, entry = await self.overlay.create(*await self.parent(path), flags, mode, CALLER)
        self.counted(entry)
        return opened

    async def write_file(self, path: bytes, data: bytes) -> None:
        """A whole file, through the overlay."""
        opened = await self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        await self.overlay.write(opened.fh, 0, data)
        await self.overlay.flush(opened.fh)
        await self.overlay.release(opened.fh)

    async def read_file(self, path: bytes) -> bytes:
        """A whole file, through the overlay."""
        opened = await self.open(path)
        data = await self.overlay.read(opened.fh, 0, 1 << 20)
        await self.overlay.release(opened.fh)
        return data

    async def list_directory(self, node_id: int, per_reply: int = 10) -> list[bytes]:
        """All names of a directory, in replies that hold `per_reply` entries each."""
        fh = await self.overlay.opendir(node_id)
        names: list[bytes] = []
        position, more = 0, True
        while more:
            before, position = position, await self.list_some(fh, position, per_reply, names)
            more = position > before
        await self.overlay.releasedir(fh)
        return names

    async def list_some(self, fh: int, start: int, per_reply: int, names: list[bytes]) -> int:
        """One reply; the position after it. Entries count as lookups, `.` and `..` do not (fuse_direntplus_link)."""
        position, room = start, per_reply

        def reply(name: bytes, st: os.stat_result, node_id: int, next_position: int) -> bool:
            nonlocal position, room
            if room == 0:
                return False
            room -= 1
            position = next_position
            if name not in (b".", b".."):
                self.counted(Entry(node_id, st))
                names.append(name)
            return True

        await self.overlay.readdir(fh, start, reply)
        return position

    def forget_all(self) -> None:
        """Memory is short: everything goes, the deepest last, in two portions each."""
        for node_id, count in self.lookups.items():
            self.overlay.forget(node_id, count - count // 2)
            if count > 1:
                self.overlay.forget(node_id, count // 2)
        self.lookups.clear()


async def number_of(call: Awaitable[object]) -> str:
    """The errno that a call ends with, by name; `ok` if it does not fail."""
    try:
        await call
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"
