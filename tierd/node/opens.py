"""What an open means, and from where its bytes come.

The first open of a node fixes both, and the kernel allows no mix (DESIGN.md, "The kernel's rule"): bytes of the node
tier's copy or of the source, moved by the kernel (passthrough) or by the daemon; a file on its way into the node
tier is served by the daemon as it lands. An open that needs anything else is answered ESTALE, and the kernel looks the
name up again and gets a new node. Reads never need that twice for one open; see `YOUNG_SECONDS` and `retries.py`.
"""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple, NoReturn

import trio

from tierd.node.caller import pod_of
from tierd.node.cold_files import ColdFiles
from tierd.node.cold_source import Cold
from tierd.node.fill import Fill
from tierd.node.handles import FileHandle, close_soon
from tierd.node.inodes import Node, pack, same_content, unpack
from tierd.node.reach import YOUNG_SECONDS, Caller, Entry, of_source
from tierd.node.reads import ReadTarget
from tierd.node.retries import SecondTries
from tierd.node.sources import (
    Creator,
    Moved,
    Ref,
    Version,
    version_of,
)
from tierd.node.store import Copy, Damaged, Identity
from tierd.node.stub_layer import Stub
from tierd.node.tier import NodeTier

PASSTHROUGH_BYTES_MIN = 128 * 1024
"""Smaller files are served by the daemon: a single READ, and lock files keep one inode for readers and writers."""


class OpenedFile(NamedTuple):
    """The answer to an open. `keep_cache` is False if cached pages of the node must go."""

    fh: int
    keep_cache: bool


class _Reached(NamedTuple):
    """What a worker thread found: the source file, and the node tier's part in it; or, without a descriptor, a cold one
    with its attributes."""

    fh: int
    fd: int
    version: Version
    pod: str | None
    model: bytes | None
    fill: Fill | None
    stub: Stub | None = None


class Opens(ColdFiles):
    """See the module. Arguments are those of `ColdFiles`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.second_tries = SecondTries(self._hot.long_way if self._hot is not None else set())
        self.retired = 0
        """Nodes retired because an open needed another content or another way of reading."""

    # --- which node a name means ---

    def _seen(self, parent: Node, name: bytes, st: os.stat_result) -> Entry:
        return Entry(self._count(parent, name, st).id, st)

    def _count(self, parent: Node, name: bytes, st: os.stat_result) -> Node:
        key, version = self.source.key(st), pack(version_of(st))
        known = self.inodes.by_key(key)
        if known is not None and known.version not in (None, version):
            renamed = not stat.S_ISDIR(st.st_mode) and (parent, name) not in known.names()
            if not known.handles and not renamed:
                self._expect_change(known, st)
            elif of_source(known) is None:
                # Nothing holds the inode that it stands for: this may be another file with its number. Under another
                # name it must not be the same node, or an open by the old name would find this file.
                self._retire(known, young_until=trio.current_time() + YOUNG_SECONDS)
        return self.inodes.seen(parent, name, key, version)

    def _expect_change(self, node: Node, st: os.stat_result) -> None:
        """A file changed while nobody had it open, or another one got its inode number.

        The open that follows may have been sent back once already, so it must find a node that settles. (If it
        was only the source's attribute cache that is behind, that open will see so.)
        """
        if stat.S_ISREG(st.st_mode):
            node.young_until = trio.current_time() + YOUNG_SECONDS

    def _is_young(self, node: Node) -> bool:
        return trio.current_time() < node.young_until

    def _retire(self, node: Node, *, young_until: float) -> None:
        self._withdraw(node)
        self.inodes.retire(node, young_until)
        self.retired += 1

    # --- open ---

    async def open(self, node_id: int, flags: int, caller: Caller) -> OpenedFile:
        """Open a file. Raises ESTALE when the kernel shall look the name up again."""
        self.take_events()
        node = self.inodes.get(node_id)
        is_second = self.second_tries.awaits(caller.pid)
        kept = self.second_tries.take(caller.pid, node_id)
        opened = None
        try:
            if node.retired and not is_second and caller.pid:
                # By a name that the kernel still takes for it. Were it open in two nodes, each would have a size of its
                # own, and appends through one would overwrite those through the other.
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    await self._free_successor(node, flags)
                raise Moved
            if self._tier is not None and flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
                opened = await self._open_copy(node, self._tier, caller, is_second=is_second)
            if opened is None:
                opened = await self._open_source(node, flags, caller, kept, is_second=is_second)
        except Moved:
            self.second_tries.sent_back(caller.pid)
            raise
        finally:
            if kept is not None:
                close_soon(kept)
        self._note(self.files[opened.fh])
        return opened

    # --- from the node tier ---

    async def _open_copy(self, node: Node, tier: NodeTier, caller: Caller, *, is_second: bool) -> OpenedFile | None:
        """Open the copy, if there is one and it is what the source holds now; None sends the open to the source, which
        fits whatever way the node is open in: one that was sent back is not sent back again."""
        copy = tier.find(node.key)
        if copy is None or not self._may_read_copy(node):
            return None
        seen = await self._validate(node, tier, copy, caller.pid)
        self.take_events()
        if seen is None or copy.removed or not self._may_read_copy(node):
            return None
        version, attributes, pod = seen
        if node.version not in (None, pack(version)):
            return None
        if self._reads_otherwise(node, copy):
            if is_second or self._was_replaced(node):
                return None
            self._retire(node, young_until=0.0)
            raise Moved
        try:
            fd = tier.store.open(copy)
        except Damaged:
            return None
        self.inodes.set_version(node, pack(version))
        return OpenedFile(self._copy_handle(node, copy, fd, attributes, caller.uid, pod).fh, True)

    def _may_read_copy(self, node: Node) -> bool:
        return not (node.retired or node.parent is None or self._is_young(node) or _has_writers(node))

    async def _validate(
        self, node: Node, tier: NodeTier, copy: Copy, pid: int
    ) -> tuple[Version, os.stat_result | None, str | None] | None:
        """The version that the source holds now, if the copy is of that; None if not.

        A source that does not answer in time is taken for unchanged, if the settings say so.
        """
        try:
            answer = await self.patience.ask(self._by_name, node, self._validate_blocking, pid)
        except Moved:
            return None
        if answer is None:
            return (Version(*copy.identity[1:]), node.attributes, None) if tier.serve_stale(copy) else None
        st, pod = answer
        version = version_of(st)
        return (version, st, pod) if tier.is_current(copy, Identity(st.st_ino, *version)) else None

    def _validate_blocking(self, ref: Ref, pid: int) -> tuple[os.stat_result, str | None]:
        return self.source.forced_stat(ref), pod_of(pid)

    def _reads_otherwise(self, node: Node, copy: Copy) -> bool:
        """The node is open in a way that this open would have to be mixed with."""
        if node.backed:
            return node.copy is None or node.copy.name != copy.name
        large = copy.identity.size >= PASSTHROUGH_BYTES_MIN
        return large and self._reads.offers_passthrough() and any(_file_of(h) != copy.name for h in node.handles or ())

    def _copy_handle(
        self, node: Node, copy: Copy, fd: int, attributes: os.stat_result | None, uid: int, pod: str | None
    ) -> FileHandle:
        handle = FileHandle(self._fh(), node, -1, False)
        handle.target = ReadTarget(fd, local=True)
        handle.copy, handle.attributes = copy, attributes
        if attributes is not None:
            self.inodes.remember(node, attributes)
        self._register(handle, copy.model)
        self._record_open(handle, uid, pod)
        if copy.identity.size >= PASSTHROUGH_BYTES_MIN:
            self._pass_through(handle, fd)
            self._publish(handle, copy, fd)
        if not handle.backed:
            self._holder.hold(handle.fh, fd)
        if self._tier is not None:
            self._tier.read_ahead(copy)
        return handle

    # --- from the source ---

    async def _open_source(
        self, node: Node, flags: int, caller: Caller, kept: int | None, *, is_second: bool
    ) -> OpenedFile:
        try:
            found = await self._reach_to_open(node, flags, caller, kept)
        except Cold as cold:
            await self._brought(cold, caller.uid)
        self._withdraw(node)
        packed = pack(found.version)
        changed = node.version not in (None, packed) and not flags & os.O_TRUNC and not node.dirty
        # A cold file is not kept open by its second lookup, but is not sent back twice either.
        settling = node.retired or self._is_young(node) or kept is not None or is_second
        if changed and settling and not _reads_a_version(node):
            # Here and now: another open of the new version may be answered, with keep_cache, before this one is.
            await self._run(self._reads.content_changed, node.id, limiter=self.open_limit)
            self._withdraw(node)
        elif changed or self._excluded(node, flags):
            await self._send_back(node, found, flags)
        if self._excluded(node, flags) or (changed and _reads_a_version(node)):  # it may have become so meanwhile
            await self._send_back(node, found, flags)
        if not node.dirty or flags & os.O_TRUNC:
            self.inodes.set_version(node, packed)
        handle = self._source_handle_of(node, found, flags, caller)
        if found.stub is not None:
            return OpenedFile(handle.fh, not changed)
        if not self._join_fill(handle, found.fill):
            large = found.version.size >= PASSTHROUGH_BYTES_MIN
            if node.backed or (large and not node.retired and not self._is_young(node)):
                self._pass_through_source(handle)
        return OpenedFile(handle.fh, not changed)

    async def _reach_to_open(self, node: Node, flags: int, caller: Caller, kept: int | None) -> _Reached:
        """By what was `kept` for this open; else by name, even if the inode is open: it may mean another file by now.

        A node whose name was just found to mean another file is not opened by its handles: until the kernel has looked
        the name up again for the one who found it, others come here by that name, too.
        """
        args = (flags, caller.pid, self._path_to_fill(node, flags), self._fh())
        if kept is not None:
            ref = Ref(kept, None, node.key)
            return await self._run(self._open_kept, ref, node.version, *args, limiter=self.open_limit)
        unlinked = node.parent is None and node.handles
        if unlinked and trio.current_time() < node.moved_at + YOUNG_SECONDS:
            raise Moved
        reach = self._by_handle if unlinked else self._by_name
        return await reach(node, self._open_blocking, *args, limiter=self.open_limit)

    def _open_kept(self, ref: Ref, known: int | None, flags: int, pid: int, path: bytes | None, fh: int) -> _Reached:
        """A file that was removed or replaced since its lookup is no other version for that, and comes into no tier."""
        if os.fstat(ref.fd).st_nlink > 0:
            return self._open_blocking(ref, flags, pid, path, fh)
        found = self._open_blocking(ref, flags, pid, None, fh)
        if known is None or not same_content(known, pack(found.version)):
            return found
        return found._replace(version=unpack(known))

    def _path_to_fill(self, node: Node, flags: int) -> bytes | None:
        """Where the file lies, if it may come into the node tier by this open."""
        if self._tier is None or flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY or not isinstance(node.key, int):
            return None
        if node.retired or self._is_young(node) or _has_writers(node):
            return None
        try:
            return self.inodes.path(node)
        except Moved:
            return None

    def _open_blocking(self, ref: Ref, flags: int, pid: int, path: bytes | None, fh: int) -> _Reached:
        try:
            fd, version = self.source.open(ref, flags)
        except Cold as cold:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise
            self.who_has(cold.stub)
            st = self.source.forced_stat(ref)
            model = self._tier.model_of(path) if path is not None and self._tier is not None else None
            return _Reached(fh, -1, version_of(st), pod_of(pid), model, None, cold.stub._replace(attributes=st))
        self._holder.hold(fh, fd)
        try:
            model, fill = (None, None)
            if path is not None and self._tier is not None and isinstance(ref.key, int):
                model, fill = self._tier.begin(Identity(ref.key, *version), path, fd)
            return _Reached(fh, fd, version, pod_of(pid), model, fill)
        except BaseException:
            self._holder.drop(fh)
            os.close(fd)
            raise

    def _join_fill(self, handle: FileHandle, fill: Fill | None) -> bool:
        """Serve the handle as the fill lands, unless the kernel reads the node by itself, or whoever writes it or was
        sent back to write it must find it free."""
        node = handle.node
        if fill is None or node.backed or _has_writers(node) or node.retired or self._is_young(node):
            return False
        handle.fill = fill
        handle.target.local = True
        fill.attach(handle.target)
        return True

    def _excluded(self, node: Node, flags: int) -> bool:
        """Its readers read one version, whatever is written, and their pages are the node's: no place for a writer."""
        return flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY and _reads_a_version(node)

    async def _send_back(self, node: Node, found: _Reached, flags: int) -> NoReturn:
        """Have the kernel look the name up again and open the node that this returns: a young one, free for that."""
        try:
            await self._free_successor(node, flags)
        finally:
            if found.fd >= 0:
                self._holder.drop(found.fh)
                close_soon(found.fd)
        raise Moved

    async def _free_successor(self, node: Node, flags: int) -> None:
        """A node that was retired long ago, and is still named by the kernel, has a successor that may be neither young
        nor free, or none any more."""
        young_until = trio.current_time() + YOUNG_SECONDS
        live = self.inodes.by_key(node.key)
        if live is None:
            self.inodes.expect(node.key, young_until)
            return
        self._withdraw(live)
        if live is node or self._excluded(live, flags):
            self._retire(live, young_until=young_until)
        else:
            live.young_until = young_until
        if live.retired:  # what its readers ask for next may be changed by way of another node
            await self._run(self._reads.attributes_changed, live.id)

    def _pass_through_source(self, handle: FileHandle) -> None:
        """Let the kernel read the source by itself, if no open of this node is served in the other mode.

        Not for young nodes: the kernel asks again only once per open, so whoever was just sent to a new
        node to write must find it free for writing.
        """
        node = handle.node
        if handle.writable or (not node.backed and len(node.handles or ()) > 1):
            return
        self._pass_through(handle, handle.fd)

    def _source_handle_of(self, node: Node, found: _Reached, flags: int, caller: Caller) -> FileHandle:
        access = flags & os.O_ACCMODE
        handle = FileHandle(found.fh, node, found.fd, access != os.O_RDONLY)
        if found.stub is not None and found.stub.origin is not None:
            handle.origin, handle.attributes = found.stub.origin, found.stub.attributes
            handle.target = self.cold_target(handle, handle.origin, caller.pid, caller.uid)
            self.cold_opens += 1
        self._register(handle, found.model)
        if access != os.O_WRONLY:
            self._record_open(handle, caller.uid, found.pod)
        return handle

    # --- create ---

    async def create(
        self, parent_id: int, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[OpenedFile, Entry]:
        """Create and open. If somebody else was faster and the caller allows it, the kernel opens that file instead.

        That is asked for with ESTALE, so that the kernel checks the caller's permission on it first.
        """
        parent = self.inodes.get(parent_id)
        async with self.dirs.hold(parent) as dir_fd:
            try:
                found, st = await self._run(self._create_blocking, dir_fd, name, flags, mode, caller, self._fh())
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                raise Moved from None
        node = self._count(parent, name, st)
        self.inodes.set_version(node, pack(found.version))
        handle = self._source_handle_of(node, found, flags, caller)
        self._note(handle)
        return OpenedFile(handle.fh, True), Entry(node.id, st)

    def _create_blocking(
        self, dir_fd: int, name: bytes, flags: int, mode: int, caller: Caller, fh: int
    ) -> tuple[_Reached, os.stat_result]:
        def adopt(st: os.stat_result) -> tuple[int, os.stat_result, Version]:
            fd, version = self.source.open(Ref(dir_fd, name, self.source.key(st)), flags)
            return fd, st, version

        fd, st, version = self.once.make(
            caller.unique,
            lambda: self.source.lstat(dir_fd, name),
            lambda: self.source.create(dir_fd, name, flags, mode, owner_of(caller)),
            adopt,
        )
        self._holder.hold(fh, fd)
        return _Reached(fh, fd, version, pod_of(caller.pid), None, None), st


def owner_of(caller: Caller) -> Creator:
    """Whose a file will be that a caller makes."""
    return Creator(caller.uid, caller.gid)


def _has_writers(node: Node) -> bool:
    return node.dirty > 0 or any(isinstance(handle, FileHandle) and handle.writable for handle in node.handles or ())


def _reads_a_version(node: Node) -> bool:
    """Some reader of the node does not see what is written to the source: the kernel serves it by itself, or it reads
    a copy, or one in the making."""
    return node.backed > 0 or reads_copy(node)


def reads_copy(node: Node) -> bool:
    """Some reader of the node reads a copy, or one in the making, or an object."""
    held = (handle for handle in node.handles or () if isinstance(handle, FileHandle))
    return any(handle.copy is not None or handle.fill is not None or handle.origin is not None for handle in held)


def _file_of(handle: object) -> str | None:
    """The data file that a handle reads; a copy that was relabelled still has the same."""
    return handle.copy.name if isinstance(handle, FileHandle) and handle.copy is not None else None
