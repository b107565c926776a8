"""Brings an export back into the archive: what is not there, was not deleted, and has no newer version anywhere.

In batches of one transaction each; repeating it changes nothing. Retention begins anew: what is restored was archived
now, all else is as it was. A conversation may be in several exports, of which the last has its end, and these may come
in any order: what an older one brought gives way to a newer one, unless somebody wrote to it meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Final

from tierd.contexts.names import conversation_digest, user_digest
from tierd.controller.contexts import files
from tierd.controller.contexts.months import make_months, span
from tierd.errors import UsageError
from tierd.metrics import ContextMetrics
from tierd.objects.store import ObjectStore
from tierd.postgres import Database

_ROWS: Final = 500

# As the library locks whoever makes a conversation (contexts/sql.py), in one order.
_LOCK: Final = """
SELECT pg_advisory_xact_lock_shared(hashtextextended(u, 7)),
       pg_advisory_xact_lock(hashtextextended(c, hashtextextended(u, 8)))
FROM (SELECT * FROM unnest($1::text[], $2::text[]) AS n (u, c) ORDER BY u, c) named
"""
_RESTORE: Final = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[],
        $7::bigint[], $8::bytea[], $9::bytea[])
    AS g (user_id, conversation_id, messages, created_at, updated_at, archived_at, version, whose, which)
), allowed AS (
    SELECT * FROM given g
    WHERE NOT EXISTS (SELECT FROM context_tombstones t
        WHERE t.digest IN (g.whose, g.which) AND t.erased_at >= g.archived_at)
), warm AS (
    UPDATE user_contexts w SET messages = g.messages::jsonb, version = g.version, updated_at = g.updated_at
    FROM allowed g WHERE w.user_id = g.user_id AND w.conversation_id = g.conversation_id
        AND w.created_at = g.created_at AND w.version < g.version AND w.updated_at < g.updated_at
    RETURNING w.user_id, w.conversation_id
), older AS (
    DELETE FROM user_contexts_archive a USING allowed g
    WHERE a.user_id = g.user_id AND a.conversation_id = g.conversation_id
        AND a.created_at = g.created_at AND a.version < g.version AND a.updated_at < g.updated_at
        AND NOT EXISTS (SELECT FROM user_contexts w
            WHERE w.user_id = g.user_id AND w.conversation_id = g.conversation_id)
    RETURNING a.user_id, a.conversation_id
), owed AS (
    INSERT INTO context_cache_debts (user_id, conversation_id) TABLE warm UNION TABLE older
    ON CONFLICT (user_id, conversation_id) DO UPDATE SET id = DEFAULT
), missing AS (
    SELECT * FROM allowed g
    WHERE NOT EXISTS (SELECT FROM user_contexts w
        WHERE w.user_id = g.user_id AND w.conversation_id = g.conversation_id)
    AND (NOT EXISTS (SELECT FROM user_contexts_archive a
            WHERE a.user_id = g.user_id AND a.conversation_id = g.conversation_id)
        OR EXISTS (SELECT FROM older o WHERE o.user_id = g.user_id AND o.conversation_id = g.conversation_id))
), keys AS (
    INSERT INTO context_archive_keys SELECT user_id, conversation_id, now() FROM missing
    ON CONFLICT (user_id, conversation_id) DO UPDATE SET archived_at = EXCLUDED.archived_at RETURNING 1
), written AS (
    INSERT INTO user_contexts_archive
        (user_id, conversation_id, messages, created_at, updated_at, version, archived_at)
    SELECT user_id, conversation_id, messages::jsonb, created_at, updated_at, version, now() FROM missing RETURNING 1
)
SELECT (SELECT count(*) FROM allowed) AS allowed, (SELECT count(*) FROM keys) AS keys,
    (SELECT count(*) FROM written) AS written, (SELECT count(*) FROM warm) AS warm,
    (SELECT count(*) FROM older) AS older
"""
_LATER: Final = """
SELECT month FROM context_exports WHERE month > $1 AND rows > 0 AND state IN ('dropped', 'done') ORDER BY month
"""


@dataclass(frozen=True)
class Restored:
    """What became of the conversations of an export."""

    rows: int
    restored: int
    erased: int
    """Were deleted, or their user was, after they were archived."""
    present: int
    """Are there, as they were or newer."""
    replaced: int = 0
    """Were there as an older export had brought them, and are newer now."""


async def restore_contexts(
    database: Database,
    store: ObjectStore,
    month: str,
    *,
    bucket: str = "context-archive",
    tablespace: str = "",
    attempt: int | None = None,
    progress: Callable[[Restored], None] = lambda _: None,
    metrics: ContextMetrics | None = None,
) -> Restored:
    """Restore a month such as `2026-11`, by default the last export of it; `progress` is called after each batch.

    Raises UsageError for what is no month, or was never exported, ObjectError, ExportDamaged, DatabaseError.
    """
    try:
        span(month)
    except ValueError:
        raise UsageError(f"{month!r} is no month", hint="for example 2026-11") from None
    attempt = attempt or await asyncio.to_thread(files.latest_attempt, store, bucket, month)
    if attempt is None:
        raise UsageError(f"{month} was never exported to {bucket}", hint="the table context_exports tells what was")
    manifest = await asyncio.to_thread(files.read_manifest, store, bucket, month, attempt)
    await make_months(database, tablespace=tablespace)
    done = Restored(0, 0, 0, 0)
    with ExitStack() as stack:
        path = await asyncio.to_thread(stack.enter_context, files.fetched(store, bucket, manifest))
        reading = files.pages(path, _ROWS)
        while page := await asyncio.to_thread(next, reading, None):
            done = _sum(done, await _restore(database, page))
            progress(done)
    if done.rows != manifest.rows:
        raise files.ExportDamaged(f"{month} has {done.rows} lines and not {manifest.rows}", hint="try another attempt")
    if metrics is not None:
        metrics.moved("restored", done.restored)
    return done


async def later_exports(database: Database, month: str) -> list[str]:
    """Later months that are exports only: they may have newer states of what `month` has. Raises DatabaseError."""
    async with database.connection() as connection:
        return [row["month"] for row in await connection.fetch(_LATER, month)]


async def _restore(database: Database, page: list[files.Row]) -> Restored:
    users, names = [row.user_id for row in page], [row.conversation_id for row in page]
    async with database.transaction() as connection:
        await connection.fetch(_LOCK, users, names)
        row = await connection.fetchrow(
            _RESTORE,
            users,
            names,
            [row.messages for row in page],
            [row.created_at for row in page],
            [row.updated_at for row in page],
            [row.archived_at for row in page],
            [row.version for row in page],
            [user_digest(row.user_id) for row in page],
            [conversation_digest(row.user_id, row.conversation_id) for row in page],
        )
        assert row["keys"] == row["written"], "each has a key"
    allowed, replaced = row["allowed"], row["warm"] + row["older"]
    restored = row["written"] - row["older"]
    return Restored(len(page), restored, len(page) - allowed, allowed - restored - replaced, replaced)


def _sum(one: Restored, other: Restored) -> Restored:
    return Restored(*(mine + others for mine, others in zip(astuple(one), astuple(other), strict=True)))
