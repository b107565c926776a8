"""Packs a PNG file anew, without loss: the same pixels, all other chunks as they were, in fewer bytes. Pure but `main`.

Only the compressed pixels (IDAT) are made anew, by Pillow; text, profiles, orientation, palette and what else a file
carries is copied byte by byte. What cannot be kept so is refused and stays as it is: animations, pixels that Pillow
would convert (16 bits a colour), chunks that depend on the bytes of others, such as signatures.

Files come from users. So this runs as a process of its own (`recoding.py`), with little memory and time: input on
standard input, result on standard output, exit 3 and one line for what stays.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

STAYS: Final = 3
"""The exit status for a file that stays as it is."""
PIXELS_MAX: Final = 50_000_000
_MEMORY_BYTES_MAX: Final = 2 << 30
_CPU_SECONDS_MAX: Final = 120
_NICE: Final = 10
_LEVEL: Final = 9
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CRITICAL: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_ANIMATED: Final = (b"acTL", b"fcTL", b"fdAT")
_KNOWN: Final = (
    b"cHRM",
    b"gAMA",
    b"iCCP",
    b"sBIT",
    b"sRGB",
    b"cICP",
    b"mDCV",
    b"cLLI",
    b"bKGD",
    b"hIST",
    b"tRNS",
    b"tIME",
)
"""Of the PNG specification (third edition, 11.3): they are about the pixels, and these stay."""
_UNSAFE_TO_COPY: Final = 0x20
"""Is not set in the fourth letter of a chunk's type if that depends on the bytes of others (specification, 5.4)."""
_INTERLACE: Final = 12
"""Where IHDR says whether pixels are interlaced: that is lost, and no pixel with it."""


class Stays(Exception):
    """A file that cannot be packed anew; `str()` says why."""


class Chunk(NamedTuple):
    """Of a PNG file; `raw` is all of it."""

    kind: bytes
    data: bytes
    raw: bytes


def recode(content: bytes) -> bytes:
    """The same image in other bytes. Raises Stays."""
    chunks = list(_chunks(content))
    _refuse(chunks)
    packed = list(_chunks(_packed(content)))
    header = _header(chunks[0], packed[0])
    result = b"".join(_joined(chunks, header, [chunk.raw for chunk in packed if chunk.kind == b"IDAT"]))
    if _look(content) != _look(result):
        raise Stays("the pixels would not be the same")
    return result


def _chunks(content: bytes) -> Iterator[Chunk]:
    """Raises Stays for what is no whole PNG file."""
    if not content.startswith(_SIGNATURE):
        raise Stays("it is no PNG file")
    offset, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        head = content[offset : offset + 8]
        if len(head) < 8:
            raise Stays("it ends early")
        length, kind = struct.unpack(">I4s", head)
        raw = content[offset : offset + length + 12]
        if len(raw) < length + 12:
            raise Stays("it ends early")
        if zlib.crc32(raw[4:-4]) != int.from_bytes(raw[-4:], "big"):
            raise Stays(f"its chunk {kind!r} is damaged")
        yield Chunk(kind, raw[8:-4], raw)
        offset += len(raw)
    if offset != len(content):
        raise Stays("there is something behind its end")


def _refuse(chunks: list[Chunk]) -> None:
    kinds = [chunk.kind for chunk in chunks]
    if kinds[0] != b"IHDR":
        raise Stays("it does not begin with its header")
    for kind in kinds:
        if kind in _ANIMATED:
            raise Stays("it is animated")
        critical, copied = not kind[0] & 0x20, bool(kind[3] & _UNSAFE_TO_COPY)
        if kind not in _CRITICAL and (critical or not (copied or kind in _KNOWN)):
            raise Stays(f"it has a chunk {kind!r}, which depends on the others")


def _header(before: Chunk, packed: Chunk) -> bytes:
    """The header of the result. Raises Stays if the pixels would be kept in another way: colours, or their depth."""
    if before.data[:_INTERLACE] != packed.data[:_INTERLACE]:
        raise Stays("its pixels would be converted")
    return packed.raw


def _joined(chunks: list[Chunk], header: bytes, pixels: list[bytes]) -> Iterator[bytes]:
    yield _SIGNATURE
    for chunk in chunks:
        if chunk.kind == b"IHDR":
            yield header
        elif chunk.kind != b"IDAT":
            yield chunk.raw
        elif pixels:
            yield from pixels
            pixels = []


def _packed(content: bytes) -> bytes:
    result = io.BytesIO()
    with _opened(content) as image:
        image.save(result, format="PNG", compress_level=_LEVEL)
    return result.getvalue()


def _look(content: bytes) -> tuple[str, tuple[int, int], bytes]:
    """Mode, dimensions and pixels of an image."""
    with _opened(content) as image:
        return image.mode, image.size, hashlib.sha256(image.tobytes()).digest()


def _opened(content: bytes) -> Image.Image:
    """An image with its pixels. Raises Stays."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = PIXELS_MAX
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(content), formats=("PNG",))
            image.load()
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise Stays(f"it cannot be decoded: {' '.join(str(error).split())}") from None
    return image


def main() -> int:
    """Pack standard input anew."""
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS_MAX, _CPU_SECONDS_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = recode(sys.stdin.buffer.read())
    except (Stays, MemoryError) as error:
        print(str(error) or "it needs too much memory", file=sys.stderr)
        return STAYS
    sys.stdout.buffer.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
