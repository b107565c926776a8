"""A source that fails one read and one open in ten: pods see only what is theirs, and no wrong byte is ever kept."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.campaigns import house
from tests.conftest import DirectoryFactory, MountFactory
from tests.faulty import FaultySource
from tests.integration.calls import outcome
from tests.integration.tiered import command, content, data_files, idle
from tests.mounts import QUIET_LEVELS, OverlayMount

NUMBERS = (errno.EIO, errno.ENOTCONN, errno.ESTALE)
PROBABILITY = 1 - 0.9 ** (1 / len(NUMBERS))
"""Of each kind: together they meet one operation in ten."""
SHORT_PROBABILITY = 0.1
READERS = 4
SIZES = {"a.safetensors": 700_001, "b.safetensors": 1_500_000, "config.json": 20_000}
OUTPUT_BYTES = 400_000
MAY_BE_LOGGED = frozenset({"fill_ended", "fill_not_begun"})


class Failing:
    """An overlay over a source that fails, files that it holds, and what readers got of them."""

    def __init__(self, source: FaultySource, mount: OverlayMount, seed: int) -> None:
        self.source = source
        self.mount = mount
        self.random = random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.errors: Counter[str] = Counter()
        self.loads = 0
        self.wrong: list[str] = []
        self._counting = threading.Lock()

    def add_files(self, round_: int) -> list[str]:
        """A model and an output that nobody has read yet."""
        names = {f"models/m{round_}/{file}": size for file, size in SIZES.items()}
        names[f"outputs/{round_}"] = OUTPUT_BYTES
        for name, size in names.items():
            self.files[name] = content(size, name)
            path = self.source.backing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
        return list(names)

    def fail_at_random(self) -> None:
        """From now on, until `self.source.release()`."""
        for number in NUMBERS:
            seed = self.random.randrange(1 << 32)
            self.source.fail(number, "open", "read", probability=PROBABILITY, seed=seed)
        self.source.shorten(probability=SHORT_PROBABILITY, seed=self.random.randrange(1 << 32))

    # --- readers ---

    def read_at_once(self, names: list[str], times: int) -> None:
        """Several readers, each in an order of its own."""
        orders = [self.random.sample(names * times, len(names) * times) for _ in range(READERS)]
        threads = [threading.Thread(target=self._read_all, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _read_all(self, names: list[str]) -> None:
        for name in names:
            got = outcome((self.mount.mountpoint / name).read_bytes)
            with self._counting:
                self.loads += 1
                if isinstance(got, str):
                    self.errors[name] += 1
                    if got not in {errno.errorcode[number] for number in NUMBERS}:
                        self.wrong.append(f"{name}: {got}")
                elif got != self.files[name]:
                    self.wrong.append(f"{name}: wrong bytes, {len(got)} of {len(self.files[name])}")

    # --- what must hold ---

    def check_errors(self) -> None:
        """No error that the source did not give; each is of a request of its own."""
        assert self.wrong == []
        failures: Counter[str] = Counter()
        for what, count in self.source.tell()["failures"].items():
            failures[what.partition(" ")[2]] += count
        for name, count in self.errors.items():
            assert count <= failures[name], f"{name}: {count} errors of {failures[name]} failures"

    def copied(self, names: Iterable[str]) -> list[str]:
        """Which of these files have a copy; each holds exactly the right bytes."""
        by_inode = {(self.source.mountpoint / name).stat().st_ino: name for name in names}
        copies = {by_inode.get(int(path.name.partition("-")[0], 16)): path for path in data_files(self.mount)}
        found = {name: path for name, path in copies.items() if name is not None}
        for name, path in found.items():
            assert path.read_bytes() == self.files[name], f"a copy of {name} has wrong bytes"
        return sorted(found)

    def check_copies_need_no_source(self, names: list[str]) -> None:
        """While it opens nothing and reads nothing, what has a copy reads well, and nothing else does."""
        rule = self.source.fail(errno.EIO, "open", "read")
        for name in names:
            assert outcome((self.mount.mountpoint / name).read_bytes) == self.files[name], name
        self.source.remove(rule)

    def check_all_reads(self, names: list[str]) -> None:
        """The faults have stopped."""
        for name in names:
            assert outcome((self.mount.mountpoint / name).read_bytes) == self.files[name], name

    def allow_log(self) -> None:
        """Failed fills are told as warnings."""
        loud = {line["event"] for line in self.mount.log() if line["level"] not in QUIET_LEVELS}
        self.mount.expect_log(*(loud & MAY_BE_LOGGED))


def read_while_it_fails(source: FaultySource, mount: OverlayMount, rounds: int, times: int) -> None:
    """That many rounds with new files, which four readers read so many times each."""
    seed, started = house.seed(), time.monotonic()
    state = Failing(source, mount, seed)
    for round_ in range(rounds):
        names = state.add_files(round_)
        state.fail_at_random()
        state.read_at_once(names, times)
        idle(mount)
        source.release()
        state.check_errors()
        mount.settled()
        state.check_copies_need_no_source(state.copied(names))
        state.check_all_reads(names)
        idle(mount)
    command(mount, "check", "--deep")
    copies = len(state.copied(state.files))
    state.allow_log()
    injected = source.tell()["injected"]
    house.report("failing source", seed=seed, rounds=rounds, files=len(state.files), loads=state.loads,
                 injected=injected, errors=state.errors.total(), copies=copies,
                 seconds=round(time.monotonic() - started))  # fmt: skip
    assert injected["fail open"] > 0
    assert injected["fail read"] > 0
    assert injected["short read"] > 0
    assert 0 < copies < len(state.files), "fills fail, and come through all the same"


@pytest.fixture
def failing(new_directory: DirectoryFactory) -> Iterator[FaultySource]:
    """A source whose failures no page cache retries or makes good."""
    with FaultySource(new_directory("failing"), direct_io=True) as source:
        yield source


def test_faults_of_the_source_stay_where_they_belong(failing: FaultySource, overlay_mount: MountFactory) -> None:
    read_while_it_fails(failing, overlay_mount(failing.mountpoint, prefetch="no"), rounds=5, times=3)


@pytest.mark.campaign
def test_campaign_faults_of_the_source_stay_where_they_belong(
    failing: FaultySource, overlay_mount: MountFactory
) -> None:
    read_while_it_fails(failing, overlay_mount(failing.mountpoint, prefetch="no"), rounds=200, times=5)


def test_a_failure_that_a_fill_meets_is_no_readers(failing: FaultySource, overlay_mount: MountFactory) -> None:
    """The first read of each file fails: it is the fill's, and the reader behind it goes on from the source."""
    mount = overlay_mount(failing.mountpoint, prefetch="no")
    state = Failing(failing, mount, 1)
    names = [name for name in state.add_files(0) if name.endswith(".safetensors")]
    failing.fail(errno.EIO, "read", times_per_path=1)
    for name in names:
        state._read_all([name])
    assert not state.errors
    assert state.wrong == []
    assert failing.tell()["injected"]["fail read"] >= len(names)
    idle(mount)
    assert state.copied(names) == []
    mount.expect_log("fill_ended")


def test_what_is_read_by_passthrough_fails_as_the_source_does(
    failing: FaultySource, overlay_mount: MountFactory
) -> None:
    mount = overlay_mount(failing.mountpoint, prefetch="no")
    state = Failing(failing, mount, 1)
    name = next(name for name in state.add_files(0) if name.startswith("outputs/"))
    failing.fail(errno.ENOTCONN, "read", times_per_path=1)
    path: Path = mount.mountpoint / name
    assert outcome(path.read_bytes) == "ENOTCONN"
    assert path.read_bytes() == state.files[name]
