"""A PNG file is packed anew without loss, with all that it carries, or it stays as it is."""

from __future__ import annotations

import asyncio
import io
import struct

import pytest
from PIL import Image

from tests.controller.images import changed, chunks, picture, saved, with_chunk, with_workflow
from tierd.controller.outputs import png_recode, recoding
from tierd.controller.outputs.png_recode import Stays, recode
from tierd.controller.outputs.recoding import CannotRecode, recoded
from tierd.errors import UsageError


def animation() -> bytes:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    target = io.BytesIO()
    frames[0].save(target, format="PNG", save_all=True, append_images=frames[1:])
    return target.getvalue()


def deep() -> bytes:
    """16 bits a colour, made by hand: Pillow writes none."""
    content = saved(Image.new("RGB", (4, 4)), compress_level=0)
    header = struct.pack(">IIBBBBB", 2, 4, 16, 2, 0, 0, 0)
    kinds = dict(chunks(content))
    return with_chunk(b"IHDR", header, before=b"IDAT", content=b"\x89PNG\r\n\x1a\n" + _tail(content)) if kinds else b""


def _tail(content: bytes) -> bytes:
    return content[content.index(b"IDAT") - 4 :]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pixels_and_all_else_stay(mode: str) -> None:
    before = picture(mode=mode) if mode != "I;16" else saved(Image.frombytes("I;16", (64, 64), bytes(range(256)) * 32))
    after = recode(before)
    with Image.open(io.BytesIO(before)) as old, Image.open(io.BytesIO(after)) as new:
        assert (new.mode, new.size, new.tobytes(), new.getpalette()) == (
            old.mode, old.size, old.tobytes(), old.getpalette(),
        )  # fmt: skip


def test_what_a_file_carries_is_copied_byte_by_byte() -> None:
    before = with_chunk(b"vpAg", content=with_workflow())
    after = recode(before)
    assert len(after) < len(before)
    kept = [[chunk for chunk in chunks(content) if chunk[0] != b"IDAT"] for content in (before, after)]
    assert kept[0] == kept[1]
    assert {b"tEXt", b"zTXt", b"eXIf", b"iCCP", b"pHYs", b"vpAg"} <= {kind for kind, _ in kept[1]}


def test_one_colour_that_is_transparent_stays_so() -> None:
    before = saved(Image.new("RGB", (50, 50), "red"), transparency=(255, 0, 0))
    after = recode(before)
    assert dict(chunks(after))[b"tRNS"] == dict(chunks(before))[b"tRNS"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (animation(), "it is animated"),
        (deep(), "its pixels would be converted"),
        (with_chunk(b"caBX"), "depends on the others"),
        (with_chunk(b"CgBI"), "depends on the others"),
        (picture() + b"more", "behind its end"),
        (picture()[:-20], "it ends early"),
        (changed(lambda content: content.__setitem__(120, content[120] ^ 1)), "is damaged"),
        (b"\xff\xd8\xff\xe0 a JPEG file", "it is no PNG file"),
        (b"", "it is no PNG file"),
        (with_chunk(b"IEND", b"", content=picture()), "behind its end"),
        (saved(Image.new("1", (15_000, 15_000)), compress_level=9), "cannot be decoded"),
    ],
)
def test_what_cannot_be_kept_stays_as_it_is(content: bytes, why: str) -> None:
    with pytest.raises(Stays, match=why):
        recode(content)


def test_it_compares_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_recode, "_packed", lambda content: picture(seed=2))
    with pytest.raises(Stays, match="would not be the same"):
        recode(picture())


def test_a_process_of_its_own_does_it() -> None:
    content = picture()
    assert asyncio.run(recoded(content)) == recode(content)
    with pytest.raises(CannotRecode, match="it is animated"):
        asyncio.run(recoded(animation()))


def test_a_decoder_that_dies_is_an_error_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoding.sys, "executable", "/bin/false")
    with pytest.raises(CannotRecode, match="its decoder ended with 1"):
        asyncio.run(recoded(picture()))


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoding, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Pillow is not installed") as caught:
        recoding.require_library()
    assert caught.value.hint == "pip install 'tierd[images]'"
