"""The job `archive-old-contexts`: conversations that nobody wrote to for 30 days leave the recent ones for the archive.

A batch is one transaction: rows are locked (those that others hold are left for later), deleted, and written with all
their columns, by one statement. So it can be killed anywhere, repeated, and run by any number of workers at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import asyncpg  # type: ignore[import-untyped]
import structlog

from tierd.controller.contexts.months import make_months
from tierd.controller.leader import NotLeaderError, assert_leader
from tierd.controller.tasks import each
from tierd.errors import DatabaseError
from tierd.metrics import ContextMetrics
from tierd.postgres import Connection, Database

log = structlog.get_logger(__name__)

WORKERS: Final = 2
BATCH_ROWS_MAX: Final = 10_000
_BATCH_ROWS: Final = 500
_BATCH_SECONDS: Final = 0.5
"""About how long a batch shall take: its rows are locked meanwhile. Large conversations make smaller batches."""
_TRIES: Final = 10
"""How often in a row a batch may fail: a restart of PostgreSQL takes seconds."""
_PAUSE_S_MAX: Final = 10.0
_EVER: Final = datetime(1, 1, 1, tzinfo=UTC)

# From $3 on, so that what was just deleted is not gone through again. Several workers at once find each other's rows
# locked, and go past them.
_MOVE: Final = """
WITH old AS MATERIALIZED (
    SELECT ctid, updated_at FROM user_contexts
    WHERE updated_at < now() - $1::interval AND updated_at >= $3
    ORDER BY updated_at LIMIT $2 FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM user_contexts WHERE ctid = ANY (ARRAY(SELECT ctid FROM old))
    RETURNING user_id, conversation_id, messages, created_at, updated_at, version
), written AS (
    INSERT INTO user_contexts_archive
        (user_id, conversation_id, messages, created_at, updated_at, version, archived_at)
    SELECT user_id, conversation_id, messages, created_at, updated_at, version, now() FROM gone RETURNING 1
), keys AS (
    INSERT INTO context_archive_keys AS k (user_id, conversation_id, archived_at)
    SELECT user_id, conversation_id, now() FROM gone
    ON CONFLICT (user_id, conversation_id) DO UPDATE SET archived_at = EXCLUDED.archived_at
    RETURNING k.xmax <> 0 AS twice, k.user_id, k.conversation_id
)
SELECT (SELECT count(*) FROM gone) AS gone, (SELECT count(*) FROM written) AS written,
    (SELECT count(*) FROM keys) AS keys,
    (SELECT max(updated_at) FROM old) AS latest,
    (SELECT array_agg(user_id::text) FROM keys WHERE twice) AS users,
    (SELECT array_agg(conversation_id::text) FROM keys WHERE twice) AS conversations
"""
# Who was in the archive already: the newer version stays, of equal ones that which was archived now.
_SETTLE: Final = """
WITH named AS (SELECT * FROM unnest($1::text[], $2::text[]) AS n (user_id, conversation_id)
), ranked AS (
    SELECT a.user_id, a.conversation_id, a.archived_at, row_number() OVER (
        PARTITION BY a.user_id, a.conversation_id ORDER BY a.version DESC, a.archived_at DESC) AS place
    FROM user_contexts_archive a JOIN named USING (user_id, conversation_id)
), gone AS (
    DELETE FROM user_contexts_archive a USING ranked r
    WHERE r.place > 1 AND a.user_id = r.user_id AND a.conversation_id = r.conversation_id
        AND a.archived_at = r.archived_at RETURNING 1
), kept AS (
    UPDATE context_archive_keys k SET archived_at = r.archived_at FROM ranked r
    WHERE r.place = 1 AND k.user_id = r.user_id AND k.conversation_id = r.conversation_id RETURNING 1
)
SELECT (SELECT count(*) FROM gone) AS gone, (SELECT count(*) FROM kept) AS kept
"""
DUE_MAX: Final = 1_000_000
"""What is due is counted as far as this: a backlog of years would take longer to count than a statement may."""
_DUE: Final = """
SELECT count(*) FROM (SELECT FROM user_contexts WHERE updated_at < now() - $1::interval LIMIT $2) due
"""


@dataclass(frozen=True)
class ArchiveProgress:
    """How far the job is. `due` was counted at its start, up to DUE_MAX."""

    due: int
    moved: int = 0
    superseded: int = 0
    """Older states in the archive that newer ones replaced."""
    batches: int = 0
    failures: int = 0
    """Batches that failed and were tried again."""


Told = Callable[[ArchiveProgress], None]


class LostRows(DatabaseError):
    """A batch would have lost rows, and was undone. This is a defect."""


async def archive_old_contexts(
    database: Database,
    *,
    days: float = 30.0,
    workers: int = WORKERS,
    progress: Told = lambda _: None,
    epoch: int | None = None,
    tablespace: str = "",
    batch_rows_max: int = BATCH_ROWS_MAX,
    metrics: ContextMetrics | None = None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> ArchiveProgress:
    """Archive all that is due now; what was done. `progress` is called after each batch.

    With `epoch` every batch first makes sure that its leader still leads. What was moved before a failure stays moved.
    Raises DatabaseError if the database stays away, NotLeaderError.
    """
    await make_months(database, tablespace=tablespace)
    age = timedelta(days=days)
    due = await count_due(database, days)
    job = _Job(database, age, epoch, progress, metrics, pause, batch_rows_max, ArchiveProgress(due))
    progress(job.done)
    await each(job.work() for _ in range(workers))
    return job.done


async def count_due(database: Database, days: float) -> int:
    """How many conversations the job would move now, DUE_MAX at most. Raises DatabaseError."""
    async with database.connection() as connection:
        due: int = await connection.fetchval(_DUE, timedelta(days=days), DUE_MAX)
    return due


@dataclass
class _Job:
    """Contract: one event loop; `done` changes between two awaits only."""

    database: Database
    age: timedelta
    epoch: int | None
    progress: Told
    metrics: ContextMetrics | None
    pause: Callable[[float], Awaitable[None]]
    rows_max: int
    done: ArchiveProgress

    async def work(self) -> None:
        """Batches until nothing is left that is not somebody else's."""
        rows, failures = min(_BATCH_ROWS, self.rows_max), 0
        begin: datetime = _EVER
        while True:
            started = time.monotonic()
            try:
                batch = await self._batch(rows, begin)
            except (DatabaseError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError) as error:
                failures += 1
                await self._failed(error, failures)
                begin, rows = _EVER, max(rows // 2, 1)
                continue
            failures = 0
            if batch is None:
                if begin == _EVER:
                    return
                begin = _EVER  # what others let go of meanwhile
                continue
            begin = batch
            rows = _next_rows(rows, time.monotonic() - started, self.rows_max)

    async def _batch(self, rows: int, begin: datetime) -> datetime | None:
        """The latest `updated_at` of what was moved; None if nothing was."""
        async with self.database.transaction() as connection:
            if self.epoch is not None:
                await assert_leader(connection, self.epoch)
            moved = await connection.fetchrow(_MOVE, self.age, rows, begin)
            if not moved["gone"] == moved["written"] == moved["keys"]:
                counts = ", ".join(f"{name} {moved[name]}" for name in ("gone", "written", "keys"))
                raise LostRows(f"a batch of the archive does not add up: {counts}", hint="nothing of it was kept")
            superseded = await _settled(connection, moved) if moved["users"] else 0
        if not moved["gone"]:
            return None
        done = self.done
        self.done = replace(
            done, moved=done.moved + moved["gone"], superseded=done.superseded + superseded, batches=done.batches + 1
        )
        if self.metrics is not None:
            self.metrics.moved("archived", moved["gone"])
            self.metrics.moved("superseded", superseded)
        self.progress(self.done)
        latest: datetime = moved["latest"]
        return latest

    async def _failed(self, error: Exception, failures: int) -> None:
        if failures >= _TRIES or isinstance(error, LostRows | NotLeaderError):
            raise error
        log.warning("archive_batch_failed", reason=" ".join(str(error).split()), consequence="it is tried again")
        self.done = replace(self.done, failures=self.done.failures + 1)
        await self.pause(min(0.1 * 2**failures, _PAUSE_S_MAX) * random.uniform(0.5, 1.0))


async def _settled(connection: Connection, moved: asyncpg.Record) -> int:
    row = await connection.fetchrow(_SETTLE, moved["users"], moved["conversations"])
    if row["kept"] != len(moved["users"]):
        raise LostRows(f"of {len(moved['users'])} that were archived before {row['kept']} are", hint="nothing was kept")
    return int(row["gone"])


def _next_rows(rows: int, seconds: float, rows_max: int) -> int:
    if seconds < _BATCH_SECONDS / 2:
        return min(rows * 2, rows_max)
    return max(rows // 2, 1) if seconds > _BATCH_SECONDS * 2 else rows
