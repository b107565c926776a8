"""From events to rows: which model, which load, how many bytes; with a real index."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tierd.metrics import Metrics
from tierd.node.cold_source import ColdSource
from tierd.node.index import Batch, Index
from tierd.node.journal import Closed, Journal, Opened
from tierd.node.recorder import ModelDirs, Recorder

NS = 1_000_000_000
TIMEOUT_SECONDS = 20.0


class Setup:
    """A recorder, what it reads from and what it writes to."""

    def __init__(self, directory: Path, is_model_dir: Callable[[bytes], bool] = lambda _: False) -> None:
        self.journal = Journal(100_000)
        self.index = Index(directory / "index.db")
        self.metrics = Metrics(CollectorRegistry())
        self.recorder = Recorder(
            self.journal,
            self.index,
            self.metrics,
            models_roots=[b"models"],
            is_model_dir=is_model_dir,
            load_idle_gap_s=30.0,
        )
        self._fh = 0

    def opened(self, path: bytes, second: float = 0, **more: Any) -> Callable[[float, int], None]:
        """Note an open; what notes its close."""
        self._fh += 1
        fh = self._fh
        event = Opened(fh, path, int(second * NS), more.get("uid", 0), more.get("pod"), more.get("from_node", False))
        assert self.journal.opened(event)

        def close(second: float, bytes_read: int = 0) -> None:
            self.journal.closed(Closed(fh, path, int(second * NS), bytes_read))

        return close

    def sums(self) -> dict[bytes, tuple[int, int, int]]:
        """Opens, loads and bytes of each model."""
        return {row.model: (row.opens, row.loads, row.bytes_read) for row in self.index.models()}


def node_tier_opens(setup: Setup) -> dict[str, float | None]:
    """The counter by its label."""
    get = setup.metrics.registry.get_sample_value
    return {result: get("tierd_node_tier_opens_total", {"result": result}) for result in ("hit", "miss")}


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    with closing(made.index):
        yield made


async def test_a_load_of_three_files(setup: Setup) -> None:
    for number in range(3):
        setup.opened(b"models/llama/%d.safetensors" % number, number)(number + 0.5, 100)
    await setup.recorder.flush()
    assert setup.sums() == {b"models/llama": (3, 1, 300)}
    (row,) = setup.index.models()
    assert (row.first_access_ns, row.last_access_ns) == (0, int(2.5 * NS))
    assert setup.metrics.totals() | {"opens": 3, "loads": 1, "read_bytes": 300} == setup.metrics.totals()


async def test_loads_reach_over_batches(setup: Setup) -> None:
    for second in (0, 10, 50, 60):
        setup.opened(b"models/llama/x.gguf", second)(second, 1)
        await setup.recorder.flush()
    assert setup.sums() == {b"models/llama": (4, 2, 4)}


async def test_a_load_from_the_node_alone_is_a_hit(setup: Setup) -> None:
    for number in range(3):
        setup.opened(b"models/llama/%d.safetensors" % number, number, from_node=True)(number + 0.5, 0)
    await setup.recorder.flush()
    (row,) = setup.index.models()
    assert (row.opens, row.loads, row.hits) == (3, 1, 1)
    assert row.heat == 1.0
    assert row.heat_at_ns == int(2.5 * NS), "the batch's last access"
    assert node_tier_opens(setup) == {"hit": 3, "miss": 0}


async def test_a_hit_is_taken_back_in_a_later_batch(setup: Setup) -> None:
    hits = []
    for second, from_node in ((0, True), (5, True), (10, False), (15, False), (20, True), (100, True), (200, False)):
        setup.opened(b"models/llama/x.gguf", second, from_node=from_node)(second + 1, 0)
        await setup.recorder.flush()
        hits.append(setup.index.models()[0].hits)
    assert hits == [1, 1, 0, 0, 0, 1, 1]
    assert setup.index.models()[0].loads == 3
    assert node_tier_opens(setup) == {"hit": 4, "miss": 3}


async def test_hits_of_one_batch_are_summed(setup: Setup) -> None:
    for second, from_node in ((0, True), (1, False), (100, True), (200, True), (201, False)):
        setup.opened(b"models/llama/x.gguf", second, from_node=from_node)(second, 0)
    setup.opened(b"models/other/x.gguf", 300, from_node=True)(301, 0)
    await setup.recorder.flush()
    assert {row.model: (row.loads, row.hits) for row in setup.index.models()} == {
        b"models/llama": (3, 1),
        b"models/other": (1, 1),
    }


async def test_what_belongs_to_no_model_is_neither_hit_nor_miss(setup: Setup) -> None:
    setup.opened(b"outputs/1.png", 5, from_node=True)(6, 10)
    setup.opened(b"outputs/2.png", 5)(6, 10)
    await setup.recorder.flush()
    assert node_tier_opens(setup) == {"hit": 0, "miss": 0}


async def test_what_belongs_to_no_model_is_still_an_open(setup: Setup) -> None:
    setup.opened(b"outputs/1.png", 5, uid=1000, pod="0-1")(6, 10)
    await setup.recorder.flush()
    assert setup.sums() == {}
    (row,) = setup.index.opens(10)
    assert (row.path, row.model, row.uid, row.pod) == (b"outputs/1.png", None, 1000, "0-1")
    assert setup.metrics.totals()["opens"] == 1
    assert setup.metrics.totals()["loads"] == 0


async def test_a_close_counts_for_the_model_of_its_open(tmp_path: Path) -> None:
    """Between the two the directory got weights, so the same path would now belong to its parent."""
    marked: set[bytes] = set()
    setup = Setup(tmp_path, marked.__contains__)
    with closing(setup.index):
        close = setup.opened(b"models/org/name/x.bin", 0)
        await setup.recorder.flush()
        marked.add(b"models/org")
        close(1, 500)
        later = setup.opened(b"models/org/name/x.bin", 2)
        later(3, 7)
        await setup.recorder.flush()
        assert setup.sums() == {b"models/org/name": (1, 1, 500), b"models/org": (1, 1, 7)}


async def test_a_failing_index_is_counted_and_the_next_batch_is_written(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = setup.index.apply

    def fail(batch: Batch) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(setup.index, "apply", fail)
    close = setup.opened(b"models/a/x.bin", 0)
    with capture_logs() as logs:
        await setup.recorder.flush()
    assert [(line["event"], line["log_level"], line["reason"]) for line in logs] == [
        ("index_write_failed", "error", "database or disk is full")
    ]
    assert setup.metrics.totals()["dropped"] == 1
    monkeypatch.setattr(setup.index, "apply", apply)
    close(1, 5)
    setup.opened(b"models/a/x.bin", 2)
    await setup.recorder.flush()
    assert setup.sums() == {b"models/a": (1, 0, 5)}, "the load began with the open that was lost"


async def test_a_read_only_disk(setup: Setup) -> None:
    """A real failure of SQLite: the writer's connection is closed."""
    setup.index.close()
    setup.opened(b"models/a/x.bin", 0)
    with capture_logs() as logs:
        await setup.recorder.flush()
    assert [line["event"] for line in logs] == ["index_write_failed"]
    assert len(setup.journal) == 0


async def test_pruned_rows_are_counted(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.index.close()
    setup.index = setup.recorder._index = Index(tmp_path / "small.db", max_files=2)
    with closing(setup.index):
        for number in range(5):
            setup.opened(b"outputs/%d" % number, number)
        await setup.recorder.flush()
        assert setup.metrics.totals()["dropped"] == 3


async def test_run_writes_in_batches(setup: Setup, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within a fifth of a second is one transaction."""
    written: list[int] = []
    done = trio.Event()
    apply = setup.index.apply

    def note(batch: Batch) -> int:
        written.append(len(batch.opens))
        pruned = apply(batch)
        trio.from_thread.run_sync(done.set)
        return pruned

    monkeypatch.setattr(setup.index, "apply", note)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.recorder.run)
        for number in range(5):
            setup.opened(b"models/a/%d.bin" % number, number)
            await wait_all_tasks_blocked()
            assert written == []
        mock_clock.jump(0.2)
        await done.wait()
        assert written == [5]
        nursery.cancel_scope.cancel()
    assert setup.sums() == {b"models/a": (5, 1, 0)}


async def test_flush_returns_once_everything_noted_before_is_written(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tierd models` flushes and reads: what the recorder has just taken must be in, too."""
    go, entered = threading.Event(), trio.Event()
    apply = setup.index.apply

    def slow(batch: Batch) -> int:
        trio.from_thread.run_sync(entered.set)
        assert go.wait(TIMEOUT_SECONDS)
        return apply(batch)

    monkeypatch.setattr(setup.index, "apply", slow)
    setup.opened(b"models/a/x.bin", 0)
    seen: list[dict[bytes, tuple[int, int, int]]] = []

    async def ask() -> None:
        await setup.recorder.flush()
        seen.append(setup.sums())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.recorder.flush)
        await entered.wait()
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        go.set()
    assert seen == [{b"models/a": (1, 1, 0)}]


async def test_an_unreadable_directory_does_not_lose_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing a directory of a network file system may fail half-way; that is no evidence, not an error."""
    source = tmp_path / "source"
    (source / "models" / "a").mkdir(parents=True)
    root = ColdSource(source)
    listdir = os.listdir

    def fail(where: Any) -> list[Any]:
        if isinstance(where, int):
            raise OSError(5, "Input/output error")
        return listdir(where)

    setup = Setup(tmp_path, ModelDirs(root))
    try:
        with closing(setup.index), capture_logs() as logs:
            monkeypatch.setattr(os, "listdir", fail)
            setup.opened(b"models/a/b/x.bin", 0)
            await setup.recorder.flush()
            assert setup.sums() == {b"models/a/b": (1, 1, 0)}
            assert [line["event"] for line in logs] == ["model_dir_unreadable"]
    finally:
        root.close()


# --- evidence from the disk ---


@pytest.fixture
def root(tmp_path: Path) -> Iterator[ColdSource]:
    """The source."""
    source = ColdSource(tmp_path)
    yield source
    source.close()


def test_evidence_is_looked_up_once_a_minute(tmp_path: Path, root: ColdSource) -> None:
    now = 1000.0
    is_model_dir = ModelDirs(root, lambda: now)
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    assert not is_model_dir(b"models/a")
    (directory / "model.safetensors").touch()
    now += 59
    assert not is_model_dir(b"models/a")
    now += 2
    assert is_model_dir(b"models/a")


@pytest.mark.parametrize("make", ["missing", "file", "dangling"])
def test_what_is_no_directory_is_no_model_and_no_warning(tmp_path: Path, root: ColdSource, make: str) -> None:
    path = tmp_path / "x"
    if make == "file":
        path.touch()
    elif make == "dangling":
        path.symlink_to("nowhere")
    with capture_logs() as logs:
        assert not ModelDirs(root)(b"x")
    assert logs == []


def test_evidence_comes_from_the_source_alone(tmp_path: Path, root: ColdSource) -> None:
    """A link out of the tree is no evidence: names are resolved beneath the root only."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.gguf").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a").symlink_to(outside)
    below = ColdSource(inside)
    assert not ModelDirs(below)(b"a")
    below.close()


def test_evidence_remembered_is_bounded(tmp_path: Path, root: ColdSource) -> None:
    is_model_dir = ModelDirs(root)
    for number in range(10_100):
        is_model_dir(b"%d" % number)
    assert len(is_model_dir._known) == 10_000
