"""Finds the outputs that no node told of: walks the outputs root, and tells the books what is there. Changes no file.

A directory that has not changed since it was read is not read again. One of these days that changed a short time ago is
read the next time, too: a file in it may still be written to. What the books have and the tree has not is marked for a
look, never deleted: a source that is not mounted looks like that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Final, NamedTuple

import structlog

from tierd.controller.outputs import books, sql
from tierd.controller.outputs.books import signed
from tierd.controller.outputs.files import BATCH_FILES, Day, Faults, OutputFiles
from tierd.objects.keys import shown
from tierd.outputs import Fault, day_of
from tierd.postgres import Connection, Database

log = structlog.get_logger(__name__)

_DAYS_AT_ONCE: Final = 500
_SETTLED_SECONDS: Final = 3600.0
_THESE_DAYS: Final = timedelta(days=2)
"""Whatever the time zone of those who write."""
_GONE_MIN: Final = 5
"""So many directories may be gone at once, however few there are."""


class Scanned(NamedTuple):
    """What a scan found. `problem` says why nothing was concluded from what it did not find."""

    days: int = 0
    read: int = 0
    new: int = 0
    gone_days: int = 0
    problem: str = ""


class OutputScan:
    """One scan. `gone_max`: where a larger share of the directories is gone at once, nothing is concluded from that."""

    def __init__(
        self,
        database: Database,
        files: OutputFiles,
        *,
        gone_max: float,
        tell: Callable[[str], Awaitable[None]],
        dry_run: bool = False,
    ) -> None:
        self._database = database
        self._files = files
        self._gone_max = gone_max
        self._tell = tell
        self._dry_run = dry_run
        self._days = self._read = self._new = 0

    async def run(self) -> Scanned:
        """Raises DatabaseError, and OSError of the source."""
        if not await asyncio.to_thread(self._files.is_there):
            async with self._database.connection() as connection:
                if not await connection.fetchval(sql.ANY_KNOWN):
                    return Scanned()  # nobody makes any
            return Scanned(problem=f"{shown(self._files.root)} is not in the source: is it mounted? outputs_root")
        async with self._database.connection() as connection:
            started: datetime = await connection.fetchval("SELECT clock_timestamp()")
        foreign: list[Faults] = []
        days = self._files.days(foreign)
        while chunk := await asyncio.to_thread(_some, days):
            await self._look_at(chunk)
            await self._note_foreign(foreign, started)
            await self._tell(f"{self._days} directories of days, {self._read} read, {self._new} new outputs")
        await self._note_foreign(foreign, started)
        gone, problem = await self._gone(started)
        return Scanned(self._days, self._read, self._new, gone, problem)

    async def _note_foreign(self, foreign: list[Faults], started: datetime) -> None:
        told = foreign[:]
        foreign.clear()
        if told and not self._dry_run:
            async with self._database.transaction() as connection:
                await _set_faults(connection, told, started)

    async def _look_at(self, chunk: list[Day]) -> None:
        names = [day.directory for day in chunk]
        async with self._database.connection() as connection:
            rows = await connection.fetch(sql.KNOWN_DAYS, names)
        known = {row["directory"]: (row["inode"], row["mtime_ns"]) for row in rows}
        same = [day.directory for day in chunk if known.get(day.directory) == (signed(day.inode), day.mtime_ns)]
        self._days += len(chunk)
        if same and not self._dry_run:
            async with self._database.transaction() as connection:
                await connection.execute(sql.SEEN_DAYS, same)
        unchanged = set(same)
        for day in chunk:
            if day.directory not in unchanged:
                await self._read_day(day)

    async def _read_day(self, day: Day) -> None:
        self._read += 1
        faults = Faults(day.directory)
        batches = self._files.outputs(day.directory, faults)
        latest_ns = day.mtime_ns
        async with self._database.connection() as connection:
            began: datetime = await connection.fetchval("SELECT clock_timestamp()")
        while batch := await asyncio.to_thread(next, batches, None):
            latest_ns = max(latest_ns, *(version.mtime_ns for _, version in batch))
            if self._dry_run:
                continue
            async with self._database.transaction() as connection:
                self._new += await books.add_found(connection, batch)
        if self._dry_run:
            return
        await self._miss(day.directory)
        async with self._database.transaction() as connection:
            await _set_faults(connection, [faults], began)
            mtime_ns = day.mtime_ns if _is_settled(day.directory, latest_ns, began) else -1
            await connection.execute(sql.SET_DAY, day.directory, signed(day.inode), mtime_ns, faults.total)

    async def _miss(self, directory: bytes) -> None:
        """Have those looked at that the books have in a directory, and that are not in their place."""
        found = day_of(directory)
        if isinstance(found, Fault):
            return
        prefix = directory.split(b"/", 1)[1].decode() + "/"
        after = prefix
        while True:
            async with self._database.connection() as connection:
                rows = await connection.fetch(sql.NAMES_OF_DAY, found[0], after, prefix[:-1] + "0", BATCH_FILES)
            if not rows:
                return
            names = [row["filename"] for row in rows]
            after = names[-1]
            leaves = {name.rpartition("/")[2].encode(): name for name in names}
            gone = await asyncio.to_thread(self._files.missing, directory, list(leaves))
            if gone:
                missing = [leaves[leaf] for leaf in gone]
                async with self._database.transaction() as connection:
                    await connection.execute(sql.MISSED, found[0], missing)

    async def _gone(self, started: datetime) -> tuple[int, str]:
        """Directories that the scan did not meet: what the books have in them is looked at. How many there are."""
        async with self._database.connection() as connection:
            gone, known = await connection.fetchrow(sql.COUNT_DAYS, started)
        if gone > max(_GONE_MIN, self._gone_max * known):
            hint = "is the source mounted whole? outputs_drop_max"
            return gone, f"{gone} of {known} directories of outputs are gone at once: {hint}"
        after = b""
        while not self._dry_run:
            async with self._database.connection() as connection:
                rows = await connection.fetch(sql.GONE_DAYS, started, after, _DAYS_AT_ONCE)
            if not rows:
                break
            names = [row["directory"] for row in rows]
            after = names[-1]
            for name in names:
                await self._miss(name)
            async with self._database.transaction() as connection:
                await connection.execute(sql.DROP_DAYS, names)
        return gone, ""


async def _set_faults(connection: Connection, told: Sequence[Faults], began: datetime) -> None:
    """What is left alone in some directories, and nothing else that was there before."""
    for faults in told:
        if faults.named:
            values = list(faults.named), faults.directory, list(faults.named.values())
            await connection.execute(sql.ADD_FAULTS, *values)
    await connection.execute(sql.DROP_FAULTS, [faults.directory for faults in told], began)


def _is_settled(directory: bytes, latest_ns: int, now: datetime) -> bool:
    """Whether nobody writes to files in it any more, as far as names and times tell."""
    found = day_of(directory)
    these_days = not isinstance(found, Fault) and found[1] >= (now - _THESE_DAYS).date()
    return not these_days or now.timestamp() - latest_ns / 1e9 > _SETTLED_SECONDS


def _some(days: Iterator[Day]) -> list[Day]:
    return list(islice(days, _DAYS_AT_ONCE))
