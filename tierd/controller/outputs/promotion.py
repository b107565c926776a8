"""Brings cold outputs back to the hot tier that are read often: decides which, and the steps of the move that does so.

The bytes go into the stubs, as those of a model do (`moves/promotion.py`); that an output is hot is found out at its
file, by whoever looks for backups. From then on it is as young as if it had been made: for `outputs_hot_days` it does
not leave for its age. Its reads count anew once it is cold, and none comes while the hot budget has no room: so what
the budget takes away is not brought back by the same reads.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog

from tierd.controller.leader import NotLeaderError
from tierd.controller.moves.books import Move, add_move, refuse_if_moving, set_state
from tierd.controller.moves.steps import MoveKind, MoveState
from tierd.controller.moves.workshop import Workshop
from tierd.controller.settings import ControllerSettings
from tierd.controller.source.moved_file import MoveRefused
from tierd.controller.source.promote import Promotion
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError
from tierd.objects.keys import shown
from tierd.objects.store import ObjectDamaged, ObjectMissing
from tierd.recall import fetch_from

log = structlog.get_logger(__name__)

_DAYS_AT_ONCE: Final = 16
_FILES_MAX: Final = 100
"""Of one move; others come with the next one."""

_WANTED: Final = """
    NOT hot_storage AND cold_storage AND vanished_at IS NULL AND pending_since IS NULL AND recent_reads >= $1
    AND reads_since > now() - $2 * interval '1 second'
"""

# Not of a day whose files are on their way.
_DAYS: Final = f"""
SELECT user_id, left(filename, 10) AS date, sum(size_bytes)::bigint AS size FROM generated_outputs
WHERE {_WANTED} AND NOT EXISTS (
    SELECT FROM moves WHERE finished_at IS NULL AND subject = $3::text || '/' || user_id || '/' || left(filename, 10))
GROUP BY 1, 2 ORDER BY max(recent_reads) DESC LIMIT $4
"""

_HOT_BYTES: Final = """
SELECT coalesce(sum(size_bytes), 0)::bigint FROM generated_outputs WHERE hot_storage AND vanished_at IS NULL
"""

# From now on their reads count anew, whatever becomes of the move.
_TAKE: Final = f"""
UPDATE generated_outputs SET recent_reads = 0, reads_since = NULL
WHERE output_id IN (
    SELECT output_id FROM generated_outputs
    WHERE {_WANTED} AND user_id = $3 AND filename COLLATE "C" > $4 || '/' AND filename COLLATE "C" < $4 || '0'
    ORDER BY recent_reads DESC LIMIT $5)
RETURNING filename, size_bytes
"""

_LOOK_AT: Final = """
UPDATE generated_outputs
SET news = news + 1, pending_since = coalesce(pending_since, now()), try_at = least(try_at, now())
WHERE user_id = $1 AND filename = ANY ($2::text[])
"""


class OutputPromotion:
    """Decides, and plans. Contract: one leader's, one task calls `round`."""

    def __init__(self, workshop: Workshop, settings: ControllerSettings) -> None:
        self._shop = workshop
        self._settings = settings
        self._enough = settings.outputs_promote_accesses, settings.outputs_promote_window

    async def round(self) -> None:
        """Plan to bring what was read often enough, as far as there is room. Raises NotLeaderError, DatabaseError."""
        if not self._settings.outputs_promote_accesses:
            return
        async with self._shop.books.writing() as connection:
            days = await connection.fetch(_DAYS, *self._enough, self._settings.outputs_root, _DAYS_AT_ONCE)
            hot_bytes = await connection.fetchval(_HOT_BYTES) if days else 0
        budget = self._settings.outputs_hot_budget
        for day in days:
            if budget and hot_bytes + day["size"] > budget:
                log.debug("output_not_promoted", user=shown(day["user_id"]), reason="outputs_hot_budget has no room")
                continue
            hot_bytes += day["size"]
            await self._try(day)

    async def _try(self, day: Any) -> None:
        try:
            await self._plan(day["user_id"], day["date"])
        except (NotLeaderError, DatabaseError):
            raise
        except (TierdError, OSError) as error:
            log.info("output_not_promoted", user=shown(day["user_id"]), date=day["date"], reason=reason_of(error))

    async def _plan(self, user: str, date: str) -> None:
        subject = f"{self._settings.outputs_root}/{user}/{date}"
        async with self._shop.fenced("plan") as fence:
            connection = fence.connection
            await refuse_if_moving(connection, subject)
            rows = await connection.fetch(_TAKE, *self._enough, user, date, _FILES_MAX)
            if not rows:
                raise MoveRefused("nothing of it is wanted any more")
            detail = {"outputs": {"user": user, "date": date}, "names": sorted(row["filename"] for row in rows)}
            size = sum(row["size_bytes"] for row in rows)
            reason = f"read {self._settings.outputs_promote_accesses} times or more"
            values = connection, self._shop.books, MoveKind.PROMOTE, subject, reason
            await add_move(*values, size_bytes=size, version=0, detail=detail)


class OutputPromotions:
    """The steps. Each takes the move as it was read, and returns False if there is nothing to do for now."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop
        self.steps = {
            MoveState.PLANNED: workshop.go_on,
            MoveState.COPYING: self.bring,
            MoveState.SWITCHING: self.become_hot,
        }

    async def bring(self, move: Move) -> bool:
        """All bytes come. Not within a transaction: it harms nobody if another leader does so, too."""
        for name in move.detail["names"]:
            await self._bring(move, f"{move.subject}/{name.rpartition('/')[2]}")
        return await self._shop.go_on(move)

    async def _bring(self, move: Move, path: str) -> None:
        fetch = fetch_from(self._shop.store, self._shop.settings.outputs_bucket)
        promotion = Promotion(self._shop.tree, path, fetch, at=self._shop.at)
        work = asyncio.ensure_future(self._shop.run(promotion.run))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            promotion.stop()
            await asyncio.wait([work])
            work.exception()  # that it was stopped is of no interest
            raise
        except (ObjectMissing, ObjectDamaged) as error:  # it keeps no other one from coming
            log.warning("output_not_promoted", path=shown(path), reason=reason_of(error))

    async def become_hot(self, move: Move) -> bool:
        """Whoever looks at the files says what they are."""
        async with self._shop.fenced("become hot", move) as fence:
            await fence.connection.execute(_LOOK_AT, move.detail["outputs"]["user"], move.detail["names"])
            await set_state(fence.connection, self._shop.books, move, MoveState.DONE)
        return True
