"""What moves of models and of days of outputs do differently: where their objects are, and what the catalogue says.

The steps are the same (`demotion.py`, `returning.py`); they ask whoever stands for the subject of a move. Models are
here, days of outputs in `output_days.py`.
"""

from __future__ import annotations

from typing import Protocol

from tierd.controller.moves import sql
from tierd.controller.moves.books import Catalogued, Move, lock_model, read_files, refuse_if_in_use
from tierd.controller.source.moved_file import MoveRefused
from tierd.objects.keys import shown
from tierd.postgres import Connection


class Subjects(Protocol):
    """See the module. What is given a connection takes part in a transaction of the leader."""

    bucket: str
    grace: float
    """Seconds from the switch to the end of the hot copies."""
    whole: bool
    """All that a subject holds moves at once, and its objects are made by the move; else only what was planned does,
    and the objects were there before."""

    async def refuse_if_in_use(self, connection: Connection, subject: str) -> None:
        """Raises MoveRefused if somebody has it open, or nobody can tell."""
        ...

    async def refuse_to_switch(self, connection: Connection, move: Move) -> None:
        """Raises MoveRefused if the catalogue says by now that it must stay."""
        ...

    async def become_cold(self, connection: Connection, move: Move) -> bool:
        """Its stubs are there; False if the catalogue says something else by now."""
        ...

    async def become_hot(self, connection: Connection, demotion: Move, *, was_cold: bool, whole: bool) -> None:
        """What a demotion switched was put back, `whole` or as far as users left it."""
        ...

    async def have_left(self, connection: Connection, demotion: Move) -> None:
        """The hot copies are deleted; another file may have their inode numbers now."""
        ...


class Models:
    """Subjects that are models."""

    whole = True

    def __init__(self, bucket: str, grace: float, report_age_max_s: float, *, nodes: bool) -> None:
        self.bucket = bucket
        self.grace = grace
        self._report_age_max_s = report_age_max_s
        self._nodes = nodes

    async def refuse_if_in_use(self, connection: Connection, subject: str) -> None:
        """See Subjects."""
        await refuse_if_in_use(connection, subject, self._report_age_max_s, nodes=self._nodes)

    async def may_leave(self, connection: Connection, model_id: str) -> Catalogued:
        """The model, if nothing speaks against its demotion. Raises MoveRefused."""
        model = await lock_model(connection, model_id)
        if model is None:
            raise MoveRefused(
                f"{shown(model_id)} is not in the catalogue", hint="`tierd controller` adds what it finds"
            )
        if model.tier != "hot":
            raise MoveRefused(f"{shown(model_id)} is cold already")
        if model.pinned:
            raise MoveRefused(f"{shown(model_id)} is pinned", hint="unpin it first")
        await self.refuse_if_in_use(connection, model_id)
        return model

    async def refuse_to_switch(self, connection: Connection, move: Move) -> None:
        """See Subjects."""
        model = await self.may_leave(connection, move.subject)
        if model.last_access != move.last_access and not move.by_hand:
            raise MoveRefused(f"{shown(move.subject)} was accessed meanwhile")

    async def become_cold(self, connection: Connection, move: Move) -> bool:
        """See Subjects."""
        model = await lock_model(connection, move.subject)
        if model is None or model.tier != "hot" or model.version != move.detail["model_version"]:
            return False
        count = sum(len(moved.file.names()) for moved in await read_files(connection, move.id))
        await connection.execute(sql.SET_COLD, move.subject, move.version, count, move.size_bytes)
        return True

    async def become_hot(self, connection: Connection, demotion: Move, *, was_cold: bool, whole: bool) -> None:
        """See Subjects."""
        if was_cold and whole:
            await connection.execute(sql.SET_HOT, demotion.subject)

    async def have_left(self, connection: Connection, demotion: Move) -> None:
        """Of models no inode numbers are kept."""
