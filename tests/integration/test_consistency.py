"""Changes beneath the mount, and on other mounts of the same volume: what an open sees, and how old a stat may be."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import MountFactory, Tree
from tests.mounts import raises, wait_until

pytestmark = pytest.mark.sources("directory", "juicefs", "daemon-reads")

ATTR_SECONDS = 1.0
"""The overlay's default for attributes and names; JuiceFS's is the same, and both may add up."""
SLACK_SECONDS = 1.0


def overwrite(path: Path, data: bytes) -> None:
    """Write over the start of a file, as a program that updates in place does."""
    with path.open("r+b") as file:
        file.write(data)


# --- one file by two names ---


def test_appends_by_two_names_follow_each_other(tree: Tree) -> None:
    """The second one was opened in the node that a reader had used before, and overwrote what the first one wrote."""
    (tree.top / "file").write_bytes(bytes(200_000))
    (tree.top / "other").hardlink_to(tree.top / "file")
    time.sleep(ATTR_SECONDS + SLACK_SECONDS)
    os.stat(tree.top / "other")
    with (tree.top / "file").open("rb"):
        first = (tree.top / "file").open("ab", buffering=0)
    with first, (tree.top / "other").open("ab", buffering=0) as second:
        for writer in (first, second, first, second):
            writer.write(b"x" * 1000)
    assert len((tree.beneath / "file").read_bytes()) == 204_000


def test_links_are_counted_whatever_node_a_name_is_of(tree: Tree) -> None:
    """The kernel had the name that went for a retired node's, and the link count of the other one stayed."""
    (tree.top / "file").write_bytes(bytes(200_000))
    (tree.top / "other").hardlink_to(tree.top / "file")
    time.sleep(ATTR_SECONDS + SLACK_SECONDS)
    os.stat(tree.top / "other")
    with (tree.top / "file").open("rb"):
        (tree.top / "file").open("r+b").close()
    assert os.stat(tree.top / "file").st_nlink == 2
    (tree.top / "other").unlink()
    assert os.stat(tree.top / "file").st_nlink == 1


# --- the next open sees all of it, at once ---


def test_an_overwrite_in_place_of_equal_size(tree: Tree) -> None:
    (tree.beneath / "file").write_bytes(b"a" * 10_000)
    for letter in b"bcdefghijk":
        assert len(set((tree.top / "file").read_bytes())) == 1
        overwrite(tree.beneath / "file", bytes([letter]) * 10_000)
        assert (tree.top / "file").read_bytes() == bytes([letter]) * 10_000


def test_an_overwrite_of_equal_size_whose_time_was_put_back(tree: Tree) -> None:
    path = tree.beneath / "file"
    path.write_bytes(b"a" * 10_000)
    times = path.stat()
    for letter in b"bcdefg":
        assert len(set((tree.top / "file").read_bytes())) == 1
        overwrite(path, bytes([letter]) * 10_000)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (tree.top / "file").read_bytes() == bytes([letter]) * 10_000


@pytest.mark.parametrize("pause", [0.0, 0.003], ids=["at-once", "moments-later"])
def test_a_file_that_grows_and_shrinks(tree: Tree, pause: float) -> None:
    """Sizes go up and down between opens; the kernel's old idea of the size must not cut a read short."""
    rng = random.Random(6)
    for number in range(20 if tree.on_juicefs else 60):
        data = rng.randbytes(rng.choice([0, 1, 100, 4096, 5000, 200_000]))
        (tree.beneath / "file").write_bytes(data)
        time.sleep(pause)
        with (tree.top / "file").open("rb", buffering=0) as file:
            found = file.read(1_000_000)
            assert len(found) == len(data), f"round {number}"
            assert found == data, f"round {number}"
            assert os.fstat(file.fileno()).st_size == len(data), f"round {number}"


def test_a_file_that_is_replaced_by_rename(tree: Tree) -> None:
    for number in range(20):
        data = b"%d" % number * (number + 1)
        (tree.beneath / "new").write_bytes(data)
        (tree.beneath / "new").rename(tree.beneath / "model")
        assert (tree.top / "model").read_bytes() == data, f"round {number}"


def test_a_file_that_is_replaced_while_somebody_reads_it(tree: Tree) -> None:
    """Those who have it open keep the old one; everybody else opens the new one at once."""
    (tree.beneath / "model").write_bytes(b"old")
    with (tree.top / "model").open("rb") as reader:
        (tree.beneath / "new").write_bytes(b"new, longer")
        (tree.beneath / "new").rename(tree.beneath / "model")
        assert (tree.top / "model").read_bytes() == b"new, longer"
        assert reader.read() == b"old"
    assert (tree.top / "model").read_bytes() == b"new, longer"


def test_a_file_that_is_removed_while_somebody_reads_it(tree: Tree) -> None:
    """Opening it again fails as soon as it is gone, however long the kernel may remember the name."""
    (tree.beneath / "model").write_bytes(b"old")
    with (tree.top / "model").open("rb") as reader:
        (tree.beneath / "model").unlink()
        with raises(errno.ENOENT):
            (tree.top / "model").read_bytes()
        assert reader.read() == b"old"


def test_what_a_mapping_and_an_old_descriptor_see(tree: Tree) -> None:
    """An open file may see old and new bytes; the next open sees new ones only."""
    (tree.beneath / "file").write_bytes(b"a" * 100_000)
    with (tree.top / "file").open("rb") as old:
        assert old.read(10) == b"a" * 10
        overwrite(tree.beneath / "file", b"b" * 100_000)
        assert (tree.top / "file").read_bytes() == b"b" * 100_000
        old.seek(0)
        assert set(old.read()) <= set(b"ab")
    assert (tree.top / "file").read_bytes() == b"b" * 100_000


def test_a_write_beneath_while_the_overlay_writes(tree: Tree) -> None:
    """Two writers of one file; afterwards the overlay shows what the source has, not what it remembers writing."""
    (tree.top / "file").write_bytes(b"." * 8192)
    with (tree.top / "file").open("r+b", buffering=0) as through:
        through.write(b"through " * 512)
        overwrite(tree.beneath / "file", b"beneath " * 512)
        through.seek(4096)
        through.write(b"also through.   " * 256)
    assert (tree.top / "file").read_bytes() == (tree.beneath / "file").read_bytes()


class Rewriter:
    """Changes a file all the time, from a thread, while readers open it; collects what went wrong for them."""

    def __init__(self, path: Path, change: Callable[[int], object]) -> None:
        self.path = path
        self._change = change
        self._stop = threading.Event()
        self.changes = 0
        self.wrong: list[str] = []

    def against(self, readers: int, opens: int, through: Path, whole: Callable[[bytes], bool]) -> None:
        """`readers` threads open `through` and read it, `opens` times in all."""
        threads = [threading.Thread(target=self._read, args=(opens // readers, through, whole)) for _ in range(readers)]
        writer = threading.Thread(target=self._write)
        for thread in (writer, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        self._stop.set()
        writer.join()

    def _write(self) -> None:
        while not self._stop.is_set():
            self.changes += 1
            self._change(self.changes)

    def _read(self, opens: int, through: Path, whole: Callable[[bytes], bool]) -> None:
        for _ in range(opens):
            try:
                data = through.read_bytes()
            except OSError as error:
                self.wrong.append(f"change {self.changes}: {error!r}")
            else:
                if not whole(data):
                    self.wrong.append(f"change {self.changes}: {len(data)} bytes of {sorted(set(data))}")


def opens(tree: Tree) -> int:
    """How often a torture test opens: JuiceFS takes ten times as long."""
    return 100 if tree.on_juicefs else 500


def test_readers_of_a_file_that_is_rewritten_in_place_all_the_time(tree: Tree) -> None:
    """Every open succeeds, never with ESTALE. A read meets writers half-way, as one of the source itself does."""
    sizes = [1000, 5000, 70_000]
    path = tree.beneath / "busy"
    path.write_bytes(b"\1" * sizes[0])

    def change(number: int) -> None:
        overwrite(path, bytes([number % 250 + 1]) * sizes[number % 3])
        os.truncate(path, sizes[number % 3])

    rewriter = Rewriter(path, change)
    rewriter.against(4, opens(tree), tree.top / "busy", lambda data: len(data) <= max(sizes))
    assert rewriter.wrong == []
    assert (tree.top / "busy").read_bytes() == path.read_bytes()


def test_readers_of_a_file_that_is_replaced_all_the_time(tree: Tree) -> None:
    """Every open succeeds and reads one version, whole (JuiceFS 0.14 itself mixes versions at this pace).

    The kernel looks a name up again once per open; replaced twice in that millisecond, it is ESTALE (JuiceFS: or
    ENOENT), as docs/SEMANTICS.md says: at this pace of 20 ms less than one open in 10.
    """
    path = tree.beneath / "busy"
    path.write_bytes(b"\1" * 1000)

    def change(number: int) -> None:
        path.with_suffix(".new").write_bytes(bytes([number % 250 + 1]) * (1000 + number % 7))
        path.with_suffix(".new").rename(path)
        time.sleep(0.02)

    def whole(data: bytes) -> bool:
        return tree.on_juicefs or (len(set(data)) == 1 and 1000 <= len(data) < 1007)

    rewriter = Rewriter(path, change)
    rewriter.against(4, opens(tree), tree.top / "busy", whole)
    again = [wrong for wrong in rewriter.wrong if "OSError(116" in wrong or "FileNotFoundError" in wrong]
    assert rewriter.wrong == again
    print(f"{len(again)} of {opens(tree)} opens failed")
    assert len(again) < opens(tree) / 10
    assert (tree.top / "busy").read_bytes() == path.read_bytes()


# --- what is looked at without an open ---


@pytest.mark.sources("directory", "juicefs")
def test_names_that_go_and_come(tree: Tree) -> None:
    (tree.beneath / "file").write_bytes(b"one")
    assert (tree.top / "file").read_bytes() == b"one"
    (tree.beneath / "file").unlink()
    limit = 2 * ATTR_SECONDS + SLACK_SECONDS
    wait_until(lambda: not (tree.top / "file").exists(), limit, "a removed file is gone")
    (tree.beneath / "file").write_bytes(b"another")
    assert (tree.top / "file").read_bytes() == b"another", "that nothing is there is never remembered"
    shutil.rmtree(tree.beneath / "dir", ignore_errors=True)
    (tree.beneath / "dir").mkdir()
    assert (tree.top / "dir").is_dir()
    (tree.beneath / "dir").rmdir()
    (tree.beneath / "dir").write_bytes(b"a file of that name")
    wait_until((tree.top / "dir").is_file, limit, "a directory became a file")
    assert (tree.top / "dir").read_bytes() == b"a file of that name"


def test_opening_a_removed_file_fails_at_once(tree: Tree) -> None:
    (tree.beneath / "file").write_bytes(b"one")
    assert (tree.top / "file").read_bytes() == b"one"
    (tree.beneath / "file").unlink()
    with raises(errno.ENOENT):
        (tree.top / "file").read_bytes()


@pytest.mark.sources("directory", "juicefs")
def test_directories_renamed_beneath(tree: Tree) -> None:
    (tree.beneath / "a/b").mkdir(parents=True)
    (tree.beneath / "a/b/file").write_bytes(b"x")
    with (tree.top / "a/b/file").open("r+b", buffering=0) as file:
        (tree.beneath / "a").rename(tree.beneath / "moved")
        assert file.read() == b"x"
        file.write(b"y")
        os.fchmod(file.fileno(), 0o611)
        assert (tree.top / "moved/b/file").read_bytes() == b"xy"
        limit = 2 * ATTR_SECONDS + SLACK_SECONDS
        wait_until(lambda: not (tree.top / "a").exists(), limit, "the old name is gone")
        (tree.top / "moved/b/second").write_bytes(b"beside")
    assert (tree.beneath / "moved/b/second").read_bytes() == b"beside"


@pytest.mark.sources("directory", "juicefs")
def test_attributes_are_at_most_a_timeout_old(tree: Tree) -> None:
    path = tree.top / "file"
    (tree.beneath / "file").write_bytes(b"x")
    assert path.stat().st_size == 1
    (tree.beneath / "file").write_bytes(b"longer")
    (tree.beneath / "file").chmod(0o600)
    os.chown(tree.beneath / "file", 7, 8)
    wait_until(
        lambda: (path.stat().st_size, path.stat().st_mode & 0o777, path.stat().st_gid) == (6, 0o600, 8),
        ATTR_SECONDS + SLACK_SECONDS,
        "new attributes are seen",
    )


@pytest.mark.sources("directory", "juicefs")
def test_listings_are_never_remembered(tree: Tree) -> None:
    for number in range(20):
        (tree.beneath / f"{number}").touch()
        assert len(os.listdir(tree.top)) == number + 1
    for number in range(20):
        (tree.beneath / f"{number}").unlink()
        assert len(os.listdir(tree.top)) == 19 - number


# --- two mounts of one volume ---


class Nodes(NamedTuple):
    """Two nodes of a cluster: the overlay over mount A, and mount B of the same volume."""

    overlay: Path
    other: Path


@pytest.fixture(scope="module")
def nodes(juicefs: Path, other_node: Path, module_overlay_mount: MountFactory) -> Nodes:
    """A directory of the volume, on both nodes."""
    (juicefs / "cluster").mkdir()
    return Nodes(module_overlay_mount(juicefs / "cluster").mountpoint, other_node / "cluster")


ROUNDS_PER_FILE = 2
"""JuiceFS 0.14 compacts a file that was written more often, and panics when two mounts do so at once."""


def _rounds(prefix: str) -> Iterator[tuple[str, bytes]]:
    """40 contents of 20 files; half of them replace one of the same size."""
    rng = random.Random(7)
    for number in range(40 // ROUNDS_PER_FILE):
        sizes = rng.choices([0, 1, 1000, 4096, 4097, 150_000, 1_200_000], k=ROUNDS_PER_FILE)
        for size in sizes if number % 2 else sizes[:1] * ROUNDS_PER_FILE:
            yield f"{prefix}-{number}", rng.randbytes(size)


def test_what_was_closed_on_another_node_is_read_here(nodes: Nodes) -> None:
    for name, data in _rounds("there"):
        (nodes.other / name).write_bytes(data)
        found = (nodes.overlay / name).read_bytes()
        assert len(found) == len(data), name
        assert found == data, name


def test_what_was_overwritten_in_place_on_another_node_is_read_here(nodes: Nodes) -> None:
    for number in range(20):
        name = f"in-place-{number}"
        (nodes.other / name).write_bytes(b"old" * 10_000)
        assert (nodes.overlay / name).read_bytes() == b"old" * 10_000
        overwrite(nodes.other / name, b"new" * 10_000)
        assert (nodes.overlay / name).read_bytes() == b"new" * 10_000, name


def test_what_was_closed_here_is_read_on_another_node(nodes: Nodes) -> None:
    for name, data in _rounds("here"):
        (nodes.overlay / name).write_bytes(data)
        found = (nodes.other / name).read_bytes()
        assert len(found) == len(data), name
        assert found == data, name


def test_two_nodes_take_turns(nodes: Nodes) -> None:
    for number in range(10):
        name, expected = f"log-{number}", b""
        for turn in range(2 * ROUNDS_PER_FILE):
            writer, reader = (nodes.overlay, nodes.other) if turn % 2 else (nodes.other, nodes.overlay)
            with (writer / name).open("ab") as file:
                file.write(b"line %d\n" % turn)
            expected += b"line %d\n" % turn
            assert (reader / name).read_bytes() == expected, f"{name}, turn {turn}"
