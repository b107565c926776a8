"""The system calls of the comparer, carried out on one tree: the overlay or the plain directory beside it.

A call is a name, a user and plain arguments, so that it can be done twice, printed, and done again later. Paths are
relative to the tree, open files and mappings are numbered slots.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from tests.integration.calls import renameat2

ATTRIBUTE = "user.test"
OTHER_USER = 1000
SET_TIMES_END_NS = 1_600_000_000_000_000_000
"""Times below are only ever set by `utimens`; later ones are a clock's, and differ between two trees."""


class Call(NamedTuple):
    """One operation; `uid` does it."""

    name: str
    uid: int
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        who = f" as {self.uid}" if self.uid else ""
        return f"{self.name}{self.arguments}{who}"


class Data(NamedTuple):
    """Bytes to write: short to print, different everywhere."""

    size: int
    seed: int

    def bytes(self) -> bytes:
        """All of them."""
        block = b"".join((self.seed * 1_000_003 + place).to_bytes(8, "little") for place in range(32))
        return (block * (self.size // len(block) + 1))[: self.size]


class Unused(Exception):
    """The slot is empty: the call cannot be made."""


class Side:
    """One of the two trees, with its open files and mappings."""

    def __init__(self, base: Path) -> None:
        self.base = str(base) + "/"
        self.files: dict[int, int] = {}
        self.maps: dict[int, mmap.mmap] = {}

    def do(self, call: Call) -> Any:
        """What the call returned, or the name of its errno; `Unused` as a value, too."""
        try:
            with acting_as(call.uid):
                return getattr(self, call.name)(*call.arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        except Unused:
            return "unused"

    def close_all(self) -> None:
        """Give back what is open."""
        for mapping in self.maps.values():
            mapping.close()
        for fd in self.files.values():
            os.close(fd)
        self.maps.clear()
        self.files.clear()

    def at(self, path: str) -> str:
        """Where a path of the tree is."""
        return self.base + path

    def fd(self, slot: int) -> int:
        """The descriptor in a slot."""
        if slot not in self.files:
            raise Unused
        return self.files[slot]

    # --- open files ---

    def open(self, slot: int, path: str, flags: int, mode: int) -> str:
        fd = os.open(self.at(path), flags, mode)
        if slot in self.files:
            os.close(self.files[slot])
        self.files[slot] = fd
        return "opened"

    def close(self, slot: int) -> None:
        os.close(self.fd(slot))
        del self.files[slot]

    def read(self, slot: int, size: int) -> bytes:
        return os.read(self.fd(slot), size)

    def pread(self, slot: int, size: int, offset: int) -> bytes:
        return os.pread(self.fd(slot), size, offset)

    def write(self, slot: int, data: Data) -> tuple[int, int]:
        fd = self.fd(slot)
        return os.write(fd, data.bytes()), os.lseek(fd, 0, os.SEEK_CUR)

    def pwrite(self, slot: int, data: Data, offset: int) -> int:
        return os.pwrite(self.fd(slot), data.bytes(), offset)

    def lseek(self, slot: int, offset: int, whence: int) -> int | str:
        if stat.S_ISDIR(os.fstat(self.fd(slot)).st_mode):
            return "positions in directories are the file system's own"
        return os.lseek(self.fd(slot), offset, whence)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.fd(slot), size)

    def fsync(self, slot: int) -> None:
        os.fsync(self.fd(slot))

    def fstat(self, slot: int) -> Any:
        return told(os.fstat(self.fd(slot)))

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.fd(slot), mode)

    def fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self.fd(slot), uid, gid)

    def futimens(self, slot: int, at_ns: int) -> Any:
        os.utime(self.fd(slot), ns=(at_ns, at_ns))
        return told(os.fstat(self.fd(slot)))

    def fsetxattr(self, slot: int, value: bytes) -> list[str]:
        os.setxattr(self.fd(slot), ATTRIBUTE, value)
        return os.listxattr(self.fd(slot))

    # --- mappings ---

    def map(self, slot: int, of: int, writable: bool) -> str:
        fd = self.fd(of)
        if os.fstat(fd).st_size == 0:
            return "empty"
        old = self.maps.pop(slot, None)
        if old is not None:
            old.close()
        self.maps[slot] = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        return "mapped"

    def mapped(self, slot: int, offset: int, size: int) -> tuple[mmap.mmap, int]:
        """A mapping, and where a range of it ends that the file still has: beyond is SIGBUS."""
        if slot not in self.maps:
            raise Unused
        found = self.maps[slot]
        return found, min(len(found), found.size(), offset + size)

    def map_read(self, slot: int, offset: int, size: int) -> bytes:
        found, end = self.mapped(slot, offset, size)
        return found[offset:end]

    def map_write(self, slot: int, offset: int, data: Data, sync: bool) -> int:
        found, end = self.mapped(slot, offset, data.size)
        if offset < end:
            try:
                found[offset:end] = data.bytes()[: end - offset]
            except TypeError:  # mapped for reading
                return -1
        if sync:
            found.flush()
        return max(0, end - offset)

    def unmap(self, slot: int) -> None:
        if slot not in self.maps:
            raise Unused
        self.maps.pop(slot).close()

    # --- names ---

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.at(path))

    def rename(self, old: str, new: str, flags: int) -> None:
        renameat2(Path(self.at(old)), Path(self.at(new)), flags)

    def link(self, old: str, new: str) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: str) -> str:
        return os.readlink(self.at(path))

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.at(path)))

    # --- attributes ---

    def lstat(self, path: str) -> Any:
        return told(os.lstat(self.at(path)))

    def stat(self, path: str) -> Any:
        return told(os.stat(self.at(path)))

    def access(self, path: str, wanted: int) -> bool:
        return os.access(self.at(path), wanted, effective_ids=True)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.at(path), size)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self.at(path), uid, gid)

    def utimens(self, path: str, at_ns: int, follow: bool) -> Any:
        os.utime(self.at(path), ns=(at_ns, at_ns), follow_symlinks=follow)
        return told(os.stat(self.at(path), follow_symlinks=follow))

    def touch(self, path: str) -> None:
        os.utime(self.at(path))

    def setxattr(self, path: str, value: bytes, flags: int) -> None:
        os.setxattr(self.at(path), ATTRIBUTE, value, flags, follow_symlinks=False)

    def getxattr(self, path: str) -> tuple[list[str], bytes]:
        return os.listxattr(self.at(path)), os.getxattr(self.at(path), ATTRIBUTE)

    def removexattr(self, path: str) -> None:
        os.removexattr(self.at(path), ATTRIBUTE)

    def statvfs(self, path: str) -> tuple[int, int, int]:
        found = os.statvfs(self.at(path))
        return found.f_frsize, found.f_blocks, found.f_namemax


@contextlib.contextmanager
def acting_as(uid: int) -> Any:
    """Be another user for one call. Of the whole process: only for one that has no other threads."""
    if uid == 0:
        yield
        return
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


MTIME = 5


def told(found: os.stat_result) -> tuple[Any, ...]:
    """What stat(2) must say alike on both sides; a time only where somebody set it."""
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    mtime = found.st_mtime_ns if found.st_mtime_ns < SET_TIMES_END_NS else None
    return stat.filemode(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size, mtime


def whole(base: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below `base`: what stat tells, contents, extended attributes, and which names are one file."""
    found: dict[str, tuple[Any, ...]] = {}
    linked: list[str] = []

    def enter(directory: str, prefix: str) -> None:
        for name in sorted(os.listdir(directory)):
            path = f"{directory}/{name}"
            seen = os.lstat(path)
            inner: Any = None
            if stat.S_ISLNK(seen.st_mode):
                inner = os.readlink(path)
            elif stat.S_ISREG(seen.st_mode):
                inner = Path(path).read_bytes()
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in attributes_of(path)}
            found[prefix + name] = (*told(seen), inner, attributes)
            if stat.S_ISDIR(seen.st_mode):
                enter(path, f"{prefix}{name}/")
            elif seen.st_nlink > 1:
                linked.append(prefix + name)

    enter(str(base), "")
    # After all opens: an open may give a file another number.
    numbers = {name: os.lstat(f"{base}/{name}").st_ino for name in linked}
    for name, number in numbers.items():
        found[name] += (tuple(sorted(other for other, its in numbers.items() if its == number)),)
    return found


def attributes_of(path: str) -> list[str]:
    """The names of extended attributes; none where the file system keeps none."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []
