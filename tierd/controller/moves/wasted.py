"""Removes objects that nothing can refer to: of demotions that were given up before they switched anything.

All others stay. A stub may stand for an object of each version that was ever switched, wherever users put it, and what
is removed here cannot be brought back: in doubt it is kept.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Final

import structlog

from tierd.controller.moves import sql
from tierd.controller.moves.books import Move, note, read_move
from tierd.controller.moves.workshop import Fence, Workshop
from tierd.objects.keys import manifest_key
from tierd.objects.store import ObjectMissing

log = structlog.get_logger(__name__)

_MOVES_AT_ONCE: Final = 10
_KEYS_AT_ONCE: Final = 1000
_AGE_SECONDS: Final = 86_400.0
"""A leader that is no longer one may still store the file that it was at."""


async def clean_up(workshop: Workshop, age_s: float = _AGE_SECONDS) -> int:
    """The next few such demotions; how many. Raises NotLeaderError, DatabaseError, ObjectError."""
    async with workshop.books.writing() as connection:
        rows = await connection.fetch(sql.WASTED_VERSIONS, age_s, _MOVES_AT_ONCE)
        moves = [await read_move(connection, row["id"]) for row in rows]
    for move in moves:
        await _remove(workshop, move)
    return len(moves)


async def _remove(workshop: Workshop, move: Move) -> None:
    store, bucket = workshop.store, workshop.settings.bucket
    prefix = manifest_key(move.subject, move.version).removesuffix(".manifest")

    def some() -> list[str]:
        with suppress(ObjectMissing):  # there is no bucket
            return [found.key for found in itertools.islice(store.list(bucket, prefix), _KEYS_AT_ONCE)]
        return []

    removed = 0
    while keys := await workshop.run(some):
        async with workshop.fenced("remove objects", move) as fence:
            removed += await workshop.effect(_delete, workshop, fence, keys)
    async with workshop.fenced("note what was removed", move) as fence:
        await workshop.note_detail(fence, move, cleaned=True)
        await note(fence.connection, move.id, move.subject, "cleaned", f"{removed} objects that nothing refers to")
    await workshop.run(_forget_uploads, workshop, move)
    log.info("wasted_version_removed", model=move.subject, version=move.version, objects=removed)


def _delete(workshop: Workshop, fence: Fence, keys: list[str]) -> int:
    removed = 0
    for key in fence.batch(keys):
        fence.at("delete object")
        workshop.store.delete(workshop.settings.bucket, key)
        fence.at("deleted object")
        removed += 1
    return removed


def _forget_uploads(workshop: Workshop, move: Move) -> None:
    """Records of uploads; the parts themselves go when they are old."""
    for path in (workshop.settings.state_dir / "uploads").glob(f"{move.id}-*"):
        path.unlink(missing_ok=True)
