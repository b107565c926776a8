"""Whether a cold file that is removed had another name is asked of the source itself, on JuiceFS, too."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cold import freeze, stub_of
from tierd.node.cold_source import ColdSource
from tierd.stubs import Origin


def make_cold(directory: Path) -> tuple[Path, Origin]:
    file = directory / "cold.png"
    file.write_bytes(b"png")
    return file, freeze({file: None})[file]


def removed(top: Path, directory: Path, name: bytes) -> list[Origin]:
    """What ends with a name."""
    source, ended = ColdSource(top), list[Origin]()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.stat(stub_of(directory / os.fsdecode(name)))  # so that its attributes are remembered
        source.unlink(fd, name, ended=ended.append)
    finally:
        os.close(fd)
        source.close()
    return ended


def test_the_last_name_ends_it(juicefs: Path) -> None:
    directory = juicefs / "last-name"
    directory.mkdir()
    file, origin = make_cold(directory)
    assert removed(juicefs, directory, b"cold.png") == [origin]
    assert not stub_of(file).exists()


def test_a_link_that_another_node_made_a_moment_ago_counts(juicefs: Path, other_node: Path) -> None:
    directory = juicefs / "other-name"
    directory.mkdir()
    file, _ = make_cold(directory)
    os.stat(stub_of(file))
    there = other_node / stub_of(file).relative_to(juicefs)
    os.link(there, other_node / "other-name/kept")
    assert removed(juicefs, directory, b"cold.png") == []
    assert (directory / "kept").exists()
