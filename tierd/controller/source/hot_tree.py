"""The source of models, as the controller reaches it: by descriptors, beneath its root, never through a link.

Blocking, any thread. Decides nothing; what is in a model is found out by `hot_scan.py`, what is done with it by
`stubbing.py`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from tierd.errors import UsageError
from tierd.stubs import RESERVED
from tierd.syscalls import RENAME_NOREPLACE, forced_stat, renameat2

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_DISCONNECTED: Final = (errno.ENOTCONN, errno.ESTALE)
"""Of a mount whose process died: what is mounted there by now has another root."""
_PRIVATE_MODE: Final = 0o700
_IDENTITY: Final = b"source-id"
_IDENTITY_BYTES_MAX: Final = 64


class HotTree:
    """A directory tree, such as a JuiceFS mount. Paths are bytes relative to its root; the empty one is the root."""

    def __init__(self, root: Path) -> None:
        """Raises UsageError."""
        self.root = root
        self._lock = threading.Lock()
        try:
            self._fd = self._opened()
        except OSError as error:
            raise UsageError(f"source {root}: {error.strerror}", hint="name a mounted directory") from None
        self.device = os.fstat(self._fd).st_dev

    def close(self) -> None:
        """Give the root's descriptor back."""
        os.close(self._fd)

    def _opened(self) -> int:
        return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _open_again(self) -> None:
        """What is mounted there now; `identity` tells whether that is still the same source. Raises OSError."""
        with self._lock:
            fd = self._opened()
            try:
                self.device = os.fstat(fd).st_dev
                os.dup2(fd, self._fd, inheritable=False)
            finally:
                os.close(fd)

    def identity(self, *, make: bool = False) -> str | None:
        """What this source is called, and no other, wherever it is mounted; None if nobody gave it a name yet.

        A directory that nothing is mounted on looks like a source from which everything was removed. Raises OSError.
        """
        with self.directory_if_there(RESERVED) as fd:
            found = _read_identity(fd) if fd is not None else None
        if found is not None or not make:
            return found
        with self.directory(RESERVED, make=True) as fd:
            _write_identity(fd)
            return _read_identity(fd)

    @contextmanager
    def directory(self, path: bytes, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory; `make` makes it, for us alone. Raises OSError, also if a link is on the way."""
        try:
            fd = self._walk(path, make)
        except OSError as error:
            if error.errno not in _DISCONNECTED:
                raise
            self._open_again()
            fd = self._walk(path, make)
        try:
            yield fd
        finally:
            os.close(fd)

    def _walk(self, path: bytes, make: bool) -> int:
        fd = os.dup(self._fd)
        try:
            if not path:
                os.fstat(fd)  # the steps would tell that nobody is there
            for name in path.split(b"/") if path else []:
                below = _step(fd, name, make)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextmanager
    def directory_if_there(self, path: bytes) -> Iterator[int | None]:
        """The same; None if there is none."""
        with ExitStack() as stack:
            fd: int | None = None
            try:
                fd = stack.enter_context(self.directory(path))
            except OSError as error:
                if error.errno not in _GONE:
                    raise
            yield fd

    def remove_empty(self, path: bytes) -> None:
        """Remove a directory and those in it, as far as nothing else is in them."""
        with self.directory_if_there(path) as fd:
            if fd is None:
                return
            for entry in os.listdir(fd):
                self.remove_empty(path + b"/" + os.fsencode(entry))
        above, name = split(path)
        with self.directory(above) as parent, suppress(OSError):  # not empty, or a file: it stays
            os.rmdir(name, dir_fd=parent)


def _step(fd: int, name: bytes, make: bool) -> int:
    if name in (b"", b".", b".."):
        raise PermissionError(errno.EPERM, f"{name!r} is no name")
    try:
        return os.open(name, _DIRECTORY, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, _PRIVATE_MODE, dir_fd=fd)
        os.fsync(fd)
    return os.open(name, _DIRECTORY, dir_fd=fd)


def _read_identity(fd: int) -> str | None:
    try:
        opened = os.open(_IDENTITY, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return None
    with open(opened, "rb") as file:
        return file.read(_IDENTITY_BYTES_MAX).decode("ascii", "replace").strip()


def _write_identity(fd: int) -> None:
    """Whole or not at all; whoever is first names it."""
    name = uuid4().hex.encode()
    draft = _IDENTITY + b"." + name
    opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=fd)
    with open(opened, "wb") as file:
        file.write(name + b"\n")
        file.flush()
        os.fsync(opened)
    try:
        renameat2(fd, draft, fd, _IDENTITY, RENAME_NOREPLACE)
    except FileExistsError:
        os.unlink(draft, dir_fd=fd)
    os.fsync(fd)


def split(path: bytes) -> tuple[bytes, bytes]:
    """The directory of a path, and its name there."""
    above, _, name = path.rpartition(b"/")
    return above, name


def joined(above: bytes, path: bytes) -> bytes:
    """`path` below `above`; either may be empty."""
    return b"/".join(part for part in (above, path) if part)


def stat_of(fd: int, name: bytes) -> os.stat_result | None:
    """What a name in a directory means now, past all caches; None if nothing."""
    try:
        return forced_stat(fd, name)
    except FileNotFoundError:
        return None


def is_inode(st: os.stat_result | None, inode: int | None) -> bool:
    """True if something is there, and has this number."""
    return st is not None and st.st_ino == inode
