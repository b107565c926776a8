"""What the unit tests share: an overlay over a real directory, without a kernel."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.unit.copies import own_store
from tests.unit.descriptors import open_descriptors
from tests.unit.kernel import FakeKernel
from tests.unit.node import node  # noqa: F401  (a fixture)
from tests.unit.shop import shop, small, tap  # noqa: F401  (fixtures)
from tests.unit.tiered import tiered  # noqa: F401  (a fixture)
from tierd.node.cold_source import ColdSource
from tierd.node.journal import Journal
from tierd.node.overlay import Overlay
from tierd.node.reads import ReadTarget
from tierd.node.store import Store

JOURNAL_CAPACITY = 1000
GATE_SECONDS = 20.0


class Reads:
    """Stands for the seam: notes which handles' READs it would answer, and which nodes the kernel would read itself.

    `offers` says whether it has backings to give. As in the kernel, one node has one at a time.
    """

    def __init__(self) -> None:
        self.targets: dict[int, ReadTarget] = {}
        self.changed: list[int] = []
        self.asked_again: list[int] = []
        self.dropped: list[int] = []
        self.offers = False
        self.backed: Counter[int] = Counter()
        self.passed_through: dict[int, int] = {}

    def serve_reads(self, fh: int, target: ReadTarget) -> None:
        """From now on."""
        assert fh not in self.targets
        self.targets[fh] = target

    def stop_reads(self, fh: int) -> None:
        """The handle was released."""
        del self.targets[fh]
        self.passed_through.pop(fh, None)

    def attributes_changed(self, node_id: int) -> None:
        """The kernel would ask again."""
        self.asked_again.append(node_id)

    def content_changed(self, node_id: int) -> None:
        """The kernel would ask again."""
        self.changed.append(node_id)

    def drop_pages(self, node_id: int) -> None:
        """The kernel would drop its pages."""
        self.dropped.append(node_id)

    def offers_passthrough(self) -> bool:
        """As told."""
        return self.offers

    def back(self, node_id: int, fd: int) -> int | None:
        """The backing of a node is its ID plus a thousand."""
        if not self.offers:
            return None
        self.backed[node_id] += 1
        return 1000 + node_id

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The reply would carry the backing."""
        self.passed_through[fh] = backing_id

    def unback(self, node_id: int) -> None:
        """One open fewer."""
        assert self.backed[node_id] > 0
        self.backed[node_id] -= 1


@dataclass
class Bench:
    """An overlay, the directory beneath it, and what it reported."""

    beneath: Path
    overlay: Overlay
    kernel: FakeKernel
    reads: Reads
    events_dropped: int = 0

    @property
    def source(self) -> ColdSource:
        return self.overlay.source

    @property
    def journal(self) -> Journal:
        return self.overlay.journal


def make_bench(beneath: Path, journal_capacity: int = JOURNAL_CAPACITY) -> Bench:
    """An overlay over `beneath`."""

    def drop() -> None:
        bench.events_dropped += 1

    reads = Reads()
    overlay = Overlay(
        ColdSource(beneath),
        Journal(journal_capacity),
        reads,
        event_dropped=drop,
        now_ns=lambda: 42,
    )
    bench = Bench(beneath, overlay, FakeKernel(overlay), reads)
    return bench


def end_bench(bench: Bench) -> None:
    """The kernel forgets everything; the overlay must then hold nothing."""
    bench.overlay.check()
    bench.kernel.forget_all()
    bench.overlay.check()
    assert not bench.overlay.files, "files left open"
    assert not bench.reads.targets, "READs still served"
    assert not +bench.reads.backed, "backings left"
    assert not bench.overlay.listings, "listings left open"
    assert len(bench.overlay.inodes) == 1, "only the root is left"
    assert len(bench.overlay.dirs) == 0, "no directory descriptor is left"
    bench.source.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A new overlay; afterwards its ledger balances and none of its descriptors is open."""
    beneath = tmp_path / "source"
    beneath.mkdir()
    made = make_bench(beneath)
    yield made
    end_bench(made)
    until = time.monotonic() + GATE_SECONDS  # some are closed by threads of their own
    while any(str(tmp_path) in line for line in open_descriptors()):
        assert time.monotonic() < until, "descriptors left open"


class Gate:
    """Holds blocking calls in their worker threads until told to go on."""

    def __init__(self) -> None:
        self.entered = 0
        self._go = threading.Event()
        self._changed = trio.Event()

    def hold(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but it waits at the gate first."""

        def held(*args: Any) -> Any:
            trio.from_thread.run_sync(self._count)
            assert self._go.wait(GATE_SECONDS), "nobody opened the gate"
            return function(*args)

        return held

    def _count(self) -> None:
        self.entered += 1
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, count: int) -> None:
        """Return once that many calls wait."""
        with trio.fail_after(GATE_SECONDS):
            while self.entered < count:
                await self._changed.wait()

    def open(self) -> None:
        """Let everybody through, now and later."""
        self._go.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open at the latest when the test ends."""
    made = Gate()
    yield made
    made.open()


@pytest.fixture(autouse=True)
def _files_of_any_size_may_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest size that does is tested on real mounts (`test_locks_hold_between_readers_and_writers`)."""
    monkeypatch.setattr("tierd.node.opens.PASSTHROUGH_BYTES_MIN", 0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a cache may be made."""
    return tmp_path / "cache"


@pytest.fixture
def store(directory: Path) -> Iterator[Store]:
    """An empty store, whose books balance at the end."""
    with own_store(directory) as made:
        yield made
