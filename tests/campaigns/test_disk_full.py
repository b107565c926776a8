"""Others fill the cache's disk again and again while models are read: no reader notices, and the room comes back."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.campaigns import house
from tests.campaigns.disks import MIB, ext4
from tests.conftest import MountFactory
from tests.integration.tiered import content, data_files, idle, leftovers, of_tier
from tests.mounts import OverlayMount, wait_until

DISK_MIB = 64
RESERVE, ENOUGH = 0.2, 0.4
RESERVE_SECONDS = 5.0
READERS = 4
MANY = 20
SIZES = (300_000, MIB, 3 * MIB, 5 * MIB, 5 * MIB, 9 * MIB, 13 * MIB)
MODELS = 20
TOO_LARGE = 70 * MIB
CALM_SECONDS = 2.0
PIECE = 512 * 1024


class Models:
    """Models that are replaced now and then. A reader may find what was there when it began, or anything later."""

    def __init__(self, mount: OverlayMount, seed: int) -> None:
        self.mount = mount
        self.random = random.Random(seed)
        self.sizes = {f"m{number}": self.random.choice(SIZES) for number in range(MODELS)} | {"huge": TOO_LARGE}
        self.written: dict[str, list[bytes]] = {name: [] for name in self.sizes}
        self.replaced: dict[str, float] = {}
        self.digests: dict[int, set[int]] = {}
        """What each inode ever held: numbers come again."""
        for name in self.sizes:
            self.replace(name)

    def replace(self, name: str) -> None:
        """A new version, by rename: a new inode, whose fill no earlier failure delays."""
        path = self.mount.source / "models" / name / "a.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content(self.sizes[name], (name, len(self.written[name]), self.random.random()))
        path.with_name("new").write_bytes(data)
        self.digests.setdefault(path.with_name("new").stat().st_ino, set()).add(hash(data))
        self.written[name].append(data)
        path.with_name("new").rename(path)
        self.written[name][:-3] = [b""] * len(self.written[name][:-3])

    def replace_one(self) -> None:
        """Any that was not replaced a moment ago: open(2) forgives one replacement, not two (docs/SEMANTICS.md)."""
        name = self.random.choice([name for name in self.sizes if name != "huge"])
        if time.monotonic() - self.replaced.get(name, 0.0) > CALM_SECONDS:
            self.replace(name)
            self.replaced[name] = time.monotonic()


class Readers:
    """Threads that load models all the time, and what they found."""

    def __init__(self, models: Models, seed: int) -> None:
        self.models = models
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read_on, args=(seed + number,)) for number in range(READERS)]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For the length of a `with`."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def _read_on(self, seed: int) -> None:
        chance = random.Random(seed)
        names = list(self.models.sizes)
        while not self._over.is_set():
            name = chance.choice(names)
            try:
                self._read(name)
            except OSError as error:
                self.problems.append(f"{name}: {error}")

    def _read(self, name: str) -> None:
        written = self.models.written[name]
        first = len(written) - 2  # the last one may not have been renamed yet
        data = (self.models.mount.mountpoint / "models" / name / "a.safetensors").read_bytes()
        self.seen["reads"] += 1
        self.seen["bytes"] += len(data)
        if data not in written[max(0, first) :]:
            self.problems.append(f"{name}: wrong bytes, {how_wrong(data, written)}")


def how_wrong(data: bytes, written: list[bytes]) -> str:
    """What of which version the bytes are, for a failure."""
    pages = Counter[str]()
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        fitting = [number for number, version in enumerate(written) if version[start : start + 4096] == page]
        pages[f"version {fitting[0]}" if fitting else "zeros" if not any(page) else "none"] += 1
    return f"{len(data)} of {len(written[-1])} bytes, pages of {dict(pages)}, {len(written)} versions"


class Disk:
    """The cache's disk, and somebody else who fills it."""

    def __init__(self, where: Path, seed: int) -> None:
        self.where = where
        self.ballast = where / "ballast"
        self.random = random.Random(seed)

    def free_ratio(self) -> float:
        """As measured here, not as tierd tells."""
        found = os.statvfs(self.where)
        return found.f_bavail / found.f_blocks

    def fill(self) -> None:
        """At once or bit by bit, to the last byte or nearly."""
        leave = self.random.choice((0, 0, MIB, 4 * MIB))
        at_once = self.random.random() < 0.5
        with self.ballast.open("wb") as file, suppress(OSError):
            while (room := os.statvfs(self.where).f_bavail * 4096 - leave) > 0:
                size = os.fstat(file.fileno()).st_size
                os.posix_fallocate(file.fileno(), size, room if at_once else min(room, PIECE))

    def give_back(self) -> float:
        """The foreign bytes go; how many seconds until the reserve is there."""
        self.ballast.unlink()
        return wait_until(lambda: self.free_ratio() >= RESERVE, RESERVE_SECONDS, "the reserve is back")


def wrong_copies(mount: OverlayMount, models: Models) -> list[str]:
    """Sealed copies that hold what their source file never held."""
    wrong = []
    for path in data_files(mount):
        with suppress(FileNotFoundError):  # evicted this moment
            data, sealed = path.read_bytes(), path.with_name(path.name + ".meta").exists()
            if sealed and hash(data) not in models.digests[int(path.name.partition("-")[0], 16)]:
                wrong.append(path.name)
    return wrong


def cycle(disk: Disk, models: Models, waits: list[float]) -> None:
    """Fill the disk at a random moment, keep it full for a moment, give it back."""
    for _ in range(disk.random.randint(1, 4)):
        models.replace_one()
    time.sleep(disk.random.uniform(0, 0.3))
    disk.fill()
    time.sleep(disk.random.uniform(0, 0.7))
    waits.append(disk.give_back())
    assert wrong_copies(models.mount, models) == []


def fill_the_disk(mount: OverlayMount, disk_at: Path, cycles: int) -> None:
    """That many times."""
    seed, started, waits = house.seed(), time.monotonic(), list[float]()
    disk, models = Disk(disk_at, seed), Models(mount, seed)
    readers = Readers(models, seed)
    with readers.reading():
        for _ in range(cycles):
            cycle(disk, models, waits)
            assert readers.problems == []
    assert readers.problems == []
    idle(mount)
    mount.settled()
    tier = of_tier(mount)
    assert (leftovers(mount), tier["reserved_bytes"], wrong_copies(mount, models)) == ([], 0, [])
    figures = {name: tier[name] for name in ("fills", "evictions", "copies")}
    ended = Counter(line["outcome"] for line in mount.log() if line["event"] == "fill_ended")
    assert ended["no_space"] or cycles < MANY, "the disk never was full when a fill began: nothing was tested"
    house.report(
        "disk full", cycles=cycles, seed=seed, seconds=round(time.monotonic() - started, 1), **readers.seen,
        read_errors=0, wrong_bytes=0, reserve_back_seconds_max=round(max(waits), 3),
        reserve_back_seconds_median=round(statistics.median(waits), 3), **figures, fills_not_done=dict(ended),
    )  # fmt: skip


@pytest.fixture
def disk() -> Iterator[Path]:
    """The cache's disk."""
    with ext4(DISK_MIB) as where:
        yield where


@pytest.fixture
def small(disk: Path, overlay_mount: MountFactory) -> OverlayMount:
    """A mount whose cache is on that disk."""
    cache = disk / "cache"
    marks = {"free_space_ratio": RESERVE, "free_space_target": ENOUGH}
    made = overlay_mount(cache_dir=cache, prefetch="no", load_idle_gap=0.1, **marks)
    made.cache_dir = cache
    made.allow_log("fill_ended", "nothing_to_evict")
    return made


def test_nobody_notices_a_full_disk(small: OverlayMount, disk: Path) -> None:
    fill_the_disk(small, disk, cycles=5)


@pytest.mark.campaign
def test_campaign_nobody_notices_a_full_disk(small: OverlayMount, disk: Path) -> None:
    fill_the_disk(small, disk, cycles=int(os.environ.get("TIERD_CAMPAIGN_CYCLES") or 100))
