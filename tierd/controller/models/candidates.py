"""What the policy of retention is asked with, and its answer: the catalogue, leases and moves as they are now.

Reads only. Whoever demotes by it looks at leases and accesses again (`moves/`): this is minutes old by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from tierd.controller import nodes
from tierd.controller.models.retention import Caps, HotModel, Rules, Spent, Verdict, decide
from tierd.controller.nodes import NodeReport
from tierd.controller.settings import ControllerSettings
from tierd.postgres import Connection

CLOCKS_APART_MAX: Final = timedelta(hours=1)
"""Two clocks that differ by more cannot both be right, and one of them decides what is old."""
_DAY_SECONDS: Final = 86_400

_HOT = """
SELECT m.model_id, m.size_bytes, extract(epoch FROM now() - m.last_access)::float8, m.pinned,
       m.vanished_at IS NOT NULL, coalesce(v.kind, '')
FROM model_locations m LEFT JOIN moves v ON v.subject = m.model_id AND v.finished_at IS NULL
WHERE m.tier = 'hot' ORDER BY m.model_id
"""
# Of the last 20 hours: a run that begins a little earlier than yesterday's has all its room.
_SPENT = """
SELECT count(*), coalesce(sum(size_bytes), 0)::bigint FROM moves
WHERE kind = 'demote' AND NOT by_hand AND NOT (detail ? 'outputs') AND state NOT IN ('abandoned', 'failed')
  AND created_at > now() - interval '20 hours'
"""


class Situation(NamedTuple):
    """`refusal` says why nothing may be demoted at all, if it is not empty; the verdicts are those without it."""

    refusal: str
    verdicts: list[Verdict]
    nodes: list[NodeReport]
    spent: Spent
    hot_bytes: int

    @property
    def going(self) -> list[Verdict]:
        """What is to be demoted, in this order."""
        return [verdict for verdict in self.verdicts if verdict.demote]


async def look(connection: Connection, settings: ControllerSettings, now: datetime | None = None) -> Situation:
    """The situation; `now` is by the caller's clock. In a transaction of one snapshot, or at least one connection."""
    found = await nodes.reports(connection, settings.lease_report_max_age)
    refusal = clocks_apart(await connection.fetchval("SELECT now()"), now or datetime.now(UTC))
    refusal = refusal or nodes.why_nothing_is_safe(found, nodes_report=settings.nodes_report)
    held = _with_relatives(await nodes.open_models(connection))
    hot = [
        HotModel(*row)._replace(open_on=tuple(dict.fromkeys(_nodes_of(row["model_id"], held))))
        for row in await connection.fetch(_HOT)
    ]
    spent = Spent(*await connection.fetchrow(_SPENT))
    return Situation(
        refusal,
        decide(hot, rules_of(settings), caps_of(settings), spent),
        found,
        spent,
        sum(model.size_bytes for model in hot if not model.vanished),
    )


def rules_of(settings: ControllerSettings) -> Rules:
    """What is to go."""
    return Rules(
        settings.unused_days * _DAY_SECONDS, settings.models_hot_budget, settings.budget_spares_days * _DAY_SECONDS
    )


def caps_of(settings: ControllerSettings) -> Caps:
    """How much at once."""
    return Caps(settings.cleanup_models_max, settings.cleanup_bytes_max, settings.cleanup_share_max)


def clocks_apart(database: datetime, ours: datetime) -> str:
    """Why nothing may be called old; empty if the clocks agree."""
    apart = abs(database - ours)
    if apart <= CLOCKS_APART_MAX:
        return ""
    return f"the clocks of the database and of this machine are {apart.total_seconds() / 3600:.1f} hours apart"


class _Held(NamedTuple):
    """Where models are open: by name, and by the directories above."""

    exact: Mapping[str, Sequence[str]]
    above: Mapping[str, Sequence[str]]


def _with_relatives(held: Mapping[str, Sequence[str]]) -> _Held:
    above: dict[str, list[str]] = {}
    for model_id, node_ids in held.items():
        for parent in _parents(model_id):
            above.setdefault(parent, []).extend(node_ids)
    return _Held(held, above)


def _nodes_of(model_id: str, held: _Held) -> Iterator[str]:
    """Where it is open, or something below it, or something above."""
    yield from held.exact.get(model_id, ())
    yield from held.above.get(model_id, ())
    for parent in _parents(model_id):
        yield from held.exact.get(parent, ())


def _parents(model_id: str) -> Iterator[str]:
    parts = model_id.split("/")
    for count in range(1, len(parts)):
        yield "/".join(parts[:count])
