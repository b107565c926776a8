"""What becomes of a demoted model's bytes in the end: deleted, put back or kept, and always there once more."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.controller.fate import Fate
from tests.controller.house import connected, settings_for, until
from tests.controller.moving import BUCKET, FILES, MODEL, Site, demote, stub_path
from tests.servers import run
from tierd.controller.leader import NotLeaderError, begin_epoch
from tierd.controller.moves.books import Books, StateChanged, set_state
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.steps import MoveState
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.source.moved_file import MoveRefused
from tierd.objects.keys import manifest_key, object_key
from tierd.postgres import Database
from tierd.recall import fetch_from, recall
from tierd.stub_files import locked
from tierd.stubs import COLD_MARK

LEASE = "INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-7b')"
PERMISSIONS = 0o7777


def object_path(site: Site, name: str, version: int = 1) -> Path:
    """Where an object is in the directory that stands for a store."""
    return site.root / "objects" / BUCKET / object_key(MODEL, version, name.encode())


async def delete(site: Site, at: Fate | None = None) -> MoveState:
    """The grace ends, and the latest move goes on."""
    await site.end_grace()
    async with site.leading(at or Fate()) as moves:
        await moves.resume_all()
        return await moves.advance(await site.value("SELECT max(id) FROM moves"))


# --- deleting ---


@pytest.mark.parametrize(
    ("query", "says"),
    [(LEASE, "is open on"), ("UPDATE nodes SET leases_at = NULL", "no report"), ("DELETE FROM nodes", "no node")],
)
def test_nothing_is_deleted_while_it_may_be_in_use(query: str, says: str, site: Site) -> None:
    run(demote(site))
    run(site.execute(query))
    assert run(delete(site)) is MoveState.IN_GRACE
    assert says in str(run(site.move())[1])
    assert len(site.trash()) == 5


def test_a_lease_between_two_files_stops_the_next_batch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.controller.moves.workshop.BATCH_FILES", 1)
    run(demote(site))
    fate = Fate(0, lambda effect: site.meanwhile(LEASE + " ON CONFLICT DO NOTHING") if effect == "deleted" else None)
    assert run(delete(site, fate)) is MoveState.DELETING
    assert len(site.trash()) == 4
    run(site.execute("DELETE FROM node_leases"))
    assert run(delete(site)) is MoveState.DONE
    assert {name: site.read(name) for name in FILES} == FILES


def test_what_was_written_through_an_old_descriptor_comes_back(site: Site) -> None:
    with (site.model / "unet/weights.bin").open("ab") as file:
        run(demote(site))
        file.write(b"newer")
    assert run(delete(site)) is MoveState.DONE
    assert (site.model / "unet/weights.bin").read_bytes() == FILES["unet/weights.bin"] + b"newer"
    assert not stub_path(site.model / "unet/weights.bin").exists()
    assert site.hot_names() == {"empty", "unet/weights.bin"}
    events = run(site.value("SELECT array_agg(event || ' ' || reason) FROM move_events WHERE event = 'put back'"))
    assert events == ["put back 'unet/weights.bin' was written to through an old descriptor"]
    assert site.litter() == []


def test_what_was_written_in_the_last_moment_comes_back(site: Site) -> None:
    with (site.model / "unet/weights.bin").open("r+b", buffering=0) as file:
        run(demote(site))
        fate = Fate(0, lambda effect: file.write(b"x") if effect == "begin delete files" else None)  # type: ignore[arg-type, func-returns-value]
        assert run(delete(site, fate)) is MoveState.DONE
    written = (site.model / "unet/weights.bin").read_bytes()
    assert written[:1] == b"x"
    assert len(written) == len(FILES["unet/weights.bin"])


def test_a_write_with_a_restored_mtime_is_found(site: Site) -> None:
    path = site.model / "unet/weights.bin"
    mtime_ns = path.stat().st_mtime_ns
    with path.open("r+b", buffering=0) as file:
        run(demote(site))
        file.write(b"other")
        os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
        assert run(delete(site)) is MoveState.DONE
    assert path.read_bytes() == b"other" + FILES["unet/weights.bin"][5:]


def test_bytes_of_a_file_that_was_removed_and_written_to_are_kept(site: Site) -> None:
    with (site.model / "unet/weights.bin").open("ab") as file:
        run(demote(site))
        file.write(b"newer")
    stub_path(site.model / "unet/weights.bin").unlink()
    assert run(delete(site)) is MoveState.DONE
    assert site.trash() == ["1/unet/weights.bin"]
    assert run(site.value("SELECT array_agg(path) FROM move_files")) == [b"unet/weights.bin"]
    assert run(site.value("SELECT reason FROM move_events WHERE event = 'kept in the trash'")).endswith("written to")


def test_a_change_of_attributes_alone_is_told_by_the_bytes(site: Site) -> None:
    run(demote(site))
    (site.source / ".tierd/trash/1/unet/weights.bin").chmod(0o600)
    assert run(delete(site)) is MoveState.DONE
    assert site.litter() == []
    assert site.read("unet/weights.bin") == FILES["unet/weights.bin"]


@pytest.mark.parametrize("lost", ["object", "manifest", "size"])
def test_without_its_copy_nothing_is_deleted(lost: str, site: Site) -> None:
    before = site.snapshot()
    run(demote(site))
    if lost == "object":
        object_path(site, "unet/weights.bin").unlink()
    elif lost == "manifest":
        (site.root / "objects" / BUCKET / manifest_key(MODEL, 1)).unlink()
    else:
        os.truncate(object_path(site, "unet/weights.bin"), 1)
    assert run(delete(site)) is MoveState.ABANDONED
    assert site.snapshot() == before
    assert site.litter() == []
    assert run(site.value("SELECT tier FROM model_locations")) == "hot"


def test_a_store_that_is_not_there_is_waited_for(site: Site) -> None:
    """A directory that is not mounted looks like one from which all was removed."""
    run(demote(site))
    (site.root / "objects" / BUCKET).rename(site.root / "elsewhere")
    assert run(delete(site)) is MoveState.DELETING
    assert len(site.trash()) == 5
    (site.root / "elsewhere").rename(site.root / "objects" / BUCKET)
    assert run(delete(site)) is MoveState.DONE


# --- undo ---


async def undo(site: Site) -> MoveState:
    async with site.leading() as moves:
        return await moves.advance(await moves.undo(site.model_id))


def test_undo_leaves_no_trace(site: Site) -> None:
    before, created = site.snapshot(), run(site.value("SELECT created_at FROM model_locations"))
    inodes = {name: (site.model / name).stat().st_ino for name in FILES}
    run(demote(site))
    assert run(undo(site)) is MoveState.DONE
    assert site.snapshot() == before
    assert {name: (site.model / name).stat().st_ino for name in FILES} == inodes
    assert site.litter() == []
    assert list(site.model.rglob(".tierd")) == []
    assert run(site.value("SELECT count(*) FROM move_files")) == 0
    assert run(site.value("SELECT (tier, created_at) FROM model_locations")) == ("hot", created)
    assert run(site.value("SELECT array_agg(kind || ' ' || state ORDER BY id) FROM moves")) == [
        "demote abandoned",
        "undo done",
    ]


def test_undo_keeps_what_users_changed_meanwhile(site: Site) -> None:
    run(demote(site))
    stub = stub_path(site.model / "model-2.safetensors")
    stub.chmod(0o600 | COLD_MARK)
    os.utime(stub, ns=(5, 7))
    os.setxattr(stub, "user.more", b"1")
    os.removexattr(stub, "user.origin")
    if os.geteuid() == 0:
        os.chown(stub, 1, 2)
    stub_path(site.model / "config.json").unlink()
    moved = stub_path(site.model / "moved")
    stub_path(site.model / "model-1.safetensors").rename(moved)
    weights = stub_path(site.model / "unet/weights.bin")
    recall(str(weights), site.origin(site.model / "unet/weights.bin"), fetch_from(site.store, BUCKET))
    with weights.open("ab") as file:
        file.write(b"newer")
    weights.rename(site.model / "unet/weights.bin")

    assert run(undo(site)) is MoveState.DONE
    for name in ("model-2.safetensors", "unet/same.safetensors"):
        st = (site.model / name).stat()
        assert (st.st_mode & PERMISSIONS, st.st_mtime_ns, st.st_nlink) == (0o600, 7, 2)
        assert os.listxattr(site.model / name) == ["user.more"]
        assert (site.model / name).read_bytes() == FILES["model-2.safetensors"]
        if os.geteuid() == 0:
            assert (st.st_uid, st.st_gid) == (1, 2)
    assert site.read("config.json") is None
    assert site.read("model-1.safetensors") is None
    assert site.read("moved") == FILES["model-1.safetensors"]
    assert site.read("unet/weights.bin") == FILES["unet/weights.bin"] + b"newer"
    assert site.litter() == []
    left = run(
        site.value(
            "SELECT array_agg(split_part(reason, ':', 1) ORDER BY id) FROM move_events WHERE event = 'left alone'"
        )
    )
    assert left == ["'config.json'", "'model-1.safetensors'", "'unet/weights.bin'"]


def test_names_that_return_one_by_one_keep_the_count_of_links(site: Site) -> None:
    """At each step of an undo both names of a file say that it has two, whether they are hot or cold just then."""
    names = ("model-2.safetensors", "unet/same.safetensors")
    run(demote(site))
    seen: list[tuple[str, list[bool], list[int]]] = []

    def look(effect: str) -> None:
        paths = [site.model / name for name in names]
        found = [path if path.exists() else stub_path(path) for path in paths]
        seen.append((effect, [path.exists() for path in paths], [path.stat().st_nlink for path in found]))

    async def main() -> None:
        async with site.leading(look) as moves:
            assert await moves.advance(await moves.undo(MODEL)) is MoveState.DONE

    run(main())
    assert any(sum(hot) == 1 for _, hot, _ in seen), "one name is back, the other one is not"
    assert [each for each in seen if each[2] != [2, 2]] == []


def test_a_link_that_a_user_made_to_a_cold_file_stays_one(site: Site) -> None:
    run(demote(site))
    os.link(stub_path(site.model / "config.json"), stub_path(site.model / "linked"))
    assert run(undo(site)) is MoveState.DONE
    assert site.read("linked") == FILES["config.json"]
    assert site.hot_names() == {*FILES, "unet/same.safetensors"}


def test_the_trash_keeps_what_the_store_lost(site: Site) -> None:
    """A stub elsewhere stands for it, and its object is damaged: the bytes in the trash are the last ones."""
    run(demote(site))
    stub_path(site.model / "unet/weights.bin").rename(stub_path(site.model / "unet/moved"))
    path = object_path(site, "unet/weights.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run(undo(site)) is MoveState.DONE
    assert site.trash() == ["1/unet/weights.bin"]
    assert (site.source / ".tierd/trash/1/unet/weights.bin").read_bytes() == FILES["unet/weights.bin"]


def test_what_is_too_late_or_never_was_cannot_be_undone(site: Site) -> None:
    with pytest.raises(MoveRefused, match="was never demoted"):
        run(undo(site))
    run(demote(site))
    run(delete(site))
    with pytest.raises(MoveRefused, match="it is done"):
        run(undo(site))


@pytest.mark.parametrize("effect", ["put object", "put manifest", "make stub", "take"])
def test_a_demotion_on_its_way_can_be_undone(effect: str, site: Site) -> None:
    before = site.snapshot()

    async def main() -> None:
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()
        go_on = threading.Event()

        def stop(one: str) -> None:
            if one == effect and not go_on.is_set():
                loop.call_soon_threadsafe(reached.set)
                go_on.wait()

        async with site.leading(Fate(0, stop)) as moves:
            move = await moves.demote(MODEL, "test")
            work = asyncio.create_task(moves.advance(move))
            await reached.wait()
            undone = asyncio.create_task(moves.undo(MODEL))
            await asyncio.sleep(0)
            go_on.set()
            await work
            await moves.advance(await undone)  # which is another move if the demotion was faster
            assert (await site.value("SELECT state FROM moves WHERE id = $1", move)) == "abandoned"

    run(main())
    assert site.snapshot() == before
    assert site.litter() == []


def test_nobody_waits_for_a_file_that_comes_back_just_now(site: Site) -> None:
    """A recall may take hours, and an undo works within transactions."""
    run(demote(site))
    with locked(str(stub_path(site.model / "config.json"))):
        assert run(undo(site)) is MoveState.DONE
    assert site.read("config.json") == FILES["config.json"]
    assert site.hot_names() == {*FILES, "unet/same.safetensors"} - {"config.json"}


def test_effects_do_not_wait_for_long_transfers(site: Site) -> None:
    """A transaction that waits for the thread that stores a large file would be ended by the database."""
    run(demote(site))
    other = replace(site, model_id="models/other")
    other.make_model()
    storing, go_on = threading.Event(), threading.Event()

    def store_slowly(effect: str) -> None:
        if effect == "put object":
            storing.set()
            assert go_on.wait(60)

    async def main() -> None:
        await other.register()
        async with site.leading(store_slowly, parallel_files=1) as moves:
            move = await moves.demote(other.model_id, "test")
            work = asyncio.create_task(moves.advance(move))
            await asyncio.to_thread(storing.wait)
            try:
                assert await moves.advance(await moves.undo(MODEL)) is MoveState.DONE
            finally:
                go_on.set()
            assert await work is MoveState.IN_GRACE

    run(main())


def test_of_two_wishes_one_is_refused(site: Site) -> None:
    async def main() -> None:
        async with site.leading() as moves:
            wishes = (moves.demote(MODEL, "one"), moves.demote(MODEL, "two"), moves.demote(MODEL, "three"))
            done = await asyncio.gather(*wishes, return_exceptions=True)
        assert sorted(type(one).__name__ for one in done) == ["MoveRefused", "MoveRefused", "int"]

    run(main())


def test_a_move_that_somebody_else_carried_on_is_not_set_back(site: Site) -> None:
    async def main() -> None:
        async with site.leading(), Database(settings_for(site.dsn)) as database:
            books = Books(database, await site.value("SELECT epoch FROM leader"))
            move_id = await site.value("INSERT INTO moves (kind, subject) VALUES ('demote', 'models/x') RETURNING id")
            move = await books.move(move_id)
            await site.execute("UPDATE moves SET state = 'verifying'")
            with pytest.raises(StateChanged):
                async with books.writing() as connection:
                    await set_state(connection, books, move, MoveState.COPYING)
            assert await site.value("SELECT state FROM moves") == "verifying"

    run(main())


# --- leaders ---


def test_a_leader_whose_session_ended_changes_nothing_more(site: Site) -> None:
    """Whatever it had begun: each of its batches says no. The next leader ends the move."""
    run(demote(site))
    run(site.end_grace())

    async def main() -> None:
        async with connected(site.dsn) as session, Database(settings_for(site.dsn)) as database:
            epoch = await begin_epoch(session, "old")
            tree = HotTree(site.source)
            ended: list[str] = []

            def end_session(effect: str) -> None:
                if effect == "committed begin to delete" and not ended:
                    ended.append(effect)
                    site.meanwhile("SELECT pg_terminate_backend($1)", session.get_server_pid())

            with Moves(database, tree, site.store, site.settings, epoch, end_session) as old:
                for _ in range(3):
                    with pytest.raises(NotLeaderError):
                        await old.resume_all()
                    assert len(site.trash()) == 5
                with pytest.raises(NotLeaderError):
                    await old.undo(MODEL)
                async with connected(site.dsn) as watcher:
                    await until(watcher, "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND objid = 2")
                async with site.leading() as new:
                    await new.resume_all()
                with pytest.raises(NotLeaderError):
                    await old.demote(MODEL, "again")
            tree.close()

    run(main())
    assert run(site.move())[0] == "done"
    assert {name: site.read(name) for name in FILES} == FILES


def test_an_effect_that_comes_too_late_is_none(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that hangs longer than the database lets a transaction live: somebody else may lead by now."""
    run(demote(site))
    run(site.end_grace())
    monkeypatch.setattr("tierd.controller.moves.workshop._FENCE_SECONDS", -1.0)

    async def main() -> None:
        async with site.leading() as moves:
            await moves.resume_all()
            assert "took too long" in str((await site.move())[1])

    run(main())
    assert len(site.trash()) == 5


def test_what_is_written_through_a_mapping_while_it_is_copied_is_not_lost(site: Site) -> None:
    """A page that is dirty already is written to without a change of any time, until it was written back."""
    path = site.model / "config.json"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0:1] = b"["

        def write(effect: str) -> None:
            if effect == "put manifest":
                mapped[0:1] = b"<"

        async def main() -> None:
            async with site.leading(Fate(0, write)) as moves:
                move = await moves.demote(MODEL, "test")
                await moves.advance(move)
                await site.end_grace()
                await moves.advance(move)

        run(main())
    assert site.read("config.json") == b"<}"
