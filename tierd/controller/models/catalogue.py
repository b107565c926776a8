"""The catalogue, `model_locations`: brought up to date with what a scan of the source found, pinned, looked at.

A scan registers models, gives them their real sizes, and says which vanished. It never deletes a row: that of a cold
model is what knows of its archive in the object store, and that of a hot one has its age and its hits, which a model
directory that was not mounted for an hour shall not lose. It calls a model cold or hot as its files are, except where
a move is at work or was since the scan began: that knew better.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from tierd.controller.models import catalogue_scan
from tierd.controller.models.catalogue_scan import Scan, Seen
from tierd.errors import UsageError
from tierd.postgres import Connection, Database

log = structlog.get_logger(__name__)

_BATCH: Final = 1000
_DROP_MIN: Final = 5
"""So many may vanish at once, however few there are."""

# A cold model that nobody can tell the bytes of is not registered; one that was renamed is as old as it was.
# A changed size or number of files is a use: somebody wrote it, perhaps beside the overlay. So is a return.
_FOLD = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::bigint[], $3::int[], $4::bool[], $5::int[], $6::bool[], $7::text[])
           AS g (model_id, size_bytes, files, cold, version, imported, archived_as)
), locked AS (
    SELECT m.model_id, m.tier, m.files, m.size_bytes, m.vanished_at, EXISTS (
        SELECT FROM moves v
        WHERE v.subject = m.model_id AND (v.finished_at IS NULL OR v.finished_at >= $8)
    ) AS moved
    FROM model_locations m WHERE m.model_id = ANY ($1::text[]) ORDER BY m.model_id FOR UPDATE
), updated AS (
    UPDATE model_locations m
    SET seen_at = now(),
        vanished_at = NULL,
        version = CASE WHEN l.moved OR NOT g.cold THEN m.version ELSE greatest(m.version, g.version) END,
        imported = m.imported OR (g.imported AND NOT l.moved),
        tier = CASE WHEN l.moved THEN m.tier
                    WHEN NOT g.cold THEN 'hot'
                    WHEN greatest(m.version, g.version) > 0 OR m.imported OR g.imported THEN 'cold'
                    ELSE m.tier END,
        size_bytes = CASE WHEN l.moved THEN m.size_bytes ELSE g.size_bytes END,
        files = CASE WHEN l.moved THEN m.files ELSE g.files END,
        last_access = CASE
            WHEN l.vanished_at IS NOT NULL
              OR (NOT l.moved AND l.tier = 'hot' AND NOT g.cold AND l.files IS NOT NULL
                  AND (l.files, l.size_bytes) IS DISTINCT FROM (g.files, g.size_bytes))
            THEN greatest(m.last_access, now()) ELSE m.last_access END
    FROM given g JOIN locked l USING (model_id)
    WHERE m.model_id = g.model_id
)
INSERT INTO model_locations (model_id, tier, size_bytes, files, version, imported, created_at, seen_at)
SELECT model_id, CASE WHEN cold THEN 'cold' ELSE 'hot' END, size_bytes, files, CASE WHEN cold THEN version ELSE 0 END,
       imported, coalesce((SELECT created_at FROM model_locations o
                           WHERE o.model_id = given.archived_as AND given.version > 0), now()), now()
FROM given
WHERE (version IS NOT NULL OR NOT cold) AND NOT EXISTS (SELECT FROM locked WHERE locked.model_id = given.model_id)
ORDER BY model_id
ON CONFLICT (model_id) DO UPDATE SET seen_at = now()
RETURNING model_id
"""
_NOT_SEEN = """
SELECT model_id FROM model_locations
WHERE vanished_at IS NULL AND (seen_at IS NULL OR seen_at < $1) AND model_id > $2 ORDER BY model_id LIMIT $3
"""
_PRESENT = "SELECT count(*) FROM model_locations WHERE vanished_at IS NULL"
_VANISHED = """
UPDATE model_locations SET vanished_at = now()
WHERE model_id = ANY ($1::text[]) AND vanished_at IS NULL AND (seen_at IS NULL OR seen_at < $2)
"""
_PIN = "UPDATE model_locations SET pinned = $2 WHERE model_id = $1"
_LIST = """
SELECT m.model_id, m.tier, m.size_bytes, m.files, m.hits, m.pinned, m.last_access, m.created_at, m.version,
       m.vanished_at, v.kind AS move, v.state AS move_state
FROM model_locations m LEFT JOIN moves v ON v.subject = m.model_id AND v.finished_at IS NULL
WHERE m.model_id > $1 AND ($2::text IS NULL OR m.tier = $2) ORDER BY m.model_id LIMIT $3
"""


class Scanned(NamedTuple):
    """What a scan changed, or would change. `problem` says why nothing may be concluded from what it did not find."""

    models: int
    size_bytes: int
    registered: int
    vanished: int
    refused: int
    problem: str = ""


async def refresh(
    database: Database, source: Path, roots: Sequence[bytes], *, drop_max: float, dry_run: bool = False
) -> Scanned:
    """Scan the source and fold what it holds into the catalogue. Raises DatabaseError, and OSError of the source.

    Where more than `drop_max` of the models are gone at once none is called vanished: a source that is not mounted
    looks like that.
    """
    async with database.connection() as connection:
        started: datetime = await connection.fetchval("SELECT now()")
    found = await asyncio.to_thread(catalogue_scan.scan, source, roots)
    if found.refused:
        log.warning("models_without_name", models=found.refused_total, names=found.refused, hint="rename them")
    if not found.roots:
        names = ", ".join(root.decode("utf-8", "replace") or "." for root in roots)
        return _scanned(found, problem=f"none of {names} is in {source}: is it mounted? models_root")
    registered = await _fold(database, found.models, started, dry_run=dry_run)
    if not found.complete:
        return _scanned(found, registered, problem="the source could not be read whole, see the log")
    gone, present = await _not_there(database, source, started, found if dry_run else None)
    if len(gone) > max(_DROP_MIN, drop_max * present):
        problem = f"{len(gone)} of {present} models are gone at once: is {source} mounted whole? catalogue_drop_max"
        return _scanned(found, registered, problem=problem)
    if not dry_run:
        await _call_vanished(database, gone, started)
    return _scanned(found, registered, len(gone))


async def set_pinned(connection: Connection, model_id: str, *, pinned: bool) -> None:
    """Keep a model hot, or no longer. Raises UsageError for one that the catalogue does not know."""
    if await connection.execute(_PIN, model_id, pinned) == "UPDATE 0":
        raise UsageError(f"the catalogue has no model {model_id}", hint="`tierd catalogue list` shows all")


async def rows(connection: Connection, tier: str | None = None) -> list[Mapping[str, Any]]:
    """All models by name, or those of a tier, with the move that is at work on each."""
    found: list[Mapping[str, Any]] = []
    while page := await connection.fetch(_LIST, found[-1]["model_id"] if found else "", tier, _BATCH):
        found += page
    return found


def _scanned(found: Scan, registered: int = 0, vanished: int = 0, problem: str = "") -> Scanned:
    size = sum(seen.size_bytes for seen in found.models.values())
    return Scanned(len(found.models), size, registered, vanished, found.refused_total, problem)


async def _fold(database: Database, models: Mapping[str, Seen], started: datetime, *, dry_run: bool) -> int:
    """How many were new."""
    new = 0
    for names in _batches(sorted(models)):
        async with database.transaction() as connection:
            if dry_run:
                known = await connection.fetchval(
                    "SELECT count(*) FROM model_locations WHERE model_id = ANY ($1::text[])", names
                )
                new += len(names) - known
            else:
                new += await fold(connection, {name: models[name] for name in names}, started)
    return new


async def fold(connection: Connection, models: Mapping[str, Seen], started: datetime) -> int:
    """Tell the catalogue of a bounded number of models, as they were found since `started`; how many were new."""
    seen = models.values()
    columns = (
        [one.size_bytes for one in seen],
        [one.files for one in seen],
        [one.cold for one in seen],
        [one.version for one in seen],
        [one.imported for one in seen],
        [one.archived_as for one in seen],
    )
    return len(await connection.fetch(_FOLD, list(models), *columns, started))


async def _not_there(
    database: Database, source: Path, started: datetime, unfolded: Scan | None
) -> tuple[list[str], int]:
    """Models that the scan did not find and that are not there, looked at one by one; how many there were."""
    gone: list[str] = []
    after = ""
    async with database.connection() as connection:
        present: int = await connection.fetchval(_PRESENT)
    while True:
        async with database.connection() as connection:
            page = [row["model_id"] for row in await connection.fetch(_NOT_SEEN, started, after, _BATCH)]
        if not page:
            return gone, present
        after = page[-1]
        unseen = [name for name in page if unfolded is None or name not in unfolded.models]
        gone += await asyncio.to_thread(_gone_of, source, unseen)


def _gone_of(source: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not catalogue_scan.is_there(source, name)]


async def _call_vanished(database: Database, gone: Sequence[str], started: datetime) -> None:
    for names in _batches(gone):
        async with database.transaction() as connection:
            await connection.execute(_VANISHED, names, started)
    if gone:
        log.info("models_vanished", models=len(gone), some=list(gone[:10]))


def _batches(names: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), _BATCH):
        yield list(names[start : start + _BATCH])
