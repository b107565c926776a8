"""The table `job_runs`: who asked for which job, which run of the schedule was begun, how each ended. Runs nothing.

A run of the schedule is a row of its instant, and there is one at most. A request is a row that waits for the leader.
Beginning a run and ending it are fenced by the leader's epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from tierd.controller.leader import assert_leader
from tierd.postgres import Connection

Ending = Literal["done", "failed", "refused", "interrupted"]
KEPT: Final = 1000
"""Rows, about."""
_SCHEDULE: Final = "schedule"
_TEXT_MAX: Final = 2000

_COLUMNS = (
    "id, job, dry_run, due_at, state, requested_by, requested_at, started_at, finished_at, progress, result, counts"
)
_REQUEST = """
INSERT INTO job_runs (job, dry_run, state, requested_by) VALUES ($1, $2, 'requested', $3)
ON CONFLICT (job, dry_run) WHERE state = 'requested' DO UPDATE SET job = excluded.job RETURNING id
"""
_WITHDRAW = "UPDATE job_runs SET state = 'withdrawn', finished_at = now() WHERE id = $1 AND state = 'requested'"
# Schedules count from when there could be any: a new installation makes up for nothing.
_LAST_DUE = """
SELECT now(), coalesce(
    (SELECT max(due_at) FROM job_runs WHERE job = $1),
    (SELECT applied_at FROM tierd_migrations WHERE name = 'job_runs')
), EXISTS (SELECT FROM job_runs WHERE job = $1 AND state = 'requested')
"""
_BEGIN_DUE = """
INSERT INTO job_runs (job, due_at, state, requested_by, started_at, epoch)
VALUES ($1, $2, 'running', $3, now(), $4) ON CONFLICT DO NOTHING RETURNING id
"""
_BEGIN_REQUESTED = """
UPDATE job_runs SET state = 'running', started_at = now(), epoch = $2
WHERE id = (SELECT id FROM job_runs WHERE job = $1 AND state = 'requested' ORDER BY id LIMIT 1) RETURNING id, dry_run
"""
_PROGRESS = "UPDATE job_runs SET progress = $2 WHERE id = $1 AND state = 'running'"
_END = """
UPDATE job_runs SET state = $2, finished_at = now(), result = $3, counts = $4::jsonb, progress = ''
WHERE id = $1 AND state = 'running'
"""
_INTERRUPT = """
UPDATE job_runs SET state = 'interrupted', finished_at = now(), result = 'the controller that ran it ended'
WHERE state = 'running' AND epoch < $1 RETURNING job
"""
_INTERRUPT_OWN = """
UPDATE job_runs SET state = 'interrupted', finished_at = now(), result = 'the database was away when it ended'
WHERE state = 'running' AND job = $1
"""
_PURGE = """
DELETE FROM job_runs WHERE id IN (
    SELECT id FROM job_runs r
    WHERE id <= (SELECT max(id) FROM job_runs) - $1 AND finished_at IS NOT NULL
      AND id IS DISTINCT FROM (SELECT max(id) FROM job_runs l WHERE l.job = r.job AND l.due_at IS NOT NULL)
    ORDER BY id LIMIT 1000
)
"""
# (The last run of each schedule stays: it says what is due.)


class Run(NamedTuple):
    """A row, but for its epoch."""

    id: int
    job: str
    dry_run: bool
    due_at: datetime | None
    state: str
    requested_by: str
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    progress: str
    result: str
    counts: Mapping[str, Any]


class Begun(NamedTuple):
    """A run that is ours to carry out."""

    id: int
    dry_run: bool


class LastDue(NamedTuple):
    """The database's time, the instant of the schedule that was last run for (or since when it counts), and whether
    somebody asks for a run."""

    now: datetime
    last: datetime
    requested: bool


async def request(connection: Connection, job: str, *, dry_run: bool, by: str) -> int:
    """Ask the leader to run a job; the run, which may be one that somebody else asks for, too."""
    run: int = await connection.fetchval(_REQUEST, job, dry_run, by[:_TEXT_MAX])
    return run


async def withdraw(connection: Connection, run: int) -> None:
    """No longer ask for it, if it has not begun."""
    await connection.execute(_WITHDRAW, run)


async def last_due(connection: Connection, job: str) -> LastDue:
    """For the schedule to tell what is due."""
    return LastDue(*await connection.fetchrow(_LAST_DUE, job))


async def _begin_none_beside(connection: Connection, job: str, epoch: int) -> None:
    """A job runs once at a time: what seems to run is a run whose end could not be told."""
    await assert_leader(connection, epoch)
    await connection.execute(_INTERRUPT_OWN, job)


async def begin_due(connection: Connection, job: str, due_at: datetime, epoch: int) -> Begun | None:
    """Begin the run of an instant; None if it was begun before. In the leader's transaction."""
    await _begin_none_beside(connection, job, epoch)
    run = await connection.fetchval(_BEGIN_DUE, job, due_at, _SCHEDULE, epoch)
    return Begun(run, dry_run=False) if run is not None else None


async def begin_requested(connection: Connection, job: str, epoch: int) -> Begun | None:
    """Begin the oldest run that was asked for; None if there is none. In the leader's transaction."""
    await _begin_none_beside(connection, job, epoch)
    row = await connection.fetchrow(_BEGIN_REQUESTED, job, epoch)
    return Begun(*row) if row is not None else None


async def tell_progress(connection: Connection, run: int, text: str) -> None:
    """What it is at."""
    await connection.execute(_PROGRESS, run, text[:_TEXT_MAX])


async def end(connection: Connection, run: int, state: Ending, result: str, counts: Mapping[str, Any]) -> None:
    """How it ended. Nothing if a later leader has given it up already."""
    await connection.execute(_END, run, state, result[:_TEXT_MAX], json.dumps(counts))


async def interrupt_others(connection: Connection, epoch: int) -> list[str]:
    """Runs of leaders before this one do not go on; their jobs. In the leader's transaction."""
    await assert_leader(connection, epoch)
    return [row["job"] for row in await connection.fetch(_INTERRUPT, epoch)]


async def run_of(connection: Connection, run: int) -> Run | None:
    """A run; None if it was purged."""
    row = await connection.fetchrow(f"SELECT {_COLUMNS} FROM job_runs WHERE id = $1", run)
    return _run(row) if row is not None else None


async def latest(connection: Connection, limit: int, job: str | None = None) -> list[Run]:
    """The latest runs first."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM job_runs WHERE $2::text IS NULL OR job = $2 ORDER BY id DESC LIMIT $1", limit, job
    )
    return [_run(row) for row in rows]


async def purge_runs(connection: Connection, keep: int = KEPT) -> int:
    """Remove all but about the latest; how many were removed, 1000 at most."""
    return int((await connection.execute(_PURGE, keep)).removeprefix("DELETE "))


def _run(row: Any) -> Run:
    run = Run(*row)
    return run._replace(counts=json.loads(row["counts"]))
