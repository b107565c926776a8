"""The seam between /dev/fuse and libfuse: pyfuse3 stays unmodified, and bytes bypass it.

libfuse takes a descriptor that is already open (`/dev/fd/N`) for its FUSE device, so it gets one end of
a socket pair, and two pumps copy messages between the other end and the device (FUSE-NOTES: "Passthrough
with an unmodified pyfuse3"). On the way the seam

- answers READ of files that the daemon serves itself, in threads of its own: one read of the source and
  one write to the device per request, no event loop, no copy in Python;
- raises `max_background` in the reply to INIT, whose default of 12 lets stalled reads block a mount;
- sets FOPEN_NOFLUSH in the reply to a read-only OPEN, so that its close costs no request;
- negotiates passthrough and puts the backing ID into the reply to an OPEN that shall use it.

Message formats: include/uapi/linux/fuse.h, protocol 7.38. Knows nothing of files or names.

Contract: `serve_reads` and `stop_reads` are called from the trio thread while the kernel cannot send a READ
for the handle (before the reply to OPEN, after RELEASE), so the pumps need no lock.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from tierd.errors import DaemonError
from tierd.node.backings import Backings

log = structlog.get_logger(__name__)

MAX_BACKGROUND: Final = 1024
"""Requests that the kernel may have outstanding without a caller waiting (read-ahead)."""
READ_BYTES_MAX: Final = 1 << 20
"""Largest READ the kernel sends: 256 pages."""

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth"""
_INIT_IN_FLAGS = struct.Struct("=II")
_INIT_IN_FLAGS_AT = _IN_HEADER.size + 12
_OPEN_OUT = struct.Struct("=QIi")
"""fh, open_flags, backing_id"""
_READ_IN = struct.Struct("=QQI")
_OPEN_IN_FLAGS = struct.Struct("=I")

_INVAL_INODE = struct.Struct("=IiQQqq")

_OP_OPEN, _OP_READ, _OP_INIT, _OP_INTERRUPT = 14, 15, 26, 36
_NOTIFY_INVAL_INODE = 2
_SPLICE_FLAGS = (1 << 7) | (1 << 8) | (1 << 9)
"""libfuse would splice from its device, which a socket of packets does not allow."""
_FOPEN_KEEP_CACHE, _FOPEN_NOFLUSH, _FOPEN_PASSTHROUGH = 1 << 1, 1 << 5, 1 << 7
_ATOMIC_O_TRUNC = 1 << 3
"""Not taken: without it the kernel truncates by SETATTR and takes setuid bits away as for any other writer."""
_INIT_EXT = 1 << 30
_INIT2_PASSTHROUGH = 1 << (37 - 32)
_STACK_DEPTH = 2
"""File systems that may lie below ours: the source may be on overlayfs, as a container's files are."""

_HEADER_ROOM = 4096
_MESSAGE_BYTES_MAX = READ_BYTES_MAX + _HEADER_ROOM
_SOCKET_BYTES = 8 * _MESSAGE_BYTES_MAX
_SIOCOUTQ = 0x5411
_READ_THREADS = 16
"""A file that the source takes long to read holds one of them."""
_NOBUFS_PAUSE_SECONDS = 0.001

_libc = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2


class ReadTarget:
    """A descriptor that READs of one handle are served from, and how many bytes were."""

    __slots__ = ("bytes_read", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.bytes_read = 0


def open_device(mountpoint: Path, *, allow_other: bool) -> int:
    """Mount and return the FUSE device: by mount(2) as root, else through fusermount3(1). Raises DaemonError."""
    return _mount_as_root(mountpoint, allow_other) if os.geteuid() == 0 else _fusermount(mountpoint, allow_other)


def _mount_as_root(mountpoint: Path, allow_other: bool) -> int:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mode = mountpoint.stat().st_mode & 0o170000
    options = f"fd={device},rootmode={mode:o},user_id=0,group_id=0,default_permissions"
    options += ",allow_other" if allow_other else ""
    target = os.fsencode(mountpoint)
    if _libc.mount(b"tierd", target, b"fuse.tierd", _MS_NOSUID | _MS_NODEV, options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(device)
        raise DaemonError(f"cannot mount {mountpoint}: {os.strerror(number)}", hint="mounting needs CAP_SYS_ADMIN")
    return device


def _fusermount(mountpoint: Path, allow_other: bool) -> int:
    """fusermount3 hands the device over the socket named by _FUSE_COMMFD (libfuse, lib/mount.c)."""
    options = "default_permissions,fsname=tierd,subtype=tierd" + (",allow_other" if allow_other else "")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", options, "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())
            raise DaemonError(f"cannot mount {mountpoint}: {reason}", hint="is fuse3 installed?")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    device = array.array("i", ancillary[0][2])[0]
    os.set_inheritable(device, False)
    return device


class Seam:
    """See the module.

    `ended` is called, from a pump, once the kernel has ended the connection (umount). `passthrough` says whether
    to ask for it; `passthrough_agreed` is None until the kernel has sent INIT, then whether it offered it.
    """

    def __init__(self, device: int, ended: Callable[[], None], *, passthrough: bool) -> None:
        self.device = device
        self._ended = ended
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._room = min(_widen(ours), _widen(theirs))
        self._ours = ours
        self.libfuse_fd = theirs.detach()
        """libfuse's end; libfuse closes it."""
        self._targets: dict[int, ReadTarget] = {}
        self._passthrough = passthrough
        self.passthrough_agreed: bool | None = None
        self.backings = Backings(device)
        self._backing_of_open: dict[int, int] = {}
        self._read_only_opens: set[int] = set()
        self._init_unique: int | None = None
        self._closed = False
        self._counting = threading.Lock()
        self._reads: queue.SimpleQueue[tuple[int, ReadTarget, int, int] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guarded, args=(pump,), name=name, daemon=True)
            for pump, name in ((self._pump_in, "seam-in"), (self._pump_out, "seam-out"))
        ] + [
            threading.Thread(target=self._guarded, args=(self._serve_reads,), name=f"seam-read-{i}", daemon=True)
            for i in range(_READ_THREADS)
        ]

    @property
    def mountpoint(self) -> str:
        """What libfuse is told to mount on."""
        return f"/dev/fd/{self.libfuse_fd}"

    def start(self) -> None:
        """Start the pumps."""
        for thread in self._threads:
            thread.start()

    def queued_reads(self) -> int:
        """READs that wait for a thread."""
        return self._reads.qsize()

    def congested(self) -> bool:
        """True if replies fill half of the room on their way to the kernel.

        The event loop must then wait before it replies: libfuse's write would block with the interpreter
        lock held, and the pump that empties the socket needs that lock.
        """
        (unsent,) = struct.unpack("=i", fcntl.ioctl(self.libfuse_fd, _SIOCOUTQ, b"\0\0\0\0"))
        return bool(unsent > self._room // 2)

    def attributes_changed(self, node_id: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE for the attributes alone. May block: not for the event loop or a pump."""
        size = _INVAL_INODE.size
        self._answer([memoryview(_INVAL_INODE.pack(size, _NOTIFY_INVAL_INODE, 0, node_id, -1, 0))])

    def serve_reads(self, fh: int, target: ReadTarget) -> None:
        """From now on READs of handle `fh` are answered from `target`."""
        self._targets[fh] = target

    def back(self, node_id: int, fd: int) -> int | None:
        """A backing ID for one more open of a node; None if the kernel offers no passthrough or refuses."""
        return self.backings.acquire(node_id, fd) if self.passthrough_agreed else None

    def unback(self, node_id: int) -> None:
        """One open of the node with a backing fewer."""
        self.backings.release(node_id)

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The reply to the OPEN that returns handle `fh` shall carry this backing ID."""
        self._backing_of_open[fh] = backing_id

    def stop_reads(self, fh: int) -> None:
        """The handle was released."""
        self._targets.pop(fh, None)
        self._backing_of_open.pop(fh, None)

    def close(self, mountpoint: Path) -> None:
        """Unmount (lazily if busy) and end the pumps. May be called again."""
        if self._closed:
            return
        self._closed = True
        if os.geteuid() == 0:
            _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
        else:
            subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        for _ in range(_READ_THREADS):
            self._reads.put(None)

    def _guarded(self, pump: Callable[[], None]) -> None:
        try:
            pump()
        except OSError as error:
            if error.errno not in _END_ERRORS:
                log.exception("seam_failed", pump=threading.current_thread().name)
        except Exception:
            log.exception("seam_failed", pump=threading.current_thread().name)
        if not self._closed:
            self._ended()

    # --- kernel to libfuse ---

    def _pump_in(self) -> None:
        buffer = bytearray(_MESSAGE_BYTES_MAX)
        view = memoryview(buffer)
        while True:
            try:
                size = os.readv(self.device, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, *_ = _IN_HEADER.unpack_from(buffer)
            if opcode == _OP_READ and self._queue_read(buffer, unique):
                continue
            if opcode == _OP_INIT:
                self._init_unique = unique
                flags, flags2 = _INIT_IN_FLAGS.unpack_from(buffer, _INIT_IN_FLAGS_AT)
                self.passthrough_agreed = bool(self._passthrough and flags & _INIT_EXT and flags2 & _INIT2_PASSTHROUGH)
                _INIT_IN_FLAGS.pack_into(buffer, _INIT_IN_FLAGS_AT, flags & ~_SPLICE_FLAGS, flags2)
            elif opcode == _OP_OPEN:
                (open_flags,) = _OPEN_IN_FLAGS.unpack_from(buffer, _IN_HEADER.size)
                if open_flags & os.O_ACCMODE == os.O_RDONLY:
                    self._read_only_opens.add(unique)
            elif opcode == _OP_INTERRUPT:
                continue  # pyfuse3 has no use for it, and libfuse would keep those of our READs for ever
            self._forward(view[:size])

    def _forward(self, message: memoryview) -> None:
        """A large packet needs contiguous memory; on a fragmented machine that takes a while."""
        while True:
            try:
                self._ours.send(message)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            time.sleep(_NOBUFS_PAUSE_SECONDS)

    def _queue_read(self, buffer: bytearray, unique: int) -> bool:
        fh, offset, size = _READ_IN.unpack_from(buffer, _IN_HEADER.size)
        target = self._targets.get(fh)
        if target is None:
            return False
        self._reads.put((unique, target, offset, size))
        return True

    # --- libfuse to kernel ---

    def _pump_out(self) -> None:
        buffer = bytearray(_MESSAGE_BYTES_MAX)
        view = memoryview(buffer)
        while size := self._ours.recv_into(buffer):
            _, error, unique = _OUT_HEADER.unpack_from(buffer)
            if unique in self._read_only_opens:
                self._read_only_opens.discard(unique)
                if error == 0:
                    self._finish_open(buffer)
            elif unique == self._init_unique and error == 0:
                self._init_unique = None
                self._set_limits(buffer)
            self._answer([view[:size]])

    def _finish_open(self, buffer: bytearray) -> None:
        """Complete the reply to a read-only OPEN with what pyfuse3 cannot say."""
        fh, flags, _ = _OPEN_OUT.unpack_from(buffer, _OUT_HEADER.size)
        flags |= _FOPEN_NOFLUSH
        backing_id = self._backing_of_open.pop(fh, 0)
        if backing_id:
            flags = (flags | _FOPEN_PASSTHROUGH) & ~_FOPEN_KEEP_CACHE
        _OPEN_OUT.pack_into(buffer, _OUT_HEADER.size, fh, flags, backing_id)

    def _set_limits(self, buffer: bytearray) -> None:
        """Put our limits into the reply to INIT; a WRITE must fit into the socket with room to spare."""
        page = os.sysconf("SC_PAGE_SIZE")
        fields = list(_INIT_OUT.unpack_from(buffer, _OUT_HEADER.size))
        fields[3] &= ~_ATOMIC_O_TRUNC
        fields[4:6] = MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
        fields[6] = max(page, min(fields[6], READ_BYTES_MAX, self._room // 4) // page * page)
        fields[8] = max(1, READ_BYTES_MAX // page)
        if self.passthrough_agreed:
            fields[3] |= _INIT_EXT
            fields[10] |= _INIT2_PASSTHROUGH
            fields[11] = _STACK_DEPTH
        _INIT_OUT.pack_into(buffer, _OUT_HEADER.size, *fields)

    def _answer(self, parts: list[memoryview]) -> None:
        """Write one message to the device. ENOENT: the request was interrupted or aborted; nobody waits for it."""
        try:
            os.writev(self.device, parts)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    # --- reads ---

    def _serve_reads(self) -> None:
        buffer = bytearray(_OUT_HEADER.size + READ_BYTES_MAX)
        view = memoryview(buffer)
        while (request := self._reads.get()) is not None:
            unique, target, offset, size = request
            try:
                have = _read_fully(target.fd, view[_OUT_HEADER.size : _OUT_HEADER.size + size], offset)
            except OSError as error:
                _OUT_HEADER.pack_into(buffer, 0, _OUT_HEADER.size, -(error.errno or errno.EIO), unique)
                self._answer([view[: _OUT_HEADER.size]])
                continue
            _OUT_HEADER.pack_into(buffer, 0, _OUT_HEADER.size + have, 0, unique)
            with self._counting:
                target.bytes_read += have
            self._answer([view[: _OUT_HEADER.size + have]])


_END_ERRORS = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})
"""How the device and the socket say that the mount is over."""


def _read_fully(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; fewer bytes only at the end of the file."""
    have = os.preadv(fd, [target], offset)
    while 0 < have < len(target):
        more = os.preadv(fd, [target[have:]], offset + have)
        if more == 0:
            break
        have += more
    return have


_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


def _widen(end: socket.socket) -> int:
    """Make room for messages of a MiB: past the system's limit as root, up to it else; the bytes there are."""
    for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BYTES)
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
