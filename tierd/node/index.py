"""The local index: one SQLite file per state directory (schema: `schema.sql`).

Contract: every method may be called from any thread. Writers (`apply`, `set_pin`, `transaction`, `close`) take turns by
a lock; readers open connections of their own, which WAL mode lets run beside the writer. An older schema is brought up
to date in one transaction. A damaged index is moved aside and started anew: it is history and wishes, and losing it
costs statistics and pins, never a byte.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import structlog

from tierd.errors import UsageError
from tierd.policy import heat_now

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 4
_SCHEMA = Path(__file__).with_name("schema.sql")
_MIGRATIONS = {
    1: """
        ALTER TABLE models ADD COLUMN heat REAL NOT NULL DEFAULT 0;
        ALTER TABLE models ADD COLUMN heat_at INTEGER NOT NULL DEFAULT 0;
    """,
}
"""By version, what leads to the next one; tables and indexes that are new come from the schema."""
_BUSY_SECONDS = 5.0
_UNSENT_OUTPUTS_MAX = 200_000
"""Of more than these the controller hears by its scan; the file grows to some 40 MB with them."""


@dataclass(slots=True)
class ModelDelta:
    """What a batch adds to one model; `hits` is below 0 where a load counted as a hit before turned out to be none."""

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


@dataclass(slots=True)
class OutputDelta:
    """What a batch adds to one output; times are 0 where nothing was."""

    opens: int = 0
    last_access_ns: int = 0
    written_ns: int = 0
    removed_ns: int = 0
    ended: int = 0
    """Version of its object for which nothing stands any more."""

    def opened(self, at_ns: int) -> None:
        """It was opened for reading."""
        self.opens += 1
        self.last_access_ns = max(self.last_access_ns, at_ns)

    def changed(self, at_ns: int, *, removed: bool, ended: int = 0) -> None:
        """It was written, or its name removed."""
        if removed:
            self.removed_ns = max(self.removed_ns, at_ns)
            self.ended = max(self.ended, ended)
        else:
            self.written_ns = max(self.written_ns, at_ns)


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
    outputs: dict[bytes, OutputDelta] = field(default_factory=dict)
    """By path below the outputs root."""


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
    heat: float
    """Loads, decayed to `heat_at_ns`; for what they weigh now see `tierd.policy.heat_now`."""
    heat_at_ns: int


class Index:
    """See the module. `history_rows` and `max_files` bound the tables `opens` and `files`.

    `half_life_s` is the time in which heat halves. `unsent`: what is added to models is noted for the outbox, too
    (`outbox.py`), in the same transaction.
    """

    def __init__(
        self,
        path: Path,
        *,
        history_rows: int = 100_000,
        max_files: int = 1_000_000,
        half_life_s: float = 7 * 86400.0,
        unsent: bool = False,
    ) -> None:
        if not half_life_s > 0:
            raise ValueError(f"half-life of {half_life_s} s: need more than 0")
        self.path = path
        self._history_rows = history_rows
        self._max_files = max_files
        self._half_life_s = half_life_s
        self._unsent = unsent
        self.outputs_not_noted = 0
        """Outputs of which the controller is not told, since the start: too many wait already."""
        self._write_lock = threading.Lock()
        self._writer = _open_or_replace(path)
        self._writer.create_function("heat_now", 4, heat_now, deterministic=True)
        self._file_rows: int
        (self._file_rows,) = self._writer.execute("SELECT count(*) FROM files").fetchone()

    def apply(self, batch: Batch) -> int:
        """Write a batch in one transaction; how many file rows were pruned for it. Raises sqlite3.Error."""
        with self._write_lock:
            with self._writer as db:
                rows, pruned = self._add_files(db, batch)
                self._add_models(db, batch)
                if self._unsent:
                    self._add_unsent(db, batch)
                    self._add_outputs(db, batch)
                self._add_opens(db, batch)
            self._file_rows = rows
        return pruned

    def _add_opens(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.executemany(
            "INSERT INTO opens (at, path, model, uid, pod) VALUES (?, ?, ?, ?, ?)",
            ((row.at_ns, row.path, row.model, row.uid, row.pod) for row in batch.opens),
        )
        db.execute("DELETE FROM opens WHERE id <= (SELECT max(id) FROM opens) - ?", (self._history_rows,))

    def _add_models(self, db: sqlite3.Connection, batch: Batch) -> None:
        """Sums never fall below 0, even if the batch that a negative delta takes back was lost.

        Heat moves to the time of the batch even if that is earlier, so that a clock that was set wrong once does not
        keep later loads from counting.
        """
        db.executemany(
            "INSERT INTO models (model, opens, loads, hits, bytes_read, first_access, last_access, heat, heat_at)"
            " VALUES (?1, ?2, ?3, max(0, ?4), ?5, ?7, ?6, ?3, iif(?3 > 0, ?6, 0)) ON CONFLICT (model) DO UPDATE SET"
            " opens = opens + ?2, loads = loads + ?3, hits = max(0, hits + ?4), bytes_read = bytes_read + ?5,"
            " last_access = max(last_access, ?6),"
            " heat = iif(?3 > 0, heat_now(heat, heat_at, ?6, ?8) + ?3, heat), heat_at = iif(?3 > 0, ?6, heat_at)",
            (
                (model, m.opens, m.loads, m.hits, m.bytes_read, m.last_access_ns, _first(m), self._half_life_s)
                for model, m in batch.models.items()
            ),
        )

    def _add_unsent(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.executemany(
            "INSERT INTO unsent (model, opens, loads, hits, bytes_read, last_access) VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
            " ON CONFLICT (model) DO UPDATE SET opens = opens + ?2, loads = loads + ?3, hits = hits + ?4,"
            " bytes_read = bytes_read + ?5, last_access = max(last_access, ?6)",
            ((model, m.opens, m.loads, m.hits, m.bytes_read, m.last_access_ns) for model, m in batch.models.items()),
        )

    def _add_outputs(self, db: sqlite3.Connection, batch: Batch) -> None:
        """Bounded: those that wait already go on adding up, others find no room."""
        if not batch.outputs:
            return
        (rows,) = db.execute("SELECT count(*) FROM unsent_outputs").fetchone()
        room = max(0, _UNSENT_OUTPUTS_MAX - rows)
        for path, delta in batch.outputs.items():
            values = (delta.opens, delta.last_access_ns, delta.written_ns, delta.removed_ns, path, delta.ended)
            known = db.execute(
                "UPDATE unsent_outputs SET opens = opens + ?1, last_access = max(last_access, ?2),"
                " written = max(written, ?3), removed = max(removed, ?4), ended = max(ended, ?6) WHERE path = ?5",
                values,
            ).rowcount
            if not known and room:
                db.execute(
                    "INSERT INTO unsent_outputs (opens, last_access, written, removed, path, ended)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    values,
                )
                room -= 1
            elif not known:
                self.outputs_not_noted += 1

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

    def forget_files(self, paths: Iterable[bytes]) -> None:
        """Keep no history of these files. Raises sqlite3.Error."""
        with self._write_lock:
            with self._writer as db:
                names = [(path,) for path in paths]
                gone = db.executemany("DELETE FROM files WHERE path = ?", names).rowcount
                db.execute("CREATE TEMP TABLE IF NOT EXISTS forgotten (path BLOB PRIMARY KEY)")
                db.executemany("INSERT OR IGNORE INTO forgotten VALUES (?)", names)
                db.execute("DELETE FROM opens WHERE path IN (SELECT path FROM forgotten)")
                db.execute("DELETE FROM forgotten")
            self._file_rows -= gone

    def set_pin(self, model: bytes, pinned: bool, at_ns: int) -> bool:
        """Pin or unpin a model; True if that changed anything. Raises sqlite3.Error."""
        with self._write_lock, self._writer as db:
            if pinned:
                done = db.execute("INSERT OR IGNORE INTO pins (model, at) VALUES (?, ?)", (model, at_ns))
            else:
                done = db.execute("DELETE FROM pins WHERE model = ?", (model,))
            return done.rowcount > 0

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """The writer's connection for one transaction, for tables that are not kept here. Raises sqlite3.Error.

        `durable`: once it has ended it is on the disk, whatever becomes of the power; other transactions may be lost
        with that, the latest ones first (https://sqlite.org/pragma.html#pragma_synchronous).
        """
        with self._write_lock:
            if durable:
                self._writer.execute("PRAGMA synchronous = FULL")
            try:
                with self._writer as db:
                    yield db
            finally:
                if durable:
                    self._writer.execute("PRAGMA synchronous = NORMAL")

    def pins(self) -> frozenset[bytes]:
        """The models that are pinned."""
        with self.reader() as db:
            return frozenset(model for (model,) in db.execute("SELECT model FROM pins"))

    def models(self) -> list[ModelRow]:
        """All models ever opened here, the latest first."""
        with self.reader() as db:
            rows = db.execute(
                "SELECT model, opens, loads, hits, bytes_read, first_access, last_access, heat, heat_at"
                " FROM models ORDER BY last_access DESC"
            )
            return [ModelRow(*row) for row in rows]

    def opens(self, limit: int, model: bytes | None = None) -> list[OpenRow]:
        """The latest opens, newest first, of one model if given."""
        where, values = ("WHERE model = ?", [model]) if model is not None else ("", [])
        with self.reader() as db:
            rows: Iterable[tuple[int, bytes, bytes | None, int, str | None]] = db.execute(
                f"SELECT at, path, model, uid, pod FROM opens {where} ORDER BY id DESC LIMIT ?",
                (*values, limit),
            )
            return [OpenRow(*row) for row in rows]

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads beside the writer. Raises sqlite3.Error."""
        with closing(
            sqlite3.connect(f"file:{quote(os.fsencode(self.path))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)
        ) as db:
            yield db

    def close(self) -> None:
        """Checkpoint and close."""
        with self._write_lock:
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
        _migrate(db, version)
    except BaseException:
        db.close()
        raise
    path.chmod(0o600)
    return db


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring the schema from `version` to this one, all or nothing.

    Version 0 is a new file, or one of version 1 that was interrupted (it did not make its tables and its number in
    one transaction). Raises sqlite3.DatabaseError if the tables are not those of their version, and
    sqlite3.OperationalError if they cannot be written.
    """
    if version == 0 and db.execute("SELECT 1 FROM sqlite_master WHERE name = 'models'").fetchone():
        version = 1
    steps = [statements for step, statements in _MIGRATIONS.items() if 0 < version <= step]
    script = "\n".join((*steps, _SCHEMA.read_text(encoding="utf-8")))
    try:
        db.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {SCHEMA_VERSION};\nCOMMIT;")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
            raise sqlite3.DatabaseError(f"no index of schema version {version}: {error}") from error
        raise
