"""What a FUSE file system served by pyfuse3 cannot offer, and what callers get instead.

docs/SEMANTICS.md has the same table; a line that changes here must change there. The answers are the
kernel's, so they do not depend on the source.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.conftest import Tree
from tests.integration.calls import outcome
from tests.mounts import as_user

_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_IOC_FIEMAP = 0xC020660B
_FICLONE = 0x40049409
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_ALL = 0xFFF
_F_OFD_SETLK = 37
_SIZE = 10_000


class Case(NamedTuple):
    """One operation and what it comes to: a value, or the name of an errno."""

    name: str
    run: Callable[[Tree, int], Any]
    expected: Any


def fallocate(fd: int, mode: int, length: int) -> None:
    """fallocate(2), which Python offers only in the form that emulates it."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def emulated_fallocate(_: Tree, fd: int) -> int:
    os.posix_fallocate(fd, 0, 20_000)
    return os.fstat(fd).st_size


def temporary_file(tree: Tree, _: int) -> None:
    os.close(os.open(tree.top, os.O_TMPFILE | os.O_RDWR))


def second(tree: Tree) -> int:
    return os.open(tree.top / "second", os.O_RDWR | os.O_CREAT | os.O_TRUNC)


def copied_range(tree: Tree, fd: int) -> tuple[int, bytes]:
    other = second(tree)
    try:
        return os.copy_file_range(fd, other, 5, 0, 0), os.pread(other, 100, 0)
    finally:
        os.close(other)


def cloned(tree: Tree, fd: int) -> None:
    other = second(tree)
    try:
        fcntl.ioctl(other, _FICLONE, fd)
    finally:
        os.close(other)


def sent(tree: Tree, fd: int) -> tuple[int, bytes]:
    other = second(tree)
    try:
        return os.sendfile(other, fd, 0, 5), os.pread(other, 100, 0)
    finally:
        os.close(other)


def data_in_a_hole(_: Tree, fd: int) -> int:
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"x", 1 << 20)
    return os.lseek(fd, 0, os.SEEK_DATA)


def statx_mask(_: Tree, fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    assert _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_ALL, buffer) == 0
    mask: int = struct.unpack_from("=I", buffer)[0]
    return mask & _STATX_BTIME


def linked_descriptor(tree: Tree, fd: int) -> int:
    directory = os.open(tree.top, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{fd}", "linked", dst_dir_fd=directory, follow_symlinks=True)
        return os.fstat(fd).st_nlink
    finally:
        os.close(directory)


def open_file_description_lock(tree: Tree, fd: int) -> str:
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, _F_OFD_SETLK, wanted)
    other = os.open(tree.top / "file", os.O_RDWR)
    try:
        return str(outcome(fcntl.fcntl, other, _F_OFD_SETLK, wanted))
    finally:
        os.close(other)


def removed_mapping(_: Tree, fd: int) -> None:
    with mmap.mmap(fd, _SIZE) as view:
        view.madvise(mmap.MADV_REMOVE)


def change_notification(tree: Tree, _: int) -> str:
    """Of what happens through the mount; dnotify(7) stands for inotify(7), which Python does not offer."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(tree.top, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE)
        return "accepted"
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, before)


CASES = [
    Case("fallocate", lambda _, fd: fallocate(fd, 0, 20_000), "ENOTSUP"),
    Case("fallocate keeping the size", lambda _, fd: fallocate(fd, _FALLOC_KEEP_SIZE, 20_000), "ENOTSUP"),
    Case("punching a hole", lambda _, fd: fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, 4096), "ENOTSUP"),
    Case("madvise(MADV_REMOVE)", removed_mapping, "ENOTSUP"),
    Case("posix_fallocate, which libc emulates", emulated_fallocate, 20_000),
    Case("O_TMPFILE", temporary_file, "ENOTSUP"),
    Case("copy_file_range, which the kernel copies", copied_range, (5, b"01234")),
    Case("sendfile", sent, (5, b"01234")),
    Case("reflinks (FICLONE)", cloned, "ENOTSUP"),
    Case("SEEK_HOLE finds the end", lambda _, fd: os.lseek(fd, 0, os.SEEK_HOLE), _SIZE),
    Case("SEEK_DATA sees no holes", data_in_a_hole, 0),
    Case("SEEK_DATA past the end", lambda _, fd: os.lseek(fd, 20_000, os.SEEK_DATA), "ENXIO"),
    Case("FS_IOC_GETFLAGS (lsattr)", lambda _, fd: fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)), "ENOTTY"),
    Case("FS_IOC_SETFLAGS (chattr)", lambda _, fd: fcntl.ioctl(fd, _FS_IOC_SETFLAGS, bytes(8)), "ENOTTY"),
    Case(
        "FIEMAP (filefrag)",
        lambda _, fd: fcntl.ioctl(fd, _FS_IOC_FIEMAP, struct.pack("=QQIIII", 0, 1 << 20, 0, 0, 0, 0)),
        "ENOTSUP",
    ),
    Case("time of birth in statx", statx_mask, 0),
    Case("RWF_NOWAIT", lambda _, fd: os.preadv(fd, [bytearray(10)], 0, os.RWF_NOWAIT), "ENOTSUP"),
    Case("RWF_DSYNC", lambda _, fd: os.pwritev(fd, [b"x"], 0, os.RWF_DSYNC), 1),
    Case("hard link of a descriptor", linked_descriptor, 2),
    Case("open file description locks", open_file_description_lock, "EAGAIN"),
    Case("leases (F_SETLEASE)", lambda _, fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK), 0),
    Case("change notification", change_notification, "accepted"),
    Case("sizes beyond 2^62", lambda _, fd: os.ftruncate(fd, (1 << 63) - 1), "EFBIG"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(tree: Tree, case: Case) -> None:
    fd = os.open(tree.top / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, b"0123456789" * (_SIZE // 10))
        assert outcome(case.run, tree, fd) == case.expected
    finally:
        os.close(fd)


@pytest.mark.sources("directory")
def test_changes_beneath_the_mount_are_not_notified(tree: Tree) -> None:
    notify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert _libc.inotify_add_watch(notify, os.fsencode(tree.top), 0x100) > 0  # IN_CREATE
        (tree.beneath / "beneath").touch()
        assert outcome(os.read, notify, 4096) == "EAGAIN"
        (tree.top / "through").touch()
        assert b"through" in os.read(notify, 4096)
    finally:
        os.close(notify)


@pytest.mark.sources("directory")
def test_inode_numbers_are_the_mount_s_own_and_do_not_last(tree: Tree) -> None:
    """They identify a file only as long as the kernel remembers it; hard links are recognised meanwhile."""
    (tree.beneath / "file").touch()
    before = (tree.top / "file").stat().st_ino
    assert (tree.top / "file").stat().st_ino == before
    assert tree.mount.ledger_complaints() == []
    assert (tree.top / "file").stat().st_ino != before


_ACL_USER_OBJ, _ACL_USER, _ACL_GROUP_OBJ, _ACL_MASK, _ACL_OTHER = 1, 2, 4, 16, 32
_NOBODY = 0xFFFFFFFF


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """The value of `system.posix_acl_access` (acl(5)): a version, then tag, permissions and ID of each entry."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.sources("directory")
def test_access_lists_of_the_source_keep_out_whom_they_name(tree: Tree) -> None:
    """The owning group has no rights by the list; the mode shows the mask in its place, which has."""
    path = tree.beneath / "file"
    path.write_text("secret")
    os.chown(path, 0, 54321)
    acl = access_list(
        (_ACL_USER_OBJ, 6, _NOBODY),
        (_ACL_USER, 4, 999),
        (_ACL_GROUP_OBJ, 0, _NOBODY),
        (_ACL_MASK, 4, _NOBODY),
        (_ACL_OTHER, 0, _NOBODY),
    )
    os.setxattr(path, "system.posix_acl_access", acl)
    read = "print(open(sys.argv[1]).read())"
    assert as_user(12345, 54321, read, path) == "EACCES"
    assert as_user(12345, 54321, read, tree.top / "file") == "EACCES"
    assert as_user(999, 999, read, path) == "secret"
    assert as_user(999, 999, read, tree.top / "file") == "secret"


@pytest.mark.sources("directory")
def test_access_lists_are_set_and_inherited_through_the_mount(tree: Tree) -> None:
    acl = access_list(
        (_ACL_USER_OBJ, 7, _NOBODY),
        (_ACL_USER, 6, 12345),
        (_ACL_GROUP_OBJ, 0, _NOBODY),
        (_ACL_MASK, 7, _NOBODY),
        (_ACL_OTHER, 0, _NOBODY),
    )
    read = "print(open(sys.argv[1]).read())"
    directory, path = tree.top / "dir", tree.top / "file"
    path.write_text("by name")
    path.chmod(0o600)
    assert as_user(12345, 1, read, path) == "EACCES"
    os.setxattr(path, "system.posix_acl_access", acl)
    assert as_user(12345, 1, read, path) == "by name"
    assert path.stat().st_mode & 0o777 == (tree.beneath / "file").stat().st_mode & 0o777
    os.removexattr(path, "system.posix_acl_access")
    path.chmod(0o600)
    assert as_user(12345, 1, read, path) == "EACCES"
    directory.mkdir()
    os.setxattr(directory, "system.posix_acl_default", acl)
    (directory / "inside").touch()
    assert os.getxattr(tree.beneath / "dir/inside", "system.posix_acl_access")
