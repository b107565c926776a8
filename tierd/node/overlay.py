"""The overlay: what each file system call means, over a source directory. Knows neither pyfuse3 nor the kernel.

Methods take and return plain data and raise OSError; `fuse.py` adapts them to the kernel, tests call them directly.
Here are names, attributes and directories. Open files are in `files.py`, what an open means in `opens.py`, and how an
inode is reached in `reach.py`, whose contract holds here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from tierd.node.attributes import unlinked
from tierd.node.cold_source import Cold
from tierd.node.estate import Said
from tierd.node.handles import DirHandle, FileHandle
from tierd.node.inodes import Node
from tierd.node.ledger import HANDLE, ROOT_ID, HandleRecord
from tierd.node.once import Inode
from tierd.node.opens import PASSTHROUGH_BYTES_MIN, Opens, owner_of, reads_copy
from tierd.node.reach import YOUNG_SECONDS, Caller, Entry, of_source
from tierd.node.recall_bounds import UNKNOWN_USER
from tierd.node.sources import ACL_NAMES, Change, Changes, Moved, Ref
from tierd.stubs import Origin
from tierd.syscalls import RENAME_EXCHANGE

_READDIR_BATCH_MAX = 512
_DOTS = (b".", b"..")
_LABELS = b"security."
"""Attributes that do not pass: labels and file capabilities mean nothing on a mount without suid."""


class Overlay(Opens):
    """See the module. Arguments are those of `ColdFiles`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.listings: dict[int, DirHandle] = {}

    # --- names ---

    async def lookup(self, parent_id: int, name: bytes, pid: int = 0) -> Entry:
        """Find a name; counts one lookup."""
        parent = self.inodes.get(parent_id)
        if self.second_tries.awaits(pid):
            return await self._lookup_again(parent, name, pid)
        st = await self.patience.ask(self._lstat, parent, name)
        if st is None:
            known = self.inodes.named(parent, name)
            if known is not None and known.attributes is not None:
                known.lookups += 1
                return Entry(known.id, known.attributes)
            st = await self._lstat(parent, name)
        node = self._count(parent, name, st)
        self._remember(node, st)
        return Entry(node.id, st)

    async def _lookup_again(self, parent: Node, name: bytes, pid: int) -> Entry:
        """The thread's open was sent back, and opens next what this finds: then, whatever happens to the name."""
        async with self.dirs.hold(parent) as dir_fd:
            st, fd = await self._run(self.source.lstat_and_open, dir_fd, name)
        node = self._count(parent, name, st)
        self._remember(node, st)
        if self._is_young(node):  # it was kept free for this thread's open, which comes only now
            node.young_until = trio.current_time() + YOUNG_SECONDS
        if fd is not None:
            self.second_tries.keep(pid, node.id, fd)
        return Entry(node.id, st)

    async def _lstat(self, parent: Node, name: bytes) -> os.stat_result:
        async with self.dirs.hold(parent) as dir_fd:
            return await self._run(self.source.lstat, dir_fd, name)

    def _remember(self, node: Node, st: os.stat_result) -> None:
        """What may be asked for while the source is away: directories, and files that have a copy or may soon have."""
        wanted = stat.S_ISDIR(st.st_mode) or st.st_size >= PASSTHROUGH_BYTES_MIN
        if self._tier is not None and (wanted or self._tier.find(node.key) is not None):
            self.inodes.remember(node, st)

    def forget(self, node_id: int, count: int) -> None:
        """The kernel forgot `count` lookups, or was never told of them. Never raises. (The seam writes it down.)"""
        with suppress(OSError):
            self._withdraw_if_last(self.inodes.get(node_id), count)
        node = self.inodes.forget(node_id, count)
        if node is not None:
            self.dirs.drop(node)

    def _withdraw_if_last(self, node: Node, count: int) -> None:
        """Before the node goes: a pump may be about to give the kernel one more lookup of it."""
        self.take_events()
        if node.lookups <= count:
            self._withdraw(node)

    async def getattr(self, node_id: int) -> Entry:
        """Attributes of a node. If all its names are gone and only a copy is open, those it had when it was opened; if
        the source does not answer, those seen last."""
        node = self.inodes.get(node_id)
        try:
            if node.attributes is None:
                st = await self._on_node(node, self.source.stat)
            else:
                st = await self.patience.ask(self._on_node, node, self.source.stat) or node.attributes
        except Moved:
            for handle in node.handles or ():
                if isinstance(handle, FileHandle) and handle.attributes is not None:
                    return Entry(node_id, unlinked(handle.attributes))
            raise
        self._remember(node, st)
        return Entry(node_id, st, lasting=not node.retired)

    async def setattr(
        self, node_id: int, changes: Changes, fh: int | None, unique: int = 0, uid: int = UNKNOWN_USER
    ) -> Entry:
        """chmod, chown, truncate and utimens in one."""
        node = self.inodes.get(node_id)
        handle = self.files.get(fh) if fh is not None else None
        if handle is None or not handle.writable:
            try:
                change = await self._on_node(node, self._setattr_blocking, changes, None, unique)
            except Cold as cold:
                await self._brought(cold, uid)
        else:
            with self._using(handle):
                ref = Ref(handle.fd, None, node.key)
                change = await self._run(self._setattr_blocking, ref, changes, handle.fd, unique)
        if changes.size is not None and reads_copy(node) and not node.retired:
            self._retire(node, young_until=trio.current_time() + YOUNG_SECONDS)  # its readers keep their bytes
        else:
            self._carry(node, change)
        self._remember(node, change.after)
        if node.retired:
            await self._tell_successor(node, change)
        return Entry(node_id, change.after, lasting=not node.retired)

    async def _tell_successor(self, node: Node, change: Change) -> None:
        """A file was changed by a name that the kernel knows as a retired node: its live one has new attributes too."""
        live = self.inodes.by_key(node.key)
        if live is not None:
            self._carry(live, change)
            await self._run(self._reads.attributes_changed, live.id)

    def _setattr_blocking(self, ref: Ref, changes: Changes, fd: int | None, unique: int) -> Change:
        if changes.size is None:
            return self.source.setattr(ref, changes, fd)

        def perform(truncating: bool) -> Change:
            return self.source.setattr(ref, changes if truncating else replace(changes, size=None), fd)

        return self.once.truncate(unique, changes.size, lambda: self.source.stat(ref), perform)

    async def readlink(self, node_id: int) -> bytes:
        """The target of a symbolic link."""
        return await self._on_node(self.inodes.get(node_id), self.source.readlink)

    async def mknod(self, parent_id: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """Make a file, FIFO, socket or device node that belongs to the caller."""
        return await self._make(parent_id, name, caller, self.source.mknod, mode, rdev)

    async def mkdir(self, parent_id: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory that belongs to the caller."""
        return await self._make(parent_id, name, caller, self.source.mkdir, mode)

    async def symlink(self, parent_id: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symbolic link that belongs to the caller."""
        return await self._make(parent_id, name, caller, self.source.symlink, target)

    async def _make(
        self, parent_id: int, name: bytes, caller: Caller, function: Callable[..., os.stat_result], *args: Any
    ) -> Entry:
        def make(dir_fd: int) -> os.stat_result:
            return self.once.make(
                caller.unique,
                lambda: self.source.lstat(dir_fd, name),
                lambda: function(dir_fd, name, *args, owner_of(caller)),
                lambda st: st,
            )

        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            st = await self._run(make, dir_fd)
        return self._seen(parent, name, st)

    async def link(self, node_id: int, parent_id: int, name: bytes, unique: int = 0) -> Entry:
        """One more name for a node."""
        node, parent = self.inodes.get(node_id), self.inodes.get(parent_id)

        def link(ref: Ref, dir_fd: int) -> Change:
            return self.once.make(
                unique,
                lambda: self.source.stat(Ref(dir_fd, name, node.key)),
                lambda: self.source.link(ref, dir_fd, name),
                lambda st: Change(st, st),
            )

        async with self.dirs.hold(parent) as dir_fd:
            change = await self._on_node(node, link, dir_fd)
        self._carry(node, change)
        if node.retired:
            await self._tell_successor(node, change)
        return self._seen(parent, name, change.after)

    async def unlink(self, parent_id: int, name: bytes, unique: int = 0) -> None:
        """Remove a name; open descriptors keep the file."""
        parent = self.inodes.get(parent_id)
        ended: list[Origin] = []
        await self._remove(parent_id, name, partial(self.source.unlink, ended=ended.append), unique)
        self._note_name(parent, name, removed=True, ended=ended[0] if ended else None)

    async def rmdir(self, parent_id: int, name: bytes, unique: int = 0) -> None:
        """Remove an empty directory."""
        await self._remove(parent_id, name, self.source.rmdir, unique)

    async def _remove(self, parent_id: int, name: bytes, function: Callable[..., Change], unique: int) -> None:
        def remove(dir_fd: int) -> Change | Inode:
            return self.once.remove(
                unique,
                lambda: self.source.lstat(dir_fd, name),
                lambda about: function(dir_fd, name, about),
            )

        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            done = await self._run(remove, dir_fd)
        node = self._changed(done)
        if node is not None:
            self._withdraw(node)
            self.inodes.drop_name(node, parent, name)
            self._let_go(node)
            await self._tell_of_links(node)

    async def _tell_of_links(self, node: Node) -> None:
        """The name that went may have been a retired node's in the kernel, which then counts links in that alone."""
        if self.inodes.has_retired(node.key):
            await self._run(self._reads.attributes_changed, node.id)

    def _let_go(self, node: Node) -> None:
        """Once an inode has no name and is held by no open file, the source gives its number to another file."""
        if node.parent is None and node.handles and of_source(node) is None and not node.retired:
            self._retire(node, young_until=0.0)

    def _changed(self, change: Change | Inode) -> Node | None:
        """The node of an inode that we changed ourselves, now or before a restart, if the kernel knows it."""
        if isinstance(change, Inode):
            return self.inodes.by_key(change.key)
        node = self.inodes.by_key(self.source.key(change.before))
        if node is not None:
            self._carry(node, change)
        return node

    async def rename(
        self, old_parent_id: int, old: bytes, new_parent_id: int, new: bytes, flags: int, unique: int = 0
    ) -> None:
        """renameat2(2) with its flags, where the source supports them."""
        old_parent, new_parent = self.inodes.get(old_parent_id), self.inodes.get(new_parent_id)

        def rename(old_fd: int, new_fd: int) -> tuple[Change | Inode, Change | Inode | None]:
            return self.once.rename(
                unique,
                lambda: (self.source.lstat_many(old_fd, [old])[0], self.source.lstat_many(new_fd, [new])[0]),
                lambda about: self.source.rename(old_fd, old, new_fd, new, flags, about),
            )

        async with self.dirs.hold(old_parent) as old_fd, self.dirs.hold(new_parent) as new_fd:
            moved, replaced = await self._run(rename, old_fd, new_fd)
        node, other = self._changed(moved), self._changed(replaced) if replaced else None
        self._note_name(new_parent, new, removed=False)
        if node is not None and node is other:
            return
        for changed in (node, other):
            if changed is not None:
                self._withdraw(changed)
        if other is not None:
            self.inodes.drop_name(other, new_parent, new)
        if node is not None:
            self.inodes.drop_name(node, old_parent, old)
            self.inodes.add_name(node, new_parent, new)
        if other is not None and flags & RENAME_EXCHANGE:
            self.inodes.add_name(other, old_parent, old)
        if other is not None:
            self._let_go(other)
            await self._tell_of_links(other)

    def _note_name(self, parent: Node, name: bytes, *, removed: bool, ended: Origin | None = None) -> None:
        """A name in a directory was removed, or is now that of a file from elsewhere."""
        with suppress(Moved):  # the directory went: so did its names
            above = self.inodes.path(parent)
            path = above + b"/" + name if above else name
            if removed:
                self.output_notes.removed(path, self._now_ns(), ended)
            else:
                self.output_notes.written(path, self._now_ns())

    # --- directories ---

    async def opendir(self, node_id: int) -> int:
        """Open a directory for listing."""
        node, fh = self.inodes.get(node_id), self._fh()
        fd = await self._on_node(node, self.source.open_dir)
        self._holder.hold(fh, fd)
        self.listings[fh] = DirHandle(fh, node, fd)
        self.ledger.append(HANDLE, HandleRecord(fh, node.id, True, False, False, False, b"", None).pack())
        return fh

    async def readdir(self, fh: int, start: int, reply: Callable[[bytes, os.stat_result, int, int], bool]) -> None:
        """Give entries from position `start` to `reply(name, attributes, node_id, next_position)` until it is full.

        `reply` returns False, and counts no lookup, for the entry that did not fit. Attributes are read in
        this call, never carried over from an earlier one: the kernel drops replies older than a write, but
        only if they were asked for before it.
        """
        handle = self._listing(fh)
        if start == 0 or not handle.names:
            handle.names = [*_DOTS, *sorted(await self._run(self.source.list_names, handle.fd))]
            self._catch_up(handle, start)
        position = start
        while position < len(handle.names):
            names = handle.names[position : position + handle.reply_size]
            found = await self._run(self.source.lstat_many, handle.fd, names)
            for name, st in zip(names, found, strict=True):
                position += 1
                if st is not None and not self._reply_entry(handle.node, name, st, position, reply):
                    handle.reply_size = max(8, min(_READDIR_BATCH_MAX, position - start + 1))
                    self._told_up_to(handle, position - 1)
                    return
        self._told_up_to(handle, position)

    def _told_up_to(self, handle: DirHandle, position: int) -> None:
        if position > 0:
            self.ledger.listed(handle.fh, position, handle.names[position - 1])

    def _catch_up(self, handle: DirHandle, start: int) -> None:
        """A listing that another daemon began goes on after the name that it ended with, whatever came and went."""
        last = handle.told.get(start)
        if last in _DOTS:  # the first two, whatever the order
            handle.names = [b""] * start + handle.names[_DOTS.index(last) + 1 :]
        elif last is not None:
            handle.names = [b""] * start + [name for name in handle.names[2:] if name > last]

    def _reply_entry(
        self,
        parent: Node,
        name: bytes,
        st: os.stat_result,
        position: int,
        reply: Callable[[bytes, os.stat_result, int, int], bool],
    ) -> bool:
        if name in _DOTS:
            node = parent if name == b"." else (parent.parent or parent)
            return reply(name, st, node.id, position)
        node = self._count(parent, name, st)
        if reply(name, st, node.id, position):
            return True
        self.forget(node.id, 1)
        return False

    async def releasedir(self, fh: int) -> None:
        """Close a listing. The daemon before this one may have been told to already."""
        handle = self.listings.pop(fh, None)
        if handle is None:
            return
        self.ledger.closed(fh)
        self._holder.drop(fh)
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

    async def removexattr(self, node_id: int, name: bytes, unique: int = 0) -> None:
        """Remove an extended attribute."""
        self._refuse_xattr(name)
        node = self.inodes.get(node_id)

        def remove(ref: Ref) -> Change | None:
            return self.once.unset(unique, lambda: self.source.removexattr(ref, name), lambda: None)

        change = await self._on_node(node, remove)
        if change is not None:
            self._carry(node, change)

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

    async def take_back(self, said: Said) -> None:
        """The kernel was never told of these lookups and this handle, and asks again."""
        for node_id in said.node_ids:
            self.forget(node_id, 1)
        with suppress(OSError):
            await (self.releasedir if said.fh in self.listings else self.release)(said.fh)

    def check(self) -> None:
        """Assert the invariants that the parts declare; for tests."""
        self.inodes.check()
        assert self.inodes.get(ROOT_ID) is self.inodes.root
        for handle in self.files.values():
            assert handle in (handle.node.handles or ())
