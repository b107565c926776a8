"""Attributes of an inode, as stat(2) tells them: made from statx(2), written to a ledger, read back."""

from __future__ import annotations

import os
import struct

from tierd.syscalls import stat_result

_ATTRIBUTES = struct.Struct("=QIQQIIIQqqqQQQ")
"""Node ID; mode, inode, device, links, owner, group, size; access, modification and change time in nanoseconds; block
size, blocks, device number."""


def unlinked(st: os.stat_result) -> os.stat_result:
    """The attributes of an inode after its last name went."""
    mode, inode, device, _, *rest = _fields(st)
    return stat_result(mode, inode, device, 0, *rest)


def changed(st: os.stat_result, *, mode: int, size: int, mtime_ns: int) -> os.stat_result:
    """The same attributes with another mode, size and modification time."""
    _, inode, device, nlink, uid, gid, _, atime_ns, _, *rest = _fields(st)
    return stat_result(mode, inode, device, nlink, uid, gid, size, atime_ns, mtime_ns, *rest)


def differ(one: os.stat_result, other: os.stat_result) -> bool:
    """They differ in more than the time of the last access."""
    return (one[:7], one.st_mtime_ns, one.st_ctime_ns) != (other[:7], other.st_mtime_ns, other.st_ctime_ns)


def pack_attributes(node_id: int, st: os.stat_result) -> bytes:
    """The payload of an ATTRIBUTES record."""
    return _ATTRIBUTES.pack(node_id, *_fields(st))


def unpack_attributes(payload: bytes) -> os.stat_result:
    """What `pack_attributes` packed, without the node."""
    _, *fields = _ATTRIBUTES.unpack(payload)
    return stat_result(*fields)


def _fields(st: os.stat_result) -> tuple[int, ...]:
    times = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    return (*st[:7], *times, st.st_blksize, st.st_blocks, st.st_rdev)
