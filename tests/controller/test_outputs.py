"""Generated outputs: registered by what nodes say and scans find, backed up, verified, and never taken for another."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from tests.controller.house import settings_for
from tests.controller.outputs import BUCKET, DAY, OLD_NS, House, Killed, sha
from tests.servers import run
from tierd.controller.leader import NotLeaderError
from tierd.controller.outputs import books as output_books
from tierd.controller.outputs.scan import Scanned
from tierd.controller.statistics.plan import OutputSum
from tierd.objects.directory import DirectoryStore
from tierd.postgres import Database


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


STATE = "SELECT hot_storage, cold_storage, version, encode(sha256, 'hex'), pending_since IS NULL FROM generated_outputs"


# --- registering ---


def test_what_a_node_tells_is_registered_and_backed_up(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        await house.told(path, written_age_ns=90 * 10**9, opens=0)
        (row,) = await house.rows(
            "SELECT output_id::text, user_id, filename, output_type, hot_storage, cold_storage, access_count,"
            " round(extract(epoch FROM now() - created_at)) FROM generated_outputs"
        )
        name = path.rpartition("/")[2]
        assert row == (name[:36], "user123", f"2026/01/12/{name}", "image", True, False, 0, row[-1])
        assert 90 <= row[-1] < 300
        async with house.leading() as leader:
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 1, sha(b"content"), True)]
        assert await house.rows("SELECT size_bytes FROM generated_outputs") == [(7,)]

    run(main())
    assert house.object(path) == b"content"
    assert house.registry.get_sample_value("tierd_output_backup_seconds_count") == 1


def test_reads_add_up_and_ask_for_no_look(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            await leader.back_up()
        await house.told(path, opens=3, access_age_ns=10**9)
        await house.told(path, opens=2, access_age_ns=99 * 10**9)
        rows = await house.rows(
            "SELECT access_count, now() - last_accessed < interval '50 s', pending_since FROM generated_outputs"
        )
        assert rows == [(5, True, None)]

    run(main())


def test_news_of_what_was_only_removed_register_nothing(house: House) -> None:
    async def main() -> None:
        await house.told(f"{DAY}/{uuid4()}.png", removed_age_ns=1)
        assert await house.rows("SELECT 1 FROM generated_outputs") == []

    run(main())


def test_a_scan_finds_what_no_node_told_and_gives_it_the_age_of_its_file(house: House) -> None:
    path = house.make(ending="wav")

    async def main() -> None:
        async with house.leading() as leader:
            assert await leader.scan() == Scanned(days=1, read=1, new=1)
            await leader.back_up()
            assert await leader.scan() == Scanned(days=1, read=0, new=0), "nothing changed"
        rows = await house.rows("SELECT output_type, extract(epoch FROM created_at)::bigint FROM generated_outputs")
        assert rows == [("audio", OLD_NS // 10**9)]

    run(main())
    assert house.object(path) == b"png"


def test_a_dry_scan_changes_nothing(house: House) -> None:
    house.make()

    async def main() -> None:
        async with house.leading() as leader:
            assert (await leader.scan(dry_run=True)).read == 1
        for table in ("generated_outputs", "output_days", "output_faults"):
            assert await house.rows(f"SELECT 1 FROM {table}") == []

    run(main())


def test_a_day_of_these_is_read_again_while_its_files_may_be_written_to(house: House) -> None:
    async def main() -> None:
        ((today,),) = await house.rows("SELECT to_char(now(), 'YYYY/MM/DD')")
        file = house.outputs / house.make(f"u/{today}")
        os.utime(file)
        async with house.leading() as leader:
            assert (await leader.scan()).read == 1
            await leader.back_up()
            file.write_bytes(b"more of it")  # which does not change the directory
            assert (await leader.scan()).read == 1
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 2, sha(b"more of it"), True)]

    run(main())


# --- what is not what it seems ---


def test_one_uuid_under_two_users_or_endings_is_reported_and_overwrites_nothing(house: House) -> None:
    name = str(uuid4())
    first = house.make(name=name, content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            await leader.back_up()
            for day, ending in (("eve/2026/01/12", "png"), (DAY, "jpg")):
                path = house.make(day, ending, b"other", name)
                await house.told(path, written_age_ns=1, opens=1, access_age_ns=1)
                await leader.scan()
            await leader.back_up()
        rows = await house.rows("SELECT user_id, filename, version, access_count FROM generated_outputs")
        assert rows == [("user123", f"2026/01/12/{name}.png", 1, 0)]
        faults = await house.rows("SELECT path, reason FROM output_faults ORDER BY path")
        reason = f"its UUID is that of {first}"
        assert faults == [
            (f"eve/2026/01/12/{name}.png".encode(), reason),
            (f"{DAY}/{name}.jpg".encode(), reason),
        ]

    run(main())
    assert house.object(first) == b"first"
    assert len(list((house.root / "objects" / BUCKET / "outputs").rglob("*.png"))) == 1


def test_two_of_one_uuid_in_one_message_leave_one_registered(house: House) -> None:
    name = str(uuid4())
    paths = [f"{user}/2026/01/12/{name}.png" for user in ("a", "b")]

    async def main() -> None:
        async with Database(settings_for(house.dsn)) as database, database.transaction() as connection:
            await output_books.tell(connection, {path: OutputSum(written_age_ns=1) for path in paths}, 0)
        assert await house.rows("SELECT user_id FROM generated_outputs") == [("a",)]
        assert await house.rows("SELECT path FROM output_faults") == [(paths[1].encode(),)]

    run(main())


FOREIGN = {
    f"{DAY}/cat.png": "no UUID for a name",
    f"{DAY}/{UUID(int=1)}.exe": "an ending that is neither image, audio nor video",
    f"user123/2026/02/30/{UUID(int=2)}.png": "no date of the calendar",
    f"user123/2026/1/12/{UUID(int=3)}.png": "no date of the calendar",
    f"user123/{UUID(int=4)}.png": "not USER/YYYY/MM/DD/NAME",
    f"a\nb/2026/01/12/{UUID(int=5)}.png": "a user ID that cannot be one",
}


def test_foreign_files_are_reported_and_left_alone(house: House) -> None:
    for path in FOREIGN:
        house.write(path)
    (house.outputs / DAY / f"{UUID(int=6)}.png").symlink_to("/etc/passwd")
    (house.outputs / "link").symlink_to("/etc")
    before = sorted(house.outputs.rglob("*"))

    async def main() -> list[tuple[Any, ...]]:
        async with house.leading() as leader:
            found = await leader.scan()
            await leader.back_up()
            assert found.new == 0
        assert await house.rows("SELECT 1 FROM generated_outputs") == []
        return await house.rows("SELECT path, reason FROM output_faults")

    faults = {path.decode(): reason for path, reason in run(main())}
    assert sorted(house.outputs.rglob("*")) == before
    assert faults.keys() >= {f"{DAY}/cat.png", "link", "a\nb", "user123/2026/1/12", "user123/2026/02/30"}
    assert faults[f"{DAY}/{UUID(int=6)}.png"] == "no plain file"
    for path, reason in FOREIGN.items():
        assert reason in {why for place, why in faults.items() if path.startswith(place)}, path


def test_a_fault_that_was_mended_is_forgotten(house: House) -> None:
    path = house.write(f"{DAY}/cat.png")

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            (house.outputs / path).unlink()
            await leader.scan()
        assert await house.rows("SELECT path FROM output_faults") == []

    run(main())


# --- backup ---


def test_a_file_written_again_gets_another_object(house: House) -> None:
    path = house.make(content=b"one")

    async def main() -> None:
        async with house.leading() as leader:
            await house.told(path, written_age_ns=1)
            await leader.back_up()
            house.write(path, b"two!")
            await house.told(path, written_age_ns=1)
            assert await house.rows(STATE) == [(True, True, 1, sha(b"one"), False)]
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 2, sha(b"two!"), True)]

    run(main())
    assert (house.object(path, 1), house.object(path, 2)) == (b"one", b"two!")


def test_other_attributes_alone_make_no_other_object(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await house.told(path, written_age_ns=1)
            await leader.back_up()
            (house.outputs / path).chmod(0o600)
            await house.told(path, written_age_ns=1)
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 1, sha(b"png"), True)]

    run(main())


@pytest.mark.parametrize("consistent", [False, True])
def test_an_object_that_is_not_what_was_stored_makes_nothing_cold(
    house: House, monkeypatch: pytest.MonkeyPatch, consistent: bool
) -> None:
    """Its bytes were damaged, or somebody else stored another object as a whole, with checksums of its own."""
    path = house.make(content=b"content")
    put = DirectoryStore.put_file

    def damage(self: DirectoryStore, bucket: str, key: str, *args: Any, **kwargs: Any) -> Any:
        stored = put(self, bucket, key, *args, **kwargs)
        other = house.root / "other" if consistent else house.root / "objects" / bucket / key
        other.write_bytes(b"cOntent")
        if consistent:
            put(self, bucket, key, other, len(b"cOntent"))
        return stored

    async def main() -> None:
        await house.told(path, written_age_ns=1)
        async with house.leading() as leader:
            with monkeypatch.context() as patched, capture_logs() as logs:
                patched.setattr(DirectoryStore, "put_file", damage)
                await leader.back_up()
            assert [line["event"] for line in logs] == ["output_not_backed_up"]
            assert await house.rows(STATE) == [(True, False, 1, None, False)]
            ((attempts, waits),) = await house.rows("SELECT attempts, try_at > now() FROM generated_outputs")
            assert (attempts, waits) == (1, True)
            await house.rows("UPDATE generated_outputs SET try_at = now() RETURNING 1")
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 1, sha(b"content"), True)]

    run(main())


def test_a_file_that_changes_while_it_is_copied_is_copied_again(house: House) -> None:
    path = house.make(content=b"one")
    changes = ["now"]

    def at(effect: str) -> None:
        if effect == "object was put" and changes:
            changes.pop()
            house.write(path, b"two")
            os.utime(house.outputs / path)

    async def main() -> None:
        await house.told(path, written_age_ns=1)
        async with house.leading(at) as leader:
            with capture_logs():
                await leader.back_up()
            assert await house.rows(STATE) == [(True, False, 1, None, False)]
            await house.rows("UPDATE generated_outputs SET try_at = now() RETURNING 1")
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 2, sha(b"two"), True)]

    run(main())
    assert house.object(path, 2) == b"two"


def test_news_that_come_during_a_copy_are_looked_at(house: House) -> None:
    path = house.make()
    told = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def at(effect: str) -> None:
            if effect == "object was put" and not told:
                told.append(asyncio.run_coroutine_threadsafe(house.told(path, written_age_ns=1), loop).result())

        await house.told(path, written_age_ns=1)
        async with house.leading(at) as leader:
            await leader.work.output_backup.round()
            assert await house.rows(STATE) == [(True, True, 1, sha(b"png"), False)]
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 1, sha(b"png"), True)]

    run(main())


@pytest.mark.parametrize(
    "effect", ["begin copy", "began copy", "put object", "object was put", "end copy", "ended copy"]
)
def test_a_backup_killed_at_any_step_goes_on(house: House, effect: str) -> None:
    path = house.make(content=b"content")

    def at(now: str) -> None:
        if now == effect:
            raise Killed

    async def main() -> None:
        await house.told(path, written_age_ns=1)
        with pytest.raises(Killed):
            async with house.leading(at) as leader:
                await leader.work.output_backup.round()
        ((cold, there),) = await house.rows("SELECT cold_storage, sha256 IS NOT NULL FROM generated_outputs")
        assert cold == there == (effect == "ended copy"), "cold only once that is verified"
        async with house.leading() as leader:
            await leader.back_up()
        assert await house.rows(STATE) == [(True, True, 1, sha(b"content"), True)]

    run(main())
    assert house.object(path) == b"content"


def test_who_no_longer_leads_writes_nothing(house: House) -> None:
    path = house.make()

    async def main() -> None:
        await house.told(path, written_age_ns=1)
        async with house.leading() as leader:
            await house.rows("UPDATE leader SET epoch = epoch + 1 RETURNING 1")
            with pytest.raises(NotLeaderError):
                await leader.work.output_backup.round()
        assert await house.rows(STATE) == [(True, False, 0, None, False)]

    run(main())


# --- what is gone ---


def test_what_is_gone_is_said_to_be_and_nothing_of_it_is_deleted(house: House) -> None:
    paths = [house.make(), house.make("other/2026/01/12")]

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            await leader.back_up()
            (house.outputs / paths[0]).unlink()
            (house.outputs / paths[1]).unlink()
            (house.outputs / paths[1]).parent.rmdir()
            await leader.scan()
            await leader.back_up()
            rows = await house.rows("SELECT hot_storage, cold_storage, vanished_at IS NOT NULL FROM generated_outputs")
            assert rows == [(False, True, True)] * 2
            house.write(paths[0])
            await leader.scan()
            await leader.back_up()
        rows = await house.rows("SELECT vanished_at IS NULL, hot_storage, cold_storage FROM generated_outputs")
        assert sorted(rows) == [(False, False, True), (True, True, True)]

    run(main())
    assert house.object(paths[1]) == b"png"


def test_a_source_that_is_not_mounted_makes_nothing_vanish(house: House) -> None:
    for number in range(10):
        house.make(f"u{number}/2026/01/12")

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            await leader.back_up()
            house.outputs.rename(house.root / "elsewhere")
            assert "is it mounted" in (await leader.scan()).problem
            house.outputs.mkdir()
            assert "10 of 10 directories of outputs are gone" in (await leader.scan()).problem
            await leader.back_up()
        assert await house.rows("SELECT 1 FROM generated_outputs WHERE vanished_at IS NOT NULL") == []
        assert await house.rows("SELECT count(*) FROM output_days") == [(10,)]

    run(main())


def test_no_outputs_root_and_no_outputs_is_nothing_to_complain_of(house: House) -> None:
    house.outputs.rmdir()

    async def main() -> None:
        async with house.leading() as leader:
            assert await leader.scan() == Scanned()

    run(main())
