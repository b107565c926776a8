"""The file system under the overlay: blocking calls on a POSIX directory, for worker threads.

No inode numbers of ours, no caches, no asyncio here. Every name is resolved one component at a
time relative to a directory descriptor and without following links, so nothing can lead out of the
source. Descriptors of inodes are checked against the inode's key before use: a name that means
something else by now raises `Moved`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tierd.errors import UsageError
from tierd.node.caller import acting_as
from tierd.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, forced_stat, renameat2
from tierd.units import split

Key = int | tuple[int, int]
"""Identity of a source inode: its number, or (device, number) beyond the source's own device."""

_RACES_MAX = 3
_OPEN_FLAGS_KEPT = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
"""What of a pod's open flags reaches the source. Never O_APPEND (the kernel gives the offset, and a
repeated write must land on the same bytes) nor O_DIRECT (our buffers are not aligned)."""
_RENAMEAT2_FLAGS = {0, RENAME_NOREPLACE, RENAME_EXCHANGE}
_STEP_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_IO_BYTES_MAX = 1 << 30


ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
"""Extended attributes that carry POSIX ACLs, acl(5)."""


class Moved(OSError):
    """A name no longer means the inode it meant."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, os.strerror(errno.ESTALE))


class Ref(NamedTuple):
    """Where to find an inode: entry `name` of directory `fd`, or `fd` itself if `name` is None."""

    fd: int
    name: bytes | None
    key: Key


class Version(NamedTuple):
    """What identifies a file's content: size in bytes, modification and change time in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What a setattr request changes; None leaves a field alone. Times in nanoseconds since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Change(NamedTuple):
    """An inode's attributes before and after we changed something of it (its last link may be gone after)."""

    before: os.stat_result
    after: os.stat_result


About = Callable[[os.stat_result], None]
"""Is told of an inode just before something is done to it."""


class Creator(NamedTuple):
    """Whose a new file will be."""

    uid: int
    gid: int


def version_of(st: os.stat_result) -> Version:
    """The content version that a stat result describes."""
    return Version(st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def forced_version(fd: int) -> Version:
    """The version of an open file as the metadata server knows it now. See `forced_stat`."""
    return version_of(forced_stat(fd))


def read_at(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts, have = [data], len(data)
    while have < size and (more := os.pread(fd, size - have, offset + have)):
        parts.append(more)
        have += len(more)
    return b"".join(parts)


def write_at(fd: int, data: bytes, offset: int) -> int:
    """Write all of `data` at `offset`; the number of bytes that reached the source before an error."""
    done = 0
    view = memoryview(data)
    while done < len(data):
        try:
            done += os.pwrite(fd, view[done : done + _IO_BYTES_MAX], offset + done)
        except OSError:
            if done:
                return done
            raise
    return done


def flush(fd: int) -> None:
    """What close(2) of one of several descriptors means: errors of delayed writes come out here."""
    os.close(os.dup(fd))


class Root(NamedTuple):
    """The root of a source: a descriptor, its device and inode number, whether it keeps xattrs and POSIX ACLs."""

    fd: int
    device: int
    inode: int
    xattrs: bool
    acls: bool


def find_root(path: Path) -> Root:
    """The root of the source at `path`. Raises UsageError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"source {path}: {error.strerror}", hint="SOURCE must be a mounted directory tierd may read"
        ) from None
    st = os.fstat(fd)
    return Root(fd, st.st_dev, st.st_ino, _keeps(fd, b"user.tierd.probe"), _keeps(fd, ACL_NAMES[0]))


def _keeps(fd: int, attribute: bytes) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", attribute)
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True


class PosixSource:
    """A directory tree, such as a JuiceFS mount. Holds one descriptor of its root for life.

    `xattrs` and `acls` say whether it keeps extended attributes and POSIX ACLs (JuiceFS by default keeps neither).
    """

    def __init__(self, path: Path, root: Root | None = None) -> None:
        """`root` is what another process found of it (`find_root`): one that hangs cannot be asked."""
        self.path = path
        root = root or find_root(path)
        self.root_fd, self._device, self.root_inode = root.fd, root.device, root.inode
        self.xattrs, self.acls = root.xattrs, root.acls

    def close(self) -> None:
        """Give the root descriptor back."""
        os.close(self.root_fd)

    def key(self, st: os.stat_result) -> Key:
        """The identity of the inode that `st` describes."""
        return st.st_ino if st.st_dev == self._device else (st.st_dev, st.st_ino)

    # --- inodes that are already known ---

    def stat(self, ref: Ref) -> os.stat_result:
        """Attributes of the inode itself, never of a link's target. Raises Moved."""
        if ref.name is None:
            return os.fstat(ref.fd)
        try:
            st = self.lstat(ref.fd, ref.name)
        except (FileNotFoundError, NotADirectoryError):
            raise Moved from None
        if self.key(st) != ref.key:
            raise Moved
        return st

    def forced_stat(self, ref: Ref) -> os.stat_result:
        """`stat` past every attribute cache. Raises Moved; may hang as long as the source does."""
        try:
            st = forced_stat(ref.fd, ref.name or b"")
        except (FileNotFoundError, NotADirectoryError):
            raise Moved from None
        if self.key(st) != ref.key:
            raise Moved
        return st

    @contextlib.contextmanager
    def path_of(self, ref: Ref) -> Iterator[str]:
        """A path that reaches exactly this inode, link or not (`/proc/self/fd/N`, proc(5)). Raises Moved."""
        if ref.name is None:
            yield f"/proc/self/fd/{ref.fd}"
            return
        fd = self._open_checked(ref, os.O_PATH)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    def _open_checked(self, ref: Ref, flags: int) -> int:
        assert ref.name is not None
        try:
            fd = os.open(ref.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=ref.fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise Moved from None
            raise
        if self.key(os.fstat(fd)) != ref.key:
            os.close(fd)
            raise Moved
        return fd

    def open(self, ref: Ref, flags: int) -> tuple[int, Version]:
        """Open a regular file for what `flags` ask; its descriptor and its version just now. Raises Moved."""
        wanted = flags & _OPEN_FLAGS_KEPT & ~os.O_TRUNC
        if ref.name is None:
            fd = os.open(f"/proc/self/fd/{ref.fd}", wanted | os.O_CLOEXEC)
        else:
            fd = self._open_checked(ref, wanted)
        try:
            if flags & os.O_TRUNC:
                os.truncate(f"/proc/self/fd/{fd}", 0)
            return fd, forced_version(fd)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.ENOENT:  # JuiceFS says so of a file that was replaced this moment
                raise Moved from None
            raise

    def open_path(self, path: bytes, flags: int = os.O_RDONLY) -> int:
        """A descriptor of what lies at `path` relative to the source, through no link and no `..`. Raises OSError."""
        if b".." in path.split(b"/"):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        fd = os.dup(self.root_fd)
        for name in split(path):
            parent = fd
            try:
                fd = os.open(name, _STEP_FLAGS, dir_fd=parent)
            finally:
                os.close(parent)
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(fd)

    def open_dir(self, ref: Ref, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a directory: for listing, or with O_PATH for resolving names in it. Raises Moved."""
        if ref.name is None:
            return os.open(f"/proc/self/fd/{ref.fd}", flags | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._open_checked(ref, flags | os.O_DIRECTORY)

    def readlink(self, ref: Ref) -> bytes:
        """The target of a symbolic link."""
        fd = self._open_checked(ref, os.O_PATH)
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def setattr(self, ref: Ref, changes: Changes, fd: int | None) -> Change:
        """Apply `changes` in an order in which none undoes another.

        `fd`, if given, is the writable descriptor that the caller truncates through.
        """
        before = self.stat(ref)
        with self.path_of(ref) as path:
            if changes.size is not None:
                os.truncate(path if fd is None else fd, changes.size)
            if changes.uid is not None or changes.gid is not None:
                os.chown(path, _or_keep(changes.uid), _or_keep(changes.gid))
            if changes.mode is not None:
                os.chmod(path, stat.S_IMODE(changes.mode))
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                now = os.stat(path)
                atime = now.st_atime_ns if changes.atime_ns is None else changes.atime_ns
                mtime = now.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
                os.utime(path, ns=(atime, mtime))
            return Change(before, os.stat(path))

    def link(self, ref: Ref, dir_fd: int, name: bytes) -> Change:
        """One more name for the inode."""
        before = self.stat(ref)
        with self.path_of(ref) as path:
            os.link(path, name, dst_dir_fd=dir_fd, follow_symlinks=True)
        return Change(before, self.lstat(dir_fd, name))

    def getxattr(self, ref: Ref, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA if there is none."""
        with self.path_of(ref) as path:
            return os.getxattr(path, name)

    def listxattr(self, ref: Ref) -> list[bytes]:
        """The names of all extended attributes."""
        with self.path_of(ref) as path:
            return [os.fsencode(name) for name in os.listxattr(path)]

    def setxattr(self, ref: Ref, name: bytes, value: bytes) -> Change:
        """Set an extended attribute."""
        with self.path_of(ref) as path:
            before = os.stat(path)
            os.setxattr(path, name, value)
            return Change(before, os.stat(path))

    def removexattr(self, ref: Ref, name: bytes) -> Change:
        """Remove an extended attribute."""
        with self.path_of(ref) as path:
            before = os.stat(path)
            os.removexattr(path, name)
            return Change(before, os.stat(path))

    # --- names in a directory ---

    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result:
        """Attributes of an entry, of the link itself if it is one."""
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def lstat_and_open(self, dir_fd: int, name: bytes) -> tuple[os.stat_result, int | None]:
        """`lstat` of an entry and, if it is a regular file that can be had, a descriptor that holds that very file."""
        for _ in range(_RACES_MAX):
            st = self.lstat(dir_fd, name)
            if not stat.S_ISREG(st.st_mode):
                return st, None
            try:
                fd = self._open_checked(Ref(dir_fd, name, self.key(st)), os.O_RDONLY)
                return os.fstat(fd), fd
            except Moved:
                continue  # replaced in between
            except PermissionError:
                return st, None  # whoever opens it is told
        return self.lstat(dir_fd, name), None

    def list_names(self, dir_fd: int) -> list[bytes]:
        """All names in a directory, without `.` and `..`.

        The position of a descriptor is shared with its duplicates, and whoever died while it listed left it anywhere.
        """
        os.lseek(dir_fd, 0, os.SEEK_SET)
        return [os.fsencode(name) for name in os.listdir(dir_fd)]

    def lstat_many(self, dir_fd: int, names: list[bytes]) -> list[os.stat_result | None]:
        """`lstat` of each name; None for what is gone by now."""
        found: list[os.stat_result | None] = []
        for name in names:
            try:
                found.append(self.lstat(dir_fd, name))
            except FileNotFoundError:
                found.append(None)
        return found

    def create(
        self, dir_fd: int, name: bytes, flags: int, mode: int, owner: Creator
    ) -> tuple[int, os.stat_result, Version]:
        """Create and open a regular file that must not exist yet; EEXIST if it does."""
        with acting_as(*owner):
            wanted = (flags & _OPEN_FLAGS_KEPT) | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, wanted, mode, dir_fd=dir_fd)
        try:
            return fd, os.fstat(fd), forced_version(fd)
        except OSError:
            os.close(fd)
            raise

    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int, owner: Creator) -> os.stat_result:
        """A regular file, FIFO, socket or device node."""
        with acting_as(*owner):
            os.mknod(name, mode, rdev, dir_fd=dir_fd)
        return self.lstat(dir_fd, name)

    def mkdir(self, dir_fd: int, name: bytes, mode: int, owner: Creator) -> os.stat_result:
        """A directory."""
        with acting_as(*owner):
            os.mkdir(name, mode, dir_fd=dir_fd)
        return self.lstat(dir_fd, name)

    def symlink(self, dir_fd: int, name: bytes, target: bytes, owner: Creator) -> os.stat_result:
        """A symbolic link to `target`, which is stored as it is."""
        with acting_as(*owner):
            os.symlink(target, name, dir_fd=dir_fd)
        return self.lstat(dir_fd, name)

    def unlink(self, dir_fd: int, name: bytes, about: About = lambda st: None) -> Change:
        """Remove a name that is no directory; `about` is told of what it is before."""
        with self._observed(dir_fd, name) as (before, seen):
            about(before)
            os.unlink(name, dir_fd=dir_fd)
            return seen()

    def rmdir(self, dir_fd: int, name: bytes, about: About = lambda st: None) -> Change:
        """Remove an empty directory; `about` is told of what it is before."""
        st = self.lstat(dir_fd, name)
        about(st)
        os.rmdir(name, dir_fd=dir_fd)
        return Change(st, st)

    def rename(
        self,
        old_fd: int,
        old: bytes,
        new_fd: int,
        new: bytes,
        flags: int,
        about: Callable[[os.stat_result, os.stat_result | None], None] = lambda moved, replaced: None,
    ) -> tuple[Change, Change | None]:
        """renameat2(2); what became of what was at `old`, and of what stood at `new` before (None: nothing). `about` is
        told of both before.

        EINVAL where the source does not support a flag.
        """
        if flags not in _RENAMEAT2_FLAGS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with contextlib.ExitStack() as stack:
            found, moved = stack.enter_context(self._observed(old_fd, old))
            try:
                stood, replaced = stack.enter_context(self._observed(new_fd, new))
            except FileNotFoundError:
                stood, replaced = None, None
            about(found, stood)
            if flags == 0:
                os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            else:
                renameat2(old_fd, old, new_fd, new, flags)
            return moved(), replaced() if replaced is not None else None

    @contextlib.contextmanager
    def _observed(self, dir_fd: int, name: bytes) -> Iterator[tuple[os.stat_result, Callable[[], Change]]]:
        """Hold on to an inode while its name changes; what it is now, and what to call to be told what became of it."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            before = os.fstat(fd)
            yield before, lambda: Change(before, _stat_after(fd, before))
        finally:
            os.close(fd)

    def statvfs(self) -> os.statvfs_result:
        """Sizes and free space of the source."""
        return os.fstatvfs(self.root_fd)


def _stat_after(fd: int, before: os.stat_result) -> os.stat_result:
    """Attributes now; those of before if the inode went with its name and the source forgot it."""
    try:
        return os.fstat(fd)
    except OSError:
        return before


def _or_keep(identity: int | None) -> int:
    return -1 if identity is None else identity
