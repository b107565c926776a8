"""The overlay: what each file system call means, over a source directory. Knows neither pyfuse3 nor the kernel.

Methods take and return plain data and raise OSError; `fuse.py` adapts them to the kernel, tests call
them directly. Blocking calls run in worker threads: metadata and data have limits of their own, so
slow reads cannot starve `stat`.

Contract: all state belongs to the trio thread. After every `await` a node may have been renamed,
retired or forgotten; so replies are built from what the source just said, never from what was
remembered. Names are found through directory descriptors, inodes through any name or open handle
that still leads to them (`_on_node`).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, TypeVarTuple

import trio

from tierd.node.caller import pod_of
from tierd.node.handles import DirCache, DirHandle, FileHandle, Handle
from tierd.node.inodes import ROOT_ID, InodeTable, Node, pack
from tierd.node.journal import Closed, Journal, Opened
from tierd.node.seam import ReadTarget
from tierd.node.sources import (
    ACL_NAMES,
    Change,
    Changes,
    Creator,
    Moved,
    PosixSource,
    Ref,
    Version,
    flush,
    forced_version,
    read_at,
    version_of,
    write_at,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_METADATA_THREADS = 16
_DATA_THREADS = 16
_YOUNG_SECONDS = 2.0
"""How long a node that replaced a retired one is not itself retired: the kernel looks a name up again only
once per open (open(2) fails with ESTALE the second time), so a file that changes all the time must settle."""
_PASSTHROUGH_BYTES_MIN = 128 * 1024
"""Smaller files are served by the daemon: a single READ, and lock files keep one inode for readers and writers."""
_READDIR_BATCH_MAX = 512
_LABELS = b"security."
"""Attributes that do not pass: labels and file capabilities mean nothing on a mount without suid."""


class Caller(NamedTuple):
    """Who sent a request."""

    uid: int
    gid: int
    pid: int


class Entry(NamedTuple):
    """A node and its attributes, as a reply with an entry carries them."""

    node_id: int
    attributes: os.stat_result


class OpenedFile(NamedTuple):
    """The answer to an open. `keep_cache` is False if cached pages of the node must go."""

    fh: int
    keep_cache: bool


class ReadPath(Protocol):
    """Answers READs of a handle outside of the event loop; the overlay says from which descriptor, and until when."""

    def serve_reads(self, fh: int, target: ReadTarget) -> None:
        """From now on."""

    def stop_reads(self, fh: int) -> None:
        """The handle was released."""

    def attributes_changed(self, node_id: int) -> None:
        """The kernel must ask for the attributes again, its size above all. May block."""

    def back(self, node_id: int, fd: int) -> int | None:
        """A passthrough backing for one more open of a node; None if there shall be none."""

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The open that returns `fh` uses this backing."""

    def unback(self, node_id: int) -> None:
        """One open with a backing fewer."""


class Overlay:
    """See the module.

    `event_dropped` is called when the journal was full; `now_ns` is the wall clock accesses are recorded with.
    """

    def __init__(
        self,
        source: PosixSource,
        journal: Journal,
        reads: ReadPath,
        *,
        event_dropped: Callable[[], None],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.source = source
        self.journal = journal
        self._reads = reads
        self._now_ns = now_ns
        self.inodes = InodeTable(source.key(os.fstat(source.root_fd)))
        self.metadata_limit = trio.CapacityLimiter(_METADATA_THREADS)
        self.data_limit = trio.CapacityLimiter(_DATA_THREADS)
        self.dirs = DirCache(source, self.inodes, self._run)
        self.files: dict[int, FileHandle] = {}
        self.listings: dict[int, DirHandle] = {}
        self._next_fh = 1
        self.retired = 0
        """Nodes retired because their content changed beneath the mount."""
        self._event_dropped = event_dropped

    # --- running blocking calls ---

    async def _run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self.metadata_limit, abandon_on_cancel=True)

    async def _run_data(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self.data_limit, abandon_on_cancel=True)

    async def _on_node(self, node: Node, function: Callable[..., T], *args: Any) -> T:
        """Run `function(ref, *args)` on the inode, through an open handle or the first name that still means it."""
        return await (self._by_handle if node.handles else self._by_name)(node, function, *args)

    async def _by_handle(self, node: Node, function: Callable[..., T], *args: Any) -> T:
        assert node.handles
        handle = node.handles[-1]
        with self._using(handle):
            return await self._run(function, Ref(handle.fd, None, node.key), *args)

    async def _by_name(self, node: Node, function: Callable[..., T], *args: Any) -> T:
        if node is self.inodes.root:
            return await self._run(function, Ref(self.source.root_fd, None, node.key), *args)
        while node.parent is not None:
            parent, name = node.parent, node.name
            try:
                async with self.dirs.hold(parent) as dir_fd:
                    return await self._run(function, Ref(dir_fd, name, node.key), *args)
            except Moved:
                self.inodes.drop_name(node, parent, name)
        raise Moved

    @contextmanager
    def _using(self, handle: Handle) -> Iterator[None]:
        handle.uses += 1
        try:
            yield
        finally:
            handle.uses -= 1
            if handle.closing and handle.uses == 0:
                os.close(handle.fd)

    # --- names ---

    async def lookup(self, parent_id: int, name: bytes) -> Entry:
        """Find a name; counts one lookup."""
        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            st = await self._run(self.source.lstat, dir_fd, name)
        return self._seen(parent, name, st)

    def _seen(self, parent: Node, name: bytes, st: os.stat_result) -> Entry:
        return Entry(self._count(parent, name, st).id, st)

    def _count(self, parent: Node, name: bytes, st: os.stat_result) -> Node:
        key, version = self.source.key(st), pack(version_of(st))
        known = self.inodes.by_key(key)
        if known is not None and not known.handles and known.version not in (None, version):
            self._expect_change(known, st)
        node = self.inodes.seen(parent, name, key)
        if node.version is None:
            node.version = version
        return node

    def _expect_change(self, node: Node, st: os.stat_result) -> None:
        """A file changed while nobody had it open, or another one got its inode number.

        The open that follows may have been sent back once already, so it must find a node that settles. (If it
        was only the source's attribute cache that is behind, that open will see so.)
        """
        if stat.S_ISREG(st.st_mode):
            node.young_until = trio.current_time() + _YOUNG_SECONDS

    def forget(self, node_id: int, count: int) -> None:
        """The kernel forgot `count` lookups. Never raises."""
        node = self.inodes.forget(node_id, count)
        if node is not None:
            self.dirs.drop(node)

    async def getattr(self, node_id: int) -> Entry:
        """Attributes of a node."""
        return Entry(node_id, await self._on_node(self.inodes.get(node_id), self.source.stat))

    async def setattr(self, node_id: int, changes: Changes, fh: int | None) -> Entry:
        """chmod, chown, truncate and utimens in one."""
        node = self.inodes.get(node_id)
        handle = self.files.get(fh) if fh is not None else None
        if handle is None or not handle.writable:
            change = await self._on_node(node, self.source.setattr, changes, None)
        else:
            with self._using(handle):
                ref = Ref(handle.fd, None, node.key)
                change = await self._run(self.source.setattr, ref, changes, handle.fd)
        self._carry(node, change)
        return Entry(node_id, change.after)

    def _carry(self, node: Node, change: Change) -> None:
        """Our own change is no reason to retire a node that was current before it."""
        if node.version == pack(version_of(change.before)):
            node.version = pack(version_of(change.after))

    async def readlink(self, node_id: int) -> bytes:
        """The target of a symbolic link."""
        return await self._on_node(self.inodes.get(node_id), self.source.readlink)

    async def mknod(self, parent_id: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """Make a file, FIFO, socket or device node that belongs to the caller."""
        return await self._make(parent_id, name, self.source.mknod, mode, rdev, _owner(caller))

    async def mkdir(self, parent_id: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory that belongs to the caller."""
        return await self._make(parent_id, name, self.source.mkdir, mode, _owner(caller))

    async def symlink(self, parent_id: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symbolic link that belongs to the caller."""
        return await self._make(parent_id, name, self.source.symlink, target, _owner(caller))

    async def _make(self, parent_id: int, name: bytes, function: Callable[..., os.stat_result], *args: Any) -> Entry:
        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            st = await self._run(function, dir_fd, name, *args)
        return self._seen(parent, name, st)

    async def link(self, node_id: int, parent_id: int, name: bytes) -> Entry:
        """One more name for a node."""
        node, parent = self.inodes.get(node_id), self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            change = await self._on_node(node, self.source.link, dir_fd, name)
        self._carry(node, change)
        return self._seen(parent, name, change.after)

    async def unlink(self, parent_id: int, name: bytes) -> None:
        """Remove a name; open descriptors keep the file."""
        await self._remove(parent_id, name, self.source.unlink)

    async def rmdir(self, parent_id: int, name: bytes) -> None:
        """Remove an empty directory."""
        await self._remove(parent_id, name, self.source.rmdir)

    async def _remove(self, parent_id: int, name: bytes, function: Callable[[int, bytes], Change]) -> None:
        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            change = await self._run(function, dir_fd, name)
        node = self._changed(change)
        if node is not None:
            self.inodes.drop_name(node, parent, name)

    def _changed(self, change: Change) -> Node | None:
        """The node of an inode that we changed ourselves, if the kernel knows it."""
        node = self.inodes.by_key(self.source.key(change.before))
        if node is not None:
            self._carry(node, change)
        return node

    async def rename(self, old_parent_id: int, old: bytes, new_parent_id: int, new: bytes, flags: int) -> None:
        """renameat2(2) with its flags, where the source supports them."""
        old_parent, new_parent = self.inodes.get(old_parent_id), self.inodes.get(new_parent_id)
        async with self.dirs.hold(old_parent) as old_fd, self.dirs.hold(new_parent) as new_fd:
            moved, replaced = await self._run(self.source.rename, old_fd, old, new_fd, new, flags)
        node, other = self._changed(moved), self._changed(replaced) if replaced else None
        if node is not None and node is other:
            return
        if other is not None:
            self.inodes.drop_name(other, new_parent, new)
        if node is not None:
            self.inodes.drop_name(node, old_parent, old)
            self.inodes.add_name(node, new_parent, new)
        if other is not None and flags & _RENAME_EXCHANGE:
            self.inodes.add_name(other, old_parent, old)

    # --- files ---

    async def open(self, node_id: int, flags: int, caller: Caller) -> OpenedFile:
        """Open a file. Raises ESTALE when the content changed beneath: the kernel then looks the name up again.

        The name is asked even if the inode is open already: it may mean another file by now.
        """
        node = self.inodes.get(node_id)
        unlinked = node.parent is None and node.handles
        reach = self._by_handle if unlinked else self._by_name
        fd, version, pod = await reach(node, self._open_blocking, flags, caller.pid)
        packed = pack(version)
        changed = node.version not in (None, packed) and not flags & os.O_TRUNC and not node.dirty
        if changed and (node.retired or self._is_young(node)):
            await self._run(self._reads.attributes_changed, node_id)
        elif changed or self._excluded(node, flags):
            await self._send_back(node, fd)
        if self._excluded(node, flags):  # it may have become so while we waited
            await self._send_back(node, fd)
        if not node.dirty or flags & os.O_TRUNC:
            node.version = packed
        handle = self._new_handle(node, fd, flags, caller.uid, pod)
        large = version.size >= _PASSTHROUGH_BYTES_MIN
        if node.backed or (large and not node.retired and not self._is_young(node)):
            self._pass_through(handle)
        return OpenedFile(handle.fh, not changed)

    def _is_young(self, node: Node) -> bool:
        return trio.current_time() < node.young_until

    def _excluded(self, node: Node, flags: int) -> bool:
        """The kernel serves the node by itself, and allows no writer beside that."""
        return node.backed > 0 and flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY

    async def _send_back(self, node: Node, fd: int) -> NoReturn:
        """Have the kernel look the name up again and open the new node that this returns."""
        if not node.retired:
            self._retire(node)
        await self._run(os.close, fd)
        raise Moved

    def _open_blocking(self, ref: Ref, flags: int, pid: int) -> tuple[int, Version, str | None]:
        fd, version = self.source.open(ref, flags)
        return fd, version, pod_of(pid)

    def _pass_through(self, handle: FileHandle) -> None:
        """Let the kernel read the source by itself, if no open of this node is served in the other mode.

        Not for young nodes: the kernel asks again only once per open, so whoever was just sent to a new
        node to write must find it free for writing.
        """
        node = handle.node
        if handle.writable or (not node.backed and len(node.handles or ()) > 1):
            return
        backing_id = self._reads.back(node.id, handle.fd)
        if backing_id is not None:
            node.backed += 1
            handle.backed = True
            self._reads.pass_through(handle.fh, backing_id)

    def _retire(self, node: Node) -> None:
        self.inodes.retire(node, trio.current_time() + _YOUNG_SECONDS)
        self.retired += 1

    def _new_handle(self, node: Node, fd: int, flags: int, uid: int, pod: str | None) -> FileHandle:
        access = flags & os.O_ACCMODE
        handle = FileHandle(self._fh(), node, fd, access != os.O_RDONLY)
        self.files[handle.fh] = handle
        self._reads.serve_reads(handle.fh, handle.target)
        if access != os.O_WRONLY:
            self._record_open(handle, uid, pod)
        return handle

    def _record_open(self, handle: FileHandle, uid: int, pod: str | None) -> None:
        try:
            path = self.inodes.path(handle.node)
        except Moved:
            return
        if self.journal.opened(Opened(handle.fh, path, self._now_ns(), uid, pod)):
            handle.recorded_path = path
        else:
            self._event_dropped()

    def _fh(self) -> int:
        self._next_fh += 1
        return self._next_fh

    async def create(
        self, parent_id: int, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[OpenedFile, Entry]:
        """Create and open. If somebody else was faster and the caller allows it, the kernel opens that file instead.

        That is asked for with ESTALE, so that the kernel checks the caller's permission on it first.
        """
        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            try:
                fd, st, version, pod = await self._run(self._create_blocking, dir_fd, name, flags, mode, caller)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                raise Moved from None
        node = self._count(parent, name, st)
        node.version = pack(version)
        return OpenedFile(self._new_handle(node, fd, flags, caller.uid, pod).fh, True), Entry(node.id, st)

    def _create_blocking(
        self, dir_fd: int, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[int, os.stat_result, Version, str | None]:
        return *self.source.create(dir_fd, name, flags, mode, _owner(caller)), pod_of(caller.pid)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        """Bytes at `offset`, fewer than `size` only at the end of the file."""
        handle = self._file(fh)
        data = await self._run_data(read_at, handle.fd, size, offset)
        handle.target.bytes_read += len(data)
        return data

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """Write at `offset`; how many bytes reached the source."""
        handle = self._file(fh)
        if not handle.dirty:
            handle.dirty = True
            handle.node.dirty += 1
        return await self._run_data(write_at, handle.fd, data, offset)

    async def flush(self, fh: int) -> None:
        """A descriptor was closed: report errors of delayed writes, and make them visible to other mounts."""
        handle = self._file(fh)
        if handle.writable:
            await self._run_data(flush, handle.fd)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make written data durable on the source."""
        await self._run_data(os.fdatasync if datasync else os.fsync, self._file(fh).fd)

    async def release(self, fh: int) -> None:
        """The last descriptor of an open was closed."""
        handle = self.files.pop(fh)
        self._reads.stop_reads(fh)
        if handle.backed:
            handle.node.backed -= 1
            self._reads.unback(handle.node.id)
        node = handle.node
        version = await self._run_data(_final_version, handle.fd) if handle.dirty else None
        handle.leave()
        if handle.dirty:
            node.dirty -= 1
            if node.dirty == 0:
                node.version = pack(version) if version is not None else None
        if handle.recorded_path is not None:
            self.journal.closed(Closed(fh, handle.recorded_path, self._now_ns(), handle.target.bytes_read))
        handle.closing = True
        if handle.uses == 0:
            await self._run_data(os.close, handle.fd)

    def _file(self, fh: int) -> FileHandle:
        handle = self.files.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    # --- directories ---

    async def opendir(self, node_id: int) -> int:
        """Open a directory for listing."""
        node = self.inodes.get(node_id)
        fd = await self._on_node(node, self.source.open_dir)
        handle = DirHandle(self._fh(), node, fd)
        self.listings[handle.fh] = handle
        return handle.fh

    async def readdir(self, fh: int, start: int, reply: Callable[[bytes, os.stat_result, int, int], bool]) -> None:
        """Give entries from position `start` to `reply(name, attributes, node_id, next_position)` until it is full.

        `reply` returns False, and counts no lookup, for the entry that did not fit. Attributes are read in
        this call, never carried over from an earlier one: the kernel drops replies older than a write, but
        only if they were asked for before it.
        """
        handle = self._listing(fh)
        if start == 0:
            handle.names = [b".", b"..", *await self._run(self.source.list_names, handle.fd)]
        position = start
        while position < len(handle.names):
            names = handle.names[position : position + handle.reply_size]
            found = await self._run(self.source.lstat_many, handle.fd, names)
            for name, st in zip(names, found, strict=True):
                position += 1
                if st is not None and not self._reply_entry(handle.node, name, st, position, reply):
                    handle.reply_size = max(8, min(_READDIR_BATCH_MAX, position - start + 1))
                    return

    def _reply_entry(
        self,
        parent: Node,
        name: bytes,
        st: os.stat_result,
        position: int,
        reply: Callable[[bytes, os.stat_result, int, int], bool],
    ) -> bool:
        if name in (b".", b".."):
            node = parent if name == b"." else (parent.parent or parent)
            return reply(name, st, node.id, position)
        node = self._count(parent, name, st)
        if reply(name, st, node.id, position):
            return True
        self.forget(node.id, 1)
        return False

    async def releasedir(self, fh: int) -> None:
        """Close a listing."""
        handle = self.listings.pop(fh)
        handle.leave()
        handle.closing = True
        if handle.uses == 0:
            await self._run(os.close, handle.fd)

    async def fsyncdir(self, fh: int) -> None:
        """Make names in a directory durable on the source."""
        await self._run_data(os.fsync, self._listing(fh).fd)

    def _listing(self, fh: int) -> DirHandle:
        handle = self.listings.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    # --- the rest ---

    async def getxattr(self, node_id: int, name: bytes) -> bytes:
        """Value of an extended attribute."""
        self._refuse_xattr(name)
        return await self._on_node(self.inodes.get(node_id), self.source.getxattr, name)

    async def listxattr(self, node_id: int) -> list[bytes]:
        """Names of the extended attributes."""
        self._refuse_xattr(b"")
        names = await self._on_node(self.inodes.get(node_id), self.source.listxattr)
        return [name for name in names if not name.startswith(_LABELS)]

    async def setxattr(self, node_id: int, name: bytes, value: bytes) -> None:
        """Set an extended attribute."""
        self._refuse_xattr(name)
        node = self.inodes.get(node_id)
        self._carry(node, await self._on_node(node, self.source.setxattr, name, value))

    async def removexattr(self, node_id: int, name: bytes) -> None:
        """Remove an extended attribute."""
        self._refuse_xattr(name)
        node = self.inodes.get(node_id)
        self._carry(node, await self._on_node(node, self.source.removexattr, name))

    def _refuse_xattr(self, name: bytes) -> None:
        """What needs no question to the source, because the kernel asks it before every write and `ls` for every file.

        ENOSYS makes the kernel stop asking for the life of the mount, and answer EOPNOTSUPP by itself.
        """
        if not self.source.xattrs:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if name.startswith(_LABELS) or (name in ACL_NAMES and not self.source.acls):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    async def statfs(self) -> os.statvfs_result:
        """Size and free space of the source."""
        return await self._run(self.source.statvfs)

    def check(self) -> None:
        """Assert the invariants that the parts declare; for tests."""
        self.inodes.check()
        assert self.inodes.get(ROOT_ID) is self.inodes.root
        for handle in self.files.values():
            assert handle in (handle.node.handles or ())


_RENAME_EXCHANGE = 2


def _owner(caller: Caller) -> Creator:
    return Creator(caller.uid, caller.gid)


def _final_version(fd: int) -> Version | None:
    """The version that a writer leaves behind; None if the source does not say, then the next open adopts it."""
    try:
        return forced_version(fd)
    except OSError:
        return None
