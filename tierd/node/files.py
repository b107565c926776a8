"""Open files: what an open means, from where its bytes come, and who moves them.

The first open of a node fixes both, and the kernel allows no mix (DESIGN.md, "The kernel's rule"): bytes of the node
tier's copy or of the source, moved by the kernel (passthrough) or by the daemon; a file on its way into the node
tier is served by the daemon as it lands. An open that needs anything else is answered ESTALE, and the kernel looks the
name up again and gets a new node. Reads never need that twice for one open; see `YOUNG_SECONDS`.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn, Protocol

import trio

from tierd.node.caller import pod_of
from tierd.node.fill import Fill
from tierd.node.handles import FileHandle
from tierd.node.hot import Event, HotFiles, HotName
from tierd.node.inodes import Node, pack, same_content, unpack
from tierd.node.journal import Closed, Journal, Opened
from tierd.node.ledger import HANDLE, HandleRecord, Ledger
from tierd.node.once import Once
from tierd.node.packets import FIRST_HANDLE
from tierd.node.reach import YOUNG_SECONDS, Caller, Entry, Reach, of_source
from tierd.node.retries import SecondTries, close_soon
from tierd.node.seam import ReadTarget
from tierd.node.sources import (
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
from tierd.node.store import Copy, Damaged, Identity
from tierd.node.tier import NodeTier

PASSTHROUGH_BYTES_MIN = 128 * 1024
"""Smaller files are served by the daemon: a single READ, and lock files keep one inode for readers and writers."""


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

    def content_changed(self, node_id: int) -> None:
        """The kernel drops its pages of a node, and asks for the attributes again, its size above all. Waits for READs
        of the node."""

    def attributes_changed(self, node_id: int) -> None:
        """The kernel must ask for the attributes again, its size above all. May block."""

    def drop_pages(self, node_id: int) -> None:
        """The kernel need not keep its cached pages of a node."""

    def offers_passthrough(self) -> bool:
        """True if `back` can be expected to give a backing."""

    def back(self, node_id: int, fd: int) -> int | None:
        """A passthrough backing for one more open of a node; None if there shall be none."""

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The open that returns `fh` uses this backing."""

    def unback(self, node_id: int) -> None:
        """One open with a backing fewer."""


class Holder(Protocol):
    """Keeps descriptors of open files for a daemon that comes after this one."""

    def hold(self, key: int, fd: int) -> None:
        """Keep a duplicate of `fd`. Any thread."""

    def drop(self, key: int) -> None:
        """Let go of it. Any thread."""


class NoHolder:
    """Nobody comes after this one."""

    def hold(self, key: int, fd: int) -> None:
        """See Holder."""

    def drop(self, key: int) -> None:
        """See Holder."""


class _Reached(NamedTuple):
    """What a worker thread found: the source file, and the node tier's part in it."""

    fh: int
    fd: int
    version: Version
    pod: str | None
    model: bytes | None
    fill: Fill | None


class Files(Reach):
    """See the module.

    `event_dropped` is called when the journal was full, `read_ended` with whence a reader's bytes came, whether the
    kernel moved them, and how many the daemon did (see `Metrics.read_ended`); `now_ns` is the wall clock accesses are
    recorded with.
    """

    def __init__(
        self,
        source: PosixSource,
        journal: Journal,
        reads: ReadPath,
        *,
        event_dropped: Callable[[], None],
        read_ended: Callable[[str, bool, int], None] = lambda source, by_kernel, size: None,
        now_ns: Callable[[], int] = time.time_ns,
        tier: NodeTier | None = None,
        hot: HotFiles | None = None,
        ledger: Ledger | None = None,
        once: Once | None = None,
        holder: Holder | None = None,
    ) -> None:
        stale = tier is not None and tier.settings.stale_if_unreachable
        super().__init__(source, tier.source_deadline_s if tier is not None and stale else math.inf, ledger, once)
        self._holder = holder or NoHolder()
        self.journal = journal
        self._reads = reads
        self._now_ns = now_ns
        self._event_dropped = event_dropped
        self._read_ended = read_ended
        self._tier = tier
        self._hot = hot
        self.files: dict[int, FileHandle] = {}
        self._next_fh = FIRST_HANDLE
        self.second_tries = SecondTries()
        self.retired = 0
        """Nodes retired because an open needed another content or another way of reading."""

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

    async def open(self, node_id: int, flags: int, caller: Caller) -> OpenedFile:
        """Open a file. Raises ESTALE when the kernel shall look the name up again."""
        self.take_events()
        node = self.inodes.get(node_id)
        kept = self.second_tries.take(caller.pid, node_id)
        opened = None
        try:
            if self._tier is not None and flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
                opened = await self._open_copy(node, self._tier, caller)
            if opened is None:
                opened = await self._open_source(node, flags, caller, kept)
        except Moved:
            self.second_tries.sent_back(caller.pid)
            raise
        finally:
            if kept is not None:
                close_soon(kept)
        self._note(self.files[opened.fh])
        return opened

    def _note(self, handle: FileHandle) -> None:
        """What a successor must know of a handle."""
        copy = os.fsencode(handle.copy.name) if handle.copy is not None else b""
        record = HandleRecord(
            handle.fh, handle.node.id, False, handle.writable, handle.dirty, handle.backed, copy, handle.model
        )
        self.ledger.append(HANDLE, record.pack())

    # --- from the node tier ---

    async def _open_copy(self, node: Node, tier: NodeTier, caller: Caller) -> OpenedFile | None:
        """Open the copy, if there is one and it is what the source holds now; None sends the open to the source."""
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
            if self._was_replaced(node):
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

    # --- the short way ---

    def _publish(self, handle: FileHandle, copy: Copy, fd: int) -> None:
        """From now on hot opens of the node are answered by the pumps, and so are lookups on the way to it."""
        node, hot = handle.node, self._hot
        if hot is None or not handle.backed or hot.is_published(node.id) or node.parent is None:
            return
        name = self._publish_name(hot, node, directory=False)
        own_fd = _duplicate(fd) if name is not None else None
        if name is None or own_fd is None:
            return
        backing_id = self._reads.back(node.id, fd)
        if backing_id is None:
            os.close(own_fd)
            return
        for node_id in hot.publish(name, copy, own_fd, backing_id):
            self._withdraw(self.inodes.get(node_id))
        above = node.parent
        while above.parent is not None:
            self._publish_name(hot, above, directory=True)
            above = above.parent

    def _publish_name(self, hot: HotFiles, node: Node, *, directory: bool) -> HotName | None:
        parent = node.parent
        entry = self.dirs.peek(parent) if parent is not None else None
        if parent is None or entry is None:
            return None
        try:
            return hot.publish_name(node, parent, entry.fd, directory=directory)
        except OSError:
            return None
        finally:
            self.dirs.leave(entry)

    def _withdraw(self, node: Node) -> None:
        """What the pumps answered for a node is known when this returns, and they answer nothing more for it."""
        if self._hot is None:
            return
        published = self._hot.withdraw(node.id)
        self.take_events()
        if published:
            self._reads.unback(node.id)

    def copy_removed(self, copy: Copy) -> None:
        """A copy left the node tier: its space returns once the kernel and we have let go of it."""
        if self._hot is not None:
            for node_id in self._hot.nodes_of(copy):
                self._withdraw(self.inodes.get(node_id))

    def take_events(self) -> None:
        """Account for what the pumps answered by themselves."""
        if self._hot is None:
            return
        for event in self._hot.take_events():
            if event.what == "lookup":
                event.node.lookups += 1
            elif event.what == "open":
                self._opened_short(event)
            else:
                self._end_handle(self.files.pop(event.fh))

    def _opened_short(self, event: Event) -> None:
        node = event.node
        handle = FileHandle(event.fh, node, -1, False)
        handle.copy, handle.attributes = event.copy, event.attributes
        if event.attributes is not None:
            self.inodes.remember(node, event.attributes)
        self.files[handle.fh] = handle
        self._reads.back(node.id, -1)
        if not node.backed:
            node.copy = event.copy
        node.backed += 1
        handle.backed = True
        if event.copy is not None and self._tier is not None:
            handle.model = event.copy.model
            self._tier.leases.take(handle.model)
            self._tier.read_ahead(event.copy)
        self._record_open(handle, event.uid, event.pod)

    # --- from the source ---

    async def _open_source(self, node: Node, flags: int, caller: Caller, kept: int | None) -> OpenedFile:
        found = await self._reach_to_open(node, flags, caller, kept)
        self._withdraw(node)
        packed = pack(found.version)
        changed = node.version not in (None, packed) and not flags & os.O_TRUNC and not node.dirty
        settling = node.retired or self._is_young(node) or kept is not None
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
        handle = self._source_handle_of(node, found, flags, caller.uid)
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
        fd, version = self.source.open(ref, flags)
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
        """Serve the handle as the fill lands, unless the kernel reads the node by itself."""
        if fill is None or handle.node.backed or _has_writers(handle.node):
            return False
        handle.fill = fill
        handle.target.local = True
        fill.attach(handle.target)
        return True

    def _is_young(self, node: Node) -> bool:
        return trio.current_time() < node.young_until

    def _excluded(self, node: Node, flags: int) -> bool:
        """Its readers read one version, whatever is written, and their pages are the node's: no place for a writer."""
        return flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY and _reads_a_version(node)

    async def _send_back(self, node: Node, found: _Reached, flags: int) -> NoReturn:
        """Have the kernel look the name up again and open the node that this returns: a young one, free for that.

        A node that was retired long ago, and is still named by the kernel, has a successor that may be neither.
        """
        young_until = trio.current_time() + YOUNG_SECONDS
        live = self.inodes.by_key(node.key)
        if live is not None and (live is node or self._excluded(live, flags)):
            self._retire(live, young_until=young_until)
        elif live is not None:
            live.young_until = young_until
        self._holder.drop(found.fh)
        await self._run(os.close, found.fd)
        if live is not None and live.retired:  # what its readers ask for next may be changed by way of another node
            await self._run(self._reads.attributes_changed, live.id)
        raise Moved

    def _pass_through_source(self, handle: FileHandle) -> None:
        """Let the kernel read the source by itself, if no open of this node is served in the other mode.

        Not for young nodes: the kernel asks again only once per open, so whoever was just sent to a new
        node to write must find it free for writing.
        """
        node = handle.node
        if handle.writable or (not node.backed and len(node.handles or ()) > 1):
            return
        self._pass_through(handle, handle.fd)

    def _pass_through(self, handle: FileHandle, fd: int) -> None:
        backing_id = self._reads.back(handle.node.id, fd)
        if backing_id is not None:
            if not handle.node.backed:
                handle.node.copy = handle.copy
            handle.node.backed += 1
            handle.backed = True
            self._reads.pass_through(handle.fh, backing_id)

    def _retire(self, node: Node, *, young_until: float) -> None:
        self._withdraw(node)
        self.inodes.retire(node, young_until)
        self.retired += 1

    def _source_handle_of(self, node: Node, found: _Reached, flags: int, uid: int) -> FileHandle:
        access = flags & os.O_ACCMODE
        handle = FileHandle(found.fh, node, found.fd, access != os.O_RDONLY)
        self._register(handle, found.model)
        if access != os.O_WRONLY:
            self._record_open(handle, uid, found.pod)
        return handle

    def inherit_handle(self, handle: FileHandle, model: bytes | None) -> None:
        """Go on with a handle of the daemon before this one. Its open was recorded then; its close will be now."""
        node = handle.node
        node.backed += handle.backed
        node.dirty += handle.dirty
        if handle.backed:
            node.copy = handle.copy
        handle.attributes = node.attributes
        self._register(handle, model)
        if not handle.writable:
            with suppress(Moved):
                handle.recorded_path = self.inodes.path(node)

    def number_from(self, first: int) -> None:
        """Give out no node ID and no handle that a daemon before this one did."""
        self._next_fh += first
        self.inodes.number_from(first)

    def _register(self, handle: FileHandle, model: bytes | None) -> None:
        self.files[handle.fh] = handle
        self._reads.serve_reads(handle.fh, handle.target)
        handle.model = model
        if self._tier is not None and model is not None:
            self._tier.leases.take(model)

    def _record_open(self, handle: FileHandle, uid: int, pod: str | None) -> None:
        try:
            path = self.inodes.path(handle.node)
        except Moved:
            return
        if self._tier is not None and handle.copy is not None and handle.copy.path != path:
            self._tier.moved(handle.copy, path)
        event = Opened(handle.fh, path, self._now_ns(), uid, pod, from_node=handle.copy is not None)
        if self.journal.opened(event):
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
                found, st = await self._run(self._create_blocking, dir_fd, name, flags, mode, caller, self._fh())
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                raise Moved from None
        node = self._count(parent, name, st)
        self.inodes.set_version(node, pack(found.version))
        handle = self._source_handle_of(node, found, flags, caller.uid)
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
            self._note(handle)
        return await self._run_data(write_at, handle.fd, data, offset)

    async def flush(self, fh: int) -> None:
        """A descriptor was closed: report errors of delayed writes, and make them visible to other mounts."""
        handle = self._file(fh)
        if handle.writable:
            await self._run_data(flush, handle.fd)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make written data durable on the source."""
        self.take_events()
        handle = self._file(fh)
        if handle.fd >= 0:  # who reads a copy has written nothing
            await self._run_data(os.fdatasync if datasync else os.fsync, handle.fd)

    async def release(self, fh: int) -> None:
        """The last descriptor of an open was closed. The daemon before this one may have been told so already."""
        self.take_events()
        handle = self.files.pop(fh, None)
        if handle is None:
            return
        self._reads.stop_reads(fh)
        node = handle.node
        version = await self._run_data(_final_version, handle.fd) if handle.dirty else None
        if handle.dirty:
            node.dirty -= 1
            if node.dirty == 0:
                self.inodes.set_version(node, pack(version) if version is not None else None)
        self._end_handle(handle)
        if handle.fill is not None:
            await self._run_data(handle.fill.detach, handle.target)
        handle.closing = True
        if handle.uses == 0:
            await self._close(handle)

    def _end_handle(self, handle: FileHandle) -> None:
        self.ledger.closed(handle.fh)
        handle.leave()
        if handle.backed:
            handle.node.backed -= 1
            self._reads.unback(handle.node.id)
        if not handle.writable:
            whence = "node_tier" if handle.copy is not None else "fill" if handle.fill is not None else "source"
            self._read_ended(whence, handle.backed, handle.target.bytes_read)
        self._record_close(handle)
        self._leave_tier(handle)

    def _record_close(self, handle: FileHandle) -> None:
        if handle.recorded_path is not None:
            self.journal.closed(Closed(handle.fh, handle.recorded_path, self._now_ns(), handle.target.bytes_read))
            handle.recorded_path = None

    def end_records(self) -> None:
        """The daemon stops: what is still open, or was closed this moment, counts as read so far."""
        self.take_events()
        for handle in self.files.values():
            self._record_close(handle)

    def _leave_tier(self, handle: FileHandle) -> None:
        """The lease ends; pages that the kernel holds twice by now are dropped after the last close."""
        if self._tier is None or handle.model is None:
            return
        self._tier.leases.give_back(handle.model)
        if handle.fill is not None and handle.node.handles is None and self._reads.offers_passthrough():
            self._reads.drop_pages(handle.node.id)

    async def _close(self, handle: FileHandle) -> None:
        """A copy that was removed meanwhile is deleted by its last close, which takes time."""
        self._holder.drop(handle.fh)
        fd = handle.target.fd if handle.fd < 0 else handle.fd
        if fd >= 0 and (handle.copy is None or handle.copy.removed):
            await self._run_data(os.close, fd)
        elif fd >= 0:
            os.close(fd)

    def _file(self, fh: int) -> FileHandle:
        handle = self.files.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle


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
    """Some reader of the node reads a copy, or one in the making."""
    held = (handle for handle in node.handles or () if isinstance(handle, FileHandle))
    return any(handle.copy is not None or handle.fill is not None for handle in held)


def _file_of(handle: object) -> str | None:
    """The data file that a handle reads; a copy that was relabelled still has the same."""
    return handle.copy.name if isinstance(handle, FileHandle) and handle.copy is not None else None


def _duplicate(fd: int) -> int | None:
    """None if there are no descriptors left: what is only faster must not fail an open."""
    try:
        return os.dup(fd)
    except OSError:
        return None


def _final_version(fd: int) -> Version | None:
    """The version that a writer leaves behind; None if the source does not say, then the next open adopts it."""
    try:
        return forced_version(fd)
    except OSError:
        return None
