"""The jobs `archive-old-contexts` and `purge-expired-contexts` as the controller runs them. Moves and drops nothing.

Either can be cut off anywhere and goes on where it was at its next run: what is left to do is in the tables.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Final

import structlog

from tierd.controller.contexts.archive import DUE_MAX, ArchiveProgress, archive_old_contexts, count_due
from tierd.controller.contexts.purge import PurgeRefused, PurgeRules, Step, purge_expired_contexts
from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.leader import NotLeaderError
from tierd.controller.settings import ControllerSettings
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError

log = structlog.get_logger(__name__)

_TELL_SECONDS: Final = 1.0
_DAY_SECONDS: Final = 86_400.0
_DONE: Final = {"export": "exported", "drop": "dropped", "sweep": "swept", "refuse": "refused", "wait": "waiting"}


class _Teller:
    """Tells the latest of what a job said, now and then: a batch waits for nobody who looks on."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._latest = ""
        self._told = ""

    def note(self, text: str) -> None:
        """What the job is at."""
        self._latest = text

    async def keep_telling(self) -> None:
        """Until cancelled. A database that is away is the job's to complain of."""
        while True:
            if self._latest != self._told:
                self._told = self._latest
                try:
                    await self._context.tell(self._told)
                except DatabaseError as error:
                    log.debug("progress_not_told", reason=str(error))
            await asyncio.sleep(_TELL_SECONDS)


@asynccontextmanager
async def _telling(context: Context) -> AsyncIterator[_Teller]:
    teller = _Teller(context)
    task = asyncio.create_task(teller.keep_telling())
    try:
        yield teller
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- archive-old-contexts ---


async def archive_contexts(context: Context) -> Outcome:
    """The job archive-old-contexts."""
    work, settings = context.work, context.work.settings
    if context.dry_run:
        due = await count_due(work.database, settings.contexts_warm_days)
        return Outcome("done", f"would archive {_about(due)} conversations", {"due": due})
    done = ArchiveProgress(0)
    async with _telling(context) as teller:

        def note(progress: ArchiveProgress) -> None:
            nonlocal done
            done = progress
            teller.note(f"{progress.moved} of {_about(progress.due)} conversations")

        try:
            await archive_old_contexts(
                work.database,
                days=settings.contexts_warm_days,
                workers=settings.contexts_archive_workers,
                tablespace=settings.contexts_tablespace,
                epoch=work.epoch,
                progress=note,
                metrics=work.context_metrics,
            )
        except NotLeaderError:
            raise
        except TierdError as error:
            return Outcome("failed", f"{done.moved} archived, then: {reason_of(error)}", asdict(done))
    return Outcome("done", f"archived {done.moved} conversations", asdict(done))


def _about(count: int) -> str:
    return f"{DUE_MAX} or more" if count >= DUE_MAX else str(count)


# --- purge-expired-contexts ---


async def purge_contexts(context: Context) -> Outcome:
    """The job purge-expired-contexts."""
    work, settings = context.work, context.work.settings
    begun: list[Step] = []
    async with _telling(context) as teller:

        def note(step: Step) -> None:
            begun.append(step)
            if step.action in ("export", "drop", "sweep"):
                teller.note(f"{step.month}: {step.action}")

        try:
            steps = await purge_expired_contexts(
                work.database,
                work.store,
                rules_of(settings),
                bucket=settings.contexts_bucket,
                dry_run=context.dry_run,
                epoch=work.epoch,
                progress=note,
                metrics=work.context_metrics,
            )
        except PurgeRefused as error:
            reason = f"{error}; {error.hint}" if error.hint else str(error)
            return Outcome("refused", reason, _counts(begun[:-1]))
    return _outcome(steps, dry_run=context.dry_run)


def rules_of(settings: ControllerSettings) -> PurgeRules:
    """What the settings say of retention."""
    return PurgeRules(
        retention_days=settings.contexts_archive_days,
        export=settings.contexts_export,
        grace_days=settings.contexts_grace / _DAY_SECONDS,
        months_max=settings.contexts_purge_months_max,
        share_max=settings.contexts_purge_share_max,
    )


def _outcome(steps: list[Step], *, dry_run: bool) -> Outcome:
    counts = _counts(steps)
    refused = [f"{step.month}: {step.reason}" for step in steps if step.action == "refuse"]
    if refused and not counts["dropped"]:
        return Outcome("refused", f"nothing was dropped: {'; '.join(refused)}", counts)
    if dry_run:
        told = [f"{step.month}: {step.action} ({step.reason})" for step in steps if step.action != "keep"]
        return Outcome("done", "; ".join(told) or "no month is over", counts)
    told = [f"{count} {name}" for name, count in counts.items() if count and name != "months"]
    return Outcome("done", f"of {counts['months']} months: {', '.join(told) or 'none is over'}", counts)


def _counts(steps: list[Step]) -> dict[str, Any]:
    found = Counter(step.action for step in steps)
    return {"months": len(steps) - found["sweep"]} | {name: found[action] for action, name in _DONE.items()}  # type: ignore[index]
