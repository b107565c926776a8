"""Old outputs leave the hot tier by the steps that models do, and are there at each moment, wherever that is cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.controller.moving import stub_path
from tests.controller.outputs import BUCKET, DAY, House, Leader, read
from tests.servers import run
from tierd.controller.models import candidates
from tierd.controller.moves.output_days import Day
from tierd.objects.keys import object_key

TIERS = "SELECT hot_storage, cold_storage, count(*) FROM generated_outputs GROUP BY 1, 2 ORDER BY 1"
SUBJECT = f"outputs/{DAY}"


def trash(house: House) -> list[Path]:
    return [path for path in (house.root / "source/.tierd/trash").rglob("*") if path.is_file()]


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


async def known(leader: Leader) -> None:
    """Everything is registered and backed up."""
    await leader.scan()
    await leader.back_up()


async def end_grace(house: House) -> None:
    await house.rows("UPDATE moves SET grace_until = now() WHERE state = 'in_grace' RETURNING 1")


def test_old_outputs_leave_after_the_grace_and_stay_readable(house: House) -> None:
    files = {house.make(ending=ending, content=os.urandom(1000)): b"" for ending in ("png", "wav")}
    files = {path: (house.outputs / path).read_bytes() for path in files}
    foreign = house.write(f"{DAY}/cat.png")
    times = {path: (house.outputs / path).stat().st_mtime_ns for path in files}

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            assert (await leader.clean_up(dry_run=True)).counts == {"outputs": 2, "bytes": 2000}
            assert await house.rows(TIERS) == [(True, True, 2)]
            outcome = await leader.clean_up()
            assert (outcome.state, outcome.counts["days_left"]) == ("done", 1), outcome
            assert await house.rows(TIERS) == [(False, True, 2)]
            assert len(trash(house)) == 2
            assert {path: read(house, path) for path in files} == files
            assert (await leader.clean_up()).counts["outputs"] == 0, "they have left"
            async with leader.work.database.connection() as connection:
                spent = (await candidates.look(connection, leader.work.settings)).spent
            assert spent.models == 0, "that is no demotion of a model"
            await end_grace(house)
            ((move, state),) = await house.rows("SELECT id, state FROM moves")
            assert state == "in_grace"
            assert await leader.work.moves.advance(move) == "done"

    run(main())
    assert {path: read(house, path) for path in files} == files
    assert trash(house) == []
    assert {path: stub_path(house.outputs / path).stat().st_mtime_ns for path in files} == times
    assert sorted(str(path.name) for path in (house.outputs / DAY).iterdir()) == [".tierd", "cat.png"]
    assert (house.outputs / foreign).read_bytes() == b"png"
    objects = [path for path in (house.root / "objects" / BUCKET / "outputs").rglob("*") if path.is_file()]
    assert len(objects) == 3, "one for each output, and the manifest: nothing is stored twice"


def test_what_is_young_or_not_backed_up_stays(house: House) -> None:
    old, young, bare = (house.make() for _ in range(3))
    os.utime(house.outputs / young)

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            name = bare.rpartition("/")[2]
            await house.rows(
                "UPDATE generated_outputs SET cold_storage = false WHERE filename LIKE '%' || $1 RETURNING 1", name
            )
            await leader.clean_up()

    run(main())
    assert [(house.outputs / path).exists() for path in (old, young, bare)] == [False, True, True]


@pytest.mark.parametrize(("budget", "leave"), [(0, 0), (250, 1), (100, 2), (1, 3), (300, 0)])
def test_above_the_budget_the_oldest_leave(house: House, budget: int, leave: int) -> None:
    async def main() -> None:
        for _ in range(3):
            house.make(content=os.urandom(100))
        async with house.leading(outputs_hot_days=36_500, outputs_hot_budget=budget) as leader:
            await known(leader)
            for age, (name,) in enumerate(await house.rows("SELECT filename FROM generated_outputs ORDER BY 1")):
                await house.rows(
                    "UPDATE generated_outputs SET created_at = now() - make_interval(days => $2)"
                    " WHERE filename = $1 RETURNING 1",
                    name, 10 + age,
                )  # fmt: skip
            await leader.clean_up()
        cold = await house.rows("SELECT filename FROM generated_outputs WHERE NOT hot_storage ORDER BY created_at")
        oldest = await house.rows("SELECT filename FROM generated_outputs ORDER BY created_at LIMIT $1", leave)
        assert cold == oldest

    run(main())


@pytest.mark.parametrize("spoil", ["link", "sticky", "gone"])
def test_a_file_that_cannot_be_moved_keeps_no_other_one(house: House, spoil: str) -> None:
    good, bad = house.make(), house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            if spoil == "link":
                os.link(house.outputs / bad, house.root / "link")
            elif spoil == "sticky":
                (house.outputs / bad).chmod(0o1644)
            else:
                (house.outputs / bad).unlink()
            assert (await leader.clean_up()).state == "done"

    run(main())
    assert (house.outputs / good).exists() is False
    assert (house.outputs / bad).exists() is (spoil != "gone")
    assert read(house, good) == b"png"


def test_a_file_written_since_its_backup_stays_and_is_looked_at(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            house.write(path, b"new")
            with capture_logs():
                assert (await leader.clean_up()).counts["days_spared"] == 1
            assert await house.rows("SELECT pending_since IS NULL FROM generated_outputs") == [(False,)]
            await leader.back_up()

    run(main())
    assert (house.outputs / path).read_bytes() == b"new"
    assert house.object(path, 2) == b"new"


def test_one_that_a_node_tells_of_between_plan_and_switch_stays(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            day = Day("outputs", "user123", "2026/01/12", [path.split("/", 1)[1]])
            move = await leader.work.moves.demote_outputs(day, "test")
            await house.told(path, written_age_ns=1)
            assert await leader.work.moves.advance(move) == "abandoned"
            await leader.back_up()
            assert await house.rows(TIERS) == [(True, True, 1)]

    run(main())
    assert (house.outputs / path).exists()


def test_an_object_that_is_damaged_keeps_the_file_hot(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            key = object_key(f"outputs/{DAY}", 1, path.rpartition("/")[2].encode())
            (house.root / "objects" / BUCKET / key).write_bytes(b"cOntent")
            with capture_logs():
                assert (await leader.clean_up()).counts["days_spared"] == 1

    run(main())
    assert (house.outputs / path).read_bytes() == b"content"


def test_an_undo_brings_them_back_and_leaves_earlier_ones_cold(house: House) -> None:
    first, second = house.make(content=b"first"), house.make(content=b"second")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            name = first.split("/", 1)[1]
            day = Day("outputs", "user123", "2026/01/12", [name])
            await leader.work.moves.advance(await leader.work.moves.demote_outputs(day, "test"))
            await end_grace(house)
            await leader.work.moves.resume_all()
            assert (await leader.clean_up()).counts["days_left"] == 1
            assert await house.rows(TIERS) == [(False, True, 2)]
            assert await leader.work.moves.advance(await leader.work.moves.undo(SUBJECT)) == "done"
            await leader.back_up()
            assert await house.rows(TIERS) == [(False, True, 1), (True, True, 1)]

    run(main())
    assert (house.outputs / second).read_bytes() == b"second"
    assert not (house.outputs / first).exists()
    assert read(house, first) == b"first"
    assert house.object(second, 2) is None, "it is what was copied"


def test_a_move_that_was_given_up_loses_no_objects(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            day = Day("outputs", "user123", "2026/01/12", [path.split("/", 1)[1]])
            move = await leader.work.moves.demote_outputs(day, "test")
            await leader.work.moves.undo(SUBJECT)
            await house.rows("UPDATE moves SET finished_at = now() - interval '9 days' WHERE id = $1 RETURNING 1", move)
            assert await leader.work.moves.clean_up() == 0

    run(main())
    assert house.object(path) == b"png"
