"""The carrier: a few moves at once, none twice, and one that cannot go on less and less often."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.controller.house import settings_for
from tests.servers import run
from tierd.controller.leader import NotLeaderError
from tierd.controller.moves.carrier import AT_ONCE, Carrier
from tierd.postgres import Database


class Road:
    """Moves that go as the test says. Not a double of ours: what it stands for is the state of the world."""

    def __init__(self) -> None:
        self.time = 0.0
        self.begun: Counter[int] = Counter()
        self.now = 0
        self.most = 0
        self.go = asyncio.Event()
        self.state = "done"
        self.error: Exception | None = None

    async def advance(self, move_id: int) -> str:
        self.begun[move_id] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.go.wait()
        finally:
            self.now -= 1
        if self.error is not None:
            raise self.error
        return self.state


@asynccontextmanager
async def carrier_of(dsn: str, road: Road, moves: int, kind: str = "demote") -> AsyncIterator[Carrier]:
    async with Database(settings_for(dsn)) as database:
        async with database.connection() as connection:
            await connection.execute(
                "INSERT INTO moves (kind, subject) SELECT $1, 'm' || n FROM generate_series(1, $2::int) n", kind, moves
            )
        carrier = Carrier(database, road, lambda: road.time)
        yield carrier
        await carrier.close()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_few_at_once_and_none_twice(schema: str) -> None:
    async def main() -> None:
        road = Road()
        async with carrier_of(schema, road, 5) as carrier:
            await carrier.round()
            waiting = asyncio.create_task(carrier.carry(1))
            await carrier.round()
            await settle()
            assert road.now == AT_ONCE
            road.go.set()
            assert await waiting == "done"
            await settle()
            assert road.begun == Counter([1, 2, 3, 4, 5])
            assert road.most == AT_ONCE

    run(main())


def test_demotions_hold_up_nothing_that_somebody_waits_for(schema: str) -> None:
    async def main() -> None:
        road = Road()
        async with carrier_of(schema, road, 4) as carrier:
            await carrier.round()
            async with carrier._database.connection() as connection:
                await connection.execute("INSERT INTO moves (kind, subject) VALUES ('promote', 'wanted')")
            await carrier.round()
            await settle()
            assert road.begun[5] == 1

    run(main())


def test_one_that_cannot_go_on_is_tried_less_and_less_often(schema: str) -> None:
    async def main() -> list[float]:
        road = Road()
        road.state = "copying"
        road.go.set()
        tried: list[float] = []
        async with carrier_of(schema, road, 1) as carrier:
            for second in range(1500):
                road.time = float(second)
                if second % 5 == 0 or road.begun.total() > len(tried):
                    before = road.begun.total()
                    await carrier.round()
                    await settle()
                    if road.begun.total() > before:
                        tried.append(road.time)
        return tried

    assert run(main()) == [0, 10, 30, 70, 150, 310, 630, 1230]


def test_what_is_in_its_grace_rests_until_that_is_over(schema: str) -> None:
    async def main() -> Counter[int]:
        road = Road()
        road.go.set()
        async with carrier_of(schema, road, 2) as carrier:
            async with carrier._database.connection() as connection:
                await connection.execute(
                    "UPDATE moves SET state = 'in_grace',"
                    " grace_until = now() + CASE id WHEN 1 THEN interval '1 hour' ELSE interval '0' END"
                )
            await carrier.round()
            await settle()
        return road.begun

    assert run(main()) == Counter([2])


def test_the_end_of_leadership_is_heard(schema: str) -> None:
    async def main() -> None:
        road = Road()
        road.error = NotLeaderError("over")
        road.go.set()
        async with carrier_of(schema, road, 1) as carrier:
            await carrier.round()
            await settle()
            with pytest.raises(NotLeaderError):
                await carrier.round()
            with pytest.raises(NotLeaderError):
                await carrier.carry(1)

    run(main())
