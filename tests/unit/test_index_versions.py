"""An index of an older schema is brought up to date, all or nothing; the schemas are as they were released."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tierd.errors import UsageError
from tierd.node import index as index_module
from tierd.node.index import SCHEMA_VERSION, Batch, Index, ModelDelta, ModelRow
from tierd.node.outbox import Outbox

VERSION_1 = """
-- The local index: history and bookkeeping of one node, rebuildable, never needed by a read.
-- Paths are BLOBs relative to the source (names need not be UTF-8). Times are nanoseconds since the epoch.

CREATE TABLE IF NOT EXISTS models (
    model          BLOB PRIMARY KEY,            -- path of the model, such as models/llama-7b
    opens          INTEGER NOT NULL DEFAULT 0,  -- files opened for reading
    loads          INTEGER NOT NULL DEFAULT 0,  -- runs of opens with an idle gap between them
    hits           INTEGER NOT NULL DEFAULT 0,  -- loads served from the node tier alone
    bytes_read     INTEGER NOT NULL DEFAULT 0,  -- bytes served by the daemon itself
    first_access   INTEGER NOT NULL,
    last_access    INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS files (
    path           BLOB PRIMARY KEY,
    model          BLOB,                        -- NULL: belongs to no model
    opens          INTEGER NOT NULL DEFAULT 0,
    bytes_read     INTEGER NOT NULL DEFAULT 0,
    last_access    INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS files_by_age ON files (last_access);

CREATE TABLE IF NOT EXISTS opens (              -- the latest opens, one row each, pruned by count
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    at             INTEGER NOT NULL,
    path           BLOB NOT NULL,
    model          BLOB,
    uid            INTEGER NOT NULL,
    pod            TEXT                         -- UID of the pod, NULL where not visible
);

CREATE INDEX IF NOT EXISTS opens_by_model ON opens (model, id);
"""

VERSION_2 = VERSION_1.replace(
    """    last_access    INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS files (""",
    """    last_access    INTEGER NOT NULL,
    heat           REAL NOT NULL DEFAULT 0,     -- loads, decayed to heat_at
    heat_at        INTEGER NOT NULL DEFAULT 0   -- when a load last added to heat
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS pins (               -- models to keep on the node
    model          BLOB PRIMARY KEY,
    at             INTEGER NOT NULL             -- since when
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS files (""",
)

MODEL = b"models/a"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.db"


def make_version_1(path: Path) -> None:
    """What the first version left behind after a few batches."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(VERSION_1)
        db.execute("INSERT INTO models VALUES (?, 7, 3, 0, 700, 10, 90)", (MODEL,))
        db.execute("INSERT INTO models VALUES (?, 1, 1, 0, 0, 20, 20)", (b"models/\xff",))
        db.execute("INSERT INTO files VALUES (?, ?, 7, 700, 90)", (b"models/a/x.bin", MODEL))
        db.execute("INSERT INTO opens (at, path, model, uid) VALUES (90, ?, ?, 0)", (b"models/a/x.bin", MODEL))
        db.execute("PRAGMA user_version = 1")
        db.commit()


def shape(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns (name, type, NOT NULL, default, key), and the version."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'index')")]
        columns = {name: [row[1:] for row in db.execute(f"PRAGMA table_info({name})")] for name in sorted(tables)}
        return columns | {"version": db.execute("PRAGMA user_version").fetchall()}


def test_version_1_is_brought_up_to_date(path: Path, tmp_path: Path) -> None:
    make_version_1(path)
    with capture_logs() as logs, closing(Index(path)) as index:
        assert index.models() == [
            ModelRow(MODEL, 7, 3, 0, 700, 10, 90, heat=0.0, heat_at_ns=0),
            ModelRow(b"models/\xff", 1, 1, 0, 0, 20, 20, heat=0.0, heat_at_ns=0),
        ]
        assert [row.path for row in index.opens(10)] == [b"models/a/x.bin"]
        assert index.pins() == frozenset()
        assert index.set_pin(MODEL, True, 1)
        index.apply(Batch(models={MODEL: ModelDelta(opens=1, loads=1, hits=1, last_access_ns=100)}))
        assert index.models()[0] == ModelRow(MODEL, 8, 4, 1, 700, 10, 100, heat=1.0, heat_at_ns=100)
    assert logs == []
    with closing(Index(tmp_path / "new.db")):
        pass
    assert shape(path) == shape(tmp_path / "new.db"), "as if it had been made new"
    assert shape(path)["version"] == [(SCHEMA_VERSION,)]
    with closing(Index(path)) as index:
        assert index.models()[0].opens == 8, "and the next start finds nothing to do"


def test_version_2_gets_an_outbox(path: Path, tmp_path: Path) -> None:
    assert "pins" in VERSION_2
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(VERSION_2)
        db.execute("INSERT INTO models VALUES (?, 7, 3, 0, 700, 10, 90, 2.5, 80)", (MODEL,))
        db.execute("INSERT INTO pins VALUES (?, 1)", (MODEL,))
        db.execute("PRAGMA user_version = 2")
        db.commit()
    with capture_logs() as logs, closing(Index(path, unsent=True)) as index:
        assert index.models() == [ModelRow(MODEL, 7, 3, 0, 700, 10, 90, heat=2.5, heat_at_ns=80)]
        assert index.pins() == {MODEL}
        outbox = Outbox(index)
        outbox.begin()
        assert outbox.unsent() == [MODEL]
    assert logs == []
    with closing(Index(tmp_path / "new.db")):
        pass
    assert shape(path) == shape(tmp_path / "new.db"), "as if it had been made new"


@pytest.mark.parametrize("tables", [1, 2, 5])
def test_version_1_whose_first_start_was_interrupted(path: Path, tables: int) -> None:
    """It made its tables one by one and wrote its number at the end."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(";".join(VERSION_1.split(";\n\n")[:tables]))
    with capture_logs() as logs, closing(Index(path)) as index:
        index.apply(Batch(models={MODEL: ModelDelta(loads=1, last_access_ns=5)}))
        assert index.models()[0].heat == 1.0
    assert logs == []
    assert shape(path)["version"] == [(SCHEMA_VERSION,)]


def damaged(path: Path) -> list[Path]:
    """What was moved aside."""
    return [file for file in path.parent.iterdir() if "damaged" in file.name]


@pytest.mark.parametrize(
    "damage", ["ALTER TABLE models RENAME TO gone", "ALTER TABLE models ADD COLUMN heat_at INTEGER"]
)
def test_a_migration_that_cannot_be_done_moves_the_index_aside_as_it_was(path: Path, damage: str) -> None:
    make_version_1(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute(damage)
        db.commit()
    before = shape(path)
    with capture_logs() as logs, closing(Index(path)) as index:
        assert index.models() == []
        index.apply(Batch(models={MODEL: ModelDelta(loads=1, last_access_ns=5)}))
    assert [(line["event"], line["log_level"]) for line in logs] == [("index_damaged", "warning")]
    assert "schema version 1" in logs[0]["reason"]
    (aside,) = damaged(path)
    assert shape(aside) == before, "half of a migration is none"


def test_a_migration_that_has_to_wait_too_long_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that somebody else holds is no reason to begin a new history."""
    make_version_1(path)
    before = shape(path)
    monkeypatch.setattr(index_module, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UsageError, match="locked"):
            Index(path)
    assert damaged(path) == []
    assert shape(path) == before
    with closing(Index(path)) as index:
        assert index.models()[0].opens == 7
