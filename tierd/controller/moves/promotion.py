"""Takes a model from the cold tier back to the hot one: the steps of a promotion, each harmless to repeat.

The bytes go into the stubs themselves, as they do when somebody writes to a cold file on a node (`source/promote.py`),
so the model can be read at each moment, and nothing is ever undone: what came back may stay. Objects are never touched,
the cold tier is an archive. `created_at` and the version of the model stay what they are.
"""

from __future__ import annotations

import asyncio
import threading

from tierd.controller.models import catalogue, catalogue_scan
from tierd.controller.moves import sql
from tierd.controller.moves.books import Catalogued, Move, add_move, lock_model, refuse_if_moving, set_state
from tierd.controller.moves.returning import manifest_name
from tierd.controller.moves.steps import MoveKind, MoveState
from tierd.controller.moves.workshop import Workshop
from tierd.controller.source import cold_tree
from tierd.controller.source.moved_file import NotCold
from tierd.controller.source.promote import Need, Promotion
from tierd.objects.keys import shown, validate_model_id
from tierd.postgres import Connection
from tierd.recall import fetch_from

_TELL_SECONDS = 1.0


class Promotions:
    """See the module. Each step takes the move as it was read, and returns False if there is nothing to do for now."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop
        self.steps = {
            MoveState.PLANNED: self.begin,
            MoveState.COPYING: self.bring,
            MoveState.SWITCHING: self.become_hot,
        }

    async def plan(self, model_id: str, reason: str, *, by_hand: bool) -> int:
        """A new move; its ID. Raises MoveRefused, PromotionError, UsageError."""
        validate_model_id(model_id)
        async with self._shop.books.writing() as connection:  # before the model is walked
            await refuse_if_moving(connection, model_id)
            model = await lock_model(connection, model_id)
        if model is None or model.tier != "cold":
            await self._look_again(model_id)
        need = await self._shop.run(self._promotion(model_id).require_space)
        if not need.files:
            await self._look_again(model_id)
        single = not await self._shop.run(cold_tree.is_directory, self._shop.tree, model_id.encode())
        source = await self._shop.source()
        async with self._shop.fenced("plan") as fence:
            await refuse_if_moving(fence.connection, model_id)
            model = await _lock_known(fence.connection, model_id)
            if model.tier != "cold" and not need.files:
                raise NotCold(f"{shown(model_id)} is hot already")
            return await add_move(
                fence.connection,
                self._shop.books,
                MoveKind.PROMOTE,
                model_id,
                reason,
                size_bytes=need.bytes,
                by_hand=by_hand,
                version=model.version,
                detail={"single": single, "files": need.files, "source": source},
            )

    async def _look_again(self, model_id: str) -> None:
        """What it does not know as cold may have been renamed, or have become cold, since it was last told."""
        books = self._shop.books
        async with books.writing() as connection:
            started = await connection.fetchval("SELECT now()")
        roots = self._shop.settings.models_roots
        seen = await self._shop.run(catalogue_scan.look, self._shop.tree.root, roots, model_id)
        if seen is None:
            raise NotCold(f"{shown(model_id)} is no model in the source", hint="is it mistyped? is the source mounted?")
        async with books.writing() as connection:
            await catalogue.fold(connection, {model_id: seen}, started)

    def _promotion(self, model_id: str) -> Promotion:
        return Promotion(self._shop.tree, model_id, fetch_from(self._shop.store, self._shop.settings.bucket))

    async def begin(self, move: Move) -> bool:
        """Nothing is to be prepared."""
        return await self._shop.go_on(move)

    async def bring(self, move: Move) -> bool:
        """All bytes come. Not within a transaction: it may take hours, and harms nobody if another leader does so."""
        await self._bring(move)
        return await self._shop.go_on(move)

    async def _bring(self, move: Move) -> None:
        """Stops soon when this leads no longer: how far it is is told within a transaction of the leader."""
        come = _Count()
        fetch = fetch_from(self._shop.store, self._shop.settings.bucket)
        promotion = Promotion(self._shop.tree, move.subject, fetch, come.add, self._shop.at)
        before = move.size_bytes - (await self._shop.run(promotion.need)).bytes
        work = asyncio.ensure_future(self._shop.run(promotion.run))
        told = -1
        try:
            while not work.done():
                await asyncio.wait([work], timeout=_TELL_SECONDS)
                if come.total != told:
                    told = come.total
                    await self._tell(move, before + told)
        except BaseException:
            promotion.stop()
            await asyncio.wait([work])
            work.exception()  # that it was stopped, by whom, and what else, is of no interest any more
            raise
        work.result()

    async def _tell(self, move: Move, done_bytes: int) -> None:
        async with self._shop.fenced("tell", move) as fence:
            await fence.connection.execute(sql.SET_DONE_BYTES, move.id, max(0, done_bytes))

    async def become_hot(self, move: Move) -> bool:
        """What turned cold meanwhile, by users who moved it there, comes too."""
        promotion = self._promotion(move.subject)
        need: Need = await self._shop.run(promotion.need)
        if need.files:
            await self._bring(move)
        async with self._shop.fenced("become hot", move) as fence:
            if move.detail["single"]:  # others may have stubs beside it
                stubbing = self._shop.stubbing(fence, move)
                await self._shop.effect(stubbing.remove_manifest, manifest_name(move))
            await fence.connection.execute(sql.SET_HOT, move.subject)
            await fence.connection.execute(sql.SET_DONE_BYTES, move.id, move.size_bytes)
            await set_state(fence.connection, self._shop.books, move, MoveState.DONE)
        return True


async def _lock_known(connection: Connection, model_id: str) -> Catalogued:
    """Raises NotCold."""
    model = await lock_model(connection, model_id)
    if model is None:
        raise NotCold(f"{shown(model_id)} is not in the catalogue", hint="nobody knows where its bytes are")
    return model


class _Count:
    """Bytes that came, counted in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0

    def add(self, size: int) -> None:
        with self._lock:
            self.total += size
