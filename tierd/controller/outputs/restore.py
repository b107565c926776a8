"""Puts outputs back into the hot tier from their backup, where the file was lost or damaged beside the overlay.

Asked for in the table `output_restores`, carried out by the leader. What is restored is compared before it gets its
name, and takes the place of nothing but a file that has the time and inode of the one that was backed up, and other
bytes. A file of another time is somebody's newer one: it stays. What its user removed stays removed, what is cold is
no less there.

Contract: one leader's, one task. A restore that is cut off is done again; what was put back is there then. `at` is told
of each effect, before and after it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller.moves.books import Books
from tierd.controller.outputs.backup import key_of
from tierd.controller.outputs.books import FileVersion
from tierd.controller.outputs.files import OutputFiles
from tierd.controller.outputs.restored_file import Draft, RestoreError, clear_drafts, has_bytes
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError
from tierd.objects.keys import shown
from tierd.objects.store import ObjectStore, Stored
from tierd.output_metrics import OutputMetrics
from tierd.outputs import Fault, parse
from tierd.postgres import Connection, Database

log = structlog.get_logger(__name__)

LEFT_ALONE_MAX: Final = 1000
"""Named in the answer; the others are counted."""
_PAGE: Final = 500
_KEPT: Final = 1000
_FIRST, _LAST = "0000/00/00", "9999/99/99"

_ASK: Final = """
INSERT INTO output_restores (output_ids, user_id, first_day, last_day, damaged, dry_run, requested_by)
VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id
"""
_ASKED: Final = """
SELECT id, output_ids, user_id, first_day, last_day, damaged, dry_run FROM output_restores
WHERE finished_at IS NULL ORDER BY id LIMIT 1
"""
_COUNT_ASKED: Final = "SELECT count(*) FROM output_restores WHERE finished_at IS NULL"
_WITHDRAW: Final = "DELETE FROM output_restores WHERE id = $1 AND finished_at IS NULL"
_FINISH: Final = """
UPDATE output_restores SET counts = $2::jsonb, left_alone = $3::jsonb, finished_at = now()
WHERE id = $1 AND finished_at IS NULL
"""
_PURGE: Final = """
DELETE FROM output_restores WHERE finished_at IS NOT NULL AND id <= (SELECT max(id) FROM output_restores) - $1
"""
_ANSWER: Final = "SELECT counts, left_alone FROM output_restores WHERE id = $1 AND finished_at IS NOT NULL"

_COLUMNS: Final = """
output_id, user_id, filename, version, size_bytes, sha256, inode, mtime_ns, cold_storage, removed_at
"""
_OUTPUTS: Final = f"""
SELECT {_COLUMNS} FROM generated_outputs
WHERE ($1::uuid[] IS NULL OR output_id = ANY ($1)) AND ($2::text IS NULL OR user_id = $2)
  AND left(filename, 10) BETWEEN $3 AND $4 AND (user_id, filename COLLATE "C") > ($5::text, $6::text COLLATE "C")
ORDER BY user_id, filename COLLATE "C" LIMIT $7
"""
_LOCK: Final = f"SELECT {_COLUMNS} FROM generated_outputs WHERE output_id = $1 FOR UPDATE"

# Whoever looks finds out that it has the bytes of the object. It is new in the hot tier.
_RESTORED: Final = """
UPDATE generated_outputs
SET hot_storage = true, hot_since = now(), vanished_at = NULL, news = news + 1,
    pending_since = coalesce(pending_since, now()), try_at = now()
WHERE output_id = $1
"""


class Wish(NamedTuple):
    """What is to be restored: all of it that is said must be so."""

    output_ids: list[UUID] | None = None
    user: str | None = None
    first_day: str | None = None
    """YYYY/MM/DD, as in paths."""
    last_day: str | None = None
    damaged: bool = False
    dry_run: bool = False


class _Output(NamedTuple):
    """A row of `generated_outputs`, as far as it is of interest here."""

    output_id: UUID
    path: bytes
    version: int
    stored: Stored | None
    inode: int | None
    mtime_ns: int | None
    removed: bool


async def ask(connection: Connection, wish: Wish, by: str) -> int:
    """Write a wish down; its number."""
    number: int = await connection.fetchval(_ASK, *wish, by)
    return number


async def withdraw(connection: Connection, number: int) -> None:
    """Nobody waits for it any more. What runs goes on."""
    await connection.execute(_WITHDRAW, number)


async def answer_to(connection: Connection, number: int) -> tuple[dict[str, int], list[dict[str, str]]] | None:
    """Outputs of a wish, counted by what became of them, and some that were left alone. None: nothing came of it."""
    row = await connection.fetchrow(_ANSWER, number)
    return None if row is None else (json.loads(row["counts"]), json.loads(row["left_alone"]))


async def count_asked(connection: Connection) -> int:
    """How many wishes wait."""
    count: int = await connection.fetchval(_COUNT_ASKED)
    return count


class OutputRestores:
    """See the module."""

    def __init__(
        self,
        database: Database,
        epoch: int,
        files: OutputFiles,
        store: ObjectStore,
        bucket: str,
        metrics: OutputMetrics,
        at: Callable[[str], None] = lambda effect: None,
    ) -> None:
        self._database = database
        self._books = Books(database, epoch)
        self._files = files
        self._store = store
        self._bucket = bucket
        self._metrics = metrics
        self._at = at

    async def all(self, tell: Callable[[str], Awaitable[None]]) -> Counter[str]:
        """Carry out what is asked for; how many outputs, by what became of them. Raises NotLeaderError,
        DatabaseError."""
        total: Counter[str] = Counter()
        await asyncio.to_thread(clear_drafts, self._files.tree)
        while True:
            async with self._database.connection() as connection:
                row = await connection.fetchrow(_ASKED)
            if row is None:
                return total
            run = _Run(self, Wish(*row[1:]), tell)
            await run.all()
            async with self._books.writing() as connection:
                values = json.dumps(run.counts), json.dumps(run.left_alone)
                await connection.execute(_FINISH, row["id"], *values)
                await connection.execute(_PURGE, _KEPT)
            total.update(run.counts)

    async def page(self, wish: Wish, after: tuple[str, str]) -> tuple[list[_Output], tuple[str, str]]:
        """Some outputs that are meant, and where to go on."""
        days = wish.first_day or _FIRST, wish.last_day or _LAST
        async with self._database.connection() as connection:
            rows = await connection.fetch(_OUTPUTS, wish.output_ids, wish.user, *days, *after, _PAGE)
        if rows:
            after = rows[-1]["user_id"], rows[-1]["filename"]
        return [_output(row) for row in rows], after

    async def one(self, output: _Output, wish: Wish) -> str:
        """What became of one: `there`, `cold`, `restored`, or why it was left alone. Raises TierdError, OSError."""
        why = await asyncio.to_thread(self._look, output, damaged=wish.damaged)
        if why not in ("lost", "damaged") or wish.dry_run:
            return why
        assert output.stored is not None
        draft = Draft(self._files.tree, self._files.root, output.path, str(output.output_id).encode(), self._at)
        key = key_of(self._files.root, output.path, output.version)
        try:
            await asyncio.to_thread(draft.fetch, self._store, self._bucket, key, output.stored, output.mtime_ns)
            return await self._place(output, draft, replace=why == "damaged")
        finally:
            await asyncio.to_thread(draft.discard)

    async def _place(self, output: _Output, draft: Draft, *, replace: bool) -> str:
        self._at("begin restore")
        async with self._books.writing() as connection:
            row = await connection.fetchrow(_LOCK, output.output_id)
            if row is None or _output(row) != output:
                return "changed"
            if replace:
                assert output.stored is not None
                done = await asyncio.to_thread(draft.replace, _version(output))
            else:
                done = await asyncio.to_thread(draft.place)
            if not done:
                return "changed"
            await connection.execute(_RESTORED, output.output_id)
            self._at("commit restore")
        self._at("committed restore")
        self._metrics.restored()
        log.info("output_restored", output=shown(output.path), version=output.version)
        return "restored"

    def _look(self, output: _Output, *, damaged: bool) -> str:
        if isinstance(parse(output.path), Fault):
            return "foreign"
        if output.stored is None:
            return "unbacked"
        found = self._files.find(output.path)
        if found.stub:
            return "cold"
        if found.hot is None:
            return "removed" if output.removed else "lost"
        if found.hot.mtime_ns != output.mtime_ns or found.hot.inode != output.inode:
            return "there" if not damaged or self._has_bytes(output) else "changed"
        return "there" if not damaged or self._has_bytes(output) else "damaged"

    def _has_bytes(self, output: _Output) -> bool:
        assert output.stored is not None
        fd = self._files.open(output.path)
        try:
            return has_bytes(fd, output.stored)
        finally:
            os.close(fd)


class _Run:
    """One wish."""

    def __init__(self, restores: OutputRestores, wish: Wish, tell: Callable[[str], Awaitable[None]]) -> None:
        self._restores = restores
        self._wish = wish
        self._tell = tell
        self.counts: Counter[str] = Counter()
        self.left_alone: list[dict[str, str]] = []

    async def all(self) -> None:
        """Page by page."""
        after = ("", "")
        while True:
            outputs, after = await self._restores.page(self._wish, after)
            if not outputs:
                return
            for output in outputs:
                await self._one(output)
            await self._tell(f"{self.counts.total()} outputs looked at, {self.counts['restored']} restored")

    async def _one(self, output: _Output) -> None:
        reason = ""
        try:
            became = await self._restores.one(output, self._wish)
        except DatabaseError:
            raise
        except RestoreError as error:
            became, reason = "left", str(error)
        except (TierdError, OSError) as error:
            became, reason = "failed", reason_of(error)
            log.warning("output_not_restored", output=shown(output.path), reason=reason)
        self.counts[became] += 1
        if became not in ("there", "cold", "restored") and len(self.left_alone) < LEFT_ALONE_MAX:
            told = reason.encode("utf-8", "replace").decode().replace("\0", "")
            self.left_alone.append({"output_id": str(output.output_id), "why": became, "reason": told})


def _output(row: Any) -> _Output:
    stored = Stored(row["size_bytes"], row["sha256"].hex()) if row["cold_storage"] else None
    inode = row["inode"] % (1 << 64) if row["inode"] is not None else None
    return _Output(
        *(row["output_id"], f"{row['user_id']}/{row['filename']}".encode(), row["version"], stored),
        *(inode, row["mtime_ns"], row["removed_at"] is not None),
    )


def _version(output: _Output) -> FileVersion:
    assert output.stored is not None
    assert output.inode is not None
    assert output.mtime_ns is not None
    return FileVersion(output.stored.size, output.inode, output.mtime_ns, 0)
