"""Runs jobs: what is due by the schedule or was asked for, each once over all controllers. Knows no job by name.

A job that is cut off is not run again by itself: what it had begun is resumed as moves are, and the rest waits for the
next run. So a job that kills its controller is not repeated for ever.
"""

from __future__ import annotations

import asyncio
import time as clocks
from collections.abc import Awaitable, Callable, Mapping
from datetime import time
from typing import Any, Final, NamedTuple

import structlog

from tierd.controller.jobs import runs as job_runs
from tierd.controller.jobs.runs import Begun, Ending
from tierd.controller.jobs.schedule import Daily
from tierd.controller.leader import NotLeaderError
from tierd.controller.settings import ControllerSettings
from tierd.controller.work import Work
from tierd.errors import DatabaseError, TierdError

log = structlog.get_logger(__name__)

_LAST_WORD_SECONDS: Final = 3.0


class Outcome(NamedTuple):
    """How a run ended: `refused` if something was not as it must be, and nothing was changed."""

    state: Ending
    result: str
    counts: Mapping[str, Any]


class Context(NamedTuple):
    """What a job runs with. `tell` says for people what it is at."""

    work: Work
    dry_run: bool
    tell: Callable[[str], Awaitable[None]]


class Job(NamedTuple):
    """A job: at which time of day it runs (None: never by itself), and what it does.

    `run` may raise TierdError and OSError: then it failed. It may be cancelled at any await.
    """

    name: str
    at: Callable[[ControllerSettings], time | None]
    run: Callable[[Context], Awaitable[Outcome]]


async def run_next(job: Job, work: Work, *, scheduled: bool = True) -> Ending | None:
    """Carry out the next run of a job that was asked for, or else is due; how it ended, None if there was none."""
    begun = await _begin(job, work, scheduled=scheduled)
    return await _carry_out(job, work, begun) if begun is not None else None


async def _begin(job: Job, work: Work, *, scheduled: bool) -> Begun | None:
    at = job.at(work.settings) if scheduled else None
    async with work.database.connection() as connection:
        now, last, asked = await job_runs.last_due(connection, job.name)
        due = Daily(at, work.settings.zone).missed(now, last) if at is not None else None
        if not asked and due is None:
            return None
        async with connection.transaction():
            begun = await job_runs.begin_requested(connection, job.name, work.epoch) if asked else None
            if begun is None and due is not None:
                begun = await job_runs.begin_due(connection, job.name, due, work.epoch)
            return begun


async def _carry_out(job: Job, work: Work, begun: Begun) -> Ending:
    async def tell(text: str) -> None:
        async with work.database.connection() as connection:
            await job_runs.tell_progress(connection, begun.id, text)

    started = clocks.monotonic()
    log.info("job_started", job=job.name, run=begun.id, dry_run=begun.dry_run)
    try:
        outcome = await _outcome(job, Context(work, begun.dry_run, tell))
    except (asyncio.CancelledError, NotLeaderError):
        work.metrics.job_ended(job.name, "interrupted", clocks.monotonic() - started)
        await _last_word(work, begun)
        raise
    async with work.database.connection() as connection:
        await job_runs.end(connection, begun.id, outcome.state, outcome.result, outcome.counts)
    seconds = clocks.monotonic() - started
    work.metrics.job_ended(job.name, outcome.state, seconds)
    tell_log = log.info if outcome.state == "done" else log.warning
    tell_log(
        "job_ended",
        job=job.name,
        run=begun.id,
        state=outcome.state,
        result=outcome.result,
        seconds=round(seconds, 1),
        **outcome.counts,
    )
    return outcome.state


async def _outcome(job: Job, context: Context) -> Outcome:
    try:
        return await job.run(context)
    except NotLeaderError:
        raise
    except (TierdError, OSError) as error:
        return Outcome("failed", " ".join(str(error).split()), {})
    except Exception:
        log.exception("job_defect", job=job.name)
        return Outcome("failed", "a defect of tierd: the controller's log has the traceback", {})


async def _last_word(work: Work, begun: Begun) -> None:
    """Say that it was cut off, if the database is still there; else the next leader does."""
    try:
        async with asyncio.timeout(_LAST_WORD_SECONDS), work.database.connection() as connection:
            await job_runs.end(connection, begun.id, "interrupted", "the controller that ran it ended", {})
    except (DatabaseError, TimeoutError) as error:
        log.debug("job_end_not_told", run=begun.id, reason=str(error))
