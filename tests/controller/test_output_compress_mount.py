"""A compressed image through a real mount: name and pixels stay, the bytes are the new ones, readers read on."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.images import picture
from tests.controller.outputs import House, Leader
from tests.controller.test_output_compress import compress, end_grace, make_cold
from tests.servers import run
from tierd.controller.outputs.png_recode import recode

SECONDS = 20.0
CONTENT = picture(60)
PACKED = recode(CONTENT)


@pytest.fixture
def house(schema: str, new_directory: DirectoryFactory) -> House:
    return House(new_directory("outputs"), schema)


async def compressed(house: House, *, original_goes: bool) -> None:
    async with house.leading(settle=3.0, outputs_compress_after_days=30) as leader:
        counts = (await compress(leader)).counts
        assert counts["done" if original_goes else "in_grace"] == 1


async def prepare(house: House) -> None:
    async with house.leading() as leader:
        what: Leader = leader
        await make_cold(house, what)


def await_size(path: Path, size: int) -> None:
    """Nodes may know a stub's size for a moment longer."""
    deadline = time.monotonic() + SECONDS
    while path.stat().st_size != size:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_readers_before_and_after_see_one_picture(house: House, overlay_mount: MountFactory) -> None:
    path = house.make(content=CONTENT)
    run(prepare(house))
    mount = overlay_mount(house.root / "source", objects=str(house.root / "objects"), prefetch="no")
    seen = mount.mountpoint / "outputs" / path
    before = seen.stat()
    assert before.st_size == len(CONTENT)
    with seen.open("rb", buffering=0) as reader:
        assert reader.read(100) == CONTENT[:100]
        run(compressed(house, original_goes=False))
        await_size(seen, len(PACKED))
        assert seen.read_bytes() == PACKED
        assert os.pread(reader.fileno(), len(CONTENT), 0) == CONTENT, "who had it open reads what he opened"
    after = seen.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_uid) == (before.st_mtime_ns, before.st_mode, before.st_uid)
    run(end_grace(house))
    run(compressed(house, original_goes=True))
    with Image.open(io.BytesIO(seen.read_bytes())) as new, Image.open(io.BytesIO(CONTENT)) as old:
        assert (new.format, new.size, new.tobytes()) == ("PNG", old.size, old.tobytes())
    seen.rename(seen.with_name("mine.png"))
    assert seen.with_name("mine.png").read_bytes() == PACKED
