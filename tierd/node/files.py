"""Open files: their handles, what is done with them, and what successors, statistics and the node tier know of them.

What an open means, and from where its bytes come, is in `opens.py`; who moves them, in `read_path.py`.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress

from tierd.node.cold_source import ColdSource
from tierd.node.handles import FileHandle
from tierd.node.hot import Event, HotFiles, HotName
from tierd.node.inodes import Node, pack
from tierd.node.journal import Closed, Journal, Opened
from tierd.node.ledger import COLD_PREFIX, HANDLE, HandleRecord, Ledger
from tierd.node.once import Once
from tierd.node.output_notes import OutputNotes
from tierd.node.packets import FIRST_HANDLE
from tierd.node.reach import Reach
from tierd.node.read_path import Holder, NoHolder, ReadPath
from tierd.node.sources import (
    Moved,
    Version,
    flush,
    forced_version,
    read_at,
    write_at,
)
from tierd.node.store import Copy
from tierd.node.tier import NodeTier
from tierd.stubs import encode


class Files(Reach):
    """See the module.

    `event_dropped` is called when the journal was full, `read_ended` with whence a reader's bytes came, whether the
    kernel moved them, and how many the daemon did (see `Metrics.read_ended`); `now_ns` is the wall clock accesses are
    recorded with. Below `outputs_root` the controller hears of what is written and removed.
    """

    def __init__(
        self,
        source: ColdSource,
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
        outputs_root: bytes | None = None,
    ) -> None:
        stale = tier is not None and tier.settings.stale_if_unreachable
        super().__init__(source, tier.source_deadline_s if tier is not None and stale else math.inf, ledger, once)
        self._holder = holder or NoHolder()
        self.journal = journal
        self.output_notes = OutputNotes(journal, outputs_root, event_dropped)
        self._reads = reads
        self._now_ns = now_ns
        self._event_dropped = event_dropped
        self._read_ended = read_ended
        self._tier = tier
        self._hot = hot
        self.files: dict[int, FileHandle] = {}
        self._next_fh = FIRST_HANDLE

    def _fh(self) -> int:
        self._next_fh += 1
        return self._next_fh

    def number_from(self, first: int) -> None:
        """Give out no node ID and no handle that a daemon before this one did."""
        self._next_fh += first
        self.inodes.number_from(first)

    def _file(self, fh: int) -> FileHandle:
        handle = self.files.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    # --- a handle begins ---

    def _register(self, handle: FileHandle, model: bytes | None) -> None:
        self.files[handle.fh] = handle
        self._reads.serve_reads(handle.fh, handle.target)
        handle.model = model
        if self._tier is not None and model is not None:
            self._tier.leases.take(model)

    def _note(self, handle: FileHandle) -> None:
        """What a successor must know of a handle."""
        copy = os.fsencode(handle.copy.name) if handle.copy is not None else b""
        if handle.origin is not None:
            copy = COLD_PREFIX + encode({handle.node.id: handle.origin})
        record = HandleRecord(
            handle.fh, handle.node.id, False, handle.writable, handle.dirty, handle.backed, copy, handle.model
        )
        self.ledger.append(HANDLE, record.pack())

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

    def _pass_through(self, handle: FileHandle, fd: int) -> None:
        backing_id = self._reads.back(handle.node.id, fd)
        if backing_id is not None:
            if not handle.node.backed:
                handle.node.copy = handle.copy
            handle.node.backed += 1
            handle.backed = True
            self._reads.pass_through(handle.fh, backing_id)

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

    # --- what is done with it ---

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

    # --- it ends ---

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
            self._record_written(handle)
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
            whence = "objects" if whence == "source" and handle.origin is not None else whence
            self._read_ended(whence, handle.backed, handle.target.bytes_read)
        self._record_close(handle)
        self._leave_tier(handle)

    def _record_close(self, handle: FileHandle) -> None:
        if handle.recorded_path is not None:
            self.journal.closed(Closed(handle.fh, handle.recorded_path, self._now_ns(), handle.target.bytes_read))
            handle.recorded_path = None

    def _record_written(self, handle: FileHandle) -> None:
        with suppress(Moved):  # a file without a name is nobody's output
            self.output_notes.written(self.inodes.path(handle.node), self._now_ns())

    def end_records(self) -> None:
        """The daemon stops: what is still open, or was closed this moment, counts as read and written so far."""
        self.take_events()
        for handle in self.files.values():
            self._record_close(handle)
            if handle.dirty:
                self._record_written(handle)

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
        if fd < 0:
            return
        if handle.copy is None or handle.copy.removed:
            await self._run_data(os.close, fd)
        else:
            os.close(fd)


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
