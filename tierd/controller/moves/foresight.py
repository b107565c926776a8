"""Whether a move that somebody asks for would be planned now, by what the database knows. Changes nothing.

The source and the object store are not looked at: what only these know is found out when it is planned.
"""

from __future__ import annotations

from typing import NamedTuple

from tierd.controller.moves import sql
from tierd.controller.moves.books import lock_model, refuse_if_in_use, refuse_if_moving
from tierd.controller.moves.steps import UNTOUCHED, MoveState
from tierd.controller.settings import ControllerSettings
from tierd.controller.source.moved_file import MoveRefused
from tierd.objects.keys import shown, validate_model_id
from tierd.postgres import Connection


class Foreseen(NamedTuple):
    """What would be done: the move's kind, which may be another than that asked for, and how many bytes it is about."""

    kind: str
    model_id: str
    size_bytes: int


async def foresee(connection: Connection, settings: ControllerSettings, kind: str, model_id: str) -> Foreseen:
    """Raises MoveRefused, UsageError."""
    validate_model_id(model_id)
    async with connection.transaction():
        demotion = await connection.fetchrow(sql.LATEST_DEMOTION, model_id)
        state = demotion["state"] if demotion is not None else None
        model = await lock_model(connection, model_id)
        if model is None:
            raise MoveRefused(
                f"{shown(model_id)} is not in the catalogue", hint="`tierd job scan-catalogue` adds what it finds"
            )
        if kind == "undo" or (kind == "promote" and state == MoveState.IN_GRACE):
            if state not in (*UNTOUCHED, MoveState.SWITCHING, MoveState.IN_GRACE):
                raise MoveRefused(f"{shown(model_id)} has no demotion to be undone", hint="`tierd promote` brings it")
            return Foreseen("undo", model_id, model.size_bytes)
        await refuse_if_moving(connection, model_id)
        if kind == "promote" and model.tier != "cold":
            raise MoveRefused(f"{shown(model_id)} is hot already")
        if kind == "demote":
            if model.tier != "hot":
                raise MoveRefused(f"{shown(model_id)} is cold already")
            if model.pinned:
                raise MoveRefused(f"{shown(model_id)} is pinned", hint="`tierd catalogue unpin` takes the pin away")
            age_s = settings.lease_report_max_age
            await refuse_if_in_use(connection, model_id, age_s, nodes=settings.nodes_report)
        return Foreseen(kind, model_id, model.size_bytes)
