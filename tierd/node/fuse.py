"""The only importer of pyfuse3: turns its calls into overlay calls and errors into errno. No semantics here.

pyfuse3 ends the whole mount when a handler raises anything but FUSEError, so every handler is
wrapped: an OSError is its errno, anything else is EIO, a traceback in the log and a counter.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import structlog
import trio
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
    XAttrNameT,
)

from tierd.errors import DaemonError, TierdError
from tierd.metrics import Metrics
from tierd.node.opens import OpenedFile
from tierd.node.overlay import Overlay
from tierd.node.reach import Caller, Entry
from tierd.node.seam import Seam
from tierd.node.sources import Changes

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

OPERATIONS = (
    "lookup", "getattr", "setattr", "readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link",
    "open", "read", "write", "flush", "release", "fsync", "opendir", "readdir", "releasedir", "fsyncdir", "statfs",
    "setxattr", "getxattr", "listxattr", "removexattr", "create",
)  # fmt: skip
"""Names of the requests that are timed, as metric labels."""

REQUESTS_MAX = 512
"""Requests that may be in work at once; more wait in the kernel."""
_CONGESTED_SECONDS = 0.0005


def handler(
    function: Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[FuseOperations, P], Coroutine[Any, Any, T]]:
    """Time a handler and translate what it raises."""
    operation = function.__name__

    async def wrapped(self: FuseOperations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        try:
            answer = await function(self, *args, **kwargs)
            while self._congested():  # noqa: ASYNC110 - the kernel's side of a socket sets no event
                await trio.sleep(_CONGESTED_SECONDS)
            return answer
        except (OSError, TierdError) as error:
            number = error.errno or errno.EIO
            self.metrics.error(number)
            raise pyfuse3.FUSEError(number) from None
        except Exception:
            log.exception("handler_failed", operation=operation)
            self.metrics.handler_failures.inc()
            self.metrics.error(errno.EIO)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.metrics.latency[operation].observe(time.perf_counter() - started)

    wrapped.__name__ = operation
    return wrapped


class FuseOperations(pyfuse3.Operations):
    """The overlay as pyfuse3 wants it."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        overlay: Overlay,
        metrics: Metrics,
        *,
        congested: Callable[[], bool],
        caller_of: Callable[[int], tuple[int, int]] = lambda pid: (pid, 0),
        attr_timeout_s: float,
        entry_timeout_s: float,
    ) -> None:
        """`congested` says whether replies must wait, `caller_of` who sent a request (see Seam); the timeouts are what
        the kernel may rely on."""
        super().__init__()
        self.overlay = overlay
        self.metrics = metrics
        self._congested = congested
        self._caller_of = caller_of
        self.enable_acl = overlay.source.acls
        self._attr_timeout_s = attr_timeout_s
        self._entry_timeout_s = entry_timeout_s

    # --- names ---

    @handler
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.overlay.lookup(parent_inode, name, ctx.pid))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for node_id, count in inode_list:
            self.overlay.forget(node_id, count)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.overlay.getattr(inode))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        caller = self._caller(ctx)
        changes = _changes(attr, fields)
        return self._entry(await self.overlay.setattr(inode, changes, fh, caller.unique, caller.uid))

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self.overlay.readlink(inode))

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self.overlay.mknod(parent_inode, name, mode, rdev, self._caller(ctx)))

    @handler
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return self._entry(await self.overlay.mkdir(parent_inode, name, mode, self._caller(ctx)))

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.overlay.unlink(parent_inode, name, self._caller(ctx).unique)

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.overlay.rmdir(parent_inode, name, self._caller(ctx).unique)

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self.overlay.symlink(parent_inode, name, target, self._caller(ctx)))

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        unique = self._caller(ctx).unique
        await self.overlay.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, unique)

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self.overlay.link(inode, new_parent_inode, new_name, self._caller(ctx).unique))

    # --- files ---

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return _file_info(await self.overlay.open(inode, flags, self._caller(ctx)))

    @handler
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        opened, entry = await self.overlay.create(parent_inode, name, flags, mode, self._caller(ctx))
        return _file_info(opened), self._entry(entry)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self.overlay.read(fh, off, size)

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        written = await self.overlay.write(fh, off, buf)
        self.metrics.written_bytes.inc(written)
        return written

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        await self.overlay.flush(fh)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        await self.overlay.release(fh)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.overlay.fsync(fh, datasync)

    # --- directories ---

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(await self.overlay.opendir(inode))

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        def reply(name: bytes, st: os.stat_result, node_id: int, next_position: int) -> bool:
            entry = self._entry(Entry(node_id, st))
            return pyfuse3.readdir_reply(token, FileNameT(name), entry, next_position)

        await self.overlay.readdir(fh, start_id, reply)

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        await self.overlay.releasedir(fh)

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self.overlay.fsyncdir(fh)

    # --- the rest ---

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        return _statvfs(await self.overlay.statfs())

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return await self.overlay.getxattr(inode, name)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in await self.overlay.listxattr(inode)]

    @handler
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        await self.overlay.setxattr(inode, name, value)

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self.overlay.removexattr(inode, name, self._caller(ctx).unique)

    def _caller(self, ctx: RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, *self._caller_of(ctx.pid))

    def _entry(self, entry: Entry) -> EntryAttributes:
        st = entry.attributes
        attributes = EntryAttributes()
        attributes.st_ino = InodeT(entry.node_id)
        attributes.attr_timeout = self._attr_timeout_s if entry.lasting else 0.0
        attributes.entry_timeout = self._entry_timeout_s
        attributes.st_mode = ModeT(st.st_mode)
        attributes.st_nlink = st.st_nlink
        attributes.st_uid = st.st_uid
        attributes.st_gid = st.st_gid
        attributes.st_rdev = st.st_rdev
        attributes.st_size = st.st_size
        attributes.st_blksize = st.st_blksize
        attributes.st_blocks = st.st_blocks
        attributes.st_atime_ns = st.st_atime_ns
        attributes.st_mtime_ns = st.st_mtime_ns
        attributes.st_ctime_ns = st.st_ctime_ns
        return attributes


def attach(operations: FuseOperations, seam: Seam) -> None:
    """Let libfuse answer what comes through the seam. Raises DaemonError."""
    try:
        pyfuse3.init(operations, seam.mountpoint, {"default_permissions"})
    except RuntimeError as error:
        raise DaemonError(f"libfuse refused the mount: {error}", hint="libfuse says why above") from None


async def serve() -> None:
    """Answer requests until `stop` or until somebody unmounts."""
    await pyfuse3.main(max_tasks=REQUESTS_MAX)


def stop() -> None:
    """Make `serve` return once the requests in work are answered."""
    pyfuse3.terminate()


def detach() -> None:
    """Give everything back to libfuse."""
    pyfuse3.close(unmount=False)


def _file_info(opened: OpenedFile) -> FileInfo:
    return FileInfo(fh=FileHandleT(opened.fh), keep_cache=opened.keep_cache)


def _changes(attr: EntryAttributes, fields: SetattrFields) -> Changes:
    return Changes(
        mode=attr.st_mode if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def _statvfs(st: os.statvfs_result) -> StatvfsData:
    data = StatvfsData()
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
        setattr(data, name, getattr(st, name))
    data.f_namemax = st.f_namemax
    return data


def versions() -> dict[str, Any]:
    """What the mount is served with."""
    return {"pyfuse3": pyfuse3.__version__}
