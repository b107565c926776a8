"""Random calls on the overlay and on a plain directory: every answer, every byte and the whole trees are equal.

Stands where pjdfstest and fsx would; neither can be had here. See `comparing.py` and `random_calls.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pytest

from tests.campaigns import house
from tests.campaigns.comparing import Part, compare_part
from tests.campaigns.disks import ext4
from tests.conftest import MountFactory
from tests.mounts import OverlayMount

AMOUNT_VARIABLE, FIRST_VARIABLE = "TIERD_CAMPAIGN_CALLS", "TIERD_CAMPAIGN_FIRST_PART"
"""How many calls a campaign does, and with which part it begins: a long one can be done in pieces, by one seed."""
PART_CALLS = 20_000
PROCESSES = 2
CALLS_PER_LOOK = 1000
BELOW = "work"
DISK_MIB = 2048


def parts(mounts: Sequence[OverlayMount], model: Path, calls: int, *, faithful: bool = True) -> Iterator[Part]:
    """The parts of a campaign that many calls long, over these mounts in turn, and the directories they need."""
    seed, first = house.seed(), int(os.environ.get(FIRST_VARIABLE) or 0)
    size = min(PART_CALLS, -(-calls // PROCESSES))
    for base in {model, *(mount.source / BELOW for mount in mounts)}:
        base.mkdir(parents=True)
    for number in range(first, first + -(-calls // size)):
        mount = mounts[number % len(mounts)]
        through, beneath = mount.mountpoint / BELOW, mount.source / BELOW
        yield Part(through, beneath, model, seed, number, size, min(CALLS_PER_LOOK, size // 4), faithful)


def compare(campaign: str, todo: list[Part]) -> None:
    """Do all parts, two at a time; the first difference ends it."""
    started, answers = time.monotonic(), Counter[str]()
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(compare_part, part) for part in todo]
        try:
            for done in as_completed(running):
                answers.update(done.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    seconds, count = time.monotonic() - started, sum(part.calls for part in todo)
    figures = {"calls": count, "first_part": todo[0].number, "parts": len(todo), "seed": todo[0].seed}
    rate = round(count / seconds)
    house.report(campaign, **figures, seconds=round(seconds, 1), calls_per_second=rate, answers=dict(answers))


def amount(default: int) -> int:
    """How many calls."""
    return int(os.environ.get(AMOUNT_VARIABLE) or default)


@pytest.fixture
def disk() -> Iterator[Path]:
    """Room for both trees where fsync(2) costs nothing."""
    with ext4(DISK_MIB) as where:
        yield where


@pytest.fixture
def both_ways(disk: Path, overlay_mount: MountFactory) -> list[OverlayMount]:
    """Two mounts, each over a directory of its own: one with passthrough, one whose daemon reads."""
    sources = {way: disk / f"source-{way}" for way in ("auto", "off")}
    for source in sources.values():
        source.mkdir()
    return [overlay_mount(source, passthrough=way) for way, source in sources.items()]


def test_the_overlay_answers_as_its_source(both_ways: list[OverlayMount], disk: Path) -> None:
    compare("comparer", list(parts(both_ways, disk / "model", 3000)))


@pytest.mark.campaign
def test_campaign_the_overlay_answers_as_its_source(both_ways: list[OverlayMount], disk: Path) -> None:
    compare("comparer", list(parts(both_ways, disk / "model", amount(1_000_000))))


@pytest.fixture
def on_juicefs(juicefs: Path, overlay_mount: MountFactory) -> OverlayMount:
    """A mount over a JuiceFS directory."""
    source = Path(tempfile.mkdtemp(prefix="source-", dir=juicefs))
    source.chmod(0o755)
    return overlay_mount(source)


def compare_with_juicefs(mount: OverlayMount, juicefs: Path, calls: int) -> None:
    """JuiceFS beside JuiceFS."""
    model = Path(tempfile.mkdtemp(prefix="model-", dir=juicefs))
    model.chmod(0o755)
    compare("comparer on JuiceFS", list(parts([mount], model / "model", calls, faithful=False)))


def test_the_overlay_answers_as_juicefs(on_juicefs: OverlayMount, juicefs: Path) -> None:
    compare_with_juicefs(on_juicefs, juicefs, 600)


@pytest.mark.campaign
def test_campaign_the_overlay_answers_as_juicefs(on_juicefs: OverlayMount, juicefs: Path) -> None:
    compare_with_juicefs(on_juicefs, juicefs, amount(50_000))
