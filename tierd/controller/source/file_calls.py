"""Attributes of files and stubs: whether they are those of the plan, and copied between the two. Decides nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final, NamedTuple

from tierd.controller.source.hot_scan import read_xattrs
from tierd.controller.source.moved_file import HotFile
from tierd.stub_files import mtime_of
from tierd.stubs import COLD_MARK
from tierd.syscalls import forced_stat

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FREE_MODE_BITS: Final = 0o7777 & ~COLD_MARK


def same(st: os.stat_result, file: HotFile) -> bool:
    """Size, time of modification, inode, links: whether it is the file that was copied, but for its attributes."""
    return (st.st_ino, st.st_size, st.st_mtime_ns) == (file.inode, file.size, file.mtime_ns) and stat.S_ISREG(
        st.st_mode
    )


def alike(one: os.stat_result, other: os.stat_result) -> bool:
    """Mode and owner, the mark apart."""
    return (one.st_mode & ~COLD_MARK, one.st_uid, one.st_gid) == (
        other.st_mode & ~COLD_MARK,
        other.st_uid,
        other.st_gid,
    )


class Looks(NamedTuple):
    """All that a user can see of a file or stub, but for the bytes and the time of the last access."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]


def looks_of(fd: int) -> Looks:
    """As they are now, past all caches."""
    st = forced_stat(fd)
    return Looks(st.st_mode & ~COLD_MARK, st.st_uid, st.st_gid, mtime_of(st), read_xattrs(fd))


def opened(fd: int, name: bytes, flags: int = 0) -> int:
    """A descriptor for reading; -1 if there is no such file. O_NOATIME counts where we may use it."""
    try:
        return os.open(name, _FILE | flags, dir_fd=fd)
    except FileNotFoundError:
        return -1
    except PermissionError:
        if not flags:
            raise
    return opened(fd, name)


@contextmanager
def opened_directory(fd: int, name: bytes) -> Iterator[int]:
    """A descriptor of a directory, for the length of a `with`."""
    opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        yield opened
    finally:
        os.close(opened)


def copy_attributes(source: int, target: int, mark: int, *, times: bool = True) -> None:
    """Owner, extended attributes, mode and times, in an order in which none undoes another. `mark` is added."""
    st = os.fstat(source)
    os.fchown(target, st.st_uid, st.st_gid)
    wanted = dict(read_xattrs(source))
    for name, _ in read_xattrs(target):
        if name not in wanted:
            os.removexattr(target, name)
    for name, value in wanted.items():
        os.setxattr(target, name, value)
    os.fchmod(target, st.st_mode & _FREE_MODE_BITS | mark)
    if times:
        os.utime(target, ns=(st.st_atime_ns, mtime_of(st)))


def draft_name(name: bytes) -> bytes:
    """How the stub of a file is called while it lies beside: short, whatever the path is."""
    return blake2b(name, digest_size=16).hexdigest().encode()
