"""From a load of a cold model on a node to a planned promotion, by way of a real Redis; and what is no load."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis as SyncRedis

from tests.cold import freeze
from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.house import settings_for
from tests.controller.moving import FILES, MODEL, Site, site_of
from tests.mounts import wait_until
from tests.servers import RedisServer, run
from tierd.controller.moves.requests import PromoteRequests
from tierd.controller.redis_client import redis_of
from tierd.metrics import ControllerMetrics
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key
from tierd.postgres import Database
from tierd.promote_wishes import MODELS_MAX, STREAM, PromoteWish, decode, encode
from tierd.statistics import FIELD

MIB = 1 << 20
SECONDS = 30.0


@pytest.fixture
def site(schema: str, tmp_path: Path) -> Site:
    """A cold model, and nobody who reads it."""
    site = site_of(tmp_path, schema, lease_reports=False)

    async def freeze_it() -> None:
        await site.register()
        async with site.leading() as moves:
            await moves.demote(MODEL, "for a test", by_hand=True)
            await moves.resume_all()
            await site.end_grace()
            await moves.resume_all()

    run(freeze_it())
    return site


def hear(site: Site, url: str, rounds: int = 1) -> dict[str, float]:
    """What a leader does; what came of the wishes so far."""
    registry = CollectorRegistry()

    async def main() -> None:
        settings = settings_for(site.dsn, redis=url)
        async with site.leading() as moves, Database(settings) as database, redis_of(settings) as redis:
            requests = PromoteRequests(database, redis, moves, ControllerMetrics(registry))
            for _ in range(rounds):
                await requests.round()

    run(main())
    name = "tierd_promote_wishes_heard_total"
    found = {result: registry.get_sample_value(name, {"result": result}) for result in ControllerMetrics.WISHES}
    return {result: count for result, count in found.items() if count}


def wish(client: SyncRedis, *models: str, entry: str = "*") -> None:
    """As a node says it."""
    client.xadd(STREAM, {FIELD: encode(PromoteWish(node_id="gpu-1", models=models))}, id=entry)


def planned(site: Site) -> list[tuple[str, str, str]]:
    """Moves that bring models back."""
    query = "SELECT array_agg((kind, subject, reason) ORDER BY id) FROM moves WHERE kind <> 'demote'"
    return run(site.value(query)) or []


def test_a_model_is_planned_once(site: Site, client: SyncRedis, url: str) -> None:
    for _ in range(3):
        wish(client, MODEL, "models/unknown")
    assert hear(site, url, rounds=2) == {"planned": 1, "ignored": 1}
    assert planned(site) == [("promote", MODEL, "loaded on gpu-1")]
    wish(client, MODEL)
    assert hear(site, url) == {"ignored": 1}, "it is on its way"
    assert client.xlen(STREAM) == 0


def test_within_the_grace_it_is_undone(schema: str, tmp_path: Path, client: SyncRedis, url: str) -> None:
    site = site_of(tmp_path, schema, lease_reports=False)

    async def main() -> None:
        await site.register()
        async with site.leading() as moves:
            await moves.demote(MODEL, "for a test", by_hand=True)
            await moves.resume_all()

    run(main())
    wish(client, MODEL)
    assert hear(site, url) == {"planned": 1}
    assert [kind for kind, _, _ in planned(site)] == ["undo"]


def test_what_is_hot_is_ignored(site: Site, client: SyncRedis, url: str) -> None:
    (site.source / "models/hot").mkdir()
    (site.source / "models/hot/a.safetensors").write_bytes(b"x")
    wish(client, "models/hot")
    assert hear(site, url) == {"ignored": 1}
    assert planned(site) == []


def test_a_model_that_was_renamed_while_cold_is_planned_by_the_name_it_has(
    site: Site, client: SyncRedis, url: str
) -> None:
    """A node asks for the name that it sees; no scan of the catalogue has seen it yet."""
    created = run(site.value("SELECT created_at FROM model_locations"))
    site.model.rename(site.source / "models/renamed")
    wish(client, "models/renamed")
    assert hear(site, url) == {"planned": 1}
    assert planned(site) == [("promote", "models/renamed", "loaded on gpu-1")]
    site.model_id = "models/renamed"
    run(resume(site))
    assert {name: (site.model / name).read_bytes() for name in FILES} == FILES
    row = "SELECT (tier, version, created_at) FROM model_locations WHERE model_id = 'models/renamed'"
    assert run(site.value(row)) == ("hot", 1, created), "it is as old as it was"


@pytest.mark.parametrize("size", [b"", b"x" * 10])
def test_a_cold_model_with_a_hot_file_is_brought(site: Site, client: SyncRedis, url: str, size: bytes) -> None:
    """A user wrote one file anew: a scan calls the model hot then, and its other files are still far away."""
    (site.model / "notes.txt").write_bytes(size)
    if size:
        run(site.execute("UPDATE model_locations SET tier = 'hot'"))  # what a scan does
    wish(client, MODEL)
    assert hear(site, url) == {"planned": 1}
    run(resume(site))
    assert {name: (site.model / name).read_bytes() for name in FILES} == FILES


async def resume(site: Site) -> None:
    async with site.leading() as moves:
        await moves.resume_all()


@pytest.mark.parametrize("name", ["models", "elsewhere/m", "models/llama-7b/unet", "models/link"])
def test_what_is_no_model_is_ignored(site: Site, client: SyncRedis, url: str, name: str) -> None:
    """Whatever a node says: cold files that are not in a model stay where they are."""
    shutil.copytree(site.model, site.source / "elsewhere/m", symlinks=True)
    (site.source / "models/link").symlink_to("llama-7b")
    wish(client, name)
    assert hear(site, url) == {"ignored": 1}
    assert planned(site) == []


def test_what_failed_a_short_while_ago_rests(site: Site, client: SyncRedis, url: str) -> None:
    wish(client, MODEL)
    hear(site, url)
    run(site.execute("UPDATE moves SET state = 'failed', finished_at = now() WHERE kind = 'promote'"))
    wish(client, MODEL)
    assert hear(site, url) == {"ignored": 1}
    run(site.execute("UPDATE moves SET finished_at = now() - interval '2 hours' WHERE kind = 'promote'"))
    wish(client, MODEL)
    assert hear(site, url) == {"planned": 1}


def test_what_cannot_come_is_refused_and_heard_no_more(site: Site, client: SyncRedis, url: str) -> None:
    for file in site.model.rglob(".tierd/origins/*.json"):
        file.unlink()
    wish(client, MODEL)
    assert hear(site, url) == {"refused": 1}
    assert client.xlen(STREAM) == 0


def test_hostile_content_is_counted_and_dropped(site: Site, client: SyncRedis, url: str) -> None:
    for data in (b"", b"{", b"x" * 100_000, b'{"format":1,"node_id":"n","models":["../x"]}'):
        client.xadd(STREAM, {FIELD: data})
    client.xadd(STREAM, {b"other": b"field"})
    wish(client, *(f"models/{number}" for number in range(MODELS_MAX)))
    wish(client, MODEL)
    assert hear(site, url) == {"bad": 5, "ignored": MODELS_MAX, "planned": 1}
    assert client.xlen(STREAM) == 0


def test_what_nobody_heard_for_long_is_over(site: Site, client: SyncRedis, url: str) -> None:
    wish(client, MODEL, entry="1000-1")
    assert hear(site, url) == {"old": 1}
    assert planned(site) == []


def test_a_model_that_was_renamed_while_cold_comes_back_when_it_is_loaded(
    site: Site, overlay_mount: MountFactory, redis_server: RedisServer, tmp_path: Path, client: SyncRedis, url: str
) -> None:
    """Through a real mount: renamed there, loaded there, heard, planned, and hot under the name that it has."""
    content, path = os.urandom(40 * MIB), site.source / "models/before/1.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    site.store.put_file("cold-models", object_key("models/before", 1, b"1.safetensors"), path, len(content))
    freeze({path: None}, "models/before")
    password = tmp_path / "password"
    password.write_text(redis_server.password + "\n")
    bare = url.replace(f":{redis_server.password}@", "")
    options = {"redis": bare, "redis_password_file": password, "publish_interval": 1, "prefetch": "no"}
    mount = overlay_mount(site.source, node_name="gpu-1", cache_size="0", objects=str(tmp_path / "objects"), **options)
    top = mount.mountpoint / "models"
    (top / "before").rename(top / "after")
    assert (top / "after/1.safetensors").read_bytes() == content
    wait_until(lambda: client.xlen(STREAM) > 0, SECONDS, "the wish")
    assert hear(site, url) == {"planned": 1}
    run(resume(site))
    assert (site.source / "models/after/1.safetensors").read_bytes() == content
    assert (top / "after/1.safetensors").read_bytes() == content


def test_loads_ask_and_looks_do_not(
    overlay_mount: MountFactory, new_directory: DirectoryFactory, redis_server: RedisServer, tmp_path: Path
) -> None:
    """With the real programs: grep, find, file, a look at headers; then a load. Also without a node tier."""
    redis_server.start()
    source, objects = new_directory("source"), new_directory("objects")
    store = DirectoryStore(objects)
    store.ensure_bucket("cold-models")
    for path in [source / "models" / name / "1.safetensors" for name in ("looked-at", "loaded")]:
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(40 * MIB))
        model = f"models/{path.parent.name}"
        store.put_file("cold-models", object_key(model, 1, b"1.safetensors"), path, 40 * MIB)
        freeze({path: None}, model)
    password = tmp_path / "password"
    password.write_text(redis_server.password + "\n")
    url = redis_server.url().replace(f":{redis_server.password}@", "")
    options = {"redis": url, "redis_password_file": password, "publish_interval": 1, "objects": str(objects)}
    mount = overlay_mount(source, node_name="gpu-1", cache_size="0", **options)
    with SyncRedis.from_url(redis_server.url()) as client:
        client.delete(STREAM)
        top = mount.mountpoint / "models"
        file = top / "looked-at/1.safetensors"
        with file.open("rb") as opened:
            assert len(opened.read(MIB)) == MIB, "as safetensors reads a header"
        subprocess.run(["head", "-c", "34000000", str(file)], capture_output=True, check=True)
        subprocess.run(["find", str(top), "-type", "f", "-exec", "file", "{}", ";"], capture_output=True, check=True)
        subprocess.run(["grep", "-r", "-c", "no such text", str(file.parent)], capture_output=True, check=False)
        assert mount.status()["counters"]["cold_loads"] == 0
        assert len((top / "loaded/1.safetensors").read_bytes()) == 40 * MIB
        wait_until(lambda: client.xlen(STREAM) > 0, SECONDS, "the wish")
        wishes = [decode(fields[FIELD]) for _, fields in client.xrange(STREAM)]
        assert [(one.node_id, one.models) for one in wishes] == [("gpu-1", ("models/loaded",))]
        assert mount.status()["counters"]["cold_loads"] == 1
