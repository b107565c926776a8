"""What all moves of a leader work with: the books, the source, the object store, threads, and the fence around effects.

Contract: for one event loop. Whatever changes the source or the books does so within `fenced`, in a transaction of the
current leader, and in batches that end long before the database would end that: so two leaders never work at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from tierd.controller.moves import sql
from tierd.controller.moves.books import Books, Move, hold, set_state
from tierd.controller.moves.output_days import OutputDays, is_of_outputs
from tierd.controller.moves.steps import next_state
from tierd.controller.moves.subjects import Models, Subjects
from tierd.controller.source.announcing import At
from tierd.controller.source.hot_scan import Subject
from tierd.controller.source.hot_tree import HotTree, split
from tierd.controller.source.moved_file import SourceGone
from tierd.controller.source.stubbing import Stubbing
from tierd.errors import TierdError
from tierd.objects.store import ObjectStore
from tierd.postgres import Connection, Database

_FENCE_SECONDS: Final = 40.0
"""Within this much of the beginning of its transaction an effect may begin; `db` ends idle ones after 60 s."""
BATCH_SECONDS: Final = 10.0
BATCH_FILES: Final = 256
_EFFECTS_AT_ONCE: Final = 16
"""More than moves are carried on at once: each has one at a time."""
_FLUSH_SECONDS: Final = 1.0
_FLUSH_RESULTS: Final = 500

Args = ParamSpec("Args")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class MoveSettings:
    """How models move. Times are seconds."""

    state_dir: Path
    """For records of uploads in parts, so that they go on after a kill."""
    models_roots: tuple[bytes, ...] = (b"models", b"hot-models")
    bucket: str = "cold-models"
    outputs_bucket: str = "generated-outputs"
    outputs_grace: float = 86_400.0
    grace: float = 7 * 86_400.0
    lease_report_max_age: float = 300.0
    lease_reports: bool = True
    """False: there are no nodes that could report what they hold open."""
    parallel_files: int = 4
    attempts: int = 8
    settle: float = 3.0
    """From the announcement of stubs to the first of them: for so long nodes may know a directory without stubs."""


class TooLate(TierdError):
    """An effect was not begun, because the transaction around it may be over: somebody else may lead."""


class Fence:
    """A transaction of the leader. `at` is for effects that must not begin when it may be over."""

    def __init__(self, connection: Connection, at: At) -> None:
        self.connection = connection
        self._at = at
        self._until = time.monotonic() + _FENCE_SECONDS
        self._batch_until = time.monotonic() + BATCH_SECONDS

    def at(self, effect: str) -> None:
        """Raises TooLate if somebody else may lead by now."""
        if time.monotonic() > self._until:
            raise TooLate(f"it took too long to {effect}", hint="does the source hang? it is tried again")
        self._at(effect)

    def batch(self, items: Iterable[Item]) -> Iterator[Item]:
        """As many of them as fit into the transaction, and one at least."""
        for number, item in enumerate(items):
            if number and (number >= BATCH_FILES or time.monotonic() > self._batch_until):
                return
            yield item


class Workshop:
    """See the module."""

    def __init__(
        self, database: Database, tree: HotTree, store: ObjectStore, settings: MoveSettings, epoch: int, at: At
    ) -> None:
        self.books = Books(database, epoch)
        self.tree = tree
        self.store = store
        self.settings = settings
        self.at = at
        self.models = Models(
            settings.bucket, settings.grace, settings.lease_report_max_age, nodes=settings.lease_reports
        )
        self._outputs = OutputDays(settings.outputs_bucket, settings.outputs_grace)
        self._long = ThreadPoolExecutor(settings.parallel_files, thread_name_prefix="move")
        self._short = ThreadPoolExecutor(_EFFECTS_AT_ONCE, thread_name_prefix="move-effect")

    def close(self) -> None:
        """Waits for what runs; close the store before, then that is not for long."""
        self._long.shutdown()
        self._short.shutdown()

    async def run(self, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """Call it in a thread: what may take long. A cancelled task waits for its end."""
        return await _awaited(self._long, partial(call, *args, **kwargs))

    async def effect(self, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """The same for what is done within a fence: it must not wait until a thread has stored a file."""
        return await _awaited(self._short, partial(call, *args, **kwargs))

    @asynccontextmanager
    async def fenced(self, what: str, move: Move | None = None) -> AsyncIterator[Fence]:
        """A transaction of the leader, and of whoever works on `move`: of nothing that was done where its source was
        not mounted. Raises NotLeaderError, StateChanged, SourceGone."""
        self.at(f"begin {what}")
        async with self.books.writing() as connection:
            if move is not None:
                await hold(connection, move)
                await self._expect_source(move)
            yield Fence(connection, self.at)
            if move is not None:
                await self._expect_source(move)
            self.at(f"commit {what}")
        self.at(f"committed {what}")

    async def source(self) -> str | None:
        """What the source is called, for the detail of a move that is planned: some of it was seen there."""
        return await self.run(self.tree.identity, make=True)

    async def _expect_source(self, move: Move) -> None:
        began_in = move.detail.get("source")
        if began_in is not None and await self.effect(self.tree.identity) != began_in:
            raise SourceGone(
                f"{self.tree.root} is not the source that move {move.id} began in", hint="is the source mounted?"
            )

    async def go_on(self, move: Move) -> bool:
        """The move's next state begins; True, as what steps return. Raises NotLeaderError, StateChanged."""
        state = next_state(move.kind, move.state)
        async with self.fenced(state, move) as fence:
            await set_state(fence.connection, self.books, move, state)
        return True

    async def note_detail(self, fence: Fence, move: Move, **detail: Any) -> None:
        """Remember more of a move."""
        await fence.connection.execute(sql.NOTE_DETAIL, move.id, json.dumps(detail))

    def subjects(self, demotion: Move) -> Subjects:
        """Who stands for the subject of a demotion."""
        return self._outputs if is_of_outputs(demotion) else self.models

    def stubbing(self, fence: Fence, demotion: Move) -> Stubbing:
        """The files of a demotion, to be changed within the fence."""
        return Stubbing(self.tree, subject_of(demotion), demotion.id, fence.at)

    async def in_batches(
        self,
        what: str,
        move: Move,
        demotion: Move,
        items: Sequence[Item],
        call: Callable[[Stubbing, Item], Result],
        tell: Callable[[Fence, list[Result]], Awaitable[None]],
        before: Callable[[Fence], Awaitable[None]] | None = None,
    ) -> None:
        """Change files of a demotion, one after another, in transactions that do not last; `move` is who works.

        Each transaction begins with `before`, and ends with `tell` about what was done in it.
        """
        todo = items
        while todo:
            async with self.fenced(what, move) as fence:
                if before is not None:
                    await before(fence)
                done = await self.effect(_batch, fence, self.stubbing(fence, demotion), call, todo)
                await tell(fence, done)
            todo = todo[len(done) :]

    async def each(
        self,
        call: Callable[[Item], Result],
        items: Sequence[Item],
        flush: Callable[[list[Result]], Awaitable[None]],
    ) -> None:
        """Call it for each item, some at once; results are flushed once a second. Raises what was raised first."""
        waiting = iter(items)
        running: set[asyncio.Task[Result]] = set()
        results: list[Result] = []
        failed: BaseException | None = None
        flushed_at = time.monotonic()
        try:
            while True:
                while failed is None and len(running) < self.settings.parallel_files:
                    item = next(waiting, None)
                    if item is None:
                        break
                    running.add(asyncio.ensure_future(self.run(call, item)))
                if not running:
                    break
                done, running = await asyncio.wait(running, timeout=_FLUSH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        results.append(task.result())
                    failed = failed or error
                if time.monotonic() - flushed_at > _FLUSH_SECONDS or len(results) >= _FLUSH_RESULTS:
                    results, told = [], results
                    await flush(told)
                    flushed_at = time.monotonic()
            if results:
                await flush(results)
        finally:
            if running:
                await asyncio.wait(running)
        if failed is not None:
            raise failed


async def _awaited(pool: ThreadPoolExecutor, call: Callable[[], Result]) -> Result:
    """Nothing goes on behind the back of whoever was cancelled."""
    future = asyncio.get_running_loop().run_in_executor(pool, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


def _batch(
    fence: Fence, stubbing: Stubbing, call: Callable[[Stubbing, Item], Result], items: Sequence[Item]
) -> list[Result]:
    done = [call(stubbing, item) for item in fence.batch(items)]
    stubbing.sync()
    return done


def subject_of(demotion: Move) -> Subject:
    """Where the model was when its demotion was planned."""
    path = demotion.subject.encode()
    single = bool(demotion.detail["single"])
    return Subject(demotion.subject, split(path)[0] if single else path, single)
