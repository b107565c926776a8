"""The local index: sums, bounds, damage, and readers beside the writer."""

from __future__ import annotations

import math
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tierd.errors import UsageError
from tierd.node import index as index_module
from tierd.node.index import SCHEMA_VERSION, Batch, FileDelta, Index, ModelDelta, ModelRow, OpenRow
from tierd.policy import NS

MODEL = b"models/a"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.db"


def batch(*opens: tuple[bytes, int], model: bytes | None = MODEL) -> Batch:
    """Opens of files at times, as the recorder would sum them up."""
    made = Batch()
    for file, at in opens:
        entry = made.files.setdefault(file, FileDelta(model))
        entry.opens += 1
        entry.bytes_read += 10
        entry.last_access_ns = max(entry.last_access_ns, at)
        made.opens.append(OpenRow(at, file, model, 0, None))
        if model is not None:
            total = made.models.setdefault(model, ModelDelta())
            total.opens += 1
            total.bytes_read += 10
            total.last_access_ns = max(total.last_access_ns, at)
    return made


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    """What another process sees."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def test_a_new_index_is_empty_and_private(path: Path) -> None:
    with closing(Index(path)) as index:
        assert index.models() == []
        assert index.opens(10) == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
        assert rows(path, "PRAGMA journal_mode") == [("wal",)]
    assert [file.name for file in path.parent.iterdir()] == ["index.db"], "closing leaves one file"


def test_batches_add_up(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 5), (b"g", 7)))
        index.apply(batch((b"f", 3)))
        more = Batch(models={MODEL: ModelDelta(loads=2, hits=1, last_access_ns=6), b"z": ModelDelta(last_access_ns=99)})
        index.apply(more)
        assert index.models() == [
            ModelRow(b"z", 0, 0, 0, 0, 99, 99, heat=0.0, heat_at_ns=0),
            ModelRow(MODEL, 3, 2, 1, 30, 7, 7, heat=2.0, heat_at_ns=6),
        ]
        files = "SELECT path, model, opens, bytes_read, last_access FROM files ORDER BY path"
        assert rows(path, files) == [(b"f", MODEL, 2, 20, 5), (b"g", MODEL, 1, 10, 7)]


def test_it_is_still_there_the_next_time(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 5)))
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 6)))
        assert index.models()[0].opens == 2
        assert [row.at_ns for row in index.opens(10)] == [6, 5]


def test_opens_newest_first_and_by_model(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 1), (b"g", 2)))
        index.apply(batch((b"h", 3), model=b"models/b"))
        index.apply(batch((b"x", 4), model=None))
        assert [row.path for row in index.opens(10)] == [b"x", b"h", b"g", b"f"]
        assert [row.path for row in index.opens(2)] == [b"x", b"h"]
        assert [row.path for row in index.opens(10, MODEL)] == [b"g", b"f"]
        assert index.opens(10, b"models/none") == []
        assert index.opens(1) == [OpenRow(4, b"x", None, 0, None)]


def test_names_that_are_not_utf8(path: Path) -> None:
    name, model, pod = b"models/\xff\n'\"/\x01;--", b"models/\xff\n'\"", "0a-1b"
    with closing(Index(path)) as index:
        made = batch((name, 1), model=model)
        made.opens[0] = OpenRow(1, name, model, 2**32 - 2, pod)
        index.apply(made)
        assert index.opens(1, model) == made.opens
        assert index.models()[0].model == model


@pytest.mark.parametrize(
    "name", ["plain", "mod\u00e8les", "\ubaa8\ub378", "a b", "100%", "%41", "q?mode=rwc#f", "\udcff\udc80"]
)
def test_wherever_the_state_directory_lies(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    with closing(Index(directory / "index.db")) as index:
        index.apply(batch((b"f", 1)))
        assert len(index.models()) == len(index.opens(10)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [name]


# --- heat, hits, pins ---


def loads(count: int, at: int, hits: int = 0) -> Batch:
    """So many loads of one model, the last at `at`."""
    return Batch(models={MODEL: ModelDelta(opens=count, loads=count, hits=hits, last_access_ns=at)})


def test_heat_is_loads_that_decay(path: Path) -> None:
    with closing(Index(path, half_life_s=100.0)) as index:
        index.apply(loads(4, 1000 * NS))
        index.apply(loads(1, 1100 * NS))
        index.apply(batch((b"f", 5000 * NS)))
        (row,) = index.models()
        assert (row.heat, row.heat_at_ns) == (pytest.approx(3.0), 1100 * NS), "an open that begins no load adds nothing"
        assert row.last_access_ns == 5000 * NS
        index.apply(loads(1, 1300 * NS))
        assert index.models()[0].heat == pytest.approx(1.75)
    with closing(Index(path, half_life_s=math.inf)) as index:
        index.apply(loads(1, 9000 * NS))
        assert index.models()[0].heat == pytest.approx(2.75), "it is still there the next time"


def test_a_clock_that_ran_ahead_once_does_not_keep_loads_from_counting(path: Path) -> None:
    with closing(Index(path, half_life_s=100.0)) as index:
        index.apply(loads(1, 2**61))
        index.apply(loads(1, 1000 * NS))
        assert (index.models()[0].heat, index.models()[0].heat_at_ns) == (2.0, 1000 * NS), "not decayed, not raised"
        index.apply(loads(1, 1100 * NS))
        assert index.models()[0].heat == pytest.approx(2.0)


@pytest.mark.parametrize("half_life_s", [0.0, -1.0, math.nan])
def test_half_lives_that_make_no_sense(path: Path, half_life_s: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        Index(path, half_life_s=half_life_s)
    assert not path.exists()


def test_hits_can_be_taken_back_but_never_fall_below_none(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(loads(2, 1, hits=2))
        index.apply(loads(0, 2, hits=-1))
        assert index.models()[0].hits == 1
        index.apply(loads(0, 3, hits=-5))
        assert index.models()[0].hits == 0, "the batch that counted them was lost"
        index.apply(Batch(models={b"new": ModelDelta(hits=-1, last_access_ns=4)}))
        assert [row.hits for row in index.models()] == [0, 0]


def test_pins(path: Path) -> None:
    name = b"models/\xff\n'\""
    with closing(Index(path)) as index:
        assert index.pins() == frozenset()
        assert not index.set_pin(MODEL, False, 1)
        assert index.set_pin(MODEL, True, 2)
        assert not index.set_pin(MODEL, True, 3)
        assert index.set_pin(name, True, 4)
        assert rows(path, "SELECT model, at FROM pins ORDER BY at") == [(MODEL, 2), (name, 4)], "since the first time"
    with closing(Index(path)) as index:
        assert index.pins() == {MODEL, name}
        assert index.set_pin(MODEL, False, 5)
        assert index.pins() == {name}
        assert not index.set_pin(MODEL, False, 6)


def test_a_pin_is_set_while_batches_are_written(path: Path) -> None:
    """Writers of several threads on one connection: without turns, one would commit or roll back half of another."""
    errors: list[BaseException] = []

    def run(write: Callable[[int], object]) -> None:
        try:
            for number in range(60):
                write(number)
        except BaseException as error:
            errors.append(error)

    with closing(Index(path)) as index:
        writers: list[Callable[[int], object]] = [
            lambda number: index.apply(batch((b"f%d" % number, number), (b"g%d" % number, number))),
            lambda number: index.set_pin(b"a%d" % number, True, number),
            lambda number: index.set_pin(b"b%d" % number, True, number),
        ]
        threads = [threading.Thread(target=run, args=(write,)) for write in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(index.pins()) == 120
        assert index.models()[0].opens == 120


def test_a_writer_waits_for_the_one_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that comes in the middle of a batch is not part of the batch's transaction: it outlives its failure."""
    begun, go = threading.Event(), threading.Event()

    def fail(db: sqlite3.Connection, batch: Batch) -> None:
        begun.set()
        go.wait(0.2)
        raise sqlite3.OperationalError("disk full")

    with closing(Index(path)) as index:
        monkeypatch.setattr(index, "_add_opens", fail)
        failures: list[sqlite3.Error] = []

        def apply() -> None:
            try:
                index.apply(batch((b"f", 1)))
            except sqlite3.Error as error:
                failures.append(error)

        writer = threading.Thread(target=apply)
        writer.start()
        assert begun.wait(20)
        assert index.set_pin(MODEL, True, 1)
        go.set()
        writer.join()
        assert [str(error) for error in failures] == ["disk full"]
        assert index.pins() == {MODEL}
        assert index.models() == []


# --- bounds ---


@pytest.mark.parametrize("history_rows", [0, 1, 5])
def test_opens_are_pruned_by_count(path: Path, history_rows: int) -> None:
    with closing(Index(path, history_rows=history_rows)) as index:
        for at in range(4):
            index.apply(batch((b"f", at * 10), (b"g", at * 10 + 1), (b"h", at * 10 + 2)))
            assert len(index.opens(1000)) == min(history_rows, (at + 1) * 3)
        assert [row.at_ns for row in index.opens(2)] == [32, 31][:history_rows]
        assert index.models()[0].opens == 12, "sums stay"


def test_files_are_pruned_the_longest_unused_first(path: Path) -> None:
    with closing(Index(path, max_files=3)) as index:
        assert index.apply(batch((b"a", 1), (b"b", 2), (b"c", 3))) == 0
        assert index.apply(batch((b"a", 4))) == 0
        assert index.apply(batch((b"d", 5), (b"e", 6))) == 2
        assert rows(path, "SELECT path FROM files ORDER BY path") == [(b"a",), (b"d",), (b"e",)]
        assert index.apply(batch(*[(b"%d" % number, 10 + number) for number in range(10)])) == 10
        assert rows(path, "SELECT path FROM files ORDER BY path") == [(b"7",), (b"8",), (b"9",)]


def test_a_smaller_limit_holds_after_a_restart(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch(*[(b"%02d" % number, number) for number in range(20)]))
    with closing(Index(path, max_files=5)) as index:
        assert index.apply(batch((b"x", 99))) == 16
        assert rows(path, "SELECT count(*) FROM files") == [(5,)]


@settings(max_examples=20)
@given(history=st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=12), max_files=st.integers(1, 8))
def test_files_never_exceed_the_limit(
    tmp_path_factory: pytest.TempPathFactory, history: list[list[int]], max_files: int
) -> None:
    path = tmp_path_factory.mktemp("index") / "index.db"
    with closing(Index(path, max_files=max_files)) as index:
        known = 0
        for at, names in enumerate(history):
            before = {name for (name,) in rows(path, "SELECT path FROM files")}
            pruned = index.apply(batch(*[(b"%d" % name, at) for name in names]))
            known += len({b"%d" % name for name in names} - before) - pruned
            assert rows(path, "SELECT count(*) FROM files") == [(known,)]
            assert known <= max_files


# --- damage ---


def damaged(path: Path) -> list[str]:
    """Names of what was moved aside."""
    return sorted(file.name for file in path.parent.iterdir() if "damaged" in file.name)


def opens_anew(path: Path) -> str:
    """Open over a damaged index: one warning, a fresh and working index; the warning's reason."""
    with capture_logs() as logs, closing(Index(path)) as index:
        assert index.models() == []
        index.apply(batch((b"f", 1)))
        assert len(index.opens(10)) == 1
    (warning,) = logs
    assert (warning["event"], warning["log_level"]) == ("index_damaged", "warning")
    assert Path(warning["moved_to"]).exists()
    return str(warning["reason"])


def test_a_file_that_is_no_database_is_moved_aside(path: Path) -> None:
    path.write_bytes(b"not a database, whatever it says" * 1000)
    opens_anew(path)
    assert len(damaged(path)) == 1
    assert (path.parent / damaged(path)[0]).read_bytes().startswith(b"not a database")


def test_a_torn_database_is_moved_aside(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch(*[(b"models/a/%d" % number, number) for number in range(2000)]))
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xaa" * 64
    path.write_bytes(data)
    opens_anew(path)
    assert len(damaged(path)) == 1


def test_what_belongs_to_a_damaged_index_goes_with_it(path: Path) -> None:
    path.write_bytes(b"x" * 8192)
    Path(f"{path}-wal").write_bytes(b"old log")
    opens_anew(path)
    assert len(damaged(path)) >= 1
    assert not Path(f"{path}-wal").exists()


def test_an_empty_file_is_a_new_index(path: Path) -> None:
    path.touch()
    with capture_logs() as logs, closing(Index(path)) as index:
        assert index.models() == []
    assert logs == []
    assert damaged(path) == []


def test_the_index_of_a_newer_version_is_kept_aside(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 1)))
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    assert "newer" in opens_anew(path)
    assert rows(path.parent / damaged(path)[0], "SELECT path FROM files") == [(b"f",)], "nothing of it is lost"


def test_an_index_in_use_is_not_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody looks at it with sqlite3 and holds a transaction: that is no reason to begin a new history."""
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 1)))
    monkeypatch.setattr(index_module, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            Index(path).close()
        except UsageError as error:
            assert "locked" in str(error)  # noqa: PT017 (it may also come up)
    assert damaged(path) == []
    with closing(Index(path)) as index:
        assert len(index.models()) == 1


# --- transactions ---


def test_a_batch_is_written_whole_or_not_at_all(path: Path) -> None:
    with closing(Index(path, max_files=3)) as index:
        index.apply(batch((b"a", 1), (b"b", 2), (b"c", 3)))
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TRIGGER full BEFORE DELETE ON files BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        with pytest.raises(sqlite3.Error, match="disk full"):
            index.apply(batch((b"d", 4), (b"e", 5)))
        assert index.models()[0].opens == 3
        assert len(index.opens(100)) == 3
        assert rows(path, "SELECT count(*) FROM files") == [(3,)]
        with closing(sqlite3.connect(path)) as db:
            db.execute("DROP TRIGGER full")
        assert index.apply(batch((b"d", 4))) == 1, "the batch that failed is not counted as rows"
        assert rows(path, "SELECT path FROM files ORDER BY path") == [(b"b",), (b"c",), (b"d",)]


def test_readers_see_the_last_batch_while_the_next_is_written(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 1)))
        with closing(sqlite3.connect(path)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE models SET opens = 99")
            assert index.models()[0].opens == 1
            assert len(index.opens(10)) == 1


def test_a_reader_does_not_hold_up_the_writer(path: Path) -> None:
    with closing(Index(path)) as index:
        index.apply(batch((b"f", 1)))
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT opens FROM models").fetchone() == (1,)
            index.apply(batch((b"f", 2)))
            assert reader.execute("SELECT opens FROM models").fetchone() == (1,)
        assert index.models()[0].opens == 2
