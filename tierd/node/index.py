"""The local index: one SQLite file per state directory (schema: `schema.sql`).

Contract: one writer, from one worker thread at a time; readers open connections of their own, which
WAL mode lets run beside the writer. A damaged index is moved aside and started anew: it is history,
and losing it costs statistics, never a byte.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import structlog

from tierd.errors import UsageError

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 1
_SCHEMA = Path(__file__).with_name("schema.sql")
_BUSY_SECONDS = 5.0


@dataclass(slots=True)
class ModelDelta:
    """What a batch adds to one model."""

    opens: int = 0
    loads: int = 0
    hits: int = 0
    bytes_read: int = 0
    first_access_ns: int | None = None
    last_access_ns: int = 0


@dataclass(slots=True)
class FileDelta:
    """What a batch adds to one file."""

    model: bytes | None
    opens: int = 0
    bytes_read: int = 0
    last_access_ns: int = 0


@dataclass(frozen=True, slots=True)
class OpenRow:
    """One open, as `tierd opens` shows it."""

    at_ns: int
    path: bytes
    model: bytes | None
    uid: int
    pod: str | None


@dataclass(slots=True)
class Batch:
    """What the recorder writes in one transaction."""

    models: dict[bytes, ModelDelta] = field(default_factory=dict)
    files: dict[bytes, FileDelta] = field(default_factory=dict)
    opens: list[OpenRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What is known of one model."""

    model: bytes
    opens: int
    loads: int
    hits: int
    bytes_read: int
    first_access_ns: int
    last_access_ns: int


class Index:
    """See the module. `history_rows` and `max_files` bound the tables `opens` and `files`."""

    def __init__(self, path: Path, *, history_rows: int = 100_000, max_files: int = 1_000_000) -> None:
        self.path = path
        self._history_rows = history_rows
        self._max_files = max_files
        self._writer = _open_or_replace(path)
        self._file_rows: int
        (self._file_rows,) = self._writer.execute("SELECT count(*) FROM files").fetchone()

    def apply(self, batch: Batch) -> int:
        """Write a batch in one transaction; how many file rows were pruned for it. Raises sqlite3.Error."""
        with self._writer as db:
            rows, pruned = self._add_files(db, batch)
            db.executemany(
                "INSERT INTO models (model, opens, loads, hits, bytes_read, first_access, last_access)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?7, ?6) ON CONFLICT (model) DO UPDATE SET"
                " opens = opens + ?2, loads = loads + ?3, hits = hits + ?4, bytes_read = bytes_read + ?5,"
                " last_access = max(last_access, ?6)",
                (
                    (model, m.opens, m.loads, m.hits, m.bytes_read, m.last_access_ns, _first(m))
                    for model, m in batch.models.items()
                ),
            )
            db.executemany(
                "INSERT INTO opens (at, path, model, uid, pod) VALUES (?, ?, ?, ?, ?)",
                ((row.at_ns, row.path, row.model, row.uid, row.pod) for row in batch.opens),
            )
            db.execute("DELETE FROM opens WHERE id <= (SELECT max(id) FROM opens) - ?", (self._history_rows,))
        self._file_rows = rows
        return pruned

    def _add_files(self, db: sqlite3.Connection, batch: Batch) -> tuple[int, int]:
        """How many file rows there will be, and how many had to go."""
        known = sum(1 for path in batch.files if db.execute("SELECT 1 FROM files WHERE path = ?", (path,)).fetchone())
        db.executemany(
            "INSERT INTO files (path, model, opens, bytes_read, last_access) VALUES (?1, ?2, ?3, ?4, ?5)"
            " ON CONFLICT (path) DO UPDATE SET model = ?2, opens = opens + ?3, bytes_read = bytes_read + ?4,"
            " last_access = max(last_access, ?5)",
            ((path, f.model, f.opens, f.bytes_read, f.last_access_ns) for path, f in batch.files.items()),
        )
        rows = self._file_rows + len(batch.files) - known
        surplus = rows - self._max_files
        if surplus <= 0:
            return rows, 0
        db.execute(
            "DELETE FROM files WHERE path IN (SELECT path FROM files ORDER BY last_access LIMIT ?)",
            (surplus,),
        )
        return rows - surplus, surplus

    def models(self) -> list[ModelRow]:
        """All models ever opened here, the latest first."""
        with self._reader() as db:
            rows = db.execute(
                "SELECT model, opens, loads, hits, bytes_read, first_access, last_access"
                " FROM models ORDER BY last_access DESC"
            )
            return [ModelRow(*row) for row in rows]

    def opens(self, limit: int, model: bytes | None = None) -> list[OpenRow]:
        """The latest opens, newest first, of one model if given."""
        where, values = ("WHERE model = ?", [model]) if model is not None else ("", [])
        with self._reader() as db:
            rows: Iterable[tuple[int, bytes, bytes | None, int, str | None]] = db.execute(
                f"SELECT at, path, model, uid, pod FROM opens {where} ORDER BY id DESC LIMIT ?",
                (*values, limit),
            )
            return [OpenRow(*row) for row in rows]

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        with closing(
            sqlite3.connect(f"file:{quote(os.fsencode(self.path))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)
        ) as db:
            yield db

    def close(self) -> None:
        """Checkpoint and close."""
        self._writer.close()


def _first(model: ModelDelta) -> int:
    return model.last_access_ns if model.first_access_ns is None else model.first_access_ns


def _open_or_replace(path: Path) -> sqlite3.Connection:
    try:
        return _open(path)
    except sqlite3.OperationalError as error:
        raise UsageError(f"index {path}: {error}", hint="is the disk full, or does another program hold it?") from None
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        log.warning("index_damaged", path=str(path), moved_to=str(aside), reason=str(error))
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"schema version {version} is newer than {SCHEMA_VERSION}")
        if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check found damage")
        db.executescript(_SCHEMA.read_text(encoding="utf-8"))
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except BaseException:
        db.close()
        raise
    path.chmod(0o600)
    return db
