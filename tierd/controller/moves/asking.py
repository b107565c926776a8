"""Has a model moved because somebody asks for it: by the leader, or as the leader if nobody leads. For commands.

There is one way: the wish is written into the database, and answered by whoever leads. That is this process, if it
gets the lock; so a leader that dies meanwhile leaves nobody waiting for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from tierd.controller.leading import lead_once
from tierd.controller.migrate import require_current
from tierd.controller.moves import wishes as move_wishes
from tierd.controller.moves.steps import FINAL
from tierd.controller.moves.wishes import Answers, Wish
from tierd.controller.settings import ControllerSettings
from tierd.controller.workplace import Workplace, holder
from tierd.errors import DatabaseError
from tierd.postgres import Connection, connected

_POLL_SECONDS: Final = 0.5
_UNHEARD_SECONDS_MAX: Final = 60.0
"""Who has no source to work on needs a leader, and one hears within seconds."""
_RETRY_SECONDS: Final = 5.0


class Asked(NamedTuple):
    """What came of a wish, so far: the answer, and the move as it stands (None without one)."""

    wish: Wish
    move: Mapping[str, Any] | None

    @property
    def ended(self) -> bool:
        """There is nothing to wait for. (Nobody waits for the days of a grace.)"""
        if self.move is None:
            return self.wish.state != "asked"
        return self.move["state"] in FINAL or (self.move["state"] == "in_grace" and self.wish.kind == "demote")

    @property
    def succeeded(self) -> bool:
        """What was asked for is so. An undo may be the end of the demotion itself."""
        if self.move is None or not self.ended:
            return False
        undone = self.wish.kind == "undo" and self.move["state"] == "abandoned"
        return undone or self.move["state"] in ("done", "in_grace")


async def ask_for(
    settings: ControllerSettings,
    environ: Mapping[str, str],
    kind: str,
    model_id: str,
    tell: Callable[[Asked], None] = lambda _: None,
    prefix: str = "",
) -> Asked:
    """Have it done, and wait for its end. `tell` hears of it every now and then; `prefix` is that of an import.

    When this is cancelled, a wish that nobody had answered is withdrawn; a move that runs elsewhere goes on, one that
    runs here is resumed by the next leader. Raises UsageError, DatabaseError.
    """
    place = Workplace(settings, environ) if settings.source is not None else None
    async with connected(settings) as connection:
        await require_current(connection)
        asking = asyncio.ensure_future(move_wishes.ask(connection, kind, model_id, holder(), prefix))
        try:
            return await _see_through(connection, await asyncio.shield(asking), place, tell)
        except BaseException:
            await asyncio.shield(_withdraw(connection, asking))
            raise


async def _withdraw(connection: Connection, asking: asyncio.Future[int]) -> None:
    """Also a wish that is being written down this moment."""
    await asyncio.wait([asking])
    if asking.exception() is None:
        await move_wishes.withdraw(connection, asking.result())


async def _see_through(
    connection: Connection, wish: int, place: Workplace | None, tell: Callable[[Asked], None]
) -> Asked:
    unheard_s = 0.0
    while True:
        asked = await _look(connection, wish)
        tell(asked)
        if asked.ended:
            return asked
        if place is not None:
            if await lead_once(place.settings, holder(), partial(_work, connection, wish, place, tell)):
                continue
        elif asked.wish.state == "asked" and (unheard_s := unheard_s + _POLL_SECONDS) > _UNHEARD_SECONDS_MAX:
            raise DatabaseError("no controller leads", hint="start `tierd controller`, or set source to do it here")
        await asyncio.sleep(_POLL_SECONDS)


async def _look(connection: Connection, wish: int) -> Asked:
    found = await move_wishes.look(connection, wish)
    move = await move_wishes.look_at_move(connection, found.move_id) if found.move_id is not None else None
    return Asked(found, move)


async def _work(connection: Connection, wish: int, place: Workplace, tell: Callable[[Asked], None], epoch: int) -> None:
    async with place.work(epoch) as work:
        watching = asyncio.create_task(_tell_now_and_then(connection, wish, tell))
        try:
            answers = Answers(work.database, work.moves, epoch)
            while not (asked := await _look_beside(work.database, wish)).ended:
                await answers.round()
                if asked.wish.move_id is not None:
                    await work.carrier.carry(asked.wish.move_id)
                    if not (await _look_beside(work.database, wish)).ended:  # it waits for something
                        await asyncio.sleep(_RETRY_SECONDS)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _look_beside(database: Any, wish: int) -> Asked:
    async with database.connection() as connection:
        return await _look(connection, wish)


async def _tell_now_and_then(connection: Connection, wish: int, tell: Callable[[Asked], None]) -> None:
    while True:
        tell(await _look(connection, wish))
        await asyncio.sleep(_POLL_SECONDS)
