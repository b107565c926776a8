"""Hears from nodes which cold models are being loaded, and plans to bring them back. Carries nothing out.

The stream in Redis holds what nodes could say, and nothing of it is believed: a model is what is found in the source
below a models root, by the name that it has there now. Best effort: what cannot be planned now is asked for again by
the next load. Whatever this is killed between, a model is planned once, because there is one unfinished move of a model
at most.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

import structlog
from redis.asyncio import Redis

from tierd.controller.leader import NotLeaderError
from tierd.controller.source.moved_file import MoveRefused, NotCold
from tierd.errors import DatabaseError, TierdError
from tierd.metrics import ControllerMetrics
from tierd.objects.keys import shown
from tierd.postgres import Database
from tierd.promote_wishes import STREAM, decode
from tierd.statistics import FIELD, BadMessage

log = structlog.get_logger(__name__)

_MESSAGES_AT_ONCE: Final = 200
_MODELS_AT_ONCE: Final = 32
"""Planned in one round; each is a walk over a model."""
_AGE_MS_MAX: Final = 3_600_000
"""Who loaded a model an hour ago, while nobody heard it, has loaded it by now."""

# One that failed a short while ago would only fail again, for each of its readers. First those that are known to be
# cold; others may have been renamed while they were, or be cold in part.
_TO_PLAN: Final = """
SELECT model_id FROM unnest($1::text[]) AS w (model_id) LEFT JOIN model_locations l USING (model_id)
WHERE NOT EXISTS (SELECT FROM moves m WHERE m.subject = w.model_id AND (
        m.finished_at IS NULL AND m.state <> 'in_grace'
        OR m.kind IN ('promote', 'undo') AND m.state = 'failed' AND m.finished_at > now() - interval '1 hour'))
ORDER BY l.tier = 'cold' DESC NULLS LAST, l.last_access DESC NULLS LAST LIMIT $2
"""


class Plans(Protocol):
    """What is used of `Moves`."""

    async def promote(self, model_id: str, reason: str) -> int:
        """Plan to bring a model back; the move's ID. Raises TierdError."""
        ...


class _Heard(NamedTuple):
    ids: list[bytes]
    wanted: dict[str, str]
    """Models, with the node that asks first."""
    bad: int
    old: int


class PromoteRequests:
    """See the module. `redis` does not decode answers. Contract: one task."""

    def __init__(self, database: Database, redis: Redis, moves: Plans, metrics: ControllerMetrics) -> None:
        self._database = database
        self._redis = redis
        self._moves = moves
        self._metrics = metrics

    async def round(self) -> bool:
        """Hear and plan; True if there is more. Raises RedisError, OSError, DatabaseError, NotLeaderError."""
        heard = await self._hear()
        to_plan = await self._to_plan(list(heard.wanted)) if heard.wanted else []
        results = {"bad": heard.bad, "old": heard.old, "planned": 0, "refused": 0}
        results["ignored"] = len(heard.wanted) - len(to_plan)
        for model in to_plan:
            results[await self._plan(model, heard.wanted[model])] += 1
        if heard.ids:
            await self._redis.xdel(STREAM, *heard.ids)
        self._metrics.promote_wishes_heard(results)
        return len(heard.ids) >= _MESSAGES_AT_ONCE

    async def _hear(self) -> _Heard:
        entries: Any = await self._redis.xrange(STREAM, count=_MESSAGES_AT_ONCE)
        heard = _Heard([entry_id for entry_id, _ in entries], {}, 0, 0)
        if not entries:
            return heard
        seconds, _ = await self._redis.time()
        oldest_ms = int(seconds) * 1000 - _AGE_MS_MAX
        for entry_id, fields in entries:
            if int(entry_id.partition(b"-")[0]) < oldest_ms:
                heard = heard._replace(old=heard.old + 1)
                continue
            try:
                wish = decode(fields.get(FIELD, b""))
            except BadMessage as error:
                log.warning("promote_wish_unreadable", reason=str(error), hint=error.hint)
                heard = heard._replace(bad=heard.bad + 1)
                continue
            for model in wish.models:
                heard.wanted.setdefault(model, wish.node_id)
        return heard

    async def _to_plan(self, models: list[str]) -> list[str]:
        """Those of them that nobody brings, as many as are looked at in one round."""
        async with self._database.connection() as connection:
            rows: list[Any] = await connection.fetch(_TO_PLAN, models, _MODELS_AT_ONCE)
        return [row["model_id"] for row in rows]

    async def _plan(self, model: str, node: str) -> str:
        """One of `ControllerMetrics.WISHES`."""
        try:
            move = await self._moves.promote(model, f"loaded on {node}")
        except (DatabaseError, NotLeaderError):
            raise
        except NotCold:
            return "ignored"
        except MoveRefused as error:
            log.info("promote_refused", model=shown(model), reason=str(error))
        except (TierdError, OSError) as error:
            hint = error.hint if isinstance(error, TierdError) else ""
            log.warning("promote_refused", model=shown(model), reason=str(error), hint=hint)
        else:
            log.info("promote_planned", model=shown(model), node=node, move=move)
            return "planned"
        return "refused"
