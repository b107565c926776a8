"""Files overwritten beneath the mount, size and time kept: each open reads one version, never one that is over.

By rename and in place; on a plain directory, behind an attribute cache, and on another mount of a JuiceFS volume.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests.campaigns import house
from tests.conftest import DirectoryFactory, MountFactory
from tests.faulty import FaultySource
from tests.integration.calls import outcome
from tests.integration.tiered import idle, metric
from tests.mounts import QUIET_LEVELS, OverlayMount, wait_until

READERS = 3
SIZES = (40_000, 400_000, 5 << 20)
"""Served by the daemon; by the kernel; in more than one chunk."""
TIME_NS = 1_700_000_000_000_000_000
SECONDS_MAX = 60.0
NAME_SECONDS = 10.0
MAY_BE_LOGGED = frozenset({"fill_ended", "fill_not_begun", "chore_failed"})
_WORD = struct.Struct("=Q")

Way = Literal["rename", "in place"]


class Place(NamedTuple):
    """Where the overlay lies over, where its files are written, how often each, and whether it mixes versions itself.

    JuiceFS 0.14 mixes versions of a file that is replaced while it is read, or reads it as empty; of one overwritten
    in place while others read it, an open in a few hundred reads old blocks after the close: with and without overlay.
    It panics when two mounts compact a file at once, which it does after the third write. A name that was
    replaced on another mount it knows for a second as it was; it reads old bytes then, and the overlay answers ENOENT
    or ESTALE.
    """

    source: Path
    written: Path
    writes_per_file: int = 1 << 60
    mixes: bool = False


class Overwriter:
    """Writes version after version; each file is its version's number over and over. Readers open all the time."""

    def __init__(self, place: Place, mount: OverlayMount, way: Way, size: int, rng: random.Random) -> None:
        self.place = place
        self.mount = mount
        self.way = way
        self.size = size
        self.random = rng
        self.begun = 0
        """The latest version of which a byte may be seen."""
        self.closed = 0
        """The latest version that every open from now on must see."""
        self.opens: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._counting = threading.Lock()
        self._over = False

    def name(self, version: int) -> str:
        """The file that a version is written to."""
        kind = self.way.replace(" ", "-")
        return f"models/{kind}-{self.size}-{version // self.place.writes_per_file}/a.safetensors"

    def write(self, version: int) -> None:
        """The next version, in the way to be tested."""
        path, data = self.place.written / self.name(version), _WORD.pack(version) * (self.size // _WORD.size)
        path.parent.mkdir(parents=True, exist_ok=True)
        in_place = self.way == "in place" and path.exists()
        where = path if in_place else path.with_suffix(".new")
        self.begun = version
        with where.open("r+b" if in_place else "wb") as file:
            file.write(data)
            file.flush()
            os.utime(file.fileno(), ns=(TIME_NS, TIME_NS))
        if not in_place:
            where.rename(path)
        self.closed = version

    def run(self, versions: int) -> None:
        """The writer, here, and the readers beside it."""
        self.write(self.begun + 1)
        readers = [threading.Thread(target=self._read) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(versions - 1):
                self._await_reads(self.random.choice((0, 0, 1, 2, 5, 10, 30)))
                self.write(self.begun + 1)
            self._await_reads(2 * READERS)
        finally:
            self._over = True
            for reader in readers:
                reader.join()

    def check_last(self) -> None:
        """With nobody writing and nobody reading, every file is its last version: no copy was made of a mix."""
        last = {self.name(version): version for version in range(1, self.begun + 1)}
        for name, version in last.items():
            wait_until(lambda path=self.mount.mountpoint / name: self._opens(path), NAME_SECONDS, f"{name} opens")
            data = (self.mount.mountpoint / name).read_bytes()
            if data != _WORD.pack(version) * (self.size // _WORD.size):
                seen = sorted(set(memoryview(data).cast("Q")))
                self.wrong.append(f"{self.way}, {self.size} bytes: {name} is {seen} in the end, not {version}")

    @staticmethod
    def _opens(path: Path) -> bool:
        return outcome(lambda: path.open("rb").close()) is None

    def _await_reads(self, count: int) -> None:
        deadline, before = time.monotonic() + SECONDS_MAX, self.opens.total()
        while self.opens.total() < before + count and time.monotonic() < deadline and not self.wrong:
            time.sleep(0.001)

    # --- readers ---

    def _read(self) -> None:
        while not self._over:
            before, name = self.closed, self.name(self.closed)
            try:
                data = (self.mount.mountpoint / name).read_bytes()
            except OSError as error:
                self._count("again", None if error.errno in _AGAIN else f"{name}: {error!r}")
            else:
                self._judge(data, before, quiet=self.begun == before)

    def _judge(self, data: bytes, before: int, *, quiet: bool) -> None:
        """`before` was closed before the open; if it is `quiet`, nothing else was written until the read ended."""
        seen = set(memoryview(data).cast("Q")) if len(data) % _WORD.size == 0 else set()
        may_mix = not quiet and (self.way == "in place" or self.place.mixes)
        fault = None
        if may_mix and self.place.mixes:
            pass
        elif len(data) != self.size // _WORD.size * _WORD.size:
            fault = f"{len(data)} bytes of {self.size}"
        elif min(seen) < before:
            fault = f"versions {sorted(seen)} after {before} was closed"
        elif len(seen) > 1 and not may_mix:
            fault = f"a mix of versions {sorted(seen)}"
        if fault is not None and self.place.mixes:
            self._count("torn", None)
        else:
            self._count("quiet" if quiet else "busy", fault)

    def _count(self, what: str, fault: str | None) -> None:
        with self._counting:
            self.opens[what] += 1
            if fault is not None:
                self.wrong.append(f"{self.way}, {self.size} bytes: {fault}")


_AGAIN = frozenset({2, 116})
"""ENOENT, ESTALE: the file was replaced between lookup and open, twice (docs/SEMANTICS.md)."""


def overwrite_again_and_again(place: Place, mount: OverlayMount, kind: str, way: Way, versions: int) -> None:
    """That many versions of files of each size; every open sees one of them, and none that is over."""
    seed, started = house.seed(), time.monotonic()
    rng, opens, wrong = random.Random(seed), Counter[str](), []
    hits = metric(mount, HITS)
    for size in SIZES:
        overwriter = Overwriter(place, mount, way, size, rng)
        overwriter.run(versions)
        idle(mount)
        mount.settled()
        overwriter.check_last()
        opens.update(overwriter.opens)
        wrong += overwriter.wrong
    idle(mount)
    loud = {line["event"] for line in mount.log() if line["level"] not in QUIET_LEVELS}
    mount.expect_log(*(loud & MAY_BE_LOGGED))
    mount.models()  # records what was opened
    house.report("overwrites", where=kind, way=way, seed=seed, versions=versions * len(SIZES), opens=dict(opens),
                 hits=metric(mount, HITS) - hits, seconds=round(time.monotonic() - started))  # fmt: skip
    assert wrong == []
    assert opens["quiet"] > versions
    assert opens["torn"] <= 1 + opens.total() / 100
    assert opens["again"] < opens.total() / 8 or place.mixes


HITS = 'tierd_node_tier_opens_total{result="hit"}'

KINDS = ("directory", "cached", "juicefs")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Over what."""
    chosen: str = request.param
    return chosen


@pytest.fixture(params=["rename", "in place"])
def way(request: pytest.FixtureRequest) -> Way:
    """In which way."""
    chosen: Way = request.param
    return chosen


@pytest.fixture
def place(kind: str, way: Way, request: pytest.FixtureRequest, new_directory: DirectoryFactory) -> Iterator[Place]:
    """`cached`: the source relies on attributes for a second, as JuiceFS does; on names only where they stay."""
    if kind == "juicefs":
        name = Path(tempfile.mkdtemp(dir=request.getfixturevalue("juicefs"))).name
        yield Place(request.getfixturevalue("juicefs") / name, request.getfixturevalue("other_node") / name, 2, True)
    elif kind == "cached":
        entry_timeout = 1.0 if way == "in place" else 0.0  # each lookup brings new attributes
        with FaultySource(new_directory("cached"), attr_timeout=1.0, entry_timeout=entry_timeout) as source:
            yield Place(source.mountpoint, source.backing)
    else:
        source = new_directory("source")
        yield Place(source, source)


def test_no_open_sees_what_is_over(place: Place, kind: str, way: Way, overlay_mount: MountFactory) -> None:
    mount = overlay_mount(place.source, prefetch="no")
    overwrite_again_and_again(place, mount, kind, way, 4 if kind == "juicefs" else 8)


@pytest.mark.campaign
def test_campaign_no_open_sees_what_is_over(place: Place, kind: str, way: Way, overlay_mount: MountFactory) -> None:
    mount = overlay_mount(place.source, prefetch="no")
    overwrite_again_and_again(place, mount, kind, way, 100 if kind == "juicefs" else 200)
