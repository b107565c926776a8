"""Outputs are deleted everywhere, in steps that can be killed; nothing comes back, and nothing else goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from tests.controller.house import connected
from tests.controller.moving import stub_path
from tests.controller.outputs import BUCKET, DAY, House, Killed, Leader
from tests.controller.test_output_moves import end_grace, known, read, trash
from tests.objects.servers import Files
from tests.servers import run
from tierd.controller.leader import NotLeaderError
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.outputs.deletion import Deletion
from tierd.errors import UsageError

USER = "user123"
ROWS = "SELECT count(*) FROM generated_outputs"
STATES = "SELECT state FROM output_erasures ORDER BY asked_at"


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


def id_of(path: str) -> UUID:
    """The UUID of an output."""
    return UUID(path.rpartition("/")[2][:36])


async def ask(house: House, path: str | None, user: str = USER) -> int:
    """Somebody wants it deleted, or all that the user has."""
    async with connected(house.dsn) as connection:
        return await output_deletion.ask(connection, user, id_of(path) if path else None, "test")


async def standing(house: House, wish: int) -> Deletion:
    async with connected(house.dsn) as connection:
        return await output_deletion.standing(connection, wish)


async def work(leader: Leader) -> None:
    """Plan and carry out all that can be."""
    while await leader.work.output_work.deletion.round():
        pass
    for _ in range(3):
        await leader.work.output_work.erasure.round()


async def demoted(house: House, leader: Leader, *, grace_over: bool) -> None:
    """Everything is cold."""
    await known(leader)
    await leader.clean_up()
    if grace_over:
        await end_grace(house)
        await leader.work.moves.resume_all()


def objects(house: House) -> list[str]:
    """Keys of what the object store has of outputs, but for manifests."""
    top = house.root / "objects" / BUCKET
    found = (str(path.relative_to(top)) for path in (top / "outputs").rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".manifest"))


def files(house: House) -> list[str]:
    """All files of the source, but for what is known of stubs."""
    top = house.root / "source"
    return sorted(
        str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() and "origins" not in path.parts
    )


# --- everywhere ---


@pytest.mark.parametrize("where", ["hot", "in grace", "cold"])
def test_one_is_deleted_everywhere_and_its_neighbour_stays(house: House, where: str) -> None:
    gone, stays = house.make(content=b"gone"), house.make(content=b"stays")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            if where != "hot":
                await demoted(house, leader, grace_over=where == "cold")
            wish = await ask(house, gone)
            await work(leader)
            found = await standing(house, wish)
            assert (found.outputs, found.deleted, found.deleted_everywhere) == (1, 1, True)
            assert await house.rows("SELECT filename FROM generated_outputs") == [(stays.split("/", 1)[1],)]
            await end_grace(house)
            await leader.work.moves.resume_all()
            assert await house.rows("SELECT DISTINCT state FROM moves WHERE state <> 'done'") == []

    run(main())
    assert (read(house, gone), read(house, stays)) == (None, b"stays")
    assert [name for name in objects(house) if str(id_of(gone)) in name] == []
    assert [name for name in objects(house) if str(id_of(stays)) in name] != []
    assert [name for name in files(house) if str(id_of(gone)) in name] == []
    assert trash(house) == []


def test_all_versions_of_an_object_go(house: House) -> None:
    path = house.make(content=b"one")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            house.write(path, b"two!")
            await house.told(path, written_age_ns=1)
            await leader.back_up()
            assert (house.object(path, 1), house.object(path, 2)) == (b"one", b"two!")
            await ask(house, path)
            await work(leader)

    run(main())
    assert objects(house) == []


def test_a_user_is_erased_in_batches_and_nobody_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_deletion, "PATHS_MAX", 2)
    mine = [house.make(f"{USER}/2026/01/{day:02}") for day in (1, 1, 1, 2, 3)]
    other = house.make("other/2026/01/01", content=b"other")
    unknown = house.make(f"{USER}/2026/02/01", content=b"nobody told of it")
    foreign = house.write(f"{USER}/2026/01/03/cat.png")

    async def main() -> None:
        async with house.leading() as leader:
            (house.outputs / unknown).rename(house.root / "aside")
            await known(leader)
            await leader.clean_up()
            (house.root / "aside").rename(house.outputs / unknown)
            stray = house.root / "objects" / BUCKET / f"outputs/{USER}/2026/01/09/v7/{uuid4()}.png"
            stray.parent.mkdir(parents=True)
            stray.write_bytes(b"of a row that was lost")
            wish = await ask(house, None)
            await work(leader)
            await work(leader)
            found = await standing(house, wish)
            assert (found.outputs, found.deleted_everywhere) == (len(mine) + 1, True)
            assert await house.rows("SELECT count(*) FROM output_erasures WHERE date <> ''") == [(5,)]
            assert await house.rows("SELECT user_id FROM generated_outputs") == [("other",)]

    run(main())
    assert files(house) == [f".tierd/trash/{n}/{other.rpartition('/')[2]}" for n in move_of(house, "other")] + sorted(
        [f"outputs/{foreign}", str(stub_path(house.outputs / other).relative_to(house.root / "source"))]
    )
    assert {name.split("/")[1] for name in objects(house)} == {"other"}
    assert not (house.outputs / USER / "2026/02").exists(), "what is empty is gone, too"
    assert read(house, other) == b"other"


def move_of(house: House, user: str) -> list[int]:
    return [number for (number,) in run(house.rows("SELECT id FROM moves WHERE subject LIKE $1", f"outputs/{user}/%"))]


# --- nothing comes back ---


def test_stale_news_bring_nothing_back(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
            minute = 60 * 10**9
            await house.told(path, written_age_ns=minute, opens=1, access_age_ns=minute)
            await house.told(path, opens=1, access_age_ns=0)
            assert await house.rows(ROWS) == [(0,)], "from the backlog of a node; and of one who still reads it"

    run(main())


def test_one_that_is_written_again_is_a_new_output_with_objects_of_its_own(house: House) -> None:
    path = house.make(content=b"old")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)
            house.write(path, b"new")
            await house.told(path, written_age_ns=0)
            await leader.back_up()
            assert await house.rows("SELECT version, cold_storage FROM generated_outputs") == [(2, True)]
            await house.rows("UPDATE output_erasures SET deleted_at = now() - interval '40 days' RETURNING 1")
            await leader.work.output_work.erasure.round()
            assert await house.rows("SELECT 1 FROM output_tombstones") == []

    run(main())
    assert (house.object(path, 1), house.object(path, 2)) == (None, b"new")
    assert (house.outputs / path).read_bytes() == b"new"


def test_a_scan_between_plan_and_deletion_registers_nothing_and_what_came_back_goes_again(house: House) -> None:
    path = house.make()
    copy = house.root / "copy"
    os.link(house.outputs / path, copy)

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            while await leader.work.output_work.deletion.round():
                pass
            await leader.scan()
            assert await house.rows(ROWS) == [(0,)]

    run(main())


def test_a_file_that_was_replaced_since_it_was_planned_stays(house: House) -> None:
    path = house.make(content=b"old")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            while await leader.work.output_work.deletion.round():
                pass
            (house.root / "new").write_bytes(b"new")
            (house.root / "new").rename(house.outputs / path)
            await work(leader)
            await leader.scan()
            await leader.back_up()
            assert await house.rows("SELECT cold_storage FROM generated_outputs") == [(True,)]

    run(main())
    assert (house.outputs / path).read_bytes() == b"new"
    assert house.object(path, 2) == b"new"
    assert house.object(path, 1) is None
    assert trash(house) == []


def test_one_that_comes_between_the_look_and_the_deletion_goes_back(house: House) -> None:
    path = house.make(content=b"old")

    def at(effect: str) -> None:
        if effect == "hide output":
            (house.root / "new").write_bytes(b"new")
            (house.root / "new").rename(house.outputs / path)

    async def main() -> None:
        async with house.leading(at) as leader:
            await known(leader)
            await ask(house, path)
            await work(leader)

    run(main())
    assert (house.outputs / path).read_bytes() == b"new"
    assert trash(house) == []


def test_books_that_are_older_than_the_deletion_say_that_nothing_is_there(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            before = await house.rows("SELECT * FROM generated_outputs")
            assert before
            (house.outputs / path).unlink()
            for file in (house.root / "objects").rglob("*.png"):
                file.unlink()
            await leader.scan()
            await leader.back_up()
            rows = await house.rows("SELECT hot_storage, cold_storage, vanished_at IS NOT NULL FROM generated_outputs")
            assert rows == [(False, False, True)]

    run(main())


# --- removed through an overlay ---


async def removed(house: House, leader: Leader, path: str, ended: int | None = None) -> None:
    """A node tells that a user removed it, and somebody looks."""
    for file in (house.outputs / path, stub_path(house.outputs / path)):
        file.unlink(missing_ok=True)
    await house.told(path, removed_age_ns=0, ended=ended)  # type: ignore[arg-type]
    await leader.back_up()
    await work(leader)


@pytest.mark.parametrize("where", ["hot", "in grace", "cold"])
def test_what_was_removed_on_a_node_is_deleted_everywhere(house: House, where: str) -> None:
    gone, stays = house.make(content=b"gone"), house.make(content=b"stays")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            if where != "hot":
                await demoted(house, leader, grace_over=where == "cold")
            await removed(house, leader, gone, None if where == "hot" else 1)
            assert await house.rows("SELECT filename FROM generated_outputs") == [(stays.split("/", 1)[1],)]

    run(main())
    assert [name for name in objects(house) if str(id_of(gone)) in name] == []
    assert read(house, stays) == b"stays"
    assert [path.name for path in trash(house)] == ([stays.rpartition("/")[2]] if where == "in grace" else [])


def test_an_object_that_a_renamed_cold_file_needs_stays(house: House) -> None:
    path = house.make(content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            stub_path(house.outputs / path).rename(house.outputs / DAY / ".tierd/cold/favourite.png")
            house.write(path, b"second")
            await house.told(path, written_age_ns=0)
            await leader.back_up()
            await removed(house, leader, path)
            assert await house.rows(ROWS) == [(0,)]

    run(main())
    assert house.object(path, 2) is None
    assert house.object(path, 1) == b"first", "favourite.png stands for it"
    assert read(house, f"{DAY}/favourite.png") == b"first"


def test_one_object_may_have_two_cold_files(house: House) -> None:
    """The copy may have got the inode number of what left, too: it must not be taken for it and end its stub."""
    path = house.make(content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            assert await house.rows("SELECT inode FROM generated_outputs") == [(0,)]
            stub_path(house.outputs / path).rename(house.outputs / DAY / ".tierd/cold/favourite.png")
            house.write(path, b"first")  # a copy of it
            await house.told(path, written_age_ns=0)
            await leader.back_up()
            await house.rows("UPDATE generated_outputs SET hot_since = now() - interval '30 days' RETURNING 1")
            await leader.clean_up()
            await end_grace(house)
            await leader.work.moves.resume_all()
            assert stub_path(house.outputs / path).exists()
            await removed(house, leader, path, 1)
            assert await house.rows(ROWS) == [(0,)]

    run(main())
    assert read(house, f"{DAY}/favourite.png") == b"first"


@pytest.mark.parametrize("content", [b"first", b"changed"])
def test_one_that_was_brought_back_and_removed_leaves_no_object(house: House, content: bytes) -> None:
    path = house.make(content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            stub = stub_path(house.outputs / path)
            stub.chmod(0o644)  # as a node does that brought its bytes
            stub.write_bytes(content)
            stub.rename(house.outputs / path)
            await house.told(path, written_age_ns=0)
            await leader.back_up()
            assert await house.rows("SELECT stub_version, loose FROM generated_outputs") == [(None, [])]
            await removed(house, leader, path)

    run(main())
    assert objects(house) == []


def test_one_that_is_there_again_is_not_deleted(house: House) -> None:
    path = house.make(content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            (house.outputs / path).unlink()
            await house.told(path, removed_age_ns=0)
            house.write(path, b"second")
            await work(leader)
            assert await house.rows(ROWS) == [(1,)], "nobody has looked yet"
            await leader.back_up()
            await work(leader)
            assert await house.rows("SELECT removed_at IS NULL FROM generated_outputs") == [(True,)]

    run(main())
    assert (house.outputs / path).read_bytes() == b"second"


def test_one_that_vanished_and_was_not_removed_keeps_its_object(house: House) -> None:
    path = house.make(content=b"first")

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            (house.outputs / path).unlink()
            await leader.scan()
            await leader.back_up()
            await work(leader)
            assert await house.rows(ROWS) == [(1,)]

    run(main())
    assert house.object(path) == b"first"


# --- nodes ---


async def register(house: House, *nodes: str) -> None:
    for node in nodes:
        await house.rows("INSERT INTO nodes (node_id, boot) VALUES ($1, gen_random_uuid()) RETURNING 1", node)


async def confirm(house: House, node: str) -> None:
    await house.rows(
        "INSERT INTO output_erasure_nodes (erasure_id, node_id) SELECT id, $1 FROM output_erasures RETURNING 1", node
    )


def test_objects_wait_for_every_node(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await register(house, "a", "b")
            await known(leader)
            wish = await ask(house, path)
            await work(leader)
            assert not (house.outputs / path).exists()
            assert house.object(path) == b"content", "somebody may read it"
            await confirm(house, "a")
            await work(leader)
            assert (await standing(house, wish)).nodes == ["b"]
            assert house.object(path) == b"content"
            await confirm(house, "b")
            await work(leader)
            assert (await standing(house, wish)).deleted_everywhere

    run(main())
    assert objects(house) == []


def test_a_node_that_says_nothing_holds_up_objects_for_a_while_and_the_tombstone_for_ever(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await register(house, "a")
            await known(leader)
            wish = await ask(house, path)
            await work(leader)
            await house.rows("UPDATE output_erasures SET hidden_at = now() - interval '2 hours' RETURNING 1")
            await work(leader)
            assert objects(house) == []
            found = await standing(house, wish)
            assert (found.gone, found.deleted_everywhere, found.nodes) == (True, False, ["a"])
            await house.rows("UPDATE output_erasures SET deleted_at = now() - interval '40 days' RETURNING 1")
            await work(leader)
            assert await house.rows("SELECT count(*) FROM output_tombstones") == [(1,)]
            await confirm(house, "a")
            await work(leader)
            assert await house.rows("SELECT count(*) FROM output_tombstones") == [(0,)]

    run(main())


# --- refusals and fences ---


def test_only_what_a_user_has_can_be_asked_for(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
        for user, wanted in (("other", path), (USER, f"{DAY}/{uuid4()}.png"), ("..", None), ("a/b", None)):
            with pytest.raises(UsageError):
                await ask(house, wanted, user)
        assert await house.rows("SELECT 1 FROM output_delete_wishes") == []

    run(main())


def test_who_no_longer_leads_deletes_nothing(house: House) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            await ask(house, path)
            while await leader.work.output_work.deletion.round():
                pass
            await house.rows("UPDATE leader SET epoch = epoch + 1 RETURNING 1")
            with pytest.raises(NotLeaderError):
                await leader.work.output_work.erasure.round()

    run(main())
    assert (house.outputs / path).exists()


def test_who_is_followed_between_two_steps_deletes_nothing(house: House) -> None:
    path = house.make()

    def at(effect: str) -> None:
        if effect == "begin hide":
            thread = Thread(target=lambda: run(house.rows("UPDATE leader SET epoch = epoch + 1 RETURNING 1")))
            thread.start()
            thread.join()

    async def main() -> None:
        async with house.leading(at) as leader:
            await known(leader)
            await ask(house, path)
            with pytest.raises(NotLeaderError):
                await work(leader)

    run(main())
    assert (house.outputs / path).exists()


def test_an_object_store_that_fails_is_asked_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    path = house.make()

    async def main() -> None:
        async with house.leading() as leader:
            await known(leader)
            wish = await ask(house, path)
            with monkeypatch.context() as patched, capture_logs():
                patched.setattr(type(house.store), "delete", lambda *_: None)
                await work(leader)
            found = await standing(house, wish)
            assert (found.deleted, found.gone) == (0, False)
            assert "still there" in (found.error or "")
            await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            await work(leader)
            assert (await standing(house, wish)).gone

    run(main())
    assert objects(house) == []


# --- kills ---


async def whole(house: House, leader: Leader, path: str) -> None:
    """One deletion from the wish to the end of its tombstone."""
    if not await house.rows("SELECT 1 FROM output_delete_wishes WHERE output_id = $1", id_of(path)):
        await ask(house, path, path.split("/", maxsplit=1)[0])
    await work(leader)
    await house.rows("UPDATE output_erasures SET deleted_at = now() - interval '40 days' RETURNING 1")
    await leader.work.output_work.erasure.round()


async def prepared(house: House, leader: Leader, where: str, user: str) -> tuple[str, str]:
    gone, stays = (house.make(f"{user}/2026/01/12", content=os.urandom(50)) for _ in range(2))
    await known(leader)
    if where != "hot":
        await demoted(house, leader, grace_over=where == "cold")
    return gone, stays


@pytest.mark.parametrize(
    "where", ["in grace", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("hot", "cold"))]
)
def test_a_deletion_killed_between_any_two_steps_ends(house: House, where: str) -> None:
    async def one(number: int, count: Callable[[], None]) -> None:
        armed = False

        def at(_: str) -> None:
            if armed:
                count()

        async with house.leading(at) as leader:
            gone, stays = await prepared(house, leader, where, f"u{number}")
            content = read(house, stays)
        with suppress(Killed):
            async with house.leading(at) as leader:
                armed = True
                await whole(house, leader, gone)
        armed = False
        async with house.leading(at) as leader:
            await whole(house, leader, gone)
            await end_grace(house)
            await leader.work.moves.resume_all()
        assert read(house, gone) is None
        assert read(house, stays) == content
        assert [name for name in (*objects(house), *files(house)) if str(id_of(gone)) in name] == []
        states = await house.rows(
            "SELECT DISTINCT state FROM moves WHERE subject = $1", f"outputs/u{number}/2026/01/12"
        )
        assert states in ([], [("done",)])
        for table in ("output_tombstones", "output_erasures"):
            assert await house.rows(f"SELECT 1 FROM {table}") == []

    async def main() -> None:
        effects = 0

        def tell() -> None:
            nonlocal effects
            effects += 1

        await one(0, tell)
        total = effects
        assert total > 12
        for last in range(1, total + 1):
            left = last

            def kill() -> None:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed

            try:
                await one(last, kill)
            except BaseException as error:
                error.add_note(f"killed at {last} of {total}")
                raise

    run(main(), seconds=300)


def test_one_that_is_restored_while_its_deletion_is_planned_goes_too(house: House) -> None:
    path = house.make(content=b"content")
    restored = house.write("draft", b"content")

    async def main() -> None:
        def restore(effect: str) -> None:
            if effect == "begin bury" and (house.outputs / restored).exists():
                (house.outputs / restored).rename(house.outputs / path)
                house.meanwhile("UPDATE generated_outputs SET news = news + 1")

        async with house.leading(restore) as leader:
            await known(leader)
            (house.outputs / path).unlink()
            await ask(house, path)
            await work(leader)
            assert await house.rows(ROWS) == [(0,)]

    run(main())
    assert files(house) == []


def test_all_versions_of_a_compressed_one_go(house: House) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await demoted(house, leader, grace_over=True)
            await house.rows("UPDATE generated_outputs SET reserved = 2 RETURNING 1")
            Files(house.root / "objects").put(BUCKET, objects(house)[0].replace("/v1/", "/v2/"), b"packed")
            assert len(objects(house)) == 2
            await ask(house, path)
            await work(leader)

    run(main())
    assert objects(house) == []
