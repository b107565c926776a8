"""One copy on disk: its two files, whose bytes it says it holds, and the seal that tells whether it still does.

A copy is two files of one directory: `NAME` holds exactly the source's bytes, so that the kernel can serve it;
`NAME.meta` says whose bytes they are and seals them. A draft is `NAME.fill`. The *seal* is the data file's own inode
number, size, mtime and ctime after the rename: any change by hand, also one that sets mtime back, changes ctime
(inode(7)), so each open can tell for the price of an fstat. Flips below the file system are found by the checksums.

Contract: blocking, for worker threads. Which copies there are, and in which order they come and go: see `store.py`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any, Final, NamedTuple

import xxhash

from tierd.syscalls import begin_writeback
from tierd.units import display

CHUNK_BYTES: Final = 4 << 20
"""What one checksum covers and one fill request reads: JuiceFS's block size."""
_FORMAT: Final = 1
_MAGIC: Final = b"tierd copy "
SUM_BYTES: Final = 16
META, FILL = ".meta", ".fill"
"""Endings of the file that seals a copy, and of a file that is not whole yet."""
_META_BYTES_MAX: Final = 64 << 20

OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""What lies there may be anything by now: no link is followed, and a pipe is not waited for."""


class Identity(NamedTuple):
    """One content version of a source file: inode number, size in bytes, times in nanoseconds."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def same_bytes_likely(self, other: Identity) -> bool:
        """True if all but ctime agree: a chmod, or a write with the time set back. The checksums decide."""
        return self[:3] == other[:3]


class Seal(NamedTuple):
    """The data file as it was committed."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Damaged(Exception):
    """A copy is not what was committed; `str()` says what is wrong."""


class Removed(Damaged):
    """A copy is not there any more, and nothing is wrong with that."""

    def __init__(self) -> None:
        super().__init__("was removed")


class Copy:
    """A committed copy. Immutable but for what it is a copy of, which `Store.relabel` replaces as a whole."""

    __slots__ = ("identity", "model", "name", "path", "removed", "seal")

    def __init__(self, name: str, identity: Identity, path: bytes, model: bytes, seal: Seal) -> None:
        self.name = name
        self.identity = identity
        self.path = path
        self.model = model
        self.seal = seal
        self.removed = False


class Draft:
    """A copy in the making: space is reserved for all of it, chunks are written in any order.

    Contract: each chunk is written by one thread; `Store.commit` or `Store.abandon` ends it. `fd` stays open until
    `close`, because readers are served from it.
    """

    def __init__(self, name: str, identity: Identity, path: bytes, model: bytes, fd: int) -> None:
        self.name = name
        self.identity = identity
        self.path = path
        self.model = model
        self.fd = fd
        self.sums = bytearray(SUM_BYTES * chunk_count(identity.size))

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes. Raises OSError."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)

    def seal_chunk(self, chunk: int, digest: bytes) -> None:
        """All bytes of a chunk were written; their `checksum`. Their way to the disk begins now."""
        self.sums[chunk * SUM_BYTES : (chunk + 1) * SUM_BYTES] = digest
        begin_writeback(self.fd, chunk * CHUNK_BYTES, CHUNK_BYTES)

    def close(self) -> None:
        """No reader needs it any longer."""
        os.close(self.fd)


def chunk_count(size: int) -> int:
    """How many chunks a file of `size` bytes has."""
    return -(-size // CHUNK_BYTES)


def checksum(data: memoryview) -> bytes:
    """XXH3, 128 bits (https://xxhash.com): against accidents, not against forgers; the directory is 0700."""
    return xxhash.xxh3_128_digest(data)


def seal_of(st: os.stat_result) -> Seal:
    """The seal that a data file has now."""
    return Seal(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def write_meta(dir_fd: int, copy: Copy, sums: bytes) -> None:
    """Seal a copy whose data file is in its place, with its chunks' checksums. Raises OSError."""
    header = {
        "format": _FORMAT,
        "path": display(copy.path),
        "model": display(copy.model),
        "identity": list(copy.identity),
        "chunk_bytes": CHUNK_BYTES,
        "seal": list(copy.seal),
    }
    body = _MAGIC + json.dumps(header).encode("ascii") + b"\n" + sums
    temporary = copy.name + META + FILL
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        with open(fd, "wb") as file:
            file.write(body + checksum(memoryview(body)))
            file.flush()
            os.fsync(fd)
        os.rename(temporary, copy.name + META, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise


def read_meta(dir_fd: int, name: str) -> tuple[dict[str, Any], bytes]:
    """The header and the chunk checksums. Raises OSError, ValueError."""
    fd = os.open(name + META, OPEN_FLAGS, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        data = file.read(_META_BYTES_MAX)
    body, own = data[:-SUM_BYTES], data[-SUM_BYTES:]
    if not body.startswith(_MAGIC) or checksum(memoryview(body)) != own:
        raise ValueError("its .meta file is damaged")
    line, _, sums = body[len(_MAGIC) :].partition(b"\n")
    header = json.loads(line)
    if header.get("format") != _FORMAT or header.get("chunk_bytes") != CHUNK_BYTES:
        raise ValueError("its format is another version's")
    return header, sums


def load_copy(dir_fd: int, name: str) -> Copy:
    """The copy of this name, as its `.meta` tells. Raises OSError, ValueError, and more if that is nonsense."""
    header, sums = read_meta(dir_fd, name)
    identity, seal = Identity(*header["identity"]), Seal(*header["seal"])
    if seal_of(os.stat(name, dir_fd=dir_fd, follow_symlinks=False)) != seal or seal.size != identity.size:
        raise ValueError("it was changed by hand or torn by a crash")
    if len(sums) != SUM_BYTES * chunk_count(identity.size):
        raise ValueError("its checksums are incomplete")
    return Copy(name, identity, _bytes(header["path"]), _bytes(header["model"]), seal)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
