"""Cold outputs that are read often come back to the hot tier, once, and not what the budget has no room for."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from tests.controller.moving import stub_path
from tests.controller.outputs import House, Killed, Leader
from tests.controller.test_output_deletion import demoted, objects
from tests.controller.test_output_moves import read
from tests.servers import run

TIERS = "SELECT hot_storage, cold_storage, version FROM generated_outputs ORDER BY filename"
MOVES = "SELECT kind, state FROM moves WHERE kind = 'promote'"


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


async def reads(house: House, path: str, times: int, age_s: int = 1) -> None:
    await house.told(path, opens=times, access_age_ns=age_s * 10**9)


async def promote(leader: Leader) -> None:
    await leader.work.output_work.promotion.round()
    await leader.work.moves.resume_all()
    await leader.back_up()


def test_five_reads_bring_it_back_and_its_neighbour_stays_cold(house: House) -> None:
    wanted, other = house.make(content=b"wanted"), house.make(content=b"other")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            await reads(house, other, 4)
            await reads(house, wanted, 3)
            await promote(leader)
            assert await house.rows(MOVES) == []
            await reads(house, wanted, 2)
            await promote(leader)
            assert await house.rows(MOVES) == [("promote", "done")]
            rows = await house.rows("SELECT hot_storage, hot_since IS NULL, version FROM generated_outputs ORDER BY 1")
            assert rows == [(False, True, 1), (True, False, 1)]
            assert (await leader.clean_up()).counts["outputs"] == 0, "it is as young as if it had been made now"
            await reads(house, wanted, 50)
            await promote(leader)
            assert len(await house.rows(MOVES)) == 1, "what is hot is not promoted"

    run(main())
    assert (house.outputs / wanted).read_bytes() == b"wanted"
    assert not stub_path(house.outputs / wanted).exists()
    assert read(house, other) == b"other"
    assert not (house.outputs / other).exists()
    assert len(objects(house)) == 2, "an object is stored once"


def test_reads_before_the_window_and_while_it_was_hot_do_not_count(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading(outputs_promote_window=3600) as leader:
            await leader.scan()
            await reads(house, path, 9)
            await demoted(house, leader, grace_over=True)
            await promote(leader)
            await reads(house, path, 4, age_s=1000)
            await house.rows("UPDATE generated_outputs SET reads_since = now() - interval '8 days' RETURNING 1")
            await reads(house, path, 1)
            await promote(leader)
            assert await house.rows(MOVES) == []
            assert await house.rows("SELECT recent_reads, access_count FROM generated_outputs") == [(1, 14)]
            await reads(house, path, 4)
            since = "UPDATE generated_outputs SET reads_since = now() - make_interval(secs => $1) RETURNING 1"
            await house.rows(since, 4000)
            await promote(leader)
            assert await house.rows(MOVES) == []
            await house.rows(since, 3000)
            await promote(leader)
            assert await house.rows(MOVES) == [("promote", "done")]

    run(main())


@pytest.mark.parametrize(("accesses", "budget", "moves"), [(5, 0, 1), (5, 1000, 1), (5, 900, 0), (0, 0, 0)])
def test_none_comes_without_room_in_the_hot_budget(house: House, accesses: int, budget: int, moves: int) -> None:
    path = house.make(content=os.urandom(500))

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            house.make("other/2026/01/12", content=os.urandom(500))
            await leader.scan()
            await leader.back_up()
        more: dict[str, Any] = {"outputs_promote_accesses": accesses, "outputs_hot_budget": budget}
        async with house.leading(**more) as leader:
            await reads(house, path, 5)
            await promote(leader)
            assert len(await house.rows(MOVES)) == moves

    run(main())


def test_while_its_day_is_in_its_grace_it_waits(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=False)
            await reads(house, path, 5)
            await promote(leader)
            assert await house.rows(MOVES) == []
            await house.rows("UPDATE moves SET grace_until = now() RETURNING 1")
            await leader.work.moves.resume_all()
            await promote(leader)
            assert await house.rows(MOVES) == [("promote", "done")]

    run(main())


def test_one_whose_object_is_gone_keeps_no_other_from_coming(house: House) -> None:
    lost, good = (house.make(content=name, name=str(UUID(int=at))) for at, name in enumerate((b"lost", b"good")))

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            for file in (house.root / "objects").rglob(lost.rpartition("/")[2]):
                file.unlink()
            for path in (lost, good):
                await reads(house, path, 5)
            with capture_logs():
                for _ in range(2):
                    await promote(leader)
            assert len(await house.rows(MOVES)) == 1, "it is not tried again and again"

    run(main())
    assert (house.outputs / good).read_bytes() == b"good"
    assert not (house.outputs / lost).exists()


def test_a_promotion_killed_at_every_step_loses_nothing_and_ends(house: House) -> None:
    async def one(number: int) -> int:
        content = os.urandom(100)
        path = house.make(f"u{number}/2026/01/12", content=content)
        armed, count = False, 0

        def at(_: str) -> None:
            nonlocal count
            if armed:
                assert read(house, path) == content, "at each moment it is there"
                count += 1
                if number and count > number:
                    raise Killed

        async with house.leading(at) as leader:
            await demoted(house, leader, grace_over=True)
            await reads(house, path, 5)
        with suppress(Killed), capture_logs():
            async with house.leading(at) as leader:
                armed = True
                await promote(leader)
        armed = False
        async with house.leading(at) as leader:
            await promote(leader)
            await house.rows("UPDATE generated_outputs SET try_at = now() RETURNING 1")
            await leader.back_up()
        assert (house.outputs / path).read_bytes() == content
        rows = await house.rows(
            "SELECT hot_storage, cold_storage, version FROM generated_outputs WHERE user_id = $1", f"u{number}"
        )
        assert rows == [(True, True, 1)]
        return count

    async def main() -> None:
        steps = await one(0)
        assert steps > 8
        for number in range(1, steps):
            await one(number)

    run(main(), seconds=300)
