"""Stubs on disk: made, marked, locked, and the files that say what they stand for. Shared by node and controller.

Blocking, any thread. What they are and how it is written down: `stubs.py`. What a name of the overlay means where
there are stubs is the node's business.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import structlog

from tierd.stubs import COLD_MARK, ORIGINS, ORIGINS_BYTES_MAX, RESERVED, STUBS, Origin, OriginsDamaged, decode, encode

log = structlog.get_logger(__name__)

_MODE = 0o755
_LOCK_TRIES = 32


def is_cold(st: os.stat_result) -> bool:
    """A stub has the mark; one that has its own bytes again has not."""
    return bool(st.st_mode & COLD_MARK)


@contextmanager
def locked(path: str, *, wait: bool = True) -> Iterator[int]:
    """A descriptor of a stub that nobody else on any node brings bytes to, flock(2). Waits for whoever does; raises
    BlockingIOError if that is not wanted.

    JuiceFS 0.14 on an SQL database answers EIO if the number that the kernel made up for the owner of the lock, the
    open file, is above 2**63, as half of them are. So other open files are tried, beside those that did not do.
    """
    with ExitStack() as opened:
        yield _lock(path, opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(path: str, opened: ExitStack, how: int) -> int:
    left = _LOCK_TRIES
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        try:
            fcntl.flock(fd, how)
        except OSError as error:
            left -= 1
            if error.errno != errno.EIO or not left:
                raise
        else:
            return fd


def warm(fd: int) -> None:
    """From now on a stub has its own bytes. The caller has it locked."""
    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & ~COLD_MARK)


def make_layer(dir_fd: int) -> None:
    """Make what stubs need in a directory, as far as it is not there."""
    for path in (RESERVED, RESERVED + b"/" + STUBS, RESERVED + b"/" + ORIGINS):
        with suppress(FileExistsError):
            os.mkdir(path, _MODE, dir_fd=dir_fd)


def remove_layer(dir_fd: int) -> None:
    """Remove a layer without stubs. Raises OSError (ENOTEMPTY) if there is one."""
    with suppress(FileNotFoundError):
        os.rmdir(RESERVED + b"/" + STUBS, dir_fd=dir_fd)
    with suppress(FileNotFoundError):
        fd = os.open(RESERVED + b"/" + ORIGINS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            for name in os.listdir(fd):
                os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(RESERVED + b"/" + ORIGINS, dir_fd=dir_fd)
    with suppress(FileNotFoundError):
        os.rmdir(RESERVED, dir_fd=dir_fd)


def write_origins(base: int, origins: dict[int, Origin]) -> None:
    """One more file of origins in a directory's `.tierd`, whole or not at all; it overrules those before."""
    name = b"%020d-%s.json" % (time.time_ns(), secrets.token_hex(4).encode())
    path, draft = ORIGINS + b"/" + name, ORIGINS + b"/" + name + b".new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=base)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(encode(origins))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(draft, path, src_dir_fd=base, dst_dir_fd=base)


def read_origins(fd: int) -> dict[int, Origin]:
    """All that a directory of origins says. What is damaged is logged, and not known."""
    found: dict[int, Origin] = {}
    for name in sorted(name for name in os.listdir(fd) if name.endswith(".json")):
        try:
            with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
                found.update(decode(file.read(ORIGINS_BYTES_MAX)))
        except FileNotFoundError:
            continue
        except (OSError, OriginsDamaged) as error:
            log.error("origins_damaged", file=name, reason=str(error), consequence="its cold files cannot be read")
    return found
