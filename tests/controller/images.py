"""PNG files that tests compress: such as programs write them, with all that may be in one."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin


def picture(size: int = 10, mode: str = "RGB", seed: int = 1, **more: Any) -> bytes:
    """A PNG file that was packed in a hurry."""
    noise = random.Random(seed).randbytes(size * size * 4)
    image = Image.frombytes("RGBA", (size, size), noise).resize((size * 6, size * 6), Image.Resampling.BICUBIC)
    image.putalpha(image.getchannel("A").point(lambda value: value // 2))
    return saved(image.convert(mode) if mode != "P" else image.convert("RGB").quantize(200), **more)


def saved(image: Image.Image, **more: Any) -> bytes:
    """The bytes of an image, hardly packed at all."""
    target = io.BytesIO()
    image.save(target, **{"format": "PNG", "compress_level": 1} | more)
    return target.getvalue()


def with_workflow() -> bytes:
    """With what ComfyUI writes into its files, an orientation, a resolution."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", '{"nodes": []}' * 20)
    texts.add_text("prompt", "a cat", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(pnginfo=texts, dpi=(300, 300), exif=exif.tobytes(), icc_profile=b"profile" * 40)


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk."""
    found, offset = [], 8
    while offset < len(content):
        length, kind = struct.unpack(">I4s", content[offset : offset + 8])
        found.append((kind, content[offset + 8 : offset + 8 + length]))
        offset += length + 12
    return found


def with_chunk(kind: bytes, data: bytes = b"data", before: bytes = b"IDAT", content: bytes | None = None) -> bytes:
    """A file with one more chunk."""
    whole = content or picture()
    at = whole.index(before) - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole[:at] + chunk + whole[at:]


def changed(change: Callable[[bytearray], None]) -> bytes:
    """A file with something else in it."""
    content = bytearray(picture())
    change(content)
    return bytes(content)
