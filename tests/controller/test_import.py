"""Objects that somebody else put into the bucket become a cold model: which, how, and what is never touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bench import s3
from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.controllers import Site as CommandSite
from tests.controller.fate import Fate, Killed
from tests.controller.freezing import Frozen
from tests.controller.moving import BUCKET, Site, site_of
from tests.objects.servers import Beneath, Files, Objects, s3_store
from tests.servers import run
from tierd.controller.models.imports import sort_out
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.steps import MoveState
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.source.import_tree import ImportTree, Making
from tierd.controller.source.moved_file import MoveRefused
from tierd.errors import UsageError
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import IMPORTED, is_ours, object_key, parse_key
from tierd.objects.store import Listed
from tierd.stubs import Origin

MIB = 1 << 20
MODEL, PREFIX = "models/org/llama", "org/llama"
CONTENT = {
    "config.json": b"{}", "model.safetensors": os.urandom(5 * MIB), "unet/w.bin": os.urandom(3000), "empty": b"",
    "unet/deep/한글 파일.txt": b"hangul",
}  # fmt: skip


@pytest.fixture(params=["directory", "rclone"])
def site(request: pytest.FixtureRequest, schema: str, tmp_path: Path) -> Iterator[tuple[Site, Beneath]]:
    """A source without the model, and a bucket with its objects."""
    beneath: Beneath
    if request.param == "directory":
        site = site_of(tmp_path, schema, lease_reports=False)
        beneath = Files(site.root / "objects")
    else:
        served: s3.Store = request.getfixturevalue("rclone")
        site = site_of(tmp_path, schema, s3_store(served.server), lease_reports=False)
        beneath = Objects(s3.client_of(served.server))
    site.model_id = MODEL
    site.store.ensure_bucket(BUCKET)
    for name, content in CONTENT.items():
        beneath.put(BUCKET, f"{PREFIX}/{name}", content)
    yield site, beneath
    for key in beneath.keys(BUCKET):
        beneath.remove(BUCKET, key)
    site.store.close()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Store]:
    """A real S3 server over a directory."""
    base = tmp_path_factory.mktemp("rclone-imports")
    (base / "data").mkdir()
    with s3.serve(base / "data", base / "s3.log") as running:
        yield running


async def adopt(site: Site, moves: Moves) -> MoveState:
    """Ask for it once, and carry on what was asked for."""
    if not await site.value("SELECT count(*) FROM moves WHERE subject = $1", site.model_id):
        await moves.adopt(site.model_id, PREFIX, "for a test")
    await moves.resume_all()
    return MoveState(await site.value("SELECT state FROM moves WHERE subject = $1", site.model_id))


def adopted(site: Site) -> MoveState:
    """As the leader."""

    async def main() -> MoveState:
        async with site.leading() as moves:
            return await adopt(site, moves)

    return run(main())


def seen(site: Site) -> dict[str, bytes]:
    """Every file as the overlay has it."""
    looks = Frozen(site.source, site.store, site.root).looks(site.model_id)
    return {name: look[-1] for name, look in looks.items() if len(look) > 2}


def test_its_files_are_there_and_their_bytes_are_right(site: tuple[Site, Beneath]) -> None:
    here, beneath = site
    before = beneath.keys(BUCKET)
    assert adopted(here) is MoveState.DONE
    assert seen(here) == CONTENT
    assert not (here.model / "config.json").exists(), "nothing was fetched into the source"
    row = run(here.value("SELECT (tier, version, imported, files, size_bytes) FROM model_locations"))
    assert row == ("cold", 0, True, len(CONTENT), sum(map(len, CONTENT.values())))
    assert {key for key in beneath.keys(BUCKET) if not key.startswith(".tierd/")} == before, (
        "objects stay where they are"
    )
    assert {key: beneath.get(BUCKET, f"{PREFIX}/{key}") for key in CONTENT} == CONTENT
    assert here.litter() == []


def test_it_is_promoted_and_demoted_like_any_other(site: tuple[Site, Beneath]) -> None:
    here, beneath = site

    async def main() -> None:
        async with here.leading() as moves:
            await adopt(here, moves)
            assert await moves.advance(await moves.promote(MODEL, "loaded")) is MoveState.DONE
            assert {name: (here.model / name).read_bytes() for name in CONTENT} == CONTENT
            await moves.demote(MODEL, "for a test", by_hand=True)
            await moves.resume_all()

    run(main())
    assert seen(here) == CONTENT
    assert run(here.value("SELECT (tier, version) FROM model_locations")) == ("cold", 1)
    assert f"{MODEL}/v1/config.json" in beneath.keys(BUCKET), "a copy of our own"


def test_what_cannot_be_a_file_is_refused_and_told(site: tuple[Site, Beneath]) -> None:
    here, beneath = site
    beneath.put(BUCKET, f"{PREFIX}/v2/x", b"looks like a version")
    beneath.put(BUCKET, f"{PREFIX}/unet/w.bin.d/x", b"fine")
    assert adopted(here) is MoveState.DONE
    detail = json.loads(run(here.value("SELECT detail FROM moves")))
    assert detail["refused"] == [] or [one["key"] for one in detail["refused"]] == [f"{PREFIX}/v2/x"]
    assert seen(here) == CONTENT | {"unet/w.bin.d/x": b"fine"}


def test_hot_files_are_never_hidden_or_replaced(site: tuple[Site, Beneath]) -> None:
    here, _ = site
    here.model.mkdir(parents=True)
    (here.model / "config.json").write_bytes(b"hot")
    (here.model / "unet").write_bytes(b"a file where a directory should be")
    assert adopted(here) is MoveState.DONE
    expected = {name: content for name, content in CONTENT.items() if not name.startswith("unet/")}
    assert seen(here) == expected | {"config.json": b"hot", "unet": b"a file where a directory should be"}
    told = run(here.value("SELECT array_agg(reason ORDER BY reason) FROM move_events WHERE event = 'left alone'"))
    assert len(told) == 3
    assert "'config.json': a hot file has its name" in told


def test_a_cold_file_of_ours_keeps_its_name(site: tuple[Site, Beneath]) -> None:
    here, _ = site
    here.model.mkdir(parents=True)
    (here.model / "config.json").write_bytes(b"ours")
    Frozen(here.source, here.store, here.root).freeze(MODEL)
    assert adopted(here) is MoveState.DONE
    assert seen(here) == CONTENT | {"config.json": b"ours"}


def test_it_is_not_imported_over_a_copy_of_ours(site: tuple[Site, Beneath]) -> None:
    here, _ = site
    run(here.register())
    run(here.execute("UPDATE model_locations SET tier = 'cold', version = 3"))

    async def main() -> None:
        async with here.leading() as moves:
            with pytest.raises(MoveRefused, match="a cold copy of tierd's own"):
                await adopt(here, moves)

    run(main())


def test_nothing_to_adopt_is_refused(site: tuple[Site, Beneath]) -> None:
    async def main() -> None:
        async with site[0].leading() as moves:
            with pytest.raises(MoveRefused, match="no object below 'org/other/'"):
                await moves.adopt("models/other", "org/other", "for a test")
            with pytest.raises(UsageError):
                await moves.adopt("models/other", "../etc", "for a test")

    run(main())


def test_an_object_that_changed_since_it_was_listed_is_not_taken(site: tuple[Site, Beneath]) -> None:
    here, beneath = site

    async def main() -> MoveState:
        async with here.leading() as moves:
            move = await moves.adopt(MODEL, PREFIX, "for a test")
            beneath.put(BUCKET, f"{PREFIX}/config.json", b"longer than it was")
            return await moves.advance(move)

    assert run(main()) is MoveState.VERIFYING
    assert not here.model.exists()


def test_killed_between_any_two_effects(schema: str, tmp_path: Path) -> None:
    """No name is there that cannot be read, nothing hot is touched, and all ends as if nothing had happened."""
    site = site_of(tmp_path, schema, lease_reports=False)
    beneath = Files(site.root / "objects")
    site.store.ensure_bucket(BUCKET)
    for name, content in CONTENT.items():
        beneath.put(BUCKET, f"{PREFIX}/{name}", content[:5000])
    right = {name: content[:5000] for name, content in CONTENT.items()} | {"hot": b"hot"}

    async def one(number: int, last: int) -> list[str]:
        site.model_id = f"models/m{number}"
        site.model.mkdir()
        (site.model / "hot").write_bytes(b"hot")
        fate = Fate(last)
        with suppress(Killed):
            async with site.leading(fate, parallel_files=1) as moves:
                await adopt(site, moves)
        found = seen(site)
        assert found.items() <= right.items(), f"killed at {fate.effects[-1]}"
        async with site.leading() as moves:
            assert await adopt(site, moves) is MoveState.DONE
        assert seen(site) == right
        assert site.litter() == []
        return fate.effects

    async def main() -> int:
        effects = await one(0, 0)
        for last in range(1, len(effects) + 1):
            await one(last, last)
        return len(effects)

    assert run(main(), 120) > 30


def test_an_object_is_read_once_whatever_is_killed(schema: str, tmp_path: Path) -> None:
    site = site_of(tmp_path, schema, lease_reports=False, parallel_files=1)
    site.model_id = MODEL
    reads: list[str] = []

    class Counting(DirectoryStore):
        def adopt(self, bucket: str, key: str):  # type: ignore[no-untyped-def]
            reads.append(key)
            return super().adopt(bucket, key)

    site.store = Counting(site.root / "objects")
    site.store.ensure_bucket(BUCKET)
    for number in range(3):
        Files(site.root / "objects").put(BUCKET, f"{PREFIX}/{number}", b"x" * (number + 1))

    async def main() -> None:
        with suppress(Killed):
            async with site.leading(Fate(0, _die_after(site, 2))) as moves:
                await adopt(site, moves)
        async with site.leading() as moves:
            await adopt(site, moves)

    run(main())
    assert len(reads) <= 4, "only what was not written down is read again"


def _die_after(site: Site, adoptions: int):  # type: ignore[no-untyped-def]
    seen: list[str] = []

    def before(effect: str) -> None:
        seen.append(effect)
        if effect == "begin make stubs":
            raise Killed

    return before


# --- keys ---


def test_keys_of_others_never_clash_with_ours() -> None:
    assert object_key("org/llama", IMPORTED, "unet/한글 x.bin".encode()) == "org/llama/unet/한글 x.bin"
    for model, path in (("a", b"v1/x"), ("a/v1", b"x"), ("v12", b"x"), ("a", b"b/v0")):
        with pytest.raises(UsageError, match="looks like a version"):
            object_key(model, IMPORTED, path)
    for version in (1, 7):
        key = object_key("a", version, b"x")
        assert parse_key(key).version == version
        assert is_ours(key)
    assert is_ours("a/v1/.manifest")
    assert not is_ours("a/x")
    assert not is_ours("a/b/.manifest")


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("p/dir/", "it stands for a directory"), ("p/../passwd", "part"), ("p//x", "is absolute"), ("p/./x", "part"),
        ("p/a\x00b", "NUL"), ("p/a\nb", "control"), ("p/.tierd/x", "tierd's own"), ("p/" + "x" * 256, "256 bytes"),
        ("p/v3/", "it stands for a directory"), ("p/x/v3", "version"), ("p/f/below", "directory"),
    ],
)  # fmt: skip
def test_hostile_keys_are_refused_with_a_reason(key: str, why: str) -> None:
    found = sort_out("p", [Listed("p/f", 1), Listed(key, 1)])
    assert [file.path for file in found.files] == [b"f"]
    assert [one.key for one in found.refused] == [key]
    assert why in found.refused[0].reason


def test_refusals_are_bounded() -> None:
    found = sort_out("p", [Listed(f"p/d{number}/", 0) for number in range(1000)])
    assert (found.refused_count, len(found.refused)) == (1000, 200)


# --- the command, a real mount ---


def test_by_command_and_through_a_mount(
    schema: str, tmp_path: Path, overlay_mount: MountFactory, new_directory: DirectoryFactory
) -> None:
    site = CommandSite(tmp_path, schema)
    beneath = Files(site.objects)
    for name, content in CONTENT.items():
        beneath.put(BUCKET, f"{PREFIX}/{name}", content)
    beneath.put(BUCKET, f"{PREFIX}/v1", b"refused")
    done = site.tierd("import", PREFIX, "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert (told["model"], len(told["files"]), told["refused_count"]) == (MODEL, len(CONTENT), 1)
    assert f"would make {MODEL} of {len(CONTENT)} objects" in site.tierd("import", PREFIX, "--dry-run").stdout
    assert site.value("SELECT count(*) FROM moves") == 0
    done = site.tierd("import", PREFIX)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{MODEL}: is cold, 5.0 MiB\n"
    assert f"refused: {PREFIX}/v1:" in done.stderr
    mount = overlay_mount(site.source, objects=str(site.objects), prefetch="no")
    for name, content in CONTENT.items():
        assert (mount.mountpoint / MODEL / name).read_bytes() == content
    assert site.tierd("import", PREFIX, "--as", "models/other", "--json").returncode == 0
    assert (mount.mountpoint / "models/other/config.json").read_bytes() == b"{}"
    assert site.tierd("import", "nothing/there").returncode == 1


def test_a_cold_file_that_comes_this_moment_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "models/m").mkdir(parents=True)
    stub = tmp_path / "models/m/.tierd/cold/x"

    def meddle(effect: str) -> None:
        if effect == "place":
            stub.write_bytes(b"a user's")

    making = ImportTree(HotTree(tmp_path), b"models/m", 7, meddle)
    file = Making(b"x", Origin("m", IMPORTED, b"x", 5, "0" * 64), 1)
    assert making.make([file]) == {b"x": "another cold file has its name"}
    assert stub.read_bytes() == b"a user's"
