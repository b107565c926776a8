"""Brings the schema up to date: numbered SQL files in `migrations/`, forward only. Decides nothing about tables.

Each file is applied once, in one transaction with its row in `tierd_migrations`, so that a migration is there as a
whole or not at all. A session lock lets one process migrate at a time; a second one waits, then finds nothing to do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import asyncpg  # type: ignore[import-untyped]

from tierd.errors import DatabaseError
from tierd.postgres import Connection

MIGRATIONS = Path(__file__).with_name("migrations")
LOCKS = 0x74696572
"""The first key of all advisory locks of tierd, so that they are nobody else's: `tier` in ASCII."""
_MIGRATION_LOCK = 1
_LOCK_SECONDS = 60
_STATEMENT_SECONDS = 3600
"""An index on a large table takes its time."""
_ANSWER_GRACE_SECONDS = 5
_FILE_NAME = re.compile(r"(?P<version>[0-9]{4})_(?P<name>[a-z0-9_]+)\.sql")

_LEDGER = """
CREATE TABLE IF NOT EXISTS tierd_migrations (
    version    int PRIMARY KEY,
    name       text NOT NULL,
    sha256     text NOT NULL,                       -- of the file as it was applied
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


class SchemaError(DatabaseError):
    """The database is not what this version works with; waiting does not help."""


class Migration(NamedTuple):
    """One file."""

    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:04}_{self.name}"


class Applied(NamedTuple):
    """One row of `tierd_migrations`."""

    version: int
    name: str
    sha256: str
    applied_at: datetime

    def __str__(self) -> str:
        return f"{self.version:04}_{self.name}"


class State(NamedTuple):
    """What a database has, and what it lacks."""

    applied: tuple[Applied, ...]
    pending: tuple[Migration, ...]


def known(directory: Path = MIGRATIONS) -> tuple[Migration, ...]:
    """The migrations of this version, 1, 2, 3 and so on. Raises DatabaseError if the files are not numbered so."""
    found: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None or int(match["version"]) != len(found) + 1:
            raise DatabaseError(f"{path} is not migration {len(found) + 1:04}", hint="reinstall tierd")
        found.append(Migration(int(match["version"]), match["name"], path.read_text(encoding="utf-8")))
    return tuple(found)


async def state(connection: Connection, migrations: Sequence[Migration]) -> State:
    """What is applied and what is not.

    Raises SchemaError if the database is newer than `migrations`, or was made by other files than these.
    """
    applied = await _applied(connection)
    for row, migration in zip(applied, migrations, strict=False):
        if (row.version, row.name, row.sha256) != (migration.version, migration.name, migration.sha256):
            raise SchemaError(
                f"migration {row} of the database is not the {migration} of this version",
                hint="it was changed after it had been applied: use the version of tierd that applied it",
            )
    if len(applied) > len(migrations):
        raise SchemaError(
            f"the database has migration {applied[-1]}, this version knows {len(migrations)}",
            hint="use the newer tierd that made it; migrations are not undone",
        )
    return State(applied, tuple(migrations[len(applied) :]))


async def migrate(connection: Connection, migrations: Sequence[Migration]) -> tuple[Migration, ...]:
    """Apply what is pending, on a connection of its own; what was applied.

    Raises DatabaseError as `state` does, if another process migrates for longer than a minute, or if a migration fails;
    those before it stay applied.
    """
    # For the ledger too: a table may be locked.
    await connection.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'; SET statement_timeout = '{_STATEMENT_SECONDS}s'")
    try:
        await connection.execute(
            *("SELECT pg_advisory_lock($1, $2)", LOCKS, _MIGRATION_LOCK), timeout=_LOCK_SECONDS + _ANSWER_GRACE_SECONDS
        )
    except asyncpg.LockNotAvailableError:
        raise DatabaseError(
            f"another process has been migrating this database for {_LOCK_SECONDS} s",
            hint="if it hangs, end it; pg_locks tells its process ID",
        ) from None
    try:
        await connection.execute(_LEDGER)
        pending = (await state(connection, migrations)).pending
        for migration in pending:
            await _apply(connection, migration)
        return pending
    finally:
        if not connection.is_closed():  # else it went with the session
            await connection.execute("SELECT pg_advisory_unlock($1, $2)", LOCKS, _MIGRATION_LOCK)


async def require_current(connection: Connection) -> None:
    """Raises SchemaError unless the database is what this version works with."""
    if pending := (await state(connection, known())).pending:
        raise SchemaError(f"the database lacks migration {pending[0]}", hint="run `tierd db migrate`")


async def _applied(connection: Connection) -> tuple[Applied, ...]:
    if await connection.fetchval("SELECT to_regclass('tierd_migrations')") is None:
        return ()
    rows = await connection.fetch("SELECT version, name, sha256, applied_at FROM tierd_migrations ORDER BY version")
    return tuple(Applied(*row) for row in rows)


async def _apply(connection: Connection, migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(migration.sql, timeout=_STATEMENT_SECONDS + _ANSWER_GRACE_SECONDS)
            await connection.execute(
                "INSERT INTO tierd_migrations (version, name, sha256) VALUES ($1, $2, $3)",
                *(migration.version, migration.name, migration.sha256),
            )
    except asyncpg.PostgresError as error:
        raise DatabaseError(
            f"migration {migration} failed: {' '.join(str(error).split())}",
            hint="nothing of it was kept; is there something of that name already, or a right missing?",
        ) from error
