"""The job compress-old-outputs: goes on with what was begun, then packs old images anew, the oldest first.

Off unless `outputs_compress_after_days` is set; what was begun before comes to its end all the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar
from uuid import UUID

import structlog

from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.leader import NotLeaderError
from tierd.controller.outputs import compress_sql as sql
from tierd.controller.outputs.compression import SIZE_MAX, Compression, OutputCompressions
from tierd.controller.outputs.recoding import require_library
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError, UsageError

log = structlog.get_logger(__name__)

_PAGE: Final = 200
_ERRORS_MAX: Final = 10
_AT_ONCE: Final = 4
_Item = TypeVar("_Item")


async def compress_old_outputs(context: Context) -> Outcome:
    """The job."""
    run = _Run(context)
    if context.dry_run:
        return await run.foresee()
    async with context.work.database.connection() as connection:
        await connection.execute(sql.FORGET_GONE)
    await run.go_on()
    if run.days:
        try:
            require_library()
        except UsageError as error:
            return Outcome("refused", f"{error}: {error.hint}", {})
        await run.begin_more()
    return run.outcome()


class _Run:
    """One run."""

    def __init__(self, context: Context) -> None:
        work, settings = context.work, context.work.settings
        self._context = context
        self.days = settings.outputs_compress_after_days
        self._left = settings.outputs_compress_max
        self._one = OutputCompressions(
            *(work.database, work.epoch, work.output_files.tree, work.output_files.root, work.store),
            *(work.output_backup.bucket, settings.outputs_grace, work.moves.workshop.settings.settle),
        )
        self._endings: Counter[str] = Counter()
        self._saved = 0
        self._last_error = ""

    async def foresee(self) -> Outcome:
        """What would be looked at. Whether it gets smaller only doing it tells."""
        count = size = 0
        if self.days:
            async with self._context.work.database.connection() as connection:
                count, size = await connection.fetchrow(sql.COUNT_CANDIDATES, *self._bounds)
        counts = {"outputs": count, "bytes": size}
        return Outcome("done", f"would try to compress {count} images, {size} bytes", counts)

    @property
    def _bounds(self) -> tuple[int, float, str]:
        return SIZE_MAX, self.days, self._context.work.settings.outputs_root

    async def go_on(self) -> None:
        """What was begun, and whose grace is over."""
        after = 0
        while not self._is_enough():
            async with self._context.work.database.connection() as connection:
                rows = await connection.fetch(sql.UNFINISHED, after, _PAGE)
            if not rows:
                return
            after = rows[-1]["id"]
            await self._each([row["id"] for row in rows], self._advance)

    async def begin_more(self) -> None:
        """Those that are due, as many as a run takes."""
        after = datetime.min.replace(tzinfo=UTC), UUID(int=0)
        while not self._is_enough():
            async with self._context.work.database.connection() as connection:
                rows = await connection.fetch(sql.CANDIDATES, *self._bounds, *after, min(_PAGE, self._left))
            if not rows:
                return
            after = rows[-1]["created_at"], rows[-1]["output_id"]
            await self._each([row["output_id"] for row in rows], self._begin)
            await self._context.tell(f"{self._endings.total()} images looked at, {self._saved} bytes saved")

    async def _each(self, items: Sequence[_Item], call: Callable[[_Item], Awaitable[None]]) -> None:
        """Some at once, because most of their time they wait for nodes."""
        for start in range(0, len(items), _AT_ONCE):
            if self._is_enough():
                return
            tasks = [asyncio.ensure_future(call(item)) for item in items[start : start + _AT_ONCE]]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self, output_id: UUID) -> None:
        if self._left > 0:
            self._left -= 1
            begun = await self._one.begin(output_id, self.days)
            if begun is not None:
                await self._advance(begun)

    def _is_enough(self) -> bool:
        return self._left <= 0 or self._endings["failed"] > _ERRORS_MAX

    async def _advance(self, compression_id: int) -> None:
        try:
            one = await self._one.advance(compression_id)
        except (NotLeaderError, DatabaseError):
            raise
        except (TierdError, OSError) as error:
            self._endings["failed"] += 1
            self._last_error = reason_of(error)
            log.warning("output_not_compressed", compression=compression_id, reason=self._last_error)
            await self._one.postpone(compression_id, self._last_error)
        else:
            self._note(one)

    def _note(self, one: Compression) -> None:
        self._endings[one.state] += 1
        if one.state == "done" and one.new is not None:
            self._saved += one.old.size - one.new.size
            self._context.work.output_metrics.compressed(one.old.size - one.new.size)

    def outcome(self) -> Outcome:
        """How it went."""
        counts = {name: self._endings[name] for name in ("in_grace", "done", "left", "kept", "failed")}
        counts["bytes_saved"] = self._saved
        if self._endings["failed"]:
            return Outcome(
                "failed", f"{self._endings['failed']} images failed, the last one: {self._last_error}", counts
            )
        told = f"{counts['in_grace']} images compressed, {counts['left']} left as they are"
        return Outcome("done", f"{told}; {counts['done']} originals deleted, {self._saved} bytes saved", counts)
