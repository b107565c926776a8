"""Moves of models between the tiers: planned, carried on from wherever they are, undone. Nobody else begins any.

How each step is done is told where it is (`demotion.py`, `returning.py`); here is which step comes next, and what an
error means for it: what may pass leaves the move where it is, what may not ends it, and nothing that was switched ever
ends half way. Which models should move is policy, and not decided here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, Self

import structlog

from tierd.controller.leader import NotLeaderError
from tierd.controller.moves import output_days as output_moves
from tierd.controller.moves import sql
from tierd.controller.moves.books import Move, StateChanged, add_move, forget_files, hold, note, read_move, set_state
from tierd.controller.moves.demotion import Demotion
from tierd.controller.moves.importing import Importing
from tierd.controller.moves.leftovers import tell_leftovers
from tierd.controller.moves.output_days import Day
from tierd.controller.moves.promotion import Promotions
from tierd.controller.moves.returning import Returning, begin_abandoning
from tierd.controller.moves.steps import FINAL, UNTOUCHED, MoveKind, MoveState
from tierd.controller.moves.wasted import clean_up
from tierd.controller.moves.workshop import MoveSettings, Workshop
from tierd.controller.outputs.promotion import OutputPromotions
from tierd.controller.source.announcing import At
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.source.moved_file import MoveRefused, SourceGone
from tierd.errors import TierdError
from tierd.objects.keys import shown, validate_model_id
from tierd.objects.store import ObjectStore
from tierd.postgres import Database

log = structlog.get_logger(__name__)

Step = Callable[[Move], Awaitable[bool]]
"""Takes a move as it was read, and returns False if there is nothing to do for now."""
_STEPS_MAX: Final = 64
"""More than any move has, with those that are put back."""


def _nowhere(effect: str) -> None:
    """Nobody wants to know of effects but tests."""


class Moves:
    """See the module. For one leader: `epoch` is its own.

    Contract: for any tasks of one event loop; a move is advanced by one of them at a time. To stop, close the store and
    cancel: a task ends when its threads have ended, and any other process can go on from there.
    NotLeaderError ends everything: whoever gets it must not go on with this object.
    """

    def __init__(
        self,
        database: Database,
        tree: HotTree,
        store: ObjectStore,
        settings: MoveSettings,
        epoch: int,
        at: At = _nowhere,
    ) -> None:
        self._shop = Workshop(database, tree, store, settings, epoch, at)
        self._returning = Returning(self._shop)
        self._demotion = Demotion(self._shop, self._returning)
        self._promotions = Promotions(self._shop)
        self._output_promotions = OutputPromotions(self._shop)
        self._importing = Importing(self._shop)
        self._steps: dict[MoveKind, Mapping[MoveState, Step]] = {
            MoveKind.DEMOTE: self._demotion.steps,
            MoveKind.UNDO: self._returning.undo_steps,
            MoveKind.PROMOTE: self._promotions.steps,
            MoveKind.IMPORT: self._importing.steps,
        }

    @property
    def workshop(self) -> Workshop:
        """For what works as moves do, within the same fences."""
        return self._shop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shop.close()

    # --- wishes ---

    async def demote(self, model_id: str, reason: str, *, by_hand: bool = False) -> int:
        """Plan to take a model to the cold tier; the move's ID.

        `by_hand`: that somebody reads the model before the switch does not stop it; an open file or a pin does.
        Raises MoveRefused, UsageError.
        """
        return await self._demotion.plan(model_id, reason, by_hand=by_hand)

    async def demote_outputs(self, day: Day, reason: str) -> int:
        """Plan to take outputs of a day to the cold tier, those that are backed up; the move's ID.

        Raises MoveRefused, UsageError.
        """
        async with self._shop.fenced("plan") as fence:
            return await output_moves.plan(fence.connection, self._shop.books, day, reason)

    async def promote(self, model_id: str, reason: str, *, by_hand: bool = False) -> int:
        """Plan to bring a model back to the hot tier; the move's ID: an undo while its files are still in the trash.

        Raises MoveRefused, PromotionError, UsageError.
        """
        if await self._is_in_grace(model_id):
            with suppress(MoveRefused):  # it may end this moment
                return await self.undo(model_id, reason)
        return await self._promotions.plan(model_id, reason, by_hand=by_hand)

    async def adopt(self, model_id: str, prefix: str, reason: str) -> int:
        """Plan to make a cold model of objects that somebody else put below a prefix of the bucket; the move's ID.

        Raises MoveRefused, UsageError, ObjectError.
        """
        return await self._importing.plan(model_id, prefix, reason)

    async def _is_in_grace(self, model_id: str) -> bool:
        async with self._shop.books.writing() as connection:
            found = await connection.fetchrow(sql.LATEST_DEMOTION, model_id)
            return found is not None and found["state"] == MoveState.IN_GRACE

    async def undo(self, model_id: str, reason: str = "by hand") -> int:
        """Take back the latest demotion of a model; the ID of the move that does so: the demotion itself as long as
        it has not switched the model. Raises MoveRefused if its grace is over, or there is none."""
        validate_model_id(model_id)
        books = self._shop.books
        async with self._shop.fenced("undo") as fence:
            found = await fence.connection.fetchrow(sql.LATEST_DEMOTION, model_id)
            if found is None:
                raise MoveRefused(f"{shown(model_id)} was never demoted")
            move = await read_move(fence.connection, found["id"])
            if move.state in UNTOUCHED:
                await set_state(fence.connection, books, move, MoveState.ABANDONED, f"undone: {reason}")
                return move.id
            if move.state is MoveState.SWITCHING:
                if move.abandoning is None:
                    await begin_abandoning(fence, self._shop, move, f"undone: {reason}")
                return move.id
            if move.state is not MoveState.IN_GRACE:
                raise MoveRefused(
                    f"the demotion of {shown(model_id)} cannot be undone: it is {move.state.replace('_', ' ')}",
                    hint="promote the model" if move.state in (MoveState.DELETING, MoveState.DONE) else "",
                )
            await set_state(fence.connection, books, move, MoveState.ABANDONED, f"undone: {reason}")
            return await add_move(
                fence.connection,
                books,
                MoveKind.UNDO,
                model_id,
                reason,
                size_bytes=move.size_bytes,
                by_hand=True,
                version=move.version,
                detail={"of": move.id, "source": move.detail.get("source")},
            )

    # --- work ---

    async def advance(self, move_id: int) -> MoveState:
        """Carry a move on as far as it can go now; the state that it is in then. What went wrong is in the books.

        Raises NotLeaderError, DatabaseError.
        """
        for _ in range(_STEPS_MAX):
            move = await self._shop.books.move(move_id)
            if move.state in FINAL:
                break
            try:
                if not await self._step_of(move)(move):
                    break
            except StateChanged:
                continue
            except NotLeaderError:
                raise
            except (TierdError, OSError) as error:
                return await self._note_failure(move, error)
        return (await self._shop.books.move(move_id)).state

    def _step_of(self, move: Move) -> Step:
        if move.kind is MoveKind.PROMOTE and output_moves.is_of_outputs(move):
            return self._output_promotions.steps[move.state]
        return self._steps[move.kind][move.state]

    async def resume_all(self) -> None:
        """Carry on all that is not at its end, oldest first. Raises NotLeaderError, DatabaseError."""
        for move_id in await self._shop.books.unfinished():
            await self.advance(move_id)

    async def look_around(self) -> list[int]:
        """Before the first wish: moves that left something in the source and that the database does not know; their
        numbers are not given out again. Raises NotLeaderError, DatabaseError, OSError."""
        return await tell_leftovers(self._shop)

    async def clean_up(self) -> int:
        """Remove objects of demotions that were given up before they switched anything: a bounded number of demotions,
        which is returned. Raises NotLeaderError, DatabaseError, ObjectError."""
        return await clean_up(self._shop)

    async def _note_failure(self, move: Move, error: TierdError | OSError) -> MoveState:
        """It is tried again next time; nothing that could be tried again for ever without any use is."""
        # For somebody to close a file, for nodes to report, for the source to be mounted.
        waits = isinstance(error, MoveRefused | SourceGone)
        hint = error.hint if isinstance(error, TierdError) else ""
        log.warning("move_failing", move=move.id, model=move.subject, state=move.state, reason=str(error), hint=hint)
        books = self._shop.books
        try:
            async with books.writing() as connection:
                await hold(connection, move)
                attempts = await connection.fetchval(
                    sql.NOTE_ERROR, move.id, str(error), 0 if waits else 1, books.epoch
                )
                ends = move.kind is not MoveKind.UNDO and move.state in UNTOUCHED
                if ends and attempts >= self._shop.settings.attempts:
                    await forget_files(connection, move.id)
                    await set_state(connection, books, move, MoveState.FAILED, str(error))
                    return MoveState.FAILED
                await note(connection, move.id, move.subject, "waiting" if waits else "failing", str(error))
        except StateChanged:
            return (await books.move(move.id)).state
        return move.state
