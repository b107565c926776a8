"""Plans deletions of outputs: those that somebody asks for, by user or by one ID, and those removed by `rm` on a node.

In one transaction rows become tombstones of an erasure, some hundred of one day at a time, whatever a user has; how
each is carried out is told in `erasure.py`. Who asks needs only the database.

Contract: one leader's, one task calls `round`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller.moves.workshop import Fence, Workshop
from tierd.controller.outputs import books as output_books
from tierd.controller.outputs import erasure_sql as sql
from tierd.controller.outputs.backup import day_id
from tierd.controller.outputs.books import signed
from tierd.controller.outputs.erasure_files import ErasureFiles, Standing
from tierd.controller.outputs.files import Faults, OutputFiles
from tierd.erasures import PATHS_MAX
from tierd.errors import DatabaseError, UsageError
from tierd.objects.keys import shown
from tierd.output_metrics import DELETION_STATES
from tierd.outputs import user_of
from tierd.postgres import Connection

log = structlog.get_logger(__name__)

_WISHES_KEPT_SECONDS: Final = 30 * 86_400.0
_DATE_CHARS: Final = len("YYYY/MM/DD")


class Deletion(NamedTuple):
    """How the deletion of what somebody asked for stands, with all that was asked for before: outputs by how far they
    are, erasures that are not at their end, nodes that have not confirmed, what the last attempt failed at."""

    planned: bool
    outputs: int
    hidden: int
    deleted: int
    unfinished: int
    nodes: Sequence[str]
    error: str | None

    @property
    def deleted_everywhere(self) -> bool:
        """Neither source nor object store have any of it, and every node said that it has none."""
        return self.gone and not self.nodes

    @property
    def gone(self) -> bool:
        """Neither source nor object store have any of it."""
        return self.planned and not self.unfinished


async def ask(connection: Connection, user: str, output_id: UUID | None, by: str) -> int:
    """Ask the leader to delete an output of a user, or all; the number to ask `standing` with. Raises UsageError."""
    if "/" in user or user_of(user.encode("utf-8", "surrogateescape")) is None:
        raise UsageError(f"{shown(user)} cannot be a user", hint="`tierd outputs list` shows whose outputs there are")
    if output_id is not None and not await connection.fetchval(sql.HAS, user, output_id):
        raise UsageError(f"user {shown(user)} has no output {output_id}", hint="`tierd outputs list --user` shows all")
    wish: int = await connection.fetchval(sql.ASK, user, output_id, by)
    return wish


async def foresee(connection: Connection, user: str, output_id: UUID | None) -> tuple[int, int]:
    """How many registered outputs would be deleted, and their bytes."""
    count, size = await connection.fetchrow(sql.FORESEE, user, output_id)
    return count, size


async def standing(connection: Connection, wish: int) -> Deletion:
    """How it stands. Raises DatabaseError if nobody remembers it."""
    row = await connection.fetchrow(sql.STANDING, wish)
    if row["planned"] is None:
        raise DatabaseError(f"deletion {wish} is gone from output_delete_wishes", hint="was the database restored?")
    return Deletion(*row)


class UnderWay(NamedTuple):
    """All deletions: outputs by how far they are, the age of the oldest that still has something somewhere."""

    outputs: dict[str, int]
    oldest_s: float


async def under_way(connection: Connection) -> UnderWay:
    """How all deletions stand now. Reads every tombstone."""
    row = await connection.fetchrow(sql.UNDER_WAY)
    return UnderWay({state: row[state] for state in DELETION_STATES}, max(0.0, row["oldest_s"]))


class OutputDeletion:
    """See the module."""

    def __init__(self, workshop: Workshop, files: OutputFiles) -> None:
        self._shop = workshop
        self._files = files
        self._waiting = False
        """For the source; said once."""

    async def round(self) -> bool:
        """Plan some of what is to be deleted; True if there may be more. Raises NotLeaderError, DatabaseError."""
        async with self._shop.books.writing() as connection:
            await connection.execute(sql.PURGE_WISHES, _WISHES_KEPT_SECONDS)
            wish = await connection.fetchrow(sql.ASKED)
            removed = await connection.fetch(sql.REMOVED, PATHS_MAX)
        if (removed or wish is not None) and not await self._shop.run(self._files.is_there):
            if not self._waiting:
                log.warning("deletions_wait", reason=f"{shown(self._files.root)} is not in the source: is it mounted?")
            self._waiting = True
            return False
        self._waiting = False
        planned = await self._bury(None, removed) if removed else 0
        if wish is not None:
            await self._plan(wish)
        return bool(planned) or wish is not None

    async def _plan(self, wish: Any) -> None:
        """All of a wish. What the books do not know of the user's files is added first: it goes, too."""
        if wish["output_id"] is None:
            await self._register(wish["user_id"])
        while True:
            async with self._shop.books.writing() as connection:
                rows = await connection.fetch(sql.OF_WISH, wish["id"], PATHS_MAX)
            if not rows:
                break
            await self._bury(wish["id"], rows)
        async with self._shop.fenced("planned", None) as fence:
            if await fence.connection.execute(sql.PLANNED, wish["id"]) == "UPDATE 1" and wish["output_id"] is None:
                values = wish["id"], wish["user_id"], "", self._shop.books.epoch
                await fence.connection.fetchval(sql.ADD_ERASURE, *values)

    async def _register(self, user: str) -> None:
        foreign: list[Faults] = []
        days = self._files.days_of(user, foreign)
        while (day := await self._shop.run(next, days, None)) is not None:
            foreign.clear()
            batches = self._files.outputs(day.directory, Faults(day.directory))
            while batch := await self._shop.run(next, batches, None):
                async with self._shop.books.writing() as connection:
                    await output_books.add_found(connection, batch)

    async def _bury(self, wish: int | None, rows: Sequence[Any]) -> int:
        """Rows of the first day among these become tombstones; how many."""
        user, date = rows[0]["user_id"], rows[0]["filename"][:_DATE_CHARS]
        of_day = [row for row in rows if row["user_id"] == user and row["filename"].startswith(date + "/")]
        names = [row["filename"].rpartition("/")[2].encode() for row in of_day]
        directory = day_id(self._files.root, f"{user}/{date}".encode()).encode()
        look = ErasureFiles(self._shop.tree, directory, 0, self._shop.at).look
        found: list[Standing] = await self._shop.run(look, names)
        async with self._shop.fenced("bury", None) as fence:
            return await self._bury_rows(fence, wish, (user, date), of_day, found)

    async def _bury_rows(
        self, fence: Fence, wish: int | None, day: tuple[str, str], rows: Sequence[Any], found: Sequence[Standing]
    ) -> int:
        connection = fence.connection
        erasure = await connection.fetchval(sql.ADD_ERASURE, wish, *day, self._shop.books.epoch)
        hot = [one.hot for one in found]
        buried = await connection.fetch(
            sql.BURY,
            erasure,
            [row["output_id"] for row in rows],
            [None if one is None else signed(one.inode) for one in hot],
            [None if one is None else one.size for one in hot],
            [None if one is None else one.mtime_ns for one in hot],
            [None if one is None else one.ctime_ns for one in hot],
            [None if one.stub is None else signed(one.stub) for one in found],
            wish is None,
            [row["news"] for row in rows],
        )
        if not buried:
            await connection.execute(sql.DROP, erasure)
        await connection.execute(sql.FORGET_DAY, *day)
        return len(buried)
