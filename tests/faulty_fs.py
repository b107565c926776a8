"""The file system of a faulty source: a directory as it is, but for what `Faults` does to each operation.

Inode numbers are its own and never used twice, as JuiceFS's. All in one event loop: the directory lies on a local
disk, and only faults wait. No semantics beyond what tests need (no links, no extended attributes).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from tests.faults import Faults

T = TypeVar("T")

_BY_NAME = frozenset({"lookup", "create", "mkdir", "unlink", "rmdir", "rename"})
_BY_HANDLE = frozenset({"read", "write", "flush", "fsync", "release", "readdir", "releasedir"})
_FLAGS_LEFT_OUT = os.O_APPEND | os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_SWEEP_EVERY = 64


@dataclass
class Settings:
    """How long the kernel may rely on what it was told, in seconds, and whether reads go past its page cache."""

    attr_timeout: float = 0.0
    entry_timeout: float = 0.0
    direct_io: bool = False


class Node:
    """An inode: held by a descriptor, so that its number is nobody else's."""

    __slots__ = ("fd", "lookups", "number", "path")

    def __init__(self, number: int, fd: int, path: str) -> None:
        self.number = number
        self.fd = fd
        self.path = path
        self.lookups = 0

    @property
    def reached(self) -> str:
        """A path that leads to it, whatever its name is by now."""
        return f"/proc/self/fd/{self.fd}"


@dataclass
class Handle:
    """An open file, or a listing (`fd` is -1)."""

    fd: int
    node: Node
    names: Sequence[str] = ()


def operation(function: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Let faults happen to a handler first, and translate errors: anything but FUSEError would end the mount."""
    op = function.__name__

    async def wrapped(self: FaultyOperations, *args: Any) -> T:
        try:
            await self.faults.meet(op, self.subject(op, args))
            return await function(self, *args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or 5) from None

    return wrapped


class FaultyOperations(pyfuse3.Operations):
    """See the module."""

    enable_writeback_cache = False

    def __init__(self, backing: str, faults: Faults, settings: Settings) -> None:
        super().__init__()
        self.faults = faults
        self.settings = settings
        root = Node(pyfuse3.ROOT_INODE, os.open(backing, os.O_PATH), "")
        self._nodes: dict[int, Node] = {root.number: root}
        self._numbers: dict[tuple[int, int], int] = {_key(os.fstat(root.fd)): root.number}
        self._last = int(pyfuse3.ROOT_INODE)
        self._handles: dict[int, Handle] = {}
        self._last_handle = 0

    def subject(self, op: str, args: Sequence[Any]) -> str:
        """The path that an operation is about."""
        if op in _BY_NAME:
            return _join(self._nodes[args[0]].path, os.fsdecode(args[1]))
        if op in _BY_HANDLE:
            return self._handles[args[0]].node.path
        return "" if op == "statfs" else self._nodes[args[0]].path

    # --- nodes ---

    def _find(self, parent: Node, name: str) -> Node:
        """The node that a name leads to now."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent.fd)
        key = _key(os.fstat(fd))
        known = self._nodes.get(self._numbers.get(key, 0))
        if known is not None:
            os.close(fd)
            known.path = _join(parent.path, name)
            return known
        self._last += 1
        node = Node(self._last, fd, _join(parent.path, name))
        self._nodes[node.number] = node
        self._numbers[key] = node.number
        if self._last % _SWEEP_EVERY == 0:
            self._sweep()
        return node

    def _sweep(self) -> None:
        """Let go of files that were removed beneath, whose space would stay with us."""
        for node in list(self._nodes.values()):
            self._drop_if_gone(node)

    def _drop_if_gone(self, node: Node) -> None:
        st = os.fstat(node.fd)
        if st.st_nlink == 0 and node.lookups == 0:
            del self._nodes[node.number], self._numbers[_key(st)]
            os.close(node.fd)

    def _attributes(self, node: Node) -> EntryAttributes:
        st = os.fstat(node.fd)
        entry = EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks",
                     "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):  # fmt: skip
            setattr(entry, name, getattr(st, name))
        entry.st_ino = InodeT(node.number)
        entry.attr_timeout = self.settings.attr_timeout
        entry.entry_timeout = self.settings.entry_timeout
        return entry

    def _counted(self, node: Node) -> EntryAttributes:
        node.lookups += 1
        return self._attributes(node)

    @operation
    async def lookup(self, parent: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return self._counted(self._find(self._nodes[parent], os.fsdecode(name)))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for number, count in inode_list:
            node = self._nodes[number]
            node.lookups -= count
            self._drop_if_gone(node)

    @operation
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._nodes[inode])

    @operation
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._nodes[inode]
        st = os.stat(node.reached)
        if fields.update_size:
            os.truncate(node.reached, attr.st_size)
        if fields.update_uid or fields.update_gid:
            uid, gid = attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1
            os.chown(node.reached, uid, gid)
        if fields.update_mode:
            os.chmod(node.reached, attr.st_mode & 0o7777)
        if fields.update_atime or fields.update_mtime:
            atime = attr.st_atime_ns if fields.update_atime else st.st_atime_ns
            os.utime(node.reached, ns=(atime, attr.st_mtime_ns if fields.update_mtime else st.st_mtime_ns))
        return self._attributes(node)

    # --- names ---

    @operation
    async def mkdir(self, parent: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        above, text = self._nodes[parent], os.fsdecode(name)
        os.mkdir(text, mode & 0o7777, dir_fd=above.fd)
        os.chown(text, ctx.uid, ctx.gid, dir_fd=above.fd)
        return self._counted(self._find(above, text))

    @operation
    async def unlink(self, parent: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        os.unlink(name, dir_fd=self._nodes[parent].fd)

    @operation
    async def rmdir(self, parent: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        os.rmdir(name, dir_fd=self._nodes[parent].fd)

    @operation
    async def rename(
        self, old_parent: InodeT, old: FileNameT, new_parent: InodeT, new: FileNameT, flags: FlagT, ctx: RequestContext
    ) -> None:
        if flags:
            raise OSError(22, "EINVAL")
        above, below = self._nodes[old_parent], self._nodes[new_parent]
        os.rename(old, new, src_dir_fd=above.fd, dst_dir_fd=below.fd)
        self._find(below, os.fsdecode(new))  # has its new path from here

    # --- files ---

    def _hold(self, handle: Handle) -> FileHandleT:
        self._last_handle += 1
        self._handles[self._last_handle] = handle
        return FileHandleT(self._last_handle)

    def _opened(self, node: Node, fd: int) -> FileInfo:
        return FileInfo(fh=self._hold(Handle(fd, node)), direct_io=self.settings.direct_io, keep_cache=False)

    @operation
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._nodes[inode]
        return self._opened(node, os.open(node.reached, flags & ~_FLAGS_LEFT_OUT))

    @operation
    async def create(
        self, parent: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        above, text = self._nodes[parent], os.fsdecode(name)
        fd = os.open(text, flags & ~os.O_APPEND & ~os.O_DIRECT | os.O_CREAT, mode & 0o7777, dir_fd=above.fd)
        os.fchown(fd, ctx.uid, ctx.gid)
        node = self._find(above, text)
        return self._opened(node, fd), self._counted(node)

    @operation
    async def read(self, fh: FileHandleT, offset: int, size: int) -> bytes:
        handle = self._handles[fh]
        return os.pread(handle.fd, self.faults.shortened(size, handle.node.path), offset)

    @operation
    async def write(self, fh: FileHandleT, offset: int, data: bytes) -> int:
        return os.pwrite(self._handles[fh].fd, data, offset)

    @operation
    async def flush(self, fh: FileHandleT) -> None:
        os.close(os.dup(self._handles[fh].fd))

    @operation
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        os.fsync(self._handles[fh].fd)

    @operation
    async def release(self, fh: FileHandleT) -> None:
        os.close(self._handles.pop(fh).fd)

    # --- directories ---

    @operation
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return self._hold(Handle(-1, self._nodes[inode]))

    @operation
    async def readdir(self, fh: FileHandleT, start: int, token: ReaddirToken) -> None:
        handle = self._handles[fh]
        if start == 0:
            handle.names = os.listdir(handle.node.reached)
        for position, name in enumerate(handle.names[start:], start + 1):
            try:
                node = self._find(handle.node, name)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, FileNameT(os.fsencode(name)), self._attributes(node), position):
                return
            node.lookups += 1

    @operation
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._handles[fh]

    @operation
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        st, data = os.fstatvfs(self._nodes[pyfuse3.ROOT_INODE].fd), StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(st, name))
        data.f_namemax = st.f_namemax
        return data


def _key(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name
