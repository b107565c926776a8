"""Deletion of outputs while other things go on: demotions, backups, writes, restores, nodes that share a name."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from redis import Redis as SyncRedis
from structlog.testing import capture_logs

from tests.controller.moving import stub_path
from tests.controller.outputs import BUCKET, House, Leader
from tests.controller.reporting import BOOT, OTHER_BOOT, controller_of, send
from tests.controller.test_output_deletion import (
    USER,
    ask,
    confirm,
    demoted,
    end_grace,
    known,
    objects,
    standing,
    trash,
    work,
)
from tests.controller.test_output_moves import read
from tests.servers import run
from tierd.controller.outputs.erasure_news import ErasureNews
from tierd.erasures import WAITING, decode, key_of
from tierd.statistics import Message, OpenReport, encode

DAY = f"{USER}/2026/01/12"


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


async def plan(leader: Leader) -> None:
    """What was asked for is planned, and not begun."""
    while await leader.work.output_work.deletion.round():
        pass


def test_a_file_that_came_back_with_the_sources_books_is_deleted_again(house: House) -> None:
    path = house.make(content=b"content")
    os.link(house.outputs / path, house.root / "copy")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
            os.link(house.root / "copy", house.outputs / path)
            st = (house.outputs / path).stat()
            await house.rows("UPDATE output_tombstones SET ctime_ns = $1 RETURNING 1", st.st_ctime_ns)
            with capture_logs() as logs:
                await leader.scan()
            assert [line["event"] for line in logs] == ["deleted_output_came_back"]
            await work(leader)
            assert await house.rows("SELECT 1 FROM generated_outputs") == []

    run(main())
    assert not (house.outputs / path).exists()


def test_a_day_whose_files_are_on_their_way_is_waited_for(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=False)
            await house.rows("UPDATE moves SET state = 'switching' RETURNING 1")
            wish = await ask(house, path)
            await work(leader)
            found = await standing(house, wish)
            assert (found.hidden, "is on its way" in (found.error or "")) == (0, True)
            assert read(house, path) == b"content"
            await house.rows("UPDATE moves SET state = 'in_grace' RETURNING 1")
            await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            await work(leader)
            assert (await standing(house, wish)).gone

    run(main())


def test_a_demotion_that_has_changed_nothing_yet_is_given_up(house: House) -> None:
    gone, stays = house.make(), house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=False)
            await house.rows("UPDATE moves SET state = 'planned' RETURNING 1")
            await ask(house, gone)
            await work(leader)
            assert await house.rows("SELECT state FROM moves") == [("abandoned",)]

    run(main())
    assert read(house, stays) == b"png"


def test_the_trash_keeps_what_was_written_and_demoted_later(house: House) -> None:
    path = house.make(content=b"old")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
            house.write(path, b"new")
            await house.told(path, written_age_ns=0)
            await leader.back_up()
            await house.rows("UPDATE generated_outputs SET created_at = now() - interval '30 days' RETURNING 1")
            await leader.clean_up()
            assert [file.read_bytes() for file in trash(house)] == [b"new"]
            await house.rows("UPDATE output_erasures SET state = 'planned' RETURNING 1")
            await work(leader)
            assert [file.read_bytes() for file in trash(house)] == [b"new"]
            await end_grace(house)
            await leader.work.moves.resume_all()
            assert await house.rows("SELECT state FROM moves") == [("done",)]

    run(main())
    assert read(house, path) == b"new"


def test_what_is_made_after_the_request_stays_with_its_object(house: House) -> None:
    old, new = house.make(content=b"old"), f"{DAY}/a1b2c3d4-e5f6-7890-abcd-ef1234567890.png"

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            wish = await ask(house, None)
            house.make(name=new.rpartition("/")[2][:36], content=b"new")
            await house.told(new, written_age_ns=0)
            await leader.back_up()
            await plan(leader)
            await work(leader)
            await work(leader)
            assert (await standing(house, wish)).deleted_everywhere
            assert await house.rows("SELECT filename FROM generated_outputs") == [(new.split("/", 1)[1],)]

    run(main())
    assert not (house.outputs / old).exists()
    assert (house.outputs / new).read_bytes() == b"new"
    assert objects(house) == [f"outputs/{DAY}/v1/{new.rpartition('/')[2]}"]


def test_a_backup_that_ends_after_the_deletion_leaves_no_object(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        leaders: list[Leader] = []

        async def delete() -> None:
            await ask(house, path)
            await plan(leaders[0])
            await work(leaders[0])

        def at(effect: str) -> None:
            if effect == "put object":
                asyncio.run_coroutine_threadsafe(delete(), loop).result()

        async with house.leading(at) as leader:
            leaders.append(leader)
            await leader.scan()
            with capture_logs():
                await leader.back_up()

    run(main())
    assert objects(house) == []
    assert not (house.outputs / path).exists()


def test_one_that_is_written_to_while_its_deletion_is_planned_is_found_again(house: House) -> None:
    path = house.make(content=b"old")

    def at(effect: str) -> None:
        if effect == "begin bury":
            (house.outputs / path).write_bytes(b"new one")

    async def main() -> None:
        async with house.leading(at) as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
            await leader.scan()
            await leader.back_up()

    run(main())
    assert (house.outputs / path).read_bytes() == b"new one"
    assert house.object(path, 2) == b"new one"
    assert len(objects(house)) == 1


def test_what_tierd_did_not_write_stays_in_the_bucket(house: House) -> None:
    house.make()
    alien = house.root / "objects" / BUCKET / "outputs" / USER / "notes.txt"

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            alien.write_bytes(b"somebody's")
            await ask(house, None)
            await work(leader)
            await work(leader)

    run(main())
    assert alien.read_bytes() == b"somebody's"


def test_an_undo_is_waited_for_and_then_takes_its_file(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=False)
            move = await leader.work.moves.undo(f"outputs/{DAY}")
            await ask(house, path)
            await work(leader)
            assert stub_path(house.outputs / path).exists()
            assert await leader.work.moves.advance(move) == "done"
            await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            await work(leader)

    run(main())
    assert read(house, path) is None
    assert (trash(house), objects(house)) == ([], [])


def test_who_shares_a_name_confirms_nothing(house: House, url: str, client: SyncRedis) -> None:
    path = house.make()

    def report(boot: object, number: int) -> bytes:
        said = OpenReport(leases=(), erased=(number,))
        return encode(Message(node_id="gpu-1", boot=boot, version="1", sent_ns=1, oldest=1, report=said))  # type: ignore[arg-type]

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
        ((number,),) = await house.rows("SELECT id FROM output_erasures")
        async with controller_of(house.dsn, url) as controller:
            send(client, report(BOOT, number), report(OTHER_BOOT, number))
            with capture_logs():
                await controller()
            assert await controller.rows("SELECT 1 FROM output_erasure_nodes") == []
            send(client, report(OTHER_BOOT, number), report(OTHER_BOOT, number + 1))
            with capture_logs():
                await controller()
            assert await controller.rows("SELECT erasure_id FROM output_erasure_nodes") == [(number,)]

    run(main())


def test_a_deletion_that_is_planned_while_files_are_switched_takes_what_came_of_them(house: House) -> None:
    gone, stays = house.make(content=b"gone"), house.make(content=b"stays")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        leaders: list[Leader] = []

        async def delete() -> None:
            await ask(house, gone)
            await plan(leaders[0])

        def at(effect: str) -> None:
            if effect == "make layer" and leaders:
                asyncio.run_coroutine_threadsafe(delete(), loop).result()
                leaders.clear()

        async with house.leading(at) as leader:
            await known(leader)
            leaders.append(leader)
            await leader.clean_up()
            assert not leaders
            assert len(trash(house)) == 2
            await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            await work(leader)
            assert [file.read_bytes() for file in trash(house)] == [b"stays"]
            await end_grace(house)
            await leader.work.moves.resume_all()
            assert await house.rows("SELECT state FROM moves") == [("done",)]

    run(main())
    assert (read(house, gone), read(house, stays)) == (None, b"stays")


def test_a_stub_that_has_its_bytes_and_not_its_place_goes_too(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            stub = stub_path(house.outputs / path)
            times = stub.stat()
            stub.chmod(0o644)
            stub.write_bytes(b"content")
            os.utime(stub, ns=(times.st_atime_ns, times.st_mtime_ns))
            await ask(house, path)
            await work(leader)

    run(main())
    assert read(house, path) is None


def test_nodes_are_told_again_and_again_until_they_confirm(house: House, url: str, client: SyncRedis) -> None:
    path = house.make()

    async def main() -> None:
        await house.rows("INSERT INTO nodes (node_id, boot) VALUES ('gpu-1', gen_random_uuid()) RETURNING 1")
        async with house.leading() as leader, controller_of(house.dsn, url) as controller:
            news = ErasureNews(controller.database, controller.redis, b"outputs")
            await known(leader)
            await ask(house, path)
            await plan(leader)
            await news.round()
            assert client.zrange(WAITING, 0, -1) == [], "its name is still there"
            await work(leader)
            await news.round()
            assert client.zrange(WAITING, 0, -1) == [], "somebody may open it from his cache of names"
            await house.rows("UPDATE output_erasures SET hidden_at = hidden_at - interval '1 min' RETURNING 1")
            for _ in range(2):
                client.flushall()
                await news.round()
                ((number,),) = await house.rows("SELECT id FROM output_erasures")
                assert client.zrange(WAITING, 0, -1) == [str(number).encode()]
                assert decode(client.get(key_of(number)) or b"") == {f"outputs/{path}".encode()}
            await confirm(house, "gpu-1")
            await news.round()
            assert client.zrange(WAITING, 0, -1) == []

    run(main())


@pytest.mark.parametrize("where", ["hot", "in grace", "cold"])
def test_deletion_in_a_juicefs_volume(juicefs: Path, house: House, where: str) -> None:
    shutil.rmtree(house.root / "source")
    (house.root / "source").symlink_to(tempfile.mkdtemp(dir=juicefs))
    house.outputs.mkdir()
    gone, stays = house.make(content=b"gone"), house.make(content=b"stays")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            if where != "hot":
                await demoted(house, leader, grace_over=where == "cold")
            wish = await ask(house, gone)
            await work(leader)
            assert (await standing(house, wish)).deleted_everywhere

    run(main())
    assert (read(house, gone), read(house, stays)) == (None, b"stays")
    assert len(objects(house)) == 1


@pytest.mark.parametrize("planned", [False, True])
def test_a_source_that_is_not_mounted_is_waited_for(house: House, planned: bool) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            wish = await ask(house, path)
            if planned:
                await plan(leader)
            house.outputs.rename(house.root / "elsewhere")
            with capture_logs():
                await work(leader)
            assert (await standing(house, wish)).hidden == 0
            assert house.object(path) == b"content"
            (house.root / "elsewhere").rename(house.outputs)
            await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            await work(leader)
            assert (await standing(house, wish)).deleted_everywhere

    run(main())
    assert (read(house, path), objects(house)) == (None, [])


def test_what_no_row_knows_goes_also_if_the_source_was_not_mounted_at_first(house: House) -> None:
    house.make(content=b"known")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            unknown = house.make(f"{USER}/2026/01/13", content=b"unknown")
            wish = await ask(house, None)
            house.outputs.rename(house.root / "elsewhere")
            with capture_logs() as logs:
                for _ in range(2):
                    await work(leader)
            assert [line["event"] for line in logs] == ["deletions_wait"]
            (house.root / "elsewhere").rename(house.outputs)
            for _ in range(2):
                await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
                await work(leader)
            assert (await standing(house, wish)).deleted_everywhere
            assert not (house.outputs / unknown).exists()

    run(main())
