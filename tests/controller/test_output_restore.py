"""`tierd outputs restore`: what was lost or damaged beside the overlay comes back; nothing newer is ever replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from tests.controller.fate import Fate, Killed
from tests.controller.house import tierd
from tests.controller.outputs import DAY, House, Leader
from tests.servers import run
from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.outputs import jobs as output_jobs
from tierd.controller.outputs import restore as output_restore
from tierd.controller.outputs.backup import key_of
from tierd.controller.outputs.restore import OutputRestores, Wish

ROW = "SELECT hot_storage, cold_storage, version, vanished_at, pending_since FROM generated_outputs"
USER = "user123"


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


async def nobody(_: str) -> None:
    """Listens to what a job is at."""


async def known(leader: Leader) -> None:
    await leader.scan()
    await leader.back_up()


async def restore(house: House, leader: Leader, wish: Wish) -> tuple[dict[str, int], list[dict[str, str]]]:
    async with leader.work.database.connection() as connection:
        number = await output_restore.ask(connection, wish, "test")
    outcome: Outcome = await output_jobs.restore_outputs(Context(leader.work, False, nobody))
    assert outcome.state in ("done", "failed")
    async with leader.work.database.connection() as connection:
        answer = await output_restore.answer_to(connection, number)
    assert answer is not None
    return answer


def test_a_file_that_was_lost_comes_back_and_what_else_is_there_stays(house: House) -> None:
    lost, there = house.make(content=b"lost"), house.make(content=b"there")
    mtime_ns = (house.outputs / lost).stat().st_mtime_ns
    os.chown(house.outputs / DAY, 1234, 2345)

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            (house.outputs / lost).unlink()
            counts, left = await restore(house, leader, Wish(user=USER, dry_run=True))
            assert counts == {"lost": 1, "there": 1}
            assert left == [{"output_id": name_of(lost), "why": "lost", "reason": ""}]
            assert not (house.outputs / lost).exists()
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"restored": 1, "there": 1}
            await leader.back_up()
            assert await house.rows(ROW) == [(True, True, 1, None, None)] * 2, "it is what was backed up"
            (row,) = await house.rows("SELECT count(*) FROM generated_outputs WHERE hot_since > now() - interval '1 h'")
            assert row == (1,), "it is new in the hot tier"
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"there": 2}

    run(main())
    assert ((house.outputs / lost).read_bytes(), (house.outputs / there).read_bytes()) == (b"lost", b"there")
    st = (house.outputs / lost).stat()
    assert (st.st_mtime_ns, st.st_uid, st.st_gid, st.st_mode) == (mtime_ns, 1234, 2345, 0o100644)
    assert litter(house) == []
    assert house.registry.get_sample_value("tierd_outputs_restored_total") == 1


def name_of(path: str) -> str:
    return path.rpartition("/")[2][:36]


def litter(house: House) -> list[Path]:
    return [path for path in (house.root / "source/.tierd").rglob("*") if not path.is_dir()]


def test_a_user_whose_directories_are_gone_gets_them_like_those_above(house: House) -> None:
    path = house.make(content=b"lost")
    house.outputs.chmod(0o2775)
    os.chown(house.outputs, 77, 88)

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            shutil.rmtree(house.outputs / USER)
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"restored": 1}

    run(main())
    assert (house.outputs / path).read_bytes() == b"lost"
    st = (house.outputs / DAY).stat()
    assert (st.st_uid, st.st_gid, st.st_mode & 0o7777) == (77, 88, 0o2775)


def test_only_what_is_meant_comes_back(house: House) -> None:
    days = {f"{user}/2026/01/{day:02}": house.make(f"{user}/2026/01/{day:02}") for user in "ab" for day in (1, 2, 3)}

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            for path in days.values():
                (house.outputs / path).unlink()
            wanted: list[tuple[Wish, set[str]]] = [
                (Wish(user="a", first_day="2026/01/02", last_day="2026/01/02"), {"a/2026/01/02"}),
                (Wish(output_ids=[UUID(name_of(days["b/2026/01/01"]))]), {"b/2026/01/01"}),
                (Wish(first_day="2026/01/03"), {"a/2026/01/03", "b/2026/01/03"}),
                (Wish(last_day="2026/01/01", user="a"), {"a/2026/01/01"}),
            ]
            back: set[str] = set()
            for wish, expected in wanted:
                await restore(house, leader, wish)
                back |= expected
                assert {day for day, path in days.items() if (house.outputs / path).exists()} == back

    run(main())


def _newer(path: Path) -> None:
    path.write_bytes(b"newer")


def _newer_of_the_same_size(path: Path) -> None:
    path.write_bytes(b"NEWER..")


def _another(path: Path) -> None:
    """By a rename, with the old time."""
    st = path.stat()
    path.with_name("other").write_bytes(b"another")
    os.utime(path.with_name("other"), ns=(st.st_mtime_ns, st.st_mtime_ns))
    path.with_name("other").rename(path)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("change", [_newer, _newer_of_the_same_size, _another, _link])
def test_a_newer_file_is_never_replaced(house: House, change: Callable[[Path], None]) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            change(house.outputs / path)
            before = (house.outputs / path).read_bytes()
            for damaged in (False, True):
                counts, _ = await restore(house, leader, Wish(user=USER, damaged=damaged))
                assert counts.get("restored", 0) == 0, counts
            foreseen, _ = await restore(house, leader, Wish(user=USER, damaged=True, dry_run=True))
            assert foreseen == {"lost" if change is _link else "changed": 1}
            assert (house.outputs / path).read_bytes() == before

    run(main())
    assert litter(house) == []


def damage(path: Path) -> None:
    """Other bytes, and nothing else."""
    st = path.stat()
    path.write_bytes(b"c0ntent")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def test_a_damaged_file_is_replaced_if_that_is_asked_for(house: House) -> None:
    path = house.make(content=b"content")
    (house.outputs / path).chmod(0o604)
    os.setxattr(house.outputs / path, "user.seed", b"42")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            damage(house.outputs / path)
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"there": 1}
            assert (await restore(house, leader, Wish(user=USER, damaged=True, dry_run=True)))[0] == {"damaged": 1}
            assert (house.outputs / path).read_bytes() == b"c0ntent"
            assert (await restore(house, leader, Wish(user=USER, damaged=True)))[0] == {"restored": 1}
            await leader.back_up()

    run(main())
    assert (house.outputs / path).read_bytes() == b"content"
    assert os.getxattr(house.outputs / path, "user.seed") == b"42"
    assert (house.outputs / path).stat().st_mode & 0o777 == 0o604
    assert run(house.rows(ROW)) == [(True, True, 1, None, None)]
    assert litter(house) == []


@pytest.mark.parametrize("kind", ["lost", "damaged"])
def test_one_that_is_written_this_moment_stays(house: House, kind: str) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            if kind == "lost":
                (house.outputs / path).unlink()
            else:
                damage(house.outputs / path)

            def at(effect: str) -> None:
                if effect == "made draft":
                    (house.outputs / path).write_bytes(b"newer")

            assert await carry_out(leader, Wish(user=USER, damaged=True), at) == {"changed": 1}

    run(main())
    assert (house.outputs / path).read_bytes() == b"newer"
    assert litter(house) == []


def test_what_its_user_removed_stays_removed(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            (house.outputs / path).unlink()
            await house.told(path, removed_age_ns=1)
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"removed": 1}

    run(main())
    assert not (house.outputs / path).exists()


def test_one_that_is_removed_meanwhile_stays_removed(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            (house.outputs / path).unlink()

            def at(effect: str) -> None:
                if effect == "made draft":
                    house.meanwhile("UPDATE generated_outputs SET removed_at = now()")

            assert await carry_out(leader, Wish(user=USER), at) == {"changed": 1}

    run(main())
    assert not (house.outputs / path).exists()
    assert litter(house) == []


async def carry_out(leader: Leader, wish: Wish, at: Callable[[str], None]) -> dict[str, int]:
    work = leader.work
    async with work.database.connection() as connection:
        await output_restore.ask(connection, wish, "test")
    where = work.output_files, work.store, work.output_backup.bucket, work.output_metrics
    return await OutputRestores(work.database, work.epoch, *where, at).all(nobody)


def test_what_is_cold_is_not_lost(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await leader.clean_up()
            assert (await restore(house, leader, Wish(user=USER)))[0] == {"cold": 1}

    run(main())
    assert not (house.outputs / path).exists()


def test_what_has_no_right_object_is_told_and_not_made_up(house: House) -> None:
    path, bare = house.make(content=b"content"), house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            for each in (path, bare):
                (house.outputs / each).unlink()
            key = key_of(b"outputs", path.encode(), 1)
            (house.root / "objects/generated-outputs" / key).write_bytes(b"c0ntent")
            await house.rows(
                "UPDATE generated_outputs SET cold_storage = false WHERE output_id = $1::text::uuid RETURNING 1",
                name_of(bare),
            )
            with capture_logs():
                counts, left = await restore(house, leader, Wish(user=USER))
            assert counts == {"failed": 1, "unbacked": 1}
            assert "is damaged" in next(one["reason"] for one in left if one["why"] == "failed")

    run(main())
    assert litter(house) == []
    assert not (house.outputs / path).exists()


@pytest.mark.parametrize("kind", ["lost", "damaged"])
def test_killed_between_any_two_effects(house: House, kind: str) -> None:
    async def one(number: int, last: int) -> list[str]:
        path = house.make(f"user{number}/2026/01/12", content=b"content")
        wish = Wish(user=f"user{number}", damaged=True)
        fate = Fate(last)
        async with house.leading() as leader:
            await known(leader)
            if kind == "lost":
                (house.outputs / path).unlink()
            else:
                damage(house.outputs / path)
            with suppress(Killed):
                await carry_out(leader, wish, fate)
        async with house.leading() as leader:
            await carry_out(leader, wish, lambda effect: None)
            await leader.back_up()
        assert (house.outputs / path).read_bytes() == b"content"
        rows = await house.rows(f"{ROW} WHERE user_id = $1", wish.user)
        assert rows == [(True, True, 1, None, None)]
        assert litter(house) == []
        return fate.effects

    async def main() -> None:
        effects = await one(0, 0)
        assert len(effects) >= 7
        for last in range(1, len(effects) + 1):
            await one(last, last)

    run(main(), seconds=300)


def outputs(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    """A command, with the settings of the house."""
    return tierd(
        *("outputs", *words), TIERDCTL_POSTGRES=house.dsn, TIERDCTL_OBJECTS=str(house.root / "objects"),
        TIERDCTL_SOURCE=str(house.root / "source"), TIERDCTL_STATE_DIR=str(house.root / "state"),
    )  # fmt: skip


def test_the_command_does_it_and_says_what_it_did(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)

    run(main())
    (house.outputs / path).unlink()
    done = outputs(house, "restore", "--user", USER, "--dry-run")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "dry run: 1 lost"), done.stderr
    done = outputs(house, "restore", name_of(path), "--from", "2026-01-12", "--to", "2026-01-12", "--json")
    assert json.loads(done.stdout) == {"dry_run": False, "counts": {"restored": 1}, "left_alone": []}
    assert (house.outputs / path).read_bytes() == b"content"
    done = outputs(house, "restore")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "tierd: which outputs?")
    (house.root / "objects/generated-outputs" / key_of(b"outputs", path.encode(), 1)).unlink()
    (house.outputs / path).unlink()
    done = outputs(house, "restore", "--user", USER)
    assert (done.returncode, done.stderr.splitlines()[-2:]) == (
        1, ["tierd: 1 outputs were not restored", "hint: the reasons are above; try again"],
    ), done.stderr  # fmt: skip
