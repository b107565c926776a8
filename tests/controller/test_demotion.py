"""A model goes to the cold tier and back: what is where at the end, and what stops it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.controller.fate import Fate
from tests.controller.moving import BUCKET, FILES, MODEL, Site, demote, site_of, stub_path
from tests.servers import run
from tierd.controller.moves.steps import MoveState
from tierd.controller.source.moved_file import MoveRefused
from tierd.errors import UsageError
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import manifest_key, object_key
from tierd.objects.manifest_text import decode
from tierd.stub_files import make_layer
from tierd.stubs import COLD_MARK, Origin, encode

SIZE = sum(map(len, FILES.values()))


# --- the plain case ---


def test_a_model_becomes_cold_and_its_bytes_leave_after_the_grace(site: Site) -> None:
    created = run(site.value("SELECT created_at FROM model_locations"))
    before = site.snapshot()

    async def main() -> None:
        async with site.leading() as moves:
            move = await moves.demote(MODEL, "not read for 90 days")
            assert await moves.advance(move) is MoveState.IN_GRACE
            assert site.hot_names() == {"empty"}
            assert {name: site.read(name) for name in FILES} == FILES
            await moves.resume_all()
            assert await moves.advance(move) is MoveState.IN_GRACE
            assert len(site.trash()) == 5
            await site.end_grace()
            assert await moves.advance(move) is MoveState.DONE

    run(main())
    assert {name: site.read(name) for name in FILES} == FILES
    assert site.litter() == []
    assert run(site.value("SELECT count(*) FROM move_files")) == 0
    row = run(site.value("SELECT (tier, version, files, size_bytes, created_at) FROM model_locations"))
    assert row == ("cold", 1, 5, SIZE, created)
    assert run(site.value("SELECT (done_bytes, size_bytes) FROM moves")) == (SIZE, SIZE)
    after = site.snapshot()
    for name in ("empty", "latest", "void"):
        assert after[name] == before[name]
    stub = after["unet/.tierd/cold/same.safetensors"]
    assert stub == after[".tierd/cold/model-2.safetensors"]
    assert stub[1:] == before["model-2.safetensors"][1:]
    assert stub[0] == oct(0o100640 | COLD_MARK)
    inodes = {stub_path(site.model / name).stat().st_ino for name in ("model-2.safetensors", "unet/same.safetensors")}
    assert len(inodes) == 1


def test_the_manifest_describes_all_of_it(site: Site) -> None:
    run(demote(site))
    path = site.root / "objects" / BUCKET / manifest_key(MODEL, 1)
    manifest = decode(path.read_bytes())
    assert [entry.path for entry in manifest.files] == [
        b"config.json", b"empty", b"model-1.safetensors", b"model-2.safetensors", b"unet/same.safetensors",
        b"unet/weights.bin",
    ]  # fmt: skip
    assert [entry.path for entry in manifest.directories] == [b"", b"unet", b"void"]
    assert [(entry.path, entry.target) for entry in manifest.links] == [(b"latest", b"model-1.safetensors")]
    assert {entry.attributes.xattrs for entry in manifest.files} == {((b"user.origin", b"hub"),)}
    groups = {entry.path: entry.group for entry in manifest.files if entry.group is not None}
    assert set(groups) == {b"model-2.safetensors", b"unet/same.safetensors"}
    assert len(set(groups.values())) == 1
    beside = site.model / ".tierd/origins/llama-7b.v1.manifest"
    assert beside.read_bytes() == path.read_bytes()


def test_a_single_file_is_a_model(site: Site) -> None:
    site.model_id = "models/tiny.gguf"
    site.model.write_bytes(b"weights")

    async def main() -> None:
        await site.register()
        async with site.leading() as moves:
            move = await moves.demote(site.model_id, "old")
            assert await moves.advance(move) is MoveState.IN_GRACE
            assert not site.model.exists()
            assert site.fetch(site.origin(site.model)) == b"weights"
            await moves.advance(await moves.undo(site.model_id))
            assert site.model.read_bytes() == b"weights"
            assert await moves.advance(await moves.demote(site.model_id, "old")) is MoveState.IN_GRACE
            assert site.origin(site.model).version == 2
            await site.end_grace()
            await moves.resume_all()

    run(main())
    assert site.litter() == []


def test_a_stub_that_a_file_hides_is_nobodys(site: Site) -> None:
    """As an overlay leaves it that dies while it renames a file over a cold one."""
    fd = os.open(site.model, os.O_RDONLY)
    make_layer(fd)
    os.close(fd)
    stub_path(site.model / "config.json").touch(COLD_MARK | 0o600)
    assert run(demote(site))[1] is MoveState.IN_GRACE
    assert site.read("config.json") == FILES["config.json"]


def test_files_that_are_cold_stay_what_they_are(site: Site) -> None:
    """A model half of which was demoted before, such as one whose promotion ended in the middle."""
    run(demote(site))

    async def main() -> None:
        async with site.leading() as moves:
            await site.end_grace()
            await moves.resume_all()
            await site.execute("UPDATE model_locations SET tier = 'hot'")
            (site.model / "more.bin").write_bytes(b"more")
            assert await moves.advance(await moves.demote(MODEL, "old")) is MoveState.IN_GRACE

    run(main())
    assert {name: site.read(name) for name in FILES} == FILES
    assert site.read("more.bin") == b"more"
    assert site.origin(site.model / "more.bin").version == 2
    manifest = decode((site.root / "objects" / BUCKET / manifest_key(MODEL, 2)).read_bytes())
    found = {entry.path: entry for entry in manifest.files}
    assert set(found) == {*(name.encode() for name in FILES), b"unet/same.safetensors", b"more.bin"}
    assert {path for path, entry in found.items() if entry.elsewhere is None} == {b"more.bin", b"empty"}
    one = found[b"unet/same.safetensors"]
    assert one.elsewhere == (MODEL, 1, b"model-2.safetensors")
    assert (one.size, one.attributes.mode) == (len(FILES["model-2.safetensors"]), 0o640)
    assert one.attributes.mtime_ns == 1_500_000_000_000_000_007
    assert one.group == found[b"model-2.safetensors"].group
    assert site.origin(site.model / "config.json").version == 1


def test_cold_files_that_nobody_understands_stop_it(site: Site) -> None:
    fd = os.open(site.model, os.O_RDONLY)
    make_layer(fd)
    os.close(fd)
    stub = stub_path(site.model / "odd")
    stub.touch(0o600 | COLD_MARK)
    stub.chmod(0o600 | COLD_MARK)
    with pytest.raises(MoveRefused, match="nobody knows where its bytes are"):
        run(demote(site))
    stub.chmod(0o600)
    with pytest.raises(MoveRefused, match="comes back from the cold tier"):
        run(demote(site))


def test_origins_from_the_future_stop_it(site: Site) -> None:
    """The clock went back, and an inode number that some stub had once is given out again."""
    before = site.snapshot()

    def forge(effect: str) -> None:
        if effect == "write origins" and not list(site.model.glob(".tierd/origins/9*")):
            drafts = (path.stat().st_ino for path in (site.source / ".tierd/drafts").rglob("*") if path.is_file())
            other = Origin("models/other", 1, b"x", 5, "0" * 64)
            (site.model / ".tierd/origins/99999999999999999999-0.json").write_bytes(
                encode(dict.fromkeys(drafts, other))
            )

    async def main() -> None:
        async with site.leading(Fate(0, forge)) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert "is the clock right" in str(run(site.move())[2])
    assert site.snapshot() == before


@pytest.mark.parametrize("effect", ["make stub", "make layer", "write manifest copy", "place stub", "take", "took"])
def test_a_model_that_is_removed_on_the_way_ends_it(effect: str, site: Site) -> None:
    def remove(one: str) -> None:
        if one == effect and site.model.exists():
            shutil.rmtree(site.model)

    async def main() -> None:
        async with site.leading(Fate(0, remove)) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert not site.model.exists()
    assert site.litter() == []


# --- what is refused ---

REFUSED = {
    "pinned": ("UPDATE model_locations SET pinned = true", "is pinned"),
    "cold": ("UPDATE model_locations SET tier = 'cold', version = 1", "is cold already"),
    "unknown": ("DELETE FROM model_locations", "is not in the catalogue"),
    "lease": ("INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-7b')", "is open on 'gpu-1'"),
    "lease below": ("INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-7b/unet')", "is open on 'gpu-1'"),
    "lease above": ("INSERT INTO node_leases VALUES ('gpu-1', 'models')", "is open on 'gpu-1'"),
    "stale report": ("UPDATE nodes SET leases_at = now() - interval '6 minutes'", "no report for 300 s"),
    "never reported": ("UPDATE nodes SET leases_at = NULL", "no report for 300 s"),
    "no nodes": ("DELETE FROM nodes", "no node reports"),
    "nodes gone for good": ("UPDATE nodes SET registered = false", "no node reports"),
    "on its way": ("INSERT INTO moves (kind, subject) VALUES ('promote', 'models/llama-7b')", "is on its way"),
    "a part on its way": ("INSERT INTO moves (kind, subject) VALUES ('promote', 'models/llama-7b/unet')", "on its way"),
    "a whole on its way": ("INSERT INTO moves (kind, subject) VALUES ('promote', 'models')", "is on its way"),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("by_hand", [False, True])
def test_what_must_not_move_is_refused(why: str, by_hand: bool, site: Site) -> None:
    query, says = REFUSED[why]
    run(site.execute(query))
    before = run(site.value("SELECT count(*) FROM moves"))
    with pytest.raises(MoveRefused, match=says):
        run(demote(site, by_hand=by_hand))
    assert run(site.value("SELECT count(*) FROM moves")) == before


def test_leases_and_names_of_others_do_not_matter(site: Site) -> None:
    run(site.execute("INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-70b'), ('gpu-1', 'models/llama-7')"))
    run(site.execute("INSERT INTO moves (kind, subject) VALUES ('promote', 'models/llama-70b')"))
    assert run(demote(site))[1] is MoveState.IN_GRACE


def test_without_nodes_it_moves_if_the_settings_say_that_there_are_none(schema: str, tmp_path: Path) -> None:
    site = site_of(tmp_path, schema, lease_reports=False)
    run(site.register())
    assert run(demote(site))[1] is MoveState.IN_GRACE


def test_what_cannot_be_kept_is_refused(site: Site) -> None:
    def refused(says: str, model_id: str = MODEL) -> None:
        site.model_id = model_id
        with pytest.raises(MoveRefused, match=says):
            run(demote(site))
        site.model_id = MODEL

    os.link(site.model / "config.json", site.source / "elsewhere")
    refused("has hard links outside of the model")
    (site.source / "elsewhere").unlink()
    os.mkfifo(site.model / "pipe")
    refused("is a device, pipe or socket")
    (site.model / "pipe").unlink()
    (site.model / "config.json").chmod(0o1644)
    refused("has the sticky bit")
    (site.model / "config.json").chmod(0o644)
    for path in site.model.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)
    refused("has no bytes in the source")
    site.model.rename(site.source / "moved")
    refused("is not in the source")
    site.model.symlink_to(site.source / "moved")
    refused("is no directory and no file")
    site.model.unlink()
    (site.source / "models").rmdir()
    (site.source / "models").symlink_to(site.source)
    refused("is not in the source")


@pytest.mark.parametrize("name", ["../x", "/etc", "models/../..", "models/.tierd/x", "", "a//b", "models/\n", "."])
def test_hostile_names_are_refused(name: str, site: Site) -> None:
    site.model_id = name
    with pytest.raises(UsageError):
        run(demote(site))


# --- what stops it on the way ---


def effects_until_switch(site: Site) -> list[str]:
    """Those of a demotion that is then undone."""
    fate = Fate()

    async def main() -> None:
        async with site.leading(fate) as moves:
            await moves.advance(await moves.demote(MODEL, "test"))
            await moves.advance(await moves.undo(MODEL))

    run(main())
    return fate.effects[: fate.effects.index("commit switch")]


ACCESS = "UPDATE model_locations SET last_access = now()"
LEASE = "INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-7b') ON CONFLICT DO NOTHING"
PIN = "UPDATE model_locations SET pinned = true"


@pytest.mark.parametrize(
    ("query", "says", "by_hand"),
    [(ACCESS, "was accessed", False), (LEASE, "is open on", False), (LEASE, "is open on", True), (PIN, "pinned", True)],
)
def test_a_model_that_is_wanted_before_the_switch_stays(query: str, says: str, by_hand: bool, site: Site) -> None:
    before = site.snapshot()
    effects = effects_until_switch(site)

    async def one(number: int) -> None:
        fate = Fate(0, lambda _: site.meanwhile(query) if len(fate.effects) == number else None)
        async with site.leading(fate) as moves:
            move = await moves.demote(MODEL, "test", by_hand=by_hand)
            assert await moves.advance(move) is MoveState.ABANDONED, effects[number - 1]
        assert says in str((await site.move())[2])
        assert site.snapshot() == before
        await site.execute("DELETE FROM node_leases")
        await site.execute("UPDATE model_locations SET pinned = false")

    for number in range(effects.index("committed plan") + 1, len(effects) + 1):
        run(one(number))
    own = "SELECT count(*) = count(DISTINCT version) FROM moves WHERE kind = 'demote'"
    assert run(site.value(own)), "each has a version of its own"
    assert run(site.value("SELECT tier FROM model_locations")) == "hot"


@pytest.mark.parametrize("effect", ["committed copying", "begin verified"])
def test_a_file_that_appears_before_the_switch_ends_it(effect: str, site: Site) -> None:
    """Somebody is still downloading the model: half of it would go."""

    def download(one: str) -> None:
        if one == effect:
            (site.model / "model-3.safetensors").write_bytes(b"part")

    async def main() -> None:
        async with site.leading(Fate(0, download)) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert run(site.move())[2] == "'model-3.safetensors' appeared"
    assert site.hot_names() == {*FILES, "unet/same.safetensors", "model-3.safetensors"}


def test_by_hand_a_read_does_not_stop_it(site: Site) -> None:
    fate = Fate(0, lambda effect: site.meanwhile(ACCESS) if effect == "put object" else None)

    async def main() -> None:
        async with site.leading(fate) as moves:
            move = await moves.demote(MODEL, "asked", by_hand=True)
            assert await moves.advance(move) is MoveState.IN_GRACE

    run(main())


def test_a_lease_during_the_switch_puts_it_back(site: Site) -> None:
    before = site.snapshot()
    fate = Fate(0, lambda effect: site.meanwhile(LEASE) if effect == "commit copy manifest" else None)

    async def main() -> None:
        async with site.leading(fate) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert site.snapshot() == before
    assert site.litter() == []


def test_unknown_leases_are_waited_for(site: Site) -> None:
    old = "UPDATE nodes SET leases_at = now() - interval '1 day'"
    fate = Fate(0, lambda effect: site.meanwhile(old) if effect == "put manifest" else None)

    async def main() -> None:
        async with site.leading(fate) as moves:
            move = await moves.demote(MODEL, "test")
            for _ in range(20):
                assert await moves.advance(move) is MoveState.VERIFYING
            assert "no report" in str((await site.move())[1])
            await site.execute("UPDATE nodes SET leases_at = now()")
            assert await moves.advance(move) is MoveState.IN_GRACE

    run(main())


def test_a_damaged_object_is_found_before_anything_is_switched(site: Site) -> None:
    before = site.snapshot()
    path = site.root / "objects" / BUCKET / object_key(MODEL, 1, b"unet/weights.bin")

    def damage(effect: str) -> None:
        if effect == "committed copied":
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    async def main() -> None:
        async with site.leading(Fate(0, damage)) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert "damaged" in str(run(site.move())[2])
    assert site.snapshot() == before
    assert {name: site.read(name) for name in FILES} == FILES


def test_an_object_that_somebody_wrote_over_is_not_taken_for_ours(site: Site) -> None:
    """Whole, and with the right checksums, but not what was copied."""
    before = site.snapshot()
    (site.root / "other").write_bytes(b"other")

    def write_over(effect: str) -> None:
        if effect == "committed copied":
            site.store.put_file(BUCKET, object_key(MODEL, 1, b"unet/weights.bin"), site.root / "other", 5)

    async def main() -> None:
        async with site.leading(Fate(0, write_over)) as moves:
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED

    run(main())
    assert "damaged" in str(run(site.move())[2])
    assert site.snapshot() == before


def test_an_object_that_is_there_already_is_never_written_over(site: Site) -> None:
    """The books were restored from an old backup: they would give the version out again."""
    run(demote(site))

    async def main() -> None:
        async with site.leading() as moves:
            await moves.advance(await moves.undo(MODEL))
            await site.execute("DELETE FROM moves")
            await site.execute("UPDATE model_locations SET version = 0")
            (site.model / "config.json").write_bytes(b"other")
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED
            assert "there already" in str((await site.move())[2])
            assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.IN_GRACE

    run(main())
    first = site.root / "objects" / BUCKET / object_key(MODEL, 1, b"config.json")
    assert first.read_bytes() == FILES["config.json"]
    assert site.origin(site.model / "config.json").version == 2


def test_a_store_that_is_away_is_waited_for_and_not_for_ever(site: Site) -> None:
    before = site.snapshot()
    store = site.store

    async def main() -> None:
        away = DirectoryStore(site.root / "objects", bytes_per_s=1)
        away.close()
        site.store = away
        async with site.leading(attempts=3) as moves:
            move = await moves.demote(MODEL, "test")
            assert await moves.advance(move) is MoveState.COPYING
            assert await moves.advance(move) is MoveState.COPYING
            assert await site.value("SELECT attempts FROM moves") == 2
        site.store = store
        async with site.leading() as moves:
            assert await moves.advance(move) is MoveState.IN_GRACE
            await moves.advance(await moves.undo(MODEL))
        site.store = away
        async with site.leading(attempts=3) as moves:
            move = await moves.demote(MODEL, "test")
            for _ in range(3):
                state = await moves.advance(move)
            assert state is MoveState.FAILED

    run(main())
    assert site.snapshot() == before
