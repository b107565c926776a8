"""What the tiers of chat contexts hold: rows, bytes, ages. Looks only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tierd.controller.contexts.months import months
from tierd.metrics import ContextMetrics
from tierd.postgres import Database

_WARM = """
SELECT count(*) AS rows, pg_total_relation_size('user_contexts') AS size_bytes,
    coalesce(extract(epoch FROM now() - min(updated_at)), 0)::float8 AS oldest_s,
    count(*) FILTER (WHERE updated_at < now() - $1::interval) AS due,
    coalesce(sum(pg_column_size(messages)) FILTER (WHERE updated_at < now() - $1::interval), 0)::bigint AS due_bytes
FROM user_contexts
"""
_ARCHIVE = """
SELECT count(*) AS rows, coalesce(extract(epoch FROM now() - min(archived_at)), 0)::float8 AS oldest_s
FROM context_archive_keys
"""
_DEBTS = "SELECT count(*) FROM context_cache_debts"
# As PostgreSQL last counted, and by the ends of indexes: nothing that takes longer with more rows.
_GLANCE = """
SELECT (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'user_contexts'::regclass) AS warm,
    (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'context_archive_keys'::regclass) AS archive,
    (SELECT extract(epoch FROM now() - updated_at)::float8 FROM user_contexts ORDER BY updated_at LIMIT 1) AS oldest_s
"""


@dataclass(frozen=True)
class TierStats:
    """One tier; the age is that of the last write to it, or of its archiving."""

    tier: str
    rows: int
    size_bytes: int
    oldest_s: float


@dataclass(frozen=True)
class ContextStats:
    """All tiers. `due` waits for the archive; `owed` are changes that Redis has not been told of."""

    tiers: tuple[TierStats, ...]
    due: int
    due_bytes: int
    owed: int
    months: tuple[tuple[str, int, int], ...]
    """Month, rows as PostgreSQL last counted them, bytes."""

    def as_json(self) -> dict[str, Any]:
        """Stable keys."""
        return {
            "tiers": {tier.tier: {"rows": tier.rows, "size_bytes": tier.size_bytes, "oldest_s": round(tier.oldest_s)}
                      for tier in self.tiers},
            "due": self.due, "due_bytes": self.due_bytes, "owed": self.owed,
            "months": [{"month": month, "rows": rows, "size_bytes": size} for month, rows, size in self.months],
        }  # fmt: skip


async def tell_metrics(database: Database, metrics: ContextMetrics) -> None:
    """About how many rows the tables have, and how old they are; the archive's age is that of its oldest month."""
    async with database.connection() as connection:
        seen = await connection.fetchrow(_GLANCE)
        oldest = next((month for month in await months(connection) if month.rows), None)
    metrics.seen("warm", rows=seen["warm"], oldest_s=seen["oldest_s"] or 0.0)
    archive_s = max((oldest.now - oldest.begins).total_seconds(), 0.0) if oldest is not None else 0.0
    metrics.seen("archive", rows=seen["archive"], oldest_s=archive_s)


async def context_stats(database: Database, redis: Redis | None = None, *, days: float = 30.0) -> ContextStats:
    """Count everything: reads both tables' indexes. Without Redis, or while it is away, that tier is left out.

    Raises DatabaseError.
    """
    async with database.connection() as connection:
        warm = await connection.fetchrow(_WARM, timedelta(days=days))
        archive = await connection.fetchrow(_ARCHIVE)
        found = await months(connection)
        owed: int = await connection.fetchval(_DEBTS)
    tiers = [
        TierStats("warm", warm["rows"], warm["size_bytes"], warm["oldest_s"]),
        TierStats("archive", archive["rows"], sum(month.size_bytes for month in found), archive["oldest_s"]),
    ]
    if redis is not None and (cached := await _redis(redis)) is not None:
        tiers.insert(0, cached)
    by_month = tuple((month.month, month.rows, month.size_bytes) for month in found)
    return ContextStats(tuple(tiers), warm["due"], warm["due_bytes"], owed, by_month)


async def _redis(redis: Redis) -> TierStats | None:
    """All keys of its database, which are sessions but for some fences, and all of its memory."""
    try:
        keys, memory = await redis.dbsize(), await redis.info("memory")
    except (RedisError, OSError):
        return None
    return TierStats("redis", keys, int(memory["used_memory"]), 0.0)
