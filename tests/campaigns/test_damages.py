"""Random damages of a cache directory, by hand and from below: none is ever served as the file it was."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaigns import house
from tests.unit.copies import add_copy, content, forge_seal, read_copy, small_chunks
from tierd.node.copies import Copy
from tierd.node.store import Store

INODES = range(1, 31)
CHUNK = 4096
_TICK_NS = 20_000_000


class Cache:
    """A store full of small files, what they must hold, and somebody who damages them."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        directory.mkdir()
        self.random = random.Random(seed)
        self.store = Store(directory)
        self.versions = 0
        self.expected: dict[int, bytes] = {}
        self.done: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.fill_up()

    def fill_up(self) -> None:
        """Bring back what was lost, in new versions of other sizes."""
        for inode in INODES:
            if self.store.find(inode) is None:
                self.versions += 1
                size = self.random.choice([1, 2, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
                self.expected[inode] = content((inode, self.versions), size)
                add_copy(self.store, inode, self.expected[inode], mtime_ns=self.versions)

    # --- damages ---

    def path(self, copy: Copy) -> Path:
        """Its data file, or the file that seals it."""
        return self.directory / (copy.name + self.random.choice(["", "", ".meta"]))

    def keeping_mtime(self, path: Path, change: Callable[[int, int], None]) -> None:
        """As a careful hand would: change(descriptor, size), and the old times again."""
        fd = os.open(path, os.O_RDWR)
        try:
            st = os.fstat(fd)
            change(fd, st.st_size)
            if self.random.random() < 0.7:
                os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
        finally:
            os.close(fd)

    def flip(self, fd: int, size: int) -> None:
        at = self.random.randrange(size) if size else 0
        old = os.pread(fd, 1, at) or b"\0"
        os.pwrite(fd, bytes([old[0] ^ (1 << self.random.randrange(8))]), at)

    def zero(self, fd: int, size: int) -> None:
        at = self.random.randrange(size) if size else 0
        os.pwrite(fd, bytes(self.random.randint(1, max(1, size - at))), at)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, self.random.randint(0, size + 10))

    def truncate_and_extend(self, fd: int, size: int) -> None:
        os.ftruncate(fd, self.random.randint(0, size))
        os.ftruncate(fd, size)

    def damage(self) -> None:
        """One of them, at random."""
        copies = sorted(self.store.copies(), key=lambda copy: copy.identity.inode)
        copy, other = self.random.choice(copies), self.random.choice(copies)
        self.await_another_tick(copy, other)
        kind = self.random.choice(["flip", "flip", "zero", "truncate", "truncate_and_extend", "swap", "swap both",
                                   "delete", "replace", "below"])  # fmt: skip
        try:
            self._do(kind, copy, other)
        except FileNotFoundError:
            kind = "on what was gone"
        self.done[kind] += 1

    def _do(self, kind: str, copy: Copy, other: Copy) -> None:
        if kind == "swap":
            suffix = self.random.choice(["", ".meta"])
            self.swap(self.directory / (copy.name + suffix), self.directory / (other.name + suffix))
        elif kind == "swap both":
            for suffix in ("", ".meta"):
                self.swap(self.directory / (copy.name + suffix), self.directory / (other.name + suffix))
        elif kind == "delete":
            self.path(copy).unlink()
        elif kind == "replace":
            path = self.path(copy)
            path.with_name("1-1-1").write_bytes(path.read_bytes())
            path.with_name("1-1-1").rename(path)
        elif kind == "below":
            path = self.directory / copy.name
            if path.stat().st_size != copy.identity.size:
                return  # what is below the file system changes no length
            self.keeping_mtime(path, self.flip)
            try:
                forge_seal(self.store, copy)
            except (ValueError, LookupError):  # the seal was damaged before
                return
            self.forged = True
        else:
            self.keeping_mtime(self.path(copy), getattr(self, kind))

    @staticmethod
    def swap(one: Path, two: Path) -> None:
        between = one.with_name("1-1-2")
        one.rename(between)
        if two != one:
            two.rename(one)
        between.rename(two)

    @staticmethod
    def await_another_tick(*copies: Copy) -> None:
        """Kernels before 6.13 stamp ctime by the tick: a change in the very tick of the commit has the same stamp."""
        while time.time_ns() - max(copy.seal.ctime_ns for copy in copies) < _TICK_NS:
            time.sleep(0.002)

    # --- what is found ---

    def one_round(self) -> int:
        """Some damages, then what a daemon or an operator would do; how many damages."""
        self.forged = False
        count = self.random.choice([1, 1, 1, 2, 5])
        for _ in range(count):
            self.damage()
        ways = ["deep"] if self.forged else ["restart", "open", "check", "deep", "restart and deep"]
        self.look(self.random.choice(ways))
        self.store.check()
        for copy in self.store.copies():
            data = read_copy(self.store, copy)
            self.outcomes["refused" if data is None else "served"] += 1
            assert data in (None, self.expected[copy.identity.inode]), f"wrong bytes of inode {copy.identity.inode}"
        self.store.remove_leftovers()
        self.fill_up()
        return count

    def look(self, way: str) -> None:
        if way.startswith("restart"):
            self.store.close()
            self.store = Store(self.directory)
        if way not in ("open", "restart"):
            for copy in self.store.copies():
                self.store.verify(copy, deep=way.endswith("deep"))
        self.outcomes[way] += 1

    def close(self) -> None:
        self.store.check()
        assert self.store.leftovers() == []
        self.store.close()


def damage_at_random(directory: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That many damages, and no wrong byte."""
    small_chunks(monkeypatch, CHUNK)
    cache, amount = Cache(directory, house.seed()), count
    try:
        while count > 0:
            count -= cache.one_round()
    except BaseException:
        cache.store.close()
        raise
    cache.close()
    house.report("damaged cache files", damages=amount, done=dict(cache.done), outcomes=dict(cache.outcomes))
    assert cache.outcomes["served"] > cache.outcomes["refused"], "what was not damaged stays"


def test_no_damage_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_at_random(tmp_path / "cache", 100, monkeypatch)


@pytest.mark.campaign
def test_campaign_no_damage_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_at_random(tmp_path / "cache", 5000, monkeypatch)
