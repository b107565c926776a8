"""The job cleanup-old-outputs: old outputs leave the hot tier, and the oldest ones when it holds too much.

It moves nothing itself: it plans a move for each day's directory, and waits for its switch.

Only what is verified in the object store leaves; what is open, hard-linked or not looked at yet stays for the next run.
It can be cut off anywhere: a move that has begun is resumed as any other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import structlog

from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.leader import NotLeaderError
from tierd.controller.models.candidates import clocks_apart
from tierd.controller.moves.output_days import Day
from tierd.controller.source.moved_file import MoveRefused
from tierd.controller.tasks import each, reason_of
from tierd.errors import TierdError
from tierd.objects.keys import shown
from tierd.postgres import Connection

log = structlog.get_logger(__name__)

_DAYS_AT_ONCE: Final = 4
_DAYS_PAGE: Final = 5000
_FILES_MAX: Final = 10_000
"""Of one move; the rest of a directory leaves with the next run."""
_ERRORS_MAX: Final = 10
_DAY_SECONDS: Final = 86_400
_LEFT: Final = ("in_grace", "deleting", "done")
_SPARED: Final = ("abandoned",)

# A move takes what is here; one that waits for a look may not be what it was.
_MAY_LEAVE: Final = """
    hot_storage AND cold_storage AND pending_since IS NULL AND vanished_at IS NULL AND size_bytes > 0
"""

# Since when the youngest that leaves has been hot: by age, or as far as the budget says, the oldest first.
_CUTOFF: Final = f"""
WITH leaving AS (
    SELECT output_id, size_bytes, greatest(created_at, hot_since) AS since FROM generated_outputs WHERE {_MAY_LEAVE}
), aged AS (
    SELECT now() - $1 * interval '1 second' AS at
), excess AS (
    SELECT (SELECT coalesce(sum(size_bytes), 0) FROM generated_outputs WHERE hot_storage AND vanished_at IS NULL)
         - (SELECT coalesce(sum(size_bytes), 0) FROM leaving, aged WHERE since < aged.at) - $2::bigint AS bytes
)
SELECT greatest((SELECT at FROM aged), (
    SELECT max(since) FROM (
        SELECT since, sum(size_bytes) OVER (ORDER BY since, output_id) - size_bytes AS before
        FROM leaving, aged WHERE since >= aged.at
    ) r WHERE $2::bigint > 0 AND before < (SELECT bytes FROM excess)
))
"""

# The oldest days first.
_DAYS: Final = f"""
SELECT left(filename, 10) AS date, user_id, count(*) AS outputs, sum(size_bytes)::bigint AS bytes FROM generated_outputs
WHERE {_MAY_LEAVE} AND greatest(created_at, hot_since) <= $1
  AND (left(filename, 10), user_id) > ($2::text, $3::text)
  AND NOT EXISTS (
      SELECT FROM moves WHERE finished_at IS NULL AND subject = $5::text || '/' || user_id || '/' || left(filename, 10))
GROUP BY 1, 2 ORDER BY 1, 2 LIMIT $4
"""

_FILES: Final = f"""
SELECT filename FROM generated_outputs
WHERE user_id = $1 AND filename COLLATE "C" > $2 || '/' AND filename COLLATE "C" < $2 || '0' AND {_MAY_LEAVE}
  AND greatest(created_at, hot_since) <= $3
ORDER BY filename COLLATE "C" LIMIT $4
"""


class _Going(NamedTuple):
    """A day with outputs that are to leave."""

    date: str
    user: str
    outputs: int
    bytes: int


async def cleanup_old_outputs(context: Context) -> Outcome:
    """The job."""
    work, settings = context.work, context.work.settings
    if not await asyncio.to_thread(work.output_files.is_there):
        return Outcome("done", f"there is no {settings.outputs_root} in the source", {})
    async with work.database.connection() as connection:
        if refusal := clocks_apart(await connection.fetchval("SELECT now()"), datetime.now(UTC)):
            return Outcome("refused", f"nothing was demoted: {refusal}", {})
        days_s = settings.outputs_hot_days * _DAY_SECONDS
        cutoff: datetime = await connection.fetchval(_CUTOFF, days_s, settings.outputs_hot_budget)
    run = _Run(context, cutoff)
    return await run.all()


class _Run:
    """One run. What has been hot since before `cutoff` leaves."""

    def __init__(self, context: Context, cutoff: datetime) -> None:
        self._context = context
        self._cutoff = cutoff
        self._endings: Counter[str] = Counter()
        self._planned = 0
        self._planned_bytes = 0
        self._last_error = ""

    async def all(self) -> Outcome:
        """Day after day."""
        after = ("", "")
        while days := await self._days(after):
            after = days[-1].date, days[-1].user
            for start in range(0, len(days), _DAYS_AT_ONCE):
                if self._is_enough():
                    return self._outcome()
                await self._some(days[start : start + _DAYS_AT_ONCE])
        return self._outcome()

    async def _days(self, after: tuple[str, str]) -> list[_Going]:
        root = self._context.work.settings.outputs_root
        async with self._context.work.database.connection() as connection:
            return [_Going(*row) for row in await connection.fetch(_DAYS, self._cutoff, *after, _DAYS_PAGE, root)]

    def _is_enough(self) -> bool:
        return self._planned >= self._context.work.settings.outputs_cleanup_max or self._endings["failed"] > _ERRORS_MAX

    async def _some(self, days: list[_Going]) -> None:
        for day in days:
            self._planned += day.outputs
            self._planned_bytes += day.bytes
        if self._context.dry_run:
            return
        await self._context.tell(f"{self._planned} outputs, now those of {days[0].date}")
        await each(self._one(day) for day in days)

    async def _one(self, going: _Going) -> None:
        try:
            ending, reason = await self._demote(going)
        except MoveRefused as error:
            ending, reason = "spared", str(error)
        except NotLeaderError:
            raise
        except (TierdError, OSError) as error:
            ending, reason = "failed", reason_of(error)
        self._endings[ending] += 1
        if ending == "failed":
            self._last_error = f"{shown(going.user)} {going.date}: {reason}"
        if ending != "left":
            log.warning("outputs_stay", user=shown(going.user), date=going.date, ending=ending, reason=reason)

    async def _demote(self, going: _Going) -> tuple[str, str]:
        """`left`, `spared` or `failed`, and why."""
        work = self._context.work
        async with work.database.connection() as connection:
            filenames = await self._filenames(connection, going)
        directory = f"{going.user}/{going.date}".encode()
        names = {name.rpartition("/")[2].encode(): name for name in filenames}
        able = await asyncio.to_thread(work.output_files.may_leave, directory, list(names))
        if not able:
            return "spared", "none of its files can be moved: gone, links, or marked with the sticky bit"
        day = Day(work.settings.outputs_root, going.user, going.date, [names[name] for name in able])
        state = await work.carrier.carry(await work.moves.demote_outputs(day, "old, or too much is hot"))
        if state in _LEFT:
            return "left", ""
        return ("spared" if state in _SPARED else "failed"), f"the move is {state}"

    async def _filenames(self, connection: Connection, going: _Going) -> list[str]:
        rows = await connection.fetch(_FILES, going.user, going.date, self._cutoff, _FILES_MAX)
        return [row["filename"] for row in rows]

    def _outcome(self) -> Outcome:
        counts: dict[str, Any] = {"outputs": self._planned, "bytes": self._planned_bytes}
        if self._context.dry_run:
            return Outcome("done", f"would demote {self._planned} outputs, {self._planned_bytes} bytes", counts)
        counts |= {f"days_{name}": self._endings[name] for name in ("left", "spared", "failed")}
        if failed := self._endings["failed"]:
            reason = f"{failed} of {self._endings.total()} days failed, the last one of {self._last_error}"
            return Outcome("failed", reason, counts)
        return Outcome("done", f"outputs of {self._endings['left']} days left, {self._planned} outputs", counts)
