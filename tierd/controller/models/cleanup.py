"""The job cleanup-unused-models: scan the source, decide, demote one model after another. Moves nothing itself.

It can be cut off anywhere: a demotion that has begun is resumed as any move, the others wait for the next run, and
what was demoted in the last day counts against that run's bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import structlog

from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.leader import NotLeaderError
from tierd.controller.models import candidates, catalogue
from tierd.controller.models.catalogue import Scanned
from tierd.controller.models.retention import Verdict
from tierd.controller.source.moved_file import MoveRefused
from tierd.controller.tasks import reason_of
from tierd.errors import TierdError

log = structlog.get_logger(__name__)

_ERRORS_MIN: Final = 3
"""So many must fail before a share of them says anything."""
_DEMOTED: Final = ("in_grace", "deleting", "done")
_GIVEN_UP: Final = ("abandoned",)


async def scan_catalogue(context: Context) -> Outcome:
    """The job scan-catalogue."""
    found = await _scan(context)
    counts = _counts(found)
    if found.problem:
        return Outcome("failed", found.problem, counts)
    would = "would register" if context.dry_run else "registered"
    return Outcome(
        "done", f"{found.models} models, {would} {found.registered}, {found.vanished} are no longer there", counts
    )


async def cleanup_unused_models(context: Context) -> Outcome:
    """The job."""
    found = await _scan(context)
    async with context.work.database.transaction() as connection:
        situation = await candidates.look(connection, context.work.settings)
    going = situation.going
    counts = _counts(found) | {"candidates": len(going), "candidate_bytes": _bytes_of(going)}
    if refusal := found.problem or situation.refusal:
        return Outcome("refused", f"nothing was demoted: {refusal}", counts)
    if context.dry_run:
        return Outcome("done", f"would demote {len(going)} of {len(situation.verdicts)} hot models", counts)
    return await _demote(context, going, counts)


async def _scan(context: Context) -> Scanned:
    work = context.work
    await context.tell("looking through the models roots")
    return await catalogue.refresh(
        work.database,
        work.source,
        work.settings.models_roots_bytes,
        drop_max=work.settings.catalogue_drop_max,
        dry_run=context.dry_run,
    )


async def _demote(context: Context, going: Sequence[Verdict], counts: dict[str, Any]) -> Outcome:
    endings: Counter[str] = Counter()
    last_error = ""
    for number, verdict in enumerate(going):
        await context.tell(f"{number} of {len(going)} models, now {verdict.model.model_id}")
        ending, reason = await _demote_one(context, verdict)
        endings[ending] += 1
        if ending == "failed":
            last_error = f"{verdict.model.model_id}: {reason}"
            errors_max = max(_ERRORS_MIN - 1, context.work.settings.cleanup_errors_max * endings.total())
            if endings["failed"] > errors_max:
                break
    counts |= {name: endings[name] for name in ("demoted", "spared", "failed")}
    if endings["failed"]:
        stopped = "stopped: " if endings.total() < len(going) else ""
        failed = f"{stopped}{endings['failed']} of {endings.total()} demotions failed, the last one of {last_error}"
        return Outcome("failed", failed, counts)
    return Outcome("done", f"demoted {endings['demoted']} of {len(going)} candidates", counts)


async def _demote_one(context: Context, verdict: Verdict) -> tuple[str, str]:
    """`demoted`; `spared` if it was read, changed or pinned meanwhile; or `failed`. And why."""
    model_id = verdict.model.model_id
    try:
        move = await context.work.moves.demote(model_id, verdict.reason)
        state = await context.work.carrier.carry(move)
    except MoveRefused as error:
        log.info("demotion_refused", model=model_id, reason=str(error))
        return "spared", str(error)
    except NotLeaderError:
        raise
    except (TierdError, OSError) as error:
        log.warning("demotion_failed", model=model_id, reason=reason_of(error))
        return "failed", reason_of(error)
    if state in _DEMOTED:
        return "demoted", ""
    return ("spared" if state in _GIVEN_UP else "failed"), f"the move is {state}"


def _counts(found: Scanned) -> dict[str, Any]:
    counts = found._asdict()
    del counts["problem"]
    return counts


def _bytes_of(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.model.size_bytes for verdict in verdicts)
