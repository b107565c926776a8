"""What nodes last said: who reports what is open, and since when not. Takes nodes that are gone off the list."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from tierd.errors import UsageError
from tierd.postgres import Connection

_NAMED_MAX: Final = 5

_REPORTS = """
SELECT node_id, version, last_seen, extract(epoch FROM now() - leases_at)::float8 AS age_s,
       coalesce(leases_at > now() - make_interval(secs => $1), false) AS fresh,
       (SELECT count(*) FROM node_leases l WHERE l.node_id = n.node_id) AS leases
FROM nodes n WHERE registered ORDER BY node_id
"""
_LEASES = """
SELECT l.model_id, l.node_id FROM node_leases l JOIN nodes n USING (node_id)
WHERE n.registered ORDER BY l.model_id, l.node_id
"""
_FORGET = "UPDATE nodes SET registered = false WHERE node_id = $1 AND registered"


class NodeReport(NamedTuple):
    """A registered node. `age_s` is how old its latest report of open models is, None if there is none; `fresh` says
    whether it is young enough to demote by."""

    node_id: str
    version: str
    last_seen: datetime
    age_s: float | None
    fresh: bool
    leases: int


async def reports(connection: Connection, max_age_s: float) -> list[NodeReport]:
    """All registered nodes by name."""
    return [NodeReport(*row) for row in await connection.fetch(_REPORTS, max_age_s)]


async def open_models(connection: Connection) -> dict[str, list[str]]:
    """Models with an open file, and on which nodes."""
    found: dict[str, list[str]] = {}
    for model_id, node_id in await connection.fetch(_LEASES):
        found.setdefault(model_id, []).append(node_id)
    return found


async def forget(connection: Connection, node_id: str, max_age_s: float) -> None:
    """A node is gone for good: nothing waits for its reports any more. Within a transaction.

    Raises UsageError for one that reports (it would be registered again at once), or that is not registered.
    """
    known = {report.node_id: report for report in await reports(connection, max_age_s)}
    if node_id not in known:
        raise UsageError(f"no node {node_id} is registered", hint="`tierd catalogue nodes` shows all")
    if known[node_id].fresh:
        raise UsageError(f"node {node_id} reports what is open there", hint="unmount tierd there first")
    await connection.execute(_FORGET, node_id)
    await connection.execute("DELETE FROM node_leases WHERE node_id = $1", node_id)


def why_nothing_is_safe(found: Sequence[NodeReport], *, nodes_report: bool) -> str:
    """Why nobody knows which models are open, or the empty string."""
    silent = [report for report in found if not report.fresh]
    if silent:
        named = ", ".join(f"{one.node_id} ({_since(one.age_s)})" for one in silent[:_NAMED_MAX])
        more = f" and {len(silent) - _NAMED_MAX} others" if len(silent) > _NAMED_MAX else ""
        return f"nobody knows what is open on {named}{more}; `tierd catalogue forget-node` is for nodes that are gone"
    if not found and nodes_report:
        return "no node has ever reported what is open there; nodes_report: no is for clusters without any"
    return ""


def _since(age_s: float | None) -> str:
    if age_s is None:
        return "never reported"
    return f"last report {age_s:.0f} s ago" if age_s < 86_400 else "last report days ago or doubtful"
