"""Runs one job and ends: as the leader if nobody leads, else by asking the one who does. For CronJobs and by hand.

There is one way: the run is asked for in the database, and begun by whoever leads. That is this process, if it gets
the lock; so a leader that dies meanwhile leaves nobody waiting for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from tierd.controller.jobs import runs as job_runs
from tierd.controller.jobs.run import Job, run_next
from tierd.controller.jobs.runs import Run
from tierd.controller.leading import lead_once
from tierd.controller.migrate import require_current
from tierd.controller.settings import ControllerSettings
from tierd.controller.workplace import Workplace, holder
from tierd.errors import DatabaseError
from tierd.postgres import Connection, connected

_POLL_SECONDS: Final = 0.5
_UNHEARD_SECONDS_MAX: Final = 60.0
"""Who has no source to work on needs a leader, and one hears within seconds."""
UNFINISHED: Final = ("requested", "running")


async def run_job(
    settings: ControllerSettings,
    environ: Mapping[str, str],
    job: Job,
    *,
    dry_run: bool,
    tell: Callable[[Run], None] = lambda _: None,
) -> Run:
    """The run, ended. `tell` hears of it every now and then.

    A run that nobody had begun when this is cancelled is no longer asked for; one that runs elsewhere goes on. Raises
    UsageError, DatabaseError.
    """
    place = Workplace(settings, environ) if settings.source is not None else None
    async with connected(settings) as connection:
        await require_current(connection)
        run = await job_runs.request(connection, job.name, dry_run=dry_run, by=holder())
        try:
            return await _see_through(connection, run, place, job, tell)
        except asyncio.CancelledError:
            await job_runs.withdraw(connection, run)
            raise


async def _see_through(
    connection: Connection, run: int, place: Workplace | None, job: Job, tell: Callable[[Run], None]
) -> Run:
    unheard_s = 0.0
    while True:
        found = await job_runs.run_of(connection, run)
        if found is None:
            raise DatabaseError(f"run {run} is gone from the table job_runs", hint="was the database restored?")
        tell(found)
        if found.state not in UNFINISHED:
            return found
        if found.state == "requested" and place is not None:
            if await lead_once(place.settings, holder(), partial(_work, connection, run, place, job, tell)):
                continue
        elif found.state == "requested" and (unheard_s := unheard_s + _POLL_SECONDS) > _UNHEARD_SECONDS_MAX:
            await job_runs.withdraw(connection, run)
            raise DatabaseError("no controller leads", hint="start `tierd controller`, or set source to do it here")
        await asyncio.sleep(_POLL_SECONDS)


async def _work(
    connection: Connection, run: int, place: Workplace, job: Job, tell: Callable[[Run], None], epoch: int
) -> None:
    async with place.work(epoch) as work:
        watching = asyncio.create_task(_tell_now_and_then(connection, run, tell))
        try:
            while await run_next(job, work, scheduled=False) is not None:
                pass  # what others ask for of this job, too
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _tell_now_and_then(connection: Connection, run: int, tell: Callable[[Run], None]) -> None:
    while True:
        if (found := await job_runs.run_of(connection, run)) is not None:
            tell(found)
        await asyncio.sleep(_POLL_SECONDS)
