"""What the database knows of moves: read and written in terms of moves and their files. Decides nothing.

Everything that changes the books does so in a transaction of the current leader: it fails with NotLeaderError when
another one began, and keeps another one from beginning until it has ended.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from tierd.controller.leader import assert_leader
from tierd.controller.moves import sql
from tierd.controller.moves.steps import FileState, MoveKind, MoveState
from tierd.controller.source.moved_file import HotFile, LeasesUnknown, MoveFile, MoveRefused
from tierd.objects.keys import shown
from tierd.postgres import Connection, Database

_BIGINT = 1 << 64
_SIGN = 1 << 63


@dataclass(frozen=True, slots=True)
class Move:
    """A row of `moves`."""

    id: int
    kind: MoveKind
    subject: str
    state: MoveState
    version: int
    attempts: int
    size_bytes: int
    done_bytes: int
    by_hand: bool
    last_access: datetime | None
    grace_until: datetime | None
    grace_is_over: bool
    abandoning: str | None
    reason: str
    detail: dict[str, Any]


class FileNews(NamedTuple):
    """What became of a file; None leaves what is known."""

    path: bytes
    state: FileState | None = None
    sha256: str | None = None
    stub: int | None = None
    trash_ctime_ns: int | None = None


class Catalogued(NamedTuple):
    """A row of `model_locations`, locked."""

    tier: str
    size_bytes: int
    version: int
    pinned: bool
    last_access: datetime


class StateChanged(Exception):
    """A move is no longer in the state that it was seen in: somebody undid or abandoned it."""


class Books:
    """See the module. `epoch` is the leader's."""

    def __init__(self, database: Database, epoch: int) -> None:
        self._database = database
        self.epoch = epoch

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """A transaction of the leader. Raises NotLeaderError."""
        async with self._database.transaction() as connection:
            await assert_leader(connection, self.epoch)
            yield connection

    async def move(self, move_id: int) -> Move:
        """Raises MoveRefused if there is none."""
        async with self._database.connection() as connection:
            return await read_move(connection, move_id)

    async def unfinished(self) -> list[int]:
        """The moves that are not at their end, oldest first."""
        async with self._database.connection() as connection:
            return [row["id"] for row in await connection.fetch(sql.UNFINISHED)]

    async def files(self, move_id: int) -> list[MoveFile]:
        """Of a move, in the order of their paths."""
        async with self._database.connection() as connection:
            return await read_files(connection, move_id)


async def read_move(connection: Connection, move_id: int) -> Move:
    """Raises MoveRefused if there is none."""
    row = await connection.fetchrow(sql.MOVE, move_id)
    if row is None:
        raise MoveRefused(f"there is no move {move_id}")
    return _move(row)


async def read_files(connection: Connection, move_id: int) -> list[MoveFile]:
    """Of a move, in the order of their paths."""
    return [_file(row) for row in await connection.fetch(sql.FILES, move_id)]


async def lock_model(connection: Connection, model_id: str) -> Catalogued | None:
    """Where the catalogue says a model is; None if it does not know it."""
    row = await connection.fetchrow(sql.LOCK_MODEL, model_id)
    return None if row is None else Catalogued(*row)


async def refuse_if_moving(connection: Connection, model_id: str) -> None:
    """Raises MoveRefused."""
    row = await connection.fetchrow(sql.UNFINISHED_NEAR, model_id)
    if row is not None:
        raise MoveRefused(
            f"{shown(row['subject'])} is on its way: move {row['id']}, {row['kind']}", hint="wait for it, or undo it"
        )


async def refuse_if_in_use(connection: Connection, model_id: str, report_age_max_s: float, *, nodes: bool) -> None:
    """Raises MoveRefused unless every node said a short time ago that it holds none of the model's files open.

    `nodes`: False if there are none that could report.
    """
    stale = [row["node_id"] for row in await connection.fetch(sql.STALE_NODES, report_age_max_s)]
    if stale:
        raise LeasesUnknown(
            f"what is open on {', '.join(map(shown, stale))} is not known: no report for {report_age_max_s:g} s",
            hint="start tierd there with --redis, or take the node out of the table nodes (registered = false)",
        )
    if nodes and not await connection.fetchval(sql.COUNT_NODES):
        raise LeasesUnknown("no node reports what is open", hint="set lease_reports to no if there are none")
    held = [row["node_id"] for row in await connection.fetch(sql.LEASES, model_id)]
    if held:
        raise MoveRefused(f"{shown(model_id)} is open on {', '.join(map(shown, held))}", hint="wait until it is closed")


async def add_move(
    connection: Connection,
    books: Books,
    kind: MoveKind,
    model_id: str,
    reason: str,
    *,
    size_bytes: int,
    by_hand: bool = False,
    last_access: datetime | None = None,
    version: int | None = None,
    detail: dict[str, Any] | None = None,
) -> int:
    """A new move, planned; its ID. Without a `version` it gets one of its own. Tells the events."""
    values = (kind, model_id, books.epoch, size_bytes, reason, by_hand, last_access, json.dumps(detail or {}))
    move_id: int
    if version is None:
        move_id = await connection.fetchval(sql.ADD_MOVE, *values)
    else:
        move_id = await connection.fetchval(sql.ADD_MOVE_OF_VERSION, *values, version)
    await note(connection, move_id, model_id, "planned", reason)
    return move_id


async def add_files(connection: Connection, move_id: int, files: Sequence[HotFile]) -> None:
    """The files of a move, as they were found."""
    await connection.execute(
        sql.ADD_FILES,
        move_id,
        [file.path for file in files],
        [b"\0".join(file.links) for file in files],
        [file.size for file in files],
        [file.mtime_ns for file in files],
        [file.ctime_ns for file in files],
        [_signed(file.inode) for file in files],
        [file.mode for file in files],
    )


async def set_files(connection: Connection, move_id: int, news: Iterable[FileNews]) -> None:
    """What became of files."""
    told = list(news)
    await connection.execute(
        sql.SET_FILES,
        move_id,
        [one.path for one in told],
        [one.state for one in told],
        [bytes.fromhex(one.sha256) if one.sha256 else None for one in told],
        [_signed(one.stub) if one.stub is not None else None for one in told],
        [one.trash_ctime_ns for one in told],
    )


async def hold(connection: Connection, move: Move) -> None:
    """Until the end of the transaction nobody else does anything with the move. Raises StateChanged if somebody did."""
    row = await connection.fetchrow(sql.HOLD, move.id)
    if row is None or (row["state"], row["abandoning"]) != (move.state, move.abandoning):
        raise StateChanged


async def set_state(connection: Connection, books: Books, move: Move, state: MoveState, reason: str = "") -> None:
    """A move goes on. Raises StateChanged if it did so, or somebody else did something with it, meanwhile."""
    if await connection.fetchval(sql.SET_STATE, move.id, move.state, state, books.epoch) is None:
        raise StateChanged
    await note(connection, move.id, move.subject, state, reason)


async def forget_files(connection: Connection, move_id: int) -> None:
    """A move at its end needs no list of its files any more, but for those that were kept in the trash."""
    await connection.execute(sql.FORGET_FILES, move_id)


async def note(
    connection: Connection, move_id: int | None, subject: str, event: str, reason: str = "", **detail: Any
) -> None:
    """Tell the events."""
    await connection.execute(sql.NOTE_EVENT, move_id, subject, event, _storable(reason), json.dumps(detail))


def _storable(text: str) -> str:
    """What a text column takes: no NUL, and no lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _move(row: Any) -> Move:
    fields = dict(row)
    return Move(
        **fields
        | {
            "kind": MoveKind(row["kind"]),
            "state": MoveState(row["state"]),
            "size_bytes": row["size_bytes"] or 0,
            "grace_is_over": bool(row["grace_is_over"]),
            "detail": json.loads(row["detail"]),
        }
    )


def _file(row: Any) -> MoveFile:
    links = tuple(row["links"].split(b"\0")) if row["links"] else ()
    file = HotFile(
        row["path"],
        links,
        row["size_bytes"],
        row["mtime_ns"],
        row["ctime_ns"],
        row["inode"] % _BIGINT,
        row["mode"],
    )
    stub = row["stub"] % _BIGINT if row["stub"] is not None else None
    return MoveFile(
        file,
        FileState(row["state"]),
        row["sha256"].hex() if row["sha256"] else None,
        stub,
        row["trash_ctime_ns"],
        row["version"],
    )


def _signed(number: int) -> int:
    """PostgreSQL has no unsigned numbers."""
    return number - _BIGINT if number >= _SIGN else number
