"""Deletes outputs everywhere, step by step: the source, the nodes' copies, the object store; each step can be repeated.

    planned -> hidden -> deleted -> (forgotten)

Some outputs of one day are an erasure; their rows become tombstones in the transaction that plans it. Then their names
go, then nodes say that they have nothing and read nothing of them (or `wait` is over), then the objects are deleted and
the store says that they are not there. The tombstones stay until every registered node has confirmed and `keep` is
over, and the store is asked once more: so that nothing comes back from a node's backlog, a scan, or a leader who was
late. What people ask for is in `deletion.py`, what nodes are told in `erasure_news.py`.

Contract: one leader's, one task calls `round`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import structlog

from tierd.controller.leader import NotLeaderError
from tierd.controller.moves.books import StateChanged, read_move, set_state
from tierd.controller.moves.steps import UNTOUCHED, MoveKind, MoveState
from tierd.controller.moves.workshop import Fence, Workshop
from tierd.controller.outputs import erasure_sql as sql
from tierd.controller.outputs.backup import day_id, key_of
from tierd.controller.outputs.erasure_files import ErasureFiles, Tombstone
from tierd.controller.outputs.erasure_sweep import Sweep
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError
from tierd.objects.keys import shown
from tierd.objects.store import ObjectDamaged, Place
from tierd.postgres import Connection

log = structlog.get_logger(__name__)

_AT_ONCE: Final = 64
_AGAIN_SECONDS: Final = 5.0
_BIGINT: Final = 1 << 64


class ErasureSettings(NamedTuple):
    """`root`: the outputs root. `wait`: seconds for which objects wait for nodes; `keep`: for which tombstones stay."""

    root: bytes
    wait: float
    keep: float


class Erasure(NamedTuple):
    """A row of `output_erasures`."""

    id: int
    wish_id: int | None
    user: str
    date: str
    state: str
    may_go: bool | None
    """Its objects may: no node has a reader of it, or none was waited for long enough."""
    kept: bool | None
    """Its tombstones were kept long enough."""

    @property
    def directory(self) -> bytes:
        """Below the outputs root."""
        return f"{self.user}/{self.date}".encode() if self.date else self.user.encode()


class Waits(Exception):
    """There is nothing to do for now; `str()` says for what it waits."""


class OutputErasure:
    """See the module."""

    def __init__(self, workshop: Workshop, settings: ErasureSettings) -> None:
        self._shop = workshop
        self._settings = settings
        self._seconds = settings.wait, settings.keep
        self._bucket = workshop.settings.outputs_bucket
        self._sweep = Sweep(workshop, settings.root)

    async def round(self) -> bool:
        """Carry some on as far as they go; True if there may be more. Raises NotLeaderError, DatabaseError."""
        async with self._shop.books.writing() as connection:
            found = [row["id"] for row in await connection.fetch(sql.TO_DO, *self._seconds, _AT_ONCE)]
        for number in found:
            await self.advance(number)
        return len(found) == _AT_ONCE

    async def advance(self, number: int) -> None:
        """Carry one on as far as it goes now. Raises NotLeaderError, DatabaseError."""
        try:
            while await self._step(number):
                pass
        except Waits as reason:
            await self._execute(sql.WAIT, number, _AGAIN_SECONDS, str(reason))
        except StateChanged:
            return
        except (NotLeaderError, DatabaseError):
            raise
        except (TierdError, OSError) as error:
            log.warning("erasure_failing", erasure=number, reason=reason_of(error))
            await self._execute(sql.FAILED, number, reason_of(error).encode("utf-8", "replace").decode())

    async def _step(self, number: int) -> bool:
        async with self._shop.books.writing() as connection:
            row = await connection.fetchrow(sql.READ, *self._seconds, number)
        if row is None:
            return False
        one = Erasure(*row)
        if one.state == "planned":
            await self._hide(one)
        elif one.state == "hidden" and one.may_go:
            await self._delete(one)
        elif one.state == "deleted" and one.kept:
            await self._forget(one)
        else:
            return False
        return True

    async def _hold(self, fence: Fence, one: Erasure) -> None:
        """Nobody else does anything with it until the end of the transaction. Raises StateChanged."""
        if await fence.connection.fetchval(sql.HOLD, one.id) != one.state:
            raise StateChanged

    async def _execute(self, statement: str, *values: object) -> None:
        async with self._shop.books.writing() as connection:
            await connection.execute(statement, *values)

    def _files(self, one: Erasure, fence: Fence) -> ErasureFiles:
        root, directory = self._settings.root, one.directory
        return ErasureFiles(self._shop.tree, day_id(root, directory).encode(), one.id, fence.at)

    async def _tombstones(self, one: Erasure) -> list[Tombstone]:
        async with self._shop.books.writing() as connection:
            rows = await connection.fetch(sql.TOMBSTONES, one.id)
        return [_tombstone(row, thorough=one.wish_id is not None) for row in rows]

    # --- planned: names go ---

    async def _hide(self, one: Erasure) -> None:
        todo = await self._tombstones(one)
        while True:
            if not await self._shop.run(self._is_mounted):
                raise Waits(f"{shown(self._settings.root)} is not in the source: is it mounted? outputs_root")
            async with self._shop.fenced("hide", None) as fence:
                await self._hold(fence, one)
                move = await self._move_in_grace(fence.connection, one)
                taken = await self._taken(fence.connection, move, todo)
                done = await self._shop.effect(self._hide_some, one, fence, todo, move, taken)
                await fence.connection.execute(sql.LEAVE_MOVE, move, list(taken & {dead.name for dead in done}))
                todo = todo[len(done) :]
                if not todo:
                    await fence.connection.execute(sql.UNCONFIRM, one.id)
                    await fence.connection.execute(sql.HIDDEN, one.id, self._shop.books.epoch)
                    return

    def _is_mounted(self) -> bool:
        """Names that are not to be seen are not gone."""
        with self._shop.tree.directory_if_there(self._settings.root) as fd:
            return fd is not None

    def _hide_some(
        self, one: Erasure, fence: Fence, todo: Sequence[Tombstone], move: int | None, taken: set[bytes]
    ) -> list[Tombstone]:
        """As many as there is time for."""
        files = self._files(one, fence)
        done = []
        for dead in fence.batch(todo):
            files.hide(dead, move if dead.name in taken else None)
            done.append(dead)
        if done:
            files.tidy(done)
        return done

    async def _taken(self, connection: Connection, move: int | None, todo: Sequence[Tombstone]) -> set[bytes]:
        """Names of those that a demotion has in its trash. What was written and demoted later has a later version."""
        rows = await connection.fetch(sql.FILES_OF_MOVE, move, [dead.name for dead in todo])
        versions = {row["path"]: row["version"] for row in rows}
        return {dead.name for dead in todo if versions.get(dead.name, dead.version + 1) <= dead.version}

    async def _move_in_grace(self, connection: Connection, one: Erasure) -> int | None:
        """The demotion that has files of the day in its trash, if there is one; locked. One that has changed nothing
        yet is given up: its files are no longer there. Raises Waits while files of the day are on their way."""
        found = await connection.fetchval(sql.MOVE_OF_DAY, day_id(self._settings.root, one.directory))
        if found is None:
            return None
        move = await read_move(connection, found)
        if move.kind is MoveKind.DEMOTE and move.state is MoveState.IN_GRACE:
            return move.id
        if move.kind is MoveKind.DEMOTE and move.state in UNTOUCHED:
            await set_state(connection, self._shop.books, move, MoveState.ABANDONED, "outputs of it are deleted")
            return None
        raise Waits(f"{shown(move.subject)} is on its way: move {move.id}, {move.kind}")

    # --- hidden: objects go ---

    async def _delete(self, one: Erasure) -> None:
        if not one.date:
            await self._sweep_all(one)
            return
        while todo := [dead for dead in await self._tombstones(one) if not dead.gone]:
            async with self._shop.fenced("delete objects", None) as fence:
                await self._hold(fence, one)
                done = await self._shop.effect(self._delete_some, fence, todo)
                await fence.connection.execute(sql.GONE, one.id, [dead.output_id for dead in done])
        async with self._shop.fenced("deleted", None) as fence:
            await self._hold(fence, one)
            await fence.connection.execute(sql.DELETED, one.id, self._shop.books.epoch)
        log.info("outputs_deleted", erasure=one.id, user=shown(one.user), date=one.date)

    def _delete_some(self, fence: Fence, todo: Sequence[Tombstone]) -> list[Tombstone]:
        done = []
        for dead in fence.batch(todo):
            for version in range(1, dead.version + 1):
                if version not in dead.keep:
                    self._delete_object(fence, key_of(self._settings.root, dead.path, version))
            done.append(dead)
        return done

    def _delete_object(self, fence: Fence, key: str) -> None:
        """Raises ObjectError, also if the store says that it still has it."""
        fence.at("delete object")
        self._shop.store.delete(self._bucket, key)
        fence.at("deleted object")
        if self._shop.store.stat(self._bucket, key) is not None:
            raise ObjectDamaged(Place("the object store", self._bucket, key), "it is still there after its deletion")

    # --- the rest of a user ---

    async def _sweep_all(self, one: Erasure) -> None:
        """After all other erasures of the user: directories that are empty by now, objects that no row knows."""
        async with self._shop.books.writing() as connection:
            if await connection.fetchval(sql.OTHERS_UNDER_WAY, one.user):
                raise Waits("other outputs of the user are being deleted")
        async with self._shop.fenced("remove directories", None) as fence:
            await self._hold(fence, one)
            await self._shop.effect(self._files(one, fence).remove_if_empty)
        await self._sweep.run(one.user)
        async with self._shop.fenced("deleted", None) as fence:
            await self._hold(fence, one)
            await fence.connection.execute(sql.DELETED, one.id, self._shop.books.epoch)

    # --- deleted: nothing is to be remembered ---

    async def _forget(self, one: Erasure) -> None:
        """The store is asked once more."""
        todo = await self._tombstones(one)
        while todo:  # a leader who was late may have stored one since
            async with self._shop.fenced("delete objects", None) as fence:
                await self._hold(fence, one)
                todo = todo[len(await self._shop.effect(self._delete_some, fence, todo)) :]
        async with self._shop.fenced("forget", None) as fence:
            await self._hold(fence, one)
            await fence.connection.execute(sql.DROP, one.id)


def _tombstone(row: Any, *, thorough: bool) -> Tombstone:
    dead = Tombstone(*(*row, thorough))
    unsigned = [None if number is None else number % _BIGINT for number in (dead.inode, dead.stub)]
    return dead._replace(inode=unsigned[0], stub=unsigned[1])
