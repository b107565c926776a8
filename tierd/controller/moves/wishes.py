"""The table `move_wishes`: moves that somebody asks for, and what the leader answers. Carries nothing out.

Whoever asks needs no source and no object store, only the database. An answer is fenced by the leader's epoch; a
wish that is answered twice, because a leader died in between, is answered with the same move.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple, Protocol

import structlog

from tierd.controller.leader import NotLeaderError, assert_leader
from tierd.errors import DatabaseError, TierdError
from tierd.objects.keys import shown, validate_model_id
from tierd.postgres import Connection, Database

log = structlog.get_logger(__name__)

_AT_ONCE: Final = 16
_KEPT: Final = 1000

_COLUMNS = "id, kind, model_id, requested_by, state, move_id, answer, hint, prefix"
_ASK = "INSERT INTO move_wishes (kind, model_id, requested_by, prefix) VALUES ($1, $2, $3, $4) RETURNING id"
_LOOK = f"SELECT {_COLUMNS} FROM move_wishes WHERE id = $1"
_ASKED = f"SELECT {_COLUMNS} FROM move_wishes WHERE state = 'asked' ORDER BY id LIMIT $1"
_WITHDRAW = "UPDATE move_wishes SET state = 'withdrawn', answered_at = now() WHERE id = $1 AND state = 'asked'"
_ANSWER = """
UPDATE move_wishes SET state = $2, move_id = $3, answer = $4, hint = $5, answered_at = now()
WHERE id = $1 AND state = 'asked'
"""
_PURGE = "DELETE FROM move_wishes WHERE state <> 'asked' AND id <= (SELECT max(id) FROM move_wishes) - $1"
# Promoted in its grace, a model is brought back by an undo.
_UNDER_WAY = """
SELECT id FROM moves WHERE subject = $1 AND finished_at IS NULL
  AND (kind = $2::text OR $2::text = 'promote' AND kind = 'undo') AND abandoning IS NULL
"""
_MOVE = """
SELECT kind, state, coalesce(size_bytes, 0) AS size_bytes, done_bytes, error, abandoning, grace_until, detail,
    (SELECT reason FROM move_events e WHERE e.move_id = m.id AND e.event = m.state ORDER BY id DESC LIMIT 1) AS reason
FROM moves m WHERE id = $1
"""


class Wish(NamedTuple):
    """A row."""

    id: int
    kind: str
    model_id: str
    requested_by: str
    state: str
    move_id: int | None
    answer: str
    hint: str
    prefix: str


class Plans(Protocol):
    """What is used of `Moves`; each returns the ID of the move that does so, and raises TierdError."""

    async def demote(self, model_id: str, reason: str, *, by_hand: bool = False) -> int: ...
    async def promote(self, model_id: str, reason: str, *, by_hand: bool = False) -> int: ...
    async def undo(self, model_id: str, reason: str = "by hand") -> int: ...
    async def adopt(self, model_id: str, prefix: str, reason: str) -> int: ...


async def ask(connection: Connection, kind: str, model_id: str, by: str, prefix: str = "") -> int:
    """Ask the leader for it; the wish. `prefix` is where the objects of an import are. Raises UsageError for what can
    be no model."""
    if kind == "import":
        validate_model_id(prefix)
    wish: int = await connection.fetchval(_ASK, kind, validate_model_id(model_id), by, prefix)
    return wish


async def look(connection: Connection, wish: int) -> Wish:
    """How it stands. Raises DatabaseError if it is gone."""
    row = await connection.fetchrow(_LOOK, wish)
    if row is None:
        raise DatabaseError(f"wish {wish} is gone from the table move_wishes", hint="was the database restored?")
    return Wish(*row)


async def look_at_move(connection: Connection, move: int) -> dict[str, Any]:
    """How a move stands. Raises DatabaseError if it is gone."""
    row = await connection.fetchrow(_MOVE, move)
    if row is None:
        raise DatabaseError(f"move {move} is gone from the table moves", hint="was the database restored?")
    return dict(row) | {"detail": json.loads(row["detail"])}


async def withdraw(connection: Connection, wish: int) -> None:
    """Nobody waits for it any more; if it was answered, its move goes on."""
    await connection.execute(_WITHDRAW, wish)


class Answers:
    """Plans what is asked for. Contract: one task."""

    def __init__(self, database: Database, moves: Plans, epoch: int) -> None:
        self._database = database
        self._moves = moves
        self._epoch = epoch

    async def round(self) -> bool:
        """Answer what waits; True if there may be more. Raises NotLeaderError, DatabaseError."""
        async with self._database.connection() as connection:
            wishes = [Wish(*row) for row in await connection.fetch(_ASKED, _AT_ONCE)]
        for wish in wishes:
            await self._answer(wish)
        if wishes:
            async with self._database.connection() as connection:
                await connection.execute(_PURGE, _KEPT)
        return len(wishes) == _AT_ONCE

    async def _answer(self, wish: Wish) -> None:
        try:
            move = await self._planned(wish)
        except (NotLeaderError, DatabaseError):
            raise
        except (TierdError, OSError) as error:
            hint = error.hint if isinstance(error, TierdError) else ""
            await self._tell(wish, "refused", None, str(error), hint)
            return
        await self._tell(wish, "planned", move)
        log.info("move_planned", move=move, kind=wish.kind, model=shown(wish.model_id), by=wish.requested_by)

    async def _planned(self, wish: Wish) -> int:
        """One that is under way is the answer, too."""
        async with self._database.connection() as connection:
            found: int | None = await connection.fetchval(_UNDER_WAY, wish.model_id, wish.kind)
        if found is not None:
            return found
        reason = f"asked for by {wish.requested_by}"
        if wish.kind == "demote":
            return await self._moves.demote(wish.model_id, reason, by_hand=True)
        if wish.kind == "promote":
            return await self._moves.promote(wish.model_id, reason, by_hand=True)
        if wish.kind == "import":
            return await self._moves.adopt(wish.model_id, wish.prefix, reason)
        return await self._moves.undo(wish.model_id, reason)

    async def _tell(self, wish: Wish, state: str, move: int | None, answer: str = "", hint: str = "") -> None:
        text = " ".join(answer.replace("\0", "").encode("utf-8", "replace").decode().split())
        async with self._database.transaction() as connection:
            await assert_leader(connection, self._epoch)
            await connection.execute(_ANSWER, wish.id, state, move, text, hint)
