"""The months of the archive: which tables it has, made ahead of time, dropped when they are over. Reads no contexts."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

import asyncpg  # type: ignore[import-untyped]

from tierd.errors import DatabaseError
from tierd.postgres import Connection, Database

MONTHS_AHEAD: Final = 3
_NAME: Final = re.compile(r"user_contexts_archive_(?P<year>[0-9]{4})m(?P<month>[0-9]{2})")

# `$1` is made of months by the database's own clock. The first day of a month is in it in every time zone that it is.
_MAKE: Final = """
SELECT make_context_month(date_trunc('month', now()) + make_interval(months => n), $2)
FROM generate_series(0, $1::int) n
"""
_MONTHS: Final = """
SELECT c.relname AS name, greatest(c.reltuples, 0)::bigint AS rows, pg_total_relation_size(c.oid) AS size_bytes,
    now() AS now
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'user_contexts_archive'::regclass ORDER BY c.relname
"""
_SEAL: Final = "tierd_exported"
_SEALED: Final = """
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = $1::text::regclass AND conname = $2 AND contype = 'c')
"""
# Keys of a month that is gone lead nowhere; they are removed in the order of their index, once through it.
_SWEEP: Final = """
WITH seen AS (
    SELECT ctid, user_id, conversation_id FROM context_archive_keys
    WHERE archived_at >= $1 AND archived_at < $2 AND (user_id, conversation_id) > ($3, $4)
    ORDER BY user_id, conversation_id LIMIT 5000 FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM context_archive_keys k USING seen WHERE k.ctid = seen.ctid RETURNING k.user_id, k.conversation_id
)
SELECT user_id, conversation_id, count(*) OVER () FROM gone ORDER BY 1 DESC, 2 DESC LIMIT 1
"""


class Month(NamedTuple):
    """One table of the archive. `rows` is what PostgreSQL last counted."""

    table: str
    month: str
    begins: datetime
    ends: datetime
    rows: int
    size_bytes: int
    now: datetime


async def make_months(database: Database, ahead: int = MONTHS_AHEAD, tablespace: str = "") -> None:
    """Tables for this month and the next ones, on a tablespace (for a slower disk) or the default one.

    Raises DatabaseError, such as for a tablespace that is not there, or that the controller's role may not use.
    """
    try:
        async with database.connection() as connection:
            await connection.fetch(_MAKE, ahead, tablespace)
    except (asyncpg.UndefinedObjectError, asyncpg.InsufficientPrivilegeError) as error:
        missing = isinstance(error, asyncpg.UndefinedObjectError)
        hint = "CREATE TABLESPACE first" if missing else "GRANT it to the role that tierd connects as"
        reason = " ".join(str(error).split())
        raise DatabaseError(f"cannot make months of the archive: {reason}", hint=hint) from error


async def months(connection: Connection) -> list[Month]:
    """Every month that the archive has a table for, the oldest first; tables with other names are nobody's business."""
    return [made for row in await connection.fetch(_MONTHS) if (made := _month(row)) is not None]


async def seal_month(connection: Connection, month: Month) -> None:
    """In a transaction of the caller's: from its end on PostgreSQL refuses each row that anybody writes into the month.

    What is there can be read and removed. Whoever wrote before is waited for, so what is read later is all there ever
    will be. In no time that depends on the rows: NOT VALID does not look at them. Raises as `drop_month` does.
    """
    await _locked_soon(connection, month)
    await connection.execute(
        f"ALTER TABLE {month.table} DROP CONSTRAINT IF EXISTS {_SEAL};"
        f" ALTER TABLE {month.table} ADD CONSTRAINT {_SEAL} CHECK (false) NOT VALID"
    )


async def is_sealed(connection: Connection, month: Month) -> bool:
    """In a transaction of the caller's: whether `seal_month` holds, which it then does until the end.

    Raises as `drop_month` does.
    """
    await _locked_soon(connection, month)
    await connection.execute(f"LOCK TABLE {month.table} IN ACCESS EXCLUSIVE MODE")
    sealed: bool = await connection.fetchval(_SEALED, month.table, _SEAL)
    return sealed


async def drop_month(connection: Connection, month: Month) -> None:
    """In a transaction of the caller's: the table is gone, in no time that depends on what is in it.

    Nobody reads the archive at that moment. PostgreSQL gives back the files after it has let go of all locks. Raises
    asyncpg.LockNotAvailableError if somebody reads it for long.
    """
    await _locked_soon(connection, month)
    await connection.execute(f"DROP TABLE {month.table}")


async def _locked_soon(connection: Connection, month: Month) -> None:
    """Who waits for a lock makes all others wait behind him."""
    assert connection.is_in_transaction()
    assert _NAME.fullmatch(month.table), month.table
    await connection.execute("SET LOCAL lock_timeout = '2s'")


async def sweep_keys(database: Database, begins: datetime, ends: datetime) -> int:
    """Remove the keys of a month whose table is gone, in short transactions; how many."""
    at, swept = ("", ""), 0
    while True:
        async with database.connection() as connection:
            row = await connection.fetchrow(_SWEEP, begins, ends, *at)
        if row is None:
            return swept
        at = (row[0], row[1])
        swept += row[2]


def span(month: str) -> tuple[datetime, datetime]:
    """When a month such as `2026-11` begins and ends, in UTC. Raises ValueError if it is none."""
    begins = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    return begins, begins.replace(year=begins.year + begins.month // 12, month=begins.month % 12 + 1)


def _month(row: asyncpg.Record) -> Month | None:
    match = _NAME.fullmatch(row["name"])
    if match is None:
        return None
    name = f"{match['year']}-{match['month']}"
    return Month(row["name"], name, *span(name), row["rows"], row["size_bytes"], row["now"])
