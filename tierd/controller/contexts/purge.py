"""The job `purge-expired-contexts`: months of the archive that are over are exported, verified, later dropped.

What is dropped is a whole table, so it takes no time and leaves nothing to clean; keys that led there are removed after
it. Each step is written down before the next, so it can be killed anywhere and goes on from there. A month is dropped
only if its export is there as it was verified, and the month holds nothing that was not exported: it is sealed before
it is exported, so PostgreSQL lets rows leave it, and none come, and nothing need be counted at the drop.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import asyncpg  # type: ignore[import-untyped]

from tierd.controller.contexts import files
from tierd.controller.contexts.months import Month, drop_month, is_sealed, months, seal_month, span, sweep_keys
from tierd.controller.leader import assert_leader
from tierd.errors import TierdError
from tierd.metrics import ContextMetrics
from tierd.objects.store import ObjectStore
from tierd.postgres import Connection, Database

_PAGE_ROWS_FIRST: Final = 20
_PAGE_ROWS_MAX: Final = 2000
_LOCK_TRIES: Final = 5
_LOCK_PAUSE_S: Final = 1.0

_EXPORTS: Final = "SELECT month, state, attempt, rows, size_bytes, sha256, verified_at FROM context_exports"
_BEGIN: Final = """
INSERT INTO context_exports AS e (month, state) VALUES ($1, 'exporting')
ON CONFLICT (month) DO UPDATE SET state = 'exporting', attempt = e.attempt + 1
    WHERE e.state IN ('exporting', 'verified')
RETURNING attempt
"""
_VERIFIED: Final = """
UPDATE context_exports SET state = 'verified', rows = $3, size_bytes = $4, sha256 = $5, verified_at = now()
WHERE month = $1 AND attempt = $2 AND state = 'exporting'
"""
_DROPPED: Final = """
INSERT INTO context_exports (month, state, dropped_at) VALUES ($1, 'dropped', now())
ON CONFLICT (month) DO UPDATE SET state = 'dropped', dropped_at = now()
"""
_SWEPT: Final = "UPDATE context_exports SET state = 'done' WHERE month = $1 AND state = 'dropped'"

_Answer = TypeVar("_Answer")
Action = Literal["keep", "export", "wait", "drop", "refuse", "sweep"]


class PurgeRefused(TierdError):
    """Something does not add up, and nothing was dropped."""


@dataclass(frozen=True)
class PurgeRules:
    """What may be dropped, and when."""

    retention_days: float = 365.0
    """Since the end of the month in which a conversation was archived."""
    export: bool = True
    """False: drop only."""
    grace_days: float = 7.0
    """From the verified export to the drop."""
    months_max: int = 1
    """Dropped in one run."""
    share_max: float = 0.5
    """Of the archive's bytes, dropped in one run: with a wrong clock or setting everything would be due."""


class Step(NamedTuple):
    """What is done with a month, and why."""

    month: str
    action: Action
    reason: str
    rows: int
    size_bytes: int


class _Export(NamedTuple):
    state: str
    attempt: int
    rows: int | None
    size_bytes: int | None
    sha256: str | None
    verified_at: datetime | None


def plan_purge(found: Sequence[Month], exports: dict[str, _Export], rules: PurgeRules) -> list[Step]:
    """What is to be done now, the oldest month first. Pure: what the time is, the months say."""
    steps = [
        Step(name, "sweep", "dropped before", 0, 0) for name, export in sorted(exports.items())
        if export.state == "dropped"
    ]  # fmt: skip
    total = sum(month.size_bytes for month in found)
    dropped, dropped_bytes = 0, 0
    for month in found:
        action, reason = _wish(month, exports.get(month.month), rules)
        if action == "drop":
            share = (dropped_bytes + month.size_bytes) / total
            if dropped >= rules.months_max:
                action, reason = "refuse", f"{rules.months_max} months in a run are the most"
            elif share > rules.share_max:
                action, reason = "refuse", f"{share:.0%} of the archive in a run is more than {rules.share_max:.0%}"
            else:
                dropped, dropped_bytes = dropped + 1, dropped_bytes + month.size_bytes
        steps.append(Step(month.month, action, reason, month.rows, month.size_bytes))
    return steps


def _wish(month: Month, export: _Export | None, rules: PurgeRules) -> tuple[Action, str]:
    due = month.ends + timedelta(days=rules.retention_days)
    if due > month.now:
        return "keep", f"kept until {due:%Y-%m-%d}"
    if not rules.export:
        return "drop", f"over since {due:%Y-%m-%d}, and no exports are wanted"
    if export is None or export.state != "verified" or export.verified_at is None:
        return "export", f"over since {due:%Y-%m-%d}"
    end = export.verified_at + timedelta(days=rules.grace_days)
    if end > month.now:
        return "wait", f"exported, dropped after {end:%Y-%m-%d %H:%M}"
    return "drop", f"exported {export.verified_at:%Y-%m-%d}"


async def purge_expired_contexts(
    database: Database,
    store: ObjectStore | None,
    rules: PurgeRules = PurgeRules(),
    *,
    bucket: str = "context-archive",
    dry_run: bool = False,
    epoch: int | None = None,
    progress: Callable[[Step], None] = lambda _: None,
    metrics: ContextMetrics | None = None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Step]:
    """Do what `plan_purge` says, or (`dry_run`) only say it; what was done. `progress` hears of each step before it.

    Raises PurgeRefused, ObjectError, NotLeaderError, DatabaseError; steps before it stay done.
    """
    async with database.connection() as connection:
        found = {month.month: month for month in await months(connection)}
        exports = {row["month"]: _Export(*list(row)[1:]) for row in await connection.fetch(_EXPORTS)}
    steps = plan_purge(list(found.values()), exports, rules)
    if dry_run:
        return steps
    if rules.export and store is None and any(step.action == "export" for step in steps):
        raise PurgeRefused("no object store to export to", hint="name one, or say that no exports are wanted")
    job = _Purge(database, store, bucket, epoch, rules, metrics, pause)
    for step in steps:
        progress(step)
        if step.action == "export":
            await job.export(found[step.month])
        elif step.action == "drop":
            await job.drop(found[step.month], exports.get(step.month))
        if step.action in ("drop", "sweep"):
            await job.sweep(step.month)
    return steps


@dataclass(frozen=True)
class _Purge:
    database: Database
    store: ObjectStore | None
    bucket: str
    epoch: int | None
    rules: PurgeRules
    metrics: ContextMetrics | None
    pause: Callable[[float], Awaitable[None]]

    async def export(self, month: Month) -> None:
        """Store a month, read it back, and write down that it is there."""
        assert self.store is not None
        attempt = await self._locking(month, self._begin_export)
        with tempfile.TemporaryDirectory(prefix="tierd-export-") as directory:
            path = Path(directory) / "lines.gz"
            rows, stored = await files.write_lines(_pages(self.database, month), path)
            manifest = files.Manifest(month.month, attempt, rows, stored.size, stored.sha256)
            await asyncio.to_thread(files.store_verified, self.store, self.bucket, manifest, path)
        async with self._leading() as connection:
            values = (month.month, attempt, rows, stored.size, stored.sha256)
            if await connection.execute(_VERIFIED, *values) != "UPDATE 1":
                raise PurgeRefused(
                    f"{month.month} was exported by somebody else meanwhile", hint="the next run goes on"
                )

    async def drop(self, month: Month, export: _Export | None) -> None:
        """Drop a month that `plan_purge` chose."""
        if self.rules.export:
            assert export is not None
            await self._check_export(month, export)
        await self._locking(month, partial(self._drop, export=export))
        if self.metrics is not None:
            self.metrics.moved("purged", month.rows if export is None else export.rows or 0)

    async def sweep(self, month: str) -> None:
        """Remove the keys that led to a month."""
        await sweep_keys(self.database, *span(month))
        async with self._leading() as connection:
            await connection.execute(_SWEPT, month)

    async def _locking(self, month: Month, step: Callable[[Connection, Month], Awaitable[_Answer]]) -> _Answer:
        """A transaction of the leader's that needs the month for itself, tried a few times: readers go first."""
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                async with self._leading() as connection:
                    return await step(connection, month)
            except asyncpg.LockNotAvailableError:
                if tries_left:
                    await self.pause(_LOCK_PAUSE_S)
        raise PurgeRefused(f"{month.month} is read without end", hint="pg_locks tells by whom")

    async def _begin_export(self, connection: Connection, month: Month) -> int:
        await seal_month(connection, month)
        attempt: int | None = await connection.fetchval(_BEGIN, month.month)
        if attempt is None:
            raise PurgeRefused(f"{month.month} was dropped already, and is here", hint="look who made its table again")
        return attempt

    async def _drop(self, connection: Connection, month: Month, export: _Export | None) -> None:
        if self.rules.export:
            state = await connection.fetchrow(f"{_EXPORTS} WHERE month = $1 FOR UPDATE", month.month)
            if export is None or state is None or _Export(*list(state)[1:]) != export:
                raise PurgeRefused(f"the export of {month.month} changed meanwhile", hint="the next run goes on")
            if not await is_sealed(connection, month):
                reason = f"{month.month} has lost the constraint that keeps rows out since its export"
                raise PurgeRefused(reason, hint="let it be exported again: docs/OPERATIONS.md, When something is wrong")
        await drop_month(connection, month)
        await connection.execute(_DROPPED, month.month)

    async def _check_export(self, month: Month, export: _Export) -> None:
        """Its objects are there, as far as can be told without reading them."""
        if self.store is None:
            raise PurgeRefused("no object store to look for exports in", hint="name the one that they were put into")
        key = files.lines_key(month.month, export.attempt)
        found = await asyncio.to_thread(self.store.stat, self.bucket, key)
        told = await asyncio.to_thread(files.read_manifest, self.store, self.bucket, month.month, export.attempt)
        wanted = (export.size_bytes, export.sha256)
        if found is None or (found.size, found.sha256) != wanted or told.stored != wanted:
            raise PurgeRefused(f"{key} is not as it was verified", hint="nothing is dropped; look who changed it")

    @asynccontextmanager
    async def _leading(self) -> AsyncIterator[Connection]:
        """A transaction of the leader's."""
        async with self.database.transaction() as connection:
            if self.epoch is not None:
                await assert_leader(connection, self.epoch)
            yield connection


async def _pages(database: Database, month: Month) -> AsyncIterator[list[files.Row]]:
    """All rows, in short transactions: rows leave an old month, by promotion or erasure, and none ever enters it."""
    at, rows = ("", ""), _PAGE_ROWS_FIRST
    query = (
        "SELECT user_id, conversation_id, messages::text, created_at, updated_at, archived_at, version"
        f" FROM {month.table} WHERE (user_id, conversation_id) > ($1, $2)"
        " ORDER BY user_id, conversation_id LIMIT $3"
    )
    while True:
        async with database.connection() as connection:
            page = [files.Row(*row) for row in await connection.fetch(query, *at, rows)]
        if not page:
            return
        at = (page[-1].user_id, page[-1].conversation_id)
        size = sum(len(row.messages) for row in page)
        rows = max(min(rows * 2, files.PAGE_BYTES * len(page) // max(size, 1), _PAGE_ROWS_MAX), 1)
        yield page
