"""Carries moves on: a few at once, none twice at a time, and one that cannot go on less and less often.

Whoever plans a move, in this process or in the database, leaves it to the carrier; whoever wants to know how it went
asks it to carry that one, and waits. What a step is and what an error means is known by `moves.py` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from tierd.postgres import Database

AT_ONCE: Final = 2
"""Of those that somebody may wait for (promotions and the like), and as many demotions besides."""
_PAUSE_SECONDS: Final = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0)
_UNTIL_TOLD: Final = ("in_grace", "done", "abandoned", "failed")
"""States in which there is nothing to do for now."""

# What is in its grace rests until that is over.
_TO_CARRY: Final = """
SELECT id, kind FROM moves
WHERE finished_at IS NULL AND (state <> 'in_grace' OR grace_until <= now()) ORDER BY created_at, id
LIMIT 1000
"""
_KIND: Final = "SELECT kind FROM moves WHERE id = $1"


class Advances(Protocol):
    """What is used of `Moves`."""

    async def advance(self, move_id: int) -> str:
        """Carry a move on as far as it can go now; its state. Raises NotLeaderError, DatabaseError."""
        ...


class _Rest(NamedTuple):
    tries: int
    until: float


class Carrier:
    """See the module. Contract: one event loop; `round` is called by one task, `carry` by any."""

    def __init__(self, database: Database, moves: Advances, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._moves = moves
        self._clock = clock
        self._running: dict[int, asyncio.Task[str]] = {}
        self._resting: dict[int, _Rest] = {}
        self._slots = {demotes: asyncio.Semaphore(AT_ONCE) for demotes in (True, False)}

    async def round(self) -> None:
        """Begin to carry on what can be, and hear how others went. Raises what one of them raised."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_TO_CARRY)
        self._resting = {move: rest for row in rows if (rest := self._resting.get(move := row["id"]))}
        for move, kind in rows:
            rest = self._resting.get(move)
            if move not in self._running and (rest is None or rest.until <= self._clock()):
                self._start(move, kind)
        ended = [move for move, task in self._running.items() if task.done()]
        for task in [self._running.pop(move) for move in ended]:
            task.result()  # raises: the others end by themselves

    async def carry(self, move: int) -> str:
        """Carry a move on as far as it can go now; its state. Raises NotLeaderError, DatabaseError."""
        task = self._running.get(move)
        if task is None:
            async with self._database.connection() as connection:
                kind = await connection.fetchval(_KIND, move)
            task = self._running.get(move) or self._start(move, kind)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what runs, wherever it is."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, move: int, kind: str) -> asyncio.Task[str]:
        task = asyncio.create_task(self._carry(move, demotes=kind == "demote"))
        self._running[move] = task
        task.add_done_callback(lambda done: self._ended(move, done))
        return task

    async def _carry(self, move: int, *, demotes: bool) -> str:
        async with self._slots[demotes]:
            return str(await self._moves.advance(move))

    def _ended(self, move: int, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:
            return  # whoever waits for it, and the next round, get to know
        del self._running[move]
        if task.result() in _UNTIL_TOLD:
            self._resting.pop(move, None)
            return
        tries = self._resting.get(move, _Rest(0, 0)).tries
        pause = _PAUSE_SECONDS[min(tries, len(_PAUSE_SECONDS) - 1)]
        self._resting[move] = _Rest(tries + 1, self._clock() + pause)
