"""System calls that Python does not offer, or not in the form that is needed: renameat2(2), statx(2) past all caches.

Blocking, any thread.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC_STATS = 0x7FF
_AT_SYMLINK_NOFOLLOW = 0x100
_STATX = struct.Struct("=4xI8xIIIH2xQQQ8xqI4x16xqI4xqI4xIIII112x")
"""struct statx of include/uapi/linux/stat.h: blksize, nlink, uid, gid, mode, ino, size, blocks, atime, ctime, mtime,
rdev, dev; without mask, attributes and btime."""
_SYNC_FILE_RANGE_WRITE = 2
_NS = 1_000_000_000


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Have what was written there go to the disk, without waiting for it: a sync at the end then finds less to do."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def forced_stat(fd: int, name: bytes = b"") -> os.stat_result:
    """Attributes of an open file, or of entry `name` of a directory, past every attribute cache.

    statx(2) with AT_STATX_FORCE_SYNC: on JuiceFS plain fstat may be an attribute timeout old.
    May hang as long as the source does.
    """
    buffer = ctypes.create_string_buffer(_STATX.size)
    flags = _AT_STATX_FORCE_SYNC | _AT_SYMLINK_NOFOLLOW | (0 if name else _AT_EMPTY_PATH)
    if _libc.statx(fd, name, flags, _STATX_BASIC_STATS, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    (
        blksize, nlink, uid, gid, mode, ino, size, blocks, atime_s, atime_ns, ctime_s, ctime_ns, mtime_s, mtime_ns,
        rdev_major, rdev_minor, dev_major, dev_minor,
    ) = _STATX.unpack(buffer)  # fmt: skip
    return stat_result(
        mode, ino, os.makedev(dev_major, dev_minor), nlink, uid, gid, size, _ns(atime_s, atime_ns),
        _ns(mtime_s, mtime_ns), _ns(ctime_s, ctime_ns), blksize, blocks, os.makedev(rdev_major, rdev_minor),
    )  # fmt: skip


def _ns(seconds: int, nanoseconds: int) -> int:
    return seconds * 1_000_000_000 + nanoseconds


def stat_result(
    mode: int, inode: int, device: int, nlink: int, uid: int, gid: int, size: int, atime_ns: int, mtime_ns: int,
    ctime_ns: int, blksize: int, blocks: int, rdev: int,
) -> os.stat_result:  # fmt: skip
    """An os.stat_result that says this; times in nanoseconds since the epoch."""
    seconds = (atime_ns // _NS, mtime_ns // _NS, ctime_ns // _NS)
    more = {
        "st_atime_ns": atime_ns,
        "st_mtime_ns": mtime_ns,
        "st_ctime_ns": ctime_ns,
        "st_blksize": blksize,
        "st_blocks": blocks,
        "st_rdev": rdev,
    }
    fields = (mode, inode, device, nlink, uid, gid, size, *seconds)
    return os.stat_result(fields, more)
