"""Checksums of an object's chunks, by which each range that is read can be told right from wrong. Pure.

S3 gives no checksum of a range, so a byte that flips on the way would go unnoticed. XXH3-128 of each 4 MiB: the chunks
and sums of the node tier (`node/copies.py`). They are an object of their own beside the object (`.tierd/sums/KEY`),
and an object of one chunk needs none: its SHA-256 will do. See docs/decisions/0011-object-checksums.md.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, NamedTuple

import xxhash

from tierd.objects.store import Stored

CHUNK_BYTES: Final = 4 << 20
SUM_BYTES: Final = 16
_DIGEST_BYTES: Final = 32
_MAGIC: Final = "tierd sums 1"
_HEADER: Final = re.compile(rb"tierd sums 1 (0|[1-9][0-9]{0,18}) ([0-9a-f]{64})")
_HEADER_BYTES_MAX: Final = 128


class SumsDamaged(ValueError):
    """Checksums are not what was written; the text says why."""


class Sums(NamedTuple):
    """Of which bytes, and the sums of their chunks one after the other."""

    stored: Stored
    sums: bytes

    def encode(self) -> bytes:
        """One line that says of what, the sums, and the SHA-256 of all that."""
        body = _header(self.stored) + self.sums
        return body + hashlib.sha256(body).digest()

    def matches(self, chunk: int, content: memoryview) -> bool:
        """True if this is that chunk of the object."""
        return xxhash.xxh3_128_digest(content) == self.sums[chunk * SUM_BYTES : (chunk + 1) * SUM_BYTES]


class WholeSum(NamedTuple):
    """Stands for the sums of an object of one chunk."""

    stored: Stored

    def matches(self, chunk: int, content: memoryview) -> bool:
        """True if these are all bytes of the object."""
        return chunk == 0 and hashlib.sha256(content).hexdigest() == self.stored.sha256


AnySums = Sums | WholeSum


def chunks_of(size: int) -> int:
    """How many chunks an object of that size has."""
    return -(-size // CHUNK_BYTES)


def encoded_bytes(size: int) -> int:
    """How long the checksums of an object of that size are, written down."""
    return len(_header(Stored(size, "0" * 64))) + chunks_of(size) * SUM_BYTES + _DIGEST_BYTES


def _header(stored: Stored) -> bytes:
    return f"{_MAGIC} {stored.size} {stored.sha256}\n".encode()


def decode(content: bytes) -> Sums:
    """What `Sums.encode` wrote. Raises SumsDamaged."""
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise SumsDamaged("their own checksum does not match")
    line, newline, sums = body[:_HEADER_BYTES_MAX].partition(b"\n")
    match = _HEADER.fullmatch(line)
    if match is None or not newline:
        raise SumsDamaged("they are in a format that this release does not know")
    stored = Stored(int(match[1]), match[2].decode())
    sums = body[len(line) + 1 :]
    if len(sums) != chunks_of(stored.size) * SUM_BYTES:
        raise SumsDamaged(f"{len(sums)} bytes of them are too few or too many for {stored.size} bytes")
    return Sums(stored, sums)


class Summing:
    """Takes bytes in their order; knows their SHA-256 and the sums of their chunks at the end. For one thread."""

    def __init__(self) -> None:
        self._size = 0
        self._whole = hashlib.sha256()
        self._sums = bytearray()
        self._chunk = xxhash.xxh3_128()

    def add(self, content: memoryview) -> None:
        """The next bytes, as many as there are."""
        self._whole.update(content)
        while content:
            missing = CHUNK_BYTES - self._size % CHUNK_BYTES
            piece, content = content[:missing], content[missing:]
            self._chunk.update(piece)
            self._size += len(piece)
            if len(piece) == missing:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._sums += self._chunk.digest()
        self._chunk.reset()

    def end(self) -> Sums:
        """That was all."""
        if self._size % CHUNK_BYTES:
            self._end_chunk()
        return Sums(Stored(self._size, self._whole.hexdigest()), bytes(self._sums))
