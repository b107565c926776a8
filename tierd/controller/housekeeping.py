"""Keeps what only grows bounded, and tells the metrics how the tiers stand. Touches no model and no move."""

from __future__ import annotations

from typing import Final

import structlog

from tierd.controller import nodes
from tierd.controller.contexts import stats as context_stats
from tierd.controller.events import purge_events
from tierd.controller.jobs.runs import purge_runs
from tierd.controller.outputs import books as output_books
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.work import Work
from tierd.postgres import Connection

log = structlog.get_logger(__name__)

_BOOTS_AT_ONCE: Final = 1000
_BOOT_DAYS: Final = 90

_TIERS = "SELECT tier, count(*), coalesce(sum(size_bytes), 0)::bigint FROM model_locations GROUP BY tier"
_MOVES = "SELECT state, count(*) FROM moves WHERE finished_at IS NULL GROUP BY state"
# What rests in its grace is not late; from the end of that on it is.
_LATE = """
SELECT coalesce(extract(epoch FROM max(now() - greatest(created_at, grace_until))), 0)::float8 AS oldest_s,
       count(*) FILTER (WHERE error IS NOT NULL) AS failing
FROM moves WHERE finished_at IS NULL AND (state <> 'in_grace' OR grace_until <= now())
"""
# The latest index of a node stays, however long the node is off. Of the others no batch can come any more, but from a
# backup of a node's disk that is older than this; its counts would then count twice.
_PURGE_BOOTS = """
DELETE FROM statistics_applied WHERE (node_id, boot) IN (
    SELECT a.node_id, a.boot FROM statistics_applied a
    WHERE a.applied_at < now() - make_interval(days => $1)
      AND NOT EXISTS (SELECT FROM nodes n WHERE n.node_id = a.node_id AND n.boot = a.boot)
    LIMIT $2
)
"""


async def tell_metrics(work: Work) -> None:
    """Models, moves, nodes, outputs and chat contexts as they are now."""
    async with work.database.connection() as connection:
        tiers = {tier: (models, size) for tier, models, size in await connection.fetch(_TIERS)}
        moves = dict(await connection.fetch(_MOVES))
        late = await connection.fetchrow(_LATE)
        assert late is not None
        found = await nodes.reports(connection, work.settings.lease_report_max_age)
        outputs = await output_books.standing(connection)
        deletions = await output_deletion.under_way(connection)
    work.metrics.late(late["oldest_s"], late["failing"])
    work.metrics.stand(tiers, moves, sum(not report.fresh for report in found))
    work.output_metrics.stand(outputs.tiers, outputs.oldest_unbacked_s, outputs.faults)
    work.output_metrics.delete(*deletions)
    await context_stats.tell_metrics(work.database, work.context_metrics)


async def purge(work: Work) -> bool:
    """One bounded round; True if there may be more to remove."""
    async with work.database.connection() as connection:
        events = await purge_events(connection, work.settings.move_events_kept)
        runs = await purge_runs(connection)
        boots = await purge_boots(connection)
    if events or runs or boots:
        log.info("purged", events=events, job_runs=runs, boots=boots)
    return bool(events or runs or boots)


async def purge_boots(connection: Connection, days: int = _BOOT_DAYS) -> int:
    """Forget indexes that nodes no longer have; how many."""
    done = await connection.execute(_PURGE_BOOTS, days, _BOOTS_AT_ONCE)
    return int(done.removeprefix("DELETE "))
