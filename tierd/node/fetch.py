"""Fetches one chunk of a fill: from the source, by the open file that has just read what lies before, into the draft.

Contract: blocking, for the filler's workers; nothing is decided here.
"""

from __future__ import annotations

import os
import threading
from typing import Final

import xxhash

from tierd.node.cold_bytes import ColdBytes
from tierd.node.copies import CHUNK_BYTES, checksum
from tierd.node.fill import Fill
from tierd.stubs import Origin

BLOCK_BYTES: Final = 1 << 20
"""One read of the source and one write of the draft: small enough for a processor's cache."""


class Changed(Exception):
    """The source file is not the version that the fill began with; `str()` says since when."""


def fetch_chunk(fill: Fill, chunk: int, buffer: memoryview, lock: threading.Condition) -> int:
    """Copy a chunk that the caller took; how many bytes. `lock` guards the fill. Raises OSError, Changed."""
    with lock:
        fd = fill.lend_fd(chunk)
    if fd is None:
        fd = os.open(f"/proc/self/fd/{fill.source_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _copy(fill, fd, chunk, buffer)
    finally:
        with lock:
            fill.take_back_fd(fd, chunk + 1)


def fetch_cold_chunk(fill: Fill, chunk: int, buffer: memoryview, origin: Origin, cold: ColdBytes) -> int:
    """The same for a cold file, from its object. Raises OSError, ObjectError."""
    draft = fill.draft
    assert draft is not None
    start = chunk * CHUNK_BYTES
    content = buffer[: min(CHUNK_BYTES, fill.identity.size - start)]
    cold.fetch(origin, start, content)
    draft.write(content, start)
    draft.seal_chunk(chunk, checksum(content))
    return len(content)


def _copy(fill: Fill, fd: int, chunk: int, buffer: memoryview) -> int:
    draft = fill.draft
    assert draft is not None
    start = chunk * CHUNK_BYTES
    end = min(start + CHUNK_BYTES, fill.identity.size)
    digest = xxhash.xxh3_128()
    for offset in range(start, end, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, end - offset)]
        read_block(fd, block, offset)
        digest.update(block)
        draft.write(block, offset)
        if fill.over:
            return 0
    draft.seal_chunk(chunk, digest.digest())
    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
    return end - start


def read_block(fd: int, block: memoryview, offset: int) -> None:
    """Fill `block` from `offset`. Raises Changed if the file ends before."""
    have = 0
    while have < len(block):
        got = os.preadv(fd, [block[have:]], offset + have)
        if got == 0:
            raise Changed("it became shorter while it was read")
        have += got
