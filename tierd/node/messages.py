"""FUSE messages as the seam reads and mends them: include/uapi/linux/fuse.h, protocol 7.38. Bytes in, bytes out."""

from __future__ import annotations

import os
import struct
from typing import Final

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
OUT_HEADER: Final = struct.Struct("=IiQ")
"""len, error, unique"""
OPEN_OUT: Final = struct.Struct("=QIi")
"""fh, open_flags, backing_id"""
READ_IN: Final = struct.Struct("=QQI")
OPEN_IN_FLAGS: Final = struct.Struct("=I")
ID: Final = struct.Struct("=Q")
"""What INTERRUPT names (a unique), RELEASE (a handle), and what an entry begins with (a node)."""
_INIT_OUT = struct.Struct("=IIIIHHIIHHII")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth"""
_INIT_IN_FLAGS = struct.Struct("=II")
_INIT_IN_FLAGS_AT = IN_HEADER.size + 12
_INVAL_INODE = struct.Struct("=IiQQqq")
_PID = struct.Struct("=I")
_PID_AT = 32
_DIRENT = struct.Struct("=QQII")
_BATCH_FORGET_IN = struct.Struct("=II")
_FORGET_ONE = struct.Struct("=QQ")
_ENTRY_BYTES = 128

LOOKUP, FORGET, SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, RELEASE = (
    1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 18,
)  # fmt: skip
REMOVEXATTR, INIT, OPENDIR, CREATE, INTERRUPT, BATCH_FORGET, READDIRPLUS, RENAME2 = 24, 26, 27, 35, 36, 42, 44, 45
ONCE: Final = frozenset({SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, REMOVEXATTR, CREATE, RENAME2})
"""Requests that must not take effect twice."""
TELLING: Final = frozenset({LOOKUP, SYMLINK, MKNOD, MKDIR, LINK, OPEN, OPENDIR, CREATE, READDIRPLUS})
"""Requests whose replies tell the kernel of nodes or handles."""

FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH = 1 << 1, 1 << 5, 1 << 7
MAX_BACKGROUND: Final = 1024
"""Requests that the kernel may have outstanding without a caller waiting (read-ahead)."""
READ_BYTES_MAX: Final = 1 << 20
"""Largest READ the kernel sends: 256 pages."""
_SPLICE_FLAGS = (1 << 7) | (1 << 8) | (1 << 9)
"""libfuse would splice from its device, which a socket of packets does not allow."""
_ATOMIC_O_TRUNC = 1 << 3
"""Not taken: without it the kernel truncates by SETATTR and takes setuid bits away as for any other writer."""
_INIT_EXT = 1 << 30
_INIT2_PASSTHROUGH = 1 << (37 - 32)
_INIT2_RESEND = 1 << (39 - 32)
_STACK_DEPTH = 2
"""File systems that may lie below ours: the source may be on overlayfs, as a container's files are."""
_NOTIFY_INVAL_INODE = 2


def offered(init: bytes | bytearray) -> tuple[bool, bool]:
    """Whether the kernel that sent this INIT offers passthrough, and to send requests again."""
    flags, flags2 = _INIT_IN_FLAGS.unpack_from(init, _INIT_IN_FLAGS_AT)
    extended = bool(flags & _INIT_EXT)
    return extended and bool(flags2 & _INIT2_PASSTHROUGH), extended and bool(flags2 & _INIT2_RESEND)


def without_splice(init: bytearray) -> None:
    """Offer libfuse no splicing."""
    flags, flags2 = _INIT_IN_FLAGS.unpack_from(init, _INIT_IN_FLAGS_AT)
    _INIT_IN_FLAGS.pack_into(init, _INIT_IN_FLAGS_AT, flags & ~_SPLICE_FLAGS, flags2)


def set_limits(reply: bytearray, write_bytes_max: int, *, passthrough: bool, resend: bool) -> None:
    """Put our limits into the reply to INIT, and what we take of the kernel's offers."""
    page = os.sysconf("SC_PAGE_SIZE")
    fields = list(_INIT_OUT.unpack_from(reply, OUT_HEADER.size))
    fields[3] &= ~_ATOMIC_O_TRUNC
    fields[4:6] = MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
    fields[6] = max(page, min(fields[6], READ_BYTES_MAX, write_bytes_max) // page * page)
    fields[8] = max(1, READ_BYTES_MAX // page)
    if passthrough or resend:
        fields[3] |= _INIT_EXT
    if passthrough:
        fields[10] |= _INIT2_PASSTHROUGH
        fields[11] = _STACK_DEPTH
    if resend:
        fields[10] |= _INIT2_RESEND
    _INIT_OUT.pack_into(reply, OUT_HEADER.size, *fields)


def finish_open(reply: bytearray, backing_id: int) -> None:
    """Complete the reply to a read-only OPEN with what pyfuse3 cannot say."""
    fh, flags, _ = OPEN_OUT.unpack_from(reply, OUT_HEADER.size)
    flags |= FOPEN_NOFLUSH
    if backing_id:
        flags = (flags | FOPEN_PASSTHROUGH) & ~FOPEN_KEEP_CACHE
    OPEN_OUT.pack_into(reply, OUT_HEADER.size, fh, flags, backing_id)


def handle_in(reply: bytes | bytearray) -> int:
    """The handle that the reply to an OPEN carries."""
    return int(ID.unpack_from(reply, OUT_HEADER.size)[0])


def told_by(opcode: int, reply: memoryview) -> tuple[list[int], int]:
    """The nodes of which a reply gives the kernel one lookup each, and the handle that it gives it (0: none)."""
    body = reply[OUT_HEADER.size :]
    if opcode in (OPEN, OPENDIR):
        return [], ID.unpack_from(body)[0]
    if opcode == READDIRPLUS:
        return _entries(body), 0
    fh = ID.unpack_from(body, _ENTRY_BYTES)[0] if opcode == CREATE else 0
    (node_id,) = ID.unpack_from(body)
    return [node_id] if node_id else [], fh


def _entries(body: memoryview) -> list[int]:
    """Of `.` and `..` the kernel counts no lookup (fuse_direntplus_link)."""
    found, at = [], 0
    while at + _ENTRY_BYTES + _DIRENT.size <= len(body):
        (node_id,) = ID.unpack_from(body, at)
        _, _, length, _ = _DIRENT.unpack_from(body, at + _ENTRY_BYTES)
        at += _ENTRY_BYTES + _DIRENT.size
        if node_id and bytes(body[at : at + min(length, 3)]) not in (b".", b".."):
            found.append(node_id)
        at += (length + 7) // 8 * 8
    return found


def forgotten(opcode: int, request: memoryview) -> list[tuple[int, int]]:
    """The nodes, and how many lookups of each, that a FORGET or BATCH_FORGET gives back."""
    if opcode == FORGET:
        return [(IN_HEADER.unpack_from(request)[3], ID.unpack_from(request, IN_HEADER.size)[0])]
    return list(_FORGET_ONE.iter_unpack(request[IN_HEADER.size + _BATCH_FORGET_IN.size :]))


def set_pid(request: memoryview, pid: int) -> None:
    """Replace the process that a request comes from."""
    _PID.pack_into(request, _PID_AT, pid)


def invalidate(node_id: int, *, pages: bool) -> bytes:
    """FUSE_NOTIFY_INVAL_INODE: the kernel drops the attributes of a node, and all its pages or none."""
    return _INVAL_INODE.pack(_INVAL_INODE.size, _NOTIFY_INVAL_INODE, 0, node_id, 0 if pages else -1, 0)
