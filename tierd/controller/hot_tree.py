"""The source of models, as the controller reaches it: by descriptors, beneath its root, never through a link.

Blocking, any thread. Decides nothing; what is in a model is found out by `hot_scan.py`, what is done with it by
`stubbing.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from tierd.errors import UsageError
from tierd.syscalls import forced_stat

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_PRIVATE_MODE: Final = 0o700


class HotTree:
    """A directory tree, such as a JuiceFS mount. Paths are bytes relative to its root; the empty one is the root."""

    def __init__(self, root: Path) -> None:
        """Raises UsageError."""
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"source {root}: {error.strerror}", hint="name a mounted directory") from None
        self.device = os.fstat(self._fd).st_dev

    def close(self) -> None:
        """Give the root's descriptor back."""
        os.close(self._fd)

    @contextmanager
    def directory(self, path: bytes, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory; `make` makes it, for us alone. Raises OSError, also if a link is on the way."""
        fd = os.dup(self._fd)
        try:
            for name in path.split(b"/") if path else []:
                below = _step(fd, name, make)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

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
