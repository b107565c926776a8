"""Names that change beneath the overlay: renamed, replaced, made links, deeper than descriptors reach. No kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.conftest import Bench
from tests.unit.kernel import CALLER, number_of
from tierd.node.ledger import ROOT_ID
from tierd.node.sources import Changes


async def test_a_file_renamed_beneath_is_found_by_its_new_name(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").rename(bench.beneath / "b")
    assert await number_of(bench.overlay.getattr(node_id)) == "ESTALE", "no name is known any more"
    assert await number_of(bench.overlay.lookup(ROOT_ID, b"a")) == "ENOENT"
    assert await bench.kernel.read_file(b"b") == b"content"


async def test_an_open_file_renamed_beneath_keeps_its_node(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    opened = await bench.kernel.open(b"a")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").rename(bench.beneath / "b")
    assert await bench.kernel.node(b"b") == node_id
    assert (await bench.overlay.getattr(node_id)).attributes.st_size == 7
    await bench.overlay.release(opened.fh)


async def test_a_file_with_two_names_is_found_by_the_one_that_is_left(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    (bench.beneath / "b").hardlink_to(bench.beneath / "a")
    node_id = await bench.kernel.node(b"a")
    assert await bench.kernel.node(b"b") == node_id
    (bench.beneath / "b").unlink()
    assert (await bench.overlay.getattr(node_id)).attributes.st_nlink == 1
    (bench.beneath / "a").unlink()
    assert await number_of(bench.overlay.getattr(node_id)) == "ESTALE"


async def test_a_name_in_a_directory_that_is_gone_gives_way_to_another(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    (bench.beneath / "d" / "x").write_bytes(b"content")
    (bench.beneath / "y").hardlink_to(bench.beneath / "d" / "x")
    node_id = await bench.kernel.node(b"y")
    assert await bench.kernel.node(b"d/x") == node_id
    (bench.beneath / "d" / "x").unlink()
    await bench.overlay.rmdir(ROOT_ID, b"d")
    bench.overlay.dirs.close()
    assert (await bench.overlay.getattr(node_id)).attributes.st_nlink == 1
    assert await bench.kernel.read_file(b"y") == b"content"


async def test_a_file_replaced_beneath_gets_a_new_node(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"old")
    old = await bench.kernel.node(b"a")
    (bench.beneath / "new").write_bytes(b"newer")
    (bench.beneath / "new").rename(bench.beneath / "a")
    assert await number_of(bench.overlay.open(old, os.O_RDONLY, CALLER)) == "ESTALE"
    assert await bench.kernel.node(b"a") != old
    assert await bench.kernel.read_file(b"a") == b"newer"


async def test_a_file_that_became_a_link_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"outside")
    (bench.beneath / "a").write_bytes(b"inside")
    node_id = await bench.kernel.node(b"a")
    (tmp_path / "kept").hardlink_to(bench.beneath / "a")  # so that its inode number is not used again
    (bench.beneath / "a").unlink()
    (bench.beneath / "a").symlink_to(secret)
    for call in (
        bench.overlay.open(node_id, os.O_RDONLY, CALLER),
        bench.overlay.setattr(node_id, Changes(mode=0o777, size=0), None),
        bench.overlay.getattr(node_id),
    ):
        assert await number_of(call) == "ESTALE"
    assert secret.read_bytes() == b"outside"


async def test_a_directory_that_became_a_link_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"outside")
    (bench.beneath / "d").mkdir()
    node_id = await bench.kernel.node(b"d")
    (bench.beneath / "d").rename(tmp_path / "kept")  # so that its inode number is not used again
    (bench.beneath / "d").symlink_to(outside)
    for call in (
        bench.overlay.lookup(node_id, b"f"),
        bench.overlay.mkdir(node_id, b"x", 0o755, CALLER),
        bench.overlay.opendir(node_id),
        bench.overlay.unlink(node_id, b"f"),
    ):
        assert await number_of(call) in ("ESTALE", "ENOENT")
    assert os.listdir(outside) == ["f"]


async def test_a_directory_renamed_beneath_is_found_once_looked_up(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    (bench.beneath / "d" / "f").write_bytes(b"1")
    file = await bench.kernel.node(b"d/f")
    (bench.beneath / "d").rename(bench.beneath / "e")
    assert (await bench.overlay.getattr(file)).attributes.st_size == 1, "its descriptor still leads there"
    bench.overlay.dirs.close()
    assert await number_of(bench.overlay.getattr(file)) == "ESTALE"
    assert await bench.kernel.node(b"e/f") == file
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(file)) == b"e/f"


async def test_directories_that_changed_places_beneath(bench: Bench) -> None:
    """a/b becomes b/a, and then the names that were seen last go: what is left must not run in a ring."""
    (bench.beneath / "a" / "b").mkdir(parents=True)
    a, b = await bench.kernel.node(b"a"), await bench.kernel.node(b"a/b")
    (bench.beneath / "a" / "b").rename(bench.beneath / "b")
    (bench.beneath / "a").rename(bench.beneath / "b" / "a")
    assert await bench.kernel.node(b"b/a") == a
    (bench.beneath / "b" / "a").rename(bench.beneath / "elsewhere")
    await bench.overlay.rmdir(ROOT_ID, b"b")
    bench.overlay.dirs.close()
    assert await number_of(bench.overlay.getattr(b)) in ("ESTALE", "ENOENT")
    assert await number_of(bench.overlay.lookup(b, b"x")) in ("ESTALE", "ENOENT")
    assert await number_of(bench.overlay.getattr(a)) == "ESTALE"
    assert await bench.kernel.node(b"elsewhere") == a


DEPTH = 1500


@pytest.fixture
def deepest(bench: Bench) -> Iterator[int]:
    """A directory DEPTH levels down, open; what pytest uses to clean up recurses, and could not remove it."""
    fd = os.open(bench.beneath, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        fd = step(fd, "d")
    yield os.dup(fd)
    for _ in range(DEPTH):
        fd = step(fd, "..")
        os.rmdir("d", dir_fd=fd)
    os.close(fd)


def step(fd: int, name: str) -> int:
    """One directory on; gives the descriptor of the last one back."""
    below = os.open(name, os.O_RDONLY, dir_fd=fd)
    os.close(fd)
    return below


async def test_a_deep_directory_is_reached_without_its_descriptors(bench: Bench, deepest: int) -> None:
    """1,500 levels fit into PATH_MAX; the cache of directory descriptors holds fewer."""
    wanted = os.fstat(deepest).st_ino
    os.close(deepest)
    node_id = ROOT_ID
    for _ in range(DEPTH):
        node_id = bench.kernel.counted(await bench.overlay.lookup(node_id, b"d")).node_id
    bench.overlay.dirs.close()
    assert (await bench.overlay.getattr(node_id)).attributes.st_ino == wanted
