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
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import structlog

from tierd.stubs import COLD_MARK, ORIGINS, ORIGINS_BYTES_MAX, RESERVED, STUBS, Origin, OriginsDamaged, decode, encode
from tierd.syscalls import forced_stat

log = structlog.get_logger(__name__)

_MODE = 0o755
_LOCK_TRIES = 32
_RACES_MAX = 3
_ASIDE = b"origins."
_NUMBER_DIGITS = 20


def is_cold(st: os.stat_result) -> bool:
    """A stub has the mark; one that has its own bytes again has not."""
    return bool(st.st_mode & COLD_MARK)


def mtime_of(st: os.stat_result) -> int:
    """The modification time of what a stub stands for, in nanoseconds.

    As soon as it has bytes, which come or did not all come, its own is of no use: then the time of its last access says
    what the other one was. Both were set to that before the first byte, and no byte of a cold stub is ever read.
    """
    return st.st_atime_ns if is_cold(st) and st.st_size else st.st_mtime_ns


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
    os.fchmod(fd, stat.S_IMODE(forced_stat(fd).st_mode) & ~COLD_MARK)


def make_layer(dir_fd: int) -> None:
    """Make what stubs need in a directory, as far as it is not there."""
    for left in reversed(range(_RACES_MAX)):
        try:
            for path in (RESERVED, RESERVED + b"/" + STUBS, RESERVED + b"/" + ORIGINS):
                with suppress(FileExistsError):
                    os.mkdir(path, _MODE, dir_fd=dir_fd)
            return
        except FileNotFoundError:  # somebody removes a layer that he found empty
            if not left:
                raise


def remove_layer(dir_fd: int) -> None:
    """Remove a layer without stubs. Raises OSError (ENOTEMPTY) if there is one.

    Others may make stubs here meanwhile: first the directory of stubs, then what they stand for, then the stubs. So
    what stubs stood for is set aside first, and given back if there is a directory of stubs again.
    """
    _give_back(dir_fd)
    with suppress(FileNotFoundError):
        os.rmdir(RESERVED + b"/" + STUBS, dir_fd=dir_fd)
    aside = RESERVED + b"/" + _ASIDE + secrets.token_hex(4).encode()
    with suppress(FileNotFoundError):
        os.rename(RESERVED + b"/" + ORIGINS, aside, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        if _exists(dir_fd, RESERVED + b"/" + STUBS):
            _give_back(dir_fd)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        with _opened(dir_fd, aside) as fd:
            for name in os.listdir(fd):
                os.unlink(name, dir_fd=fd)
        os.rmdir(aside, dir_fd=dir_fd)
    with suppress(FileNotFoundError):
        os.rmdir(RESERVED, dir_fd=dir_fd)


def _give_back(dir_fd: int) -> None:
    """Also what somebody set aside who was killed then."""
    with suppress(FileNotFoundError), _opened(dir_fd, RESERVED) as base:
        for aside in (name for name in map(os.fsencode, os.listdir(base)) if name.startswith(_ASIDE)):
            with suppress(FileExistsError):
                os.mkdir(ORIGINS, _MODE, dir_fd=base)
            with _opened(base, aside) as fd, _opened(base, ORIGINS) as origins:
                for name in os.listdir(fd):
                    os.rename(name, name, src_dir_fd=fd, dst_dir_fd=origins)
            os.rmdir(aside, dir_fd=base)


def _exists(dir_fd: int, path: bytes) -> bool:
    with suppress(FileNotFoundError):
        forced_stat(dir_fd, path)
        return True
    return False


@contextmanager
def _opened(dir_fd: int, path: bytes) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def write_origins(base: int, origins: Mapping[int, Origin]) -> None:
    """One more file of origins in a directory's `.tierd`, whole or not at all; it overrules those before.

    Those of a clock that went ahead, too: what an inode stood for whose number is used again would be read for it.
    """
    number = max(time.time_ns(), _latest(base) + 1)
    _write(base, b"%020d-%s.json" % (number, secrets.token_hex(4).encode()), encode(origins))


def _latest(base: int) -> int:
    with _opened(base, ORIGINS) as fd:
        return max((int(name[:_NUMBER_DIGITS]) for name in _files_of(fd) if name[:_NUMBER_DIGITS].isdigit()), default=0)


def drop_origins(base: int, inodes: Collection[int]) -> None:
    """Forget what these inodes stood for, by one file instead of all that there are. Those that come meanwhile stay.

    Nothing is forgotten where a file is damaged: what it says may yet be found out.
    """
    with _opened(base, ORIGINS) as fd:
        names = _files_of(fd)
        found: dict[int, Origin] = {}
        try:
            for name in names:
                found.update(_read(fd, name))
        except (OSError, OriginsDamaged):
            return
        kept = {inode: origin for inode, origin in found.items() if inode not in inodes}
        data = encode(kept)
        if len(kept) == len(found) or len(data) > ORIGINS_BYTES_MAX:
            return
        if kept:  # in the order of names it is where those were, and overrules no later one
            stem = names[-1].removesuffix(b".json").partition(b"+")[0]
            _write(base, b"%s+%s.json" % (stem, secrets.token_hex(4).encode()), data)
            os.fsync(fd)
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)


def _write(base: int, name: bytes, data: bytes) -> None:
    path, draft = ORIGINS + b"/" + name, ORIGINS + b"/" + name + b".new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=base)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(draft, path, src_dir_fd=base, dst_dir_fd=base)


def read_origins(fd: int) -> dict[int, Origin]:
    """All that a directory of origins says. What is damaged is logged, and not known."""
    found: dict[int, Origin] = {}
    for name in _files_of(fd):
        try:
            found.update(_read(fd, name))
        except FileNotFoundError:
            continue
        except (OSError, OriginsDamaged) as error:
            told, consequence = os.fsdecode(name), "its cold files cannot be read"
            log.error("origins_damaged", file=told, reason=str(error), consequence=consequence)
    return found


def _files_of(fd: int) -> list[bytes]:
    return sorted(name for name in map(os.fsencode, os.listdir(fd)) if name.endswith(b".json"))


def _read(fd: int, name: bytes) -> dict[int, Origin]:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
        return decode(file.read(ORIGINS_BYTES_MAX))
