"""The life of an output through a real mount: written, told by way of Redis, backed up, cold, read, removed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.controllers import Site, running, until
from tests.controller.house import connected
from tests.controller.outputs import DAY, House
from tests.controller.reporting import controller_of
from tests.servers import RedisServer, run
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.outputs.erasure_news import ErasureNews

SECONDS = 40.0
COLD_READ_SECONDS = 5.0
"""What an output may take to be read once it is cold."""


@pytest.fixture
def house(schema: str, new_directory: DirectoryFactory) -> House:
    return House(new_directory("outputs"), schema)


async def heard(house: House, url: str, query: str) -> None:
    """Fold what nodes tell until the books say so."""
    async with controller_of(house.dsn, url) as controller:
        async with asyncio.timeout(SECONDS):
            while not await controller.rows(query):
                await controller()
                await asyncio.sleep(0.1)


@pytest.fixture
def telling(url: str, redis_server: RedisServer, tmp_path: Path) -> dict[str, Any]:
    """Options of a mount that tells what happens."""
    password = tmp_path / "password"
    password.write_text(redis_server.password + "\n")
    plain = url.replace(f":{redis_server.password}@", "")
    return {"redis": plain, "redis_password_file": password, "publish_interval": 1}


def test_an_output_lives_on_when_it_is_cold(
    house: House, overlay_mount: MountFactory, url: str, telling: dict[str, Any]
) -> None:
    mount = overlay_mount(house.root / "source", objects=str(house.root / "objects"), prefetch="no", **telling)
    name, content = f"{uuid4()}.png", os.urandom(3_000_000)
    day: Path = mount.mountpoint / "outputs" / DAY
    day.mkdir(parents=True)
    (day / f".{name}.tmp").write_bytes(content)
    (day / f".{name}.tmp").rename(day / name)
    (day / "notes.txt").write_text("nobody's business")

    async def cold() -> None:
        await heard(house, url, "SELECT 1 FROM generated_outputs")
        async with house.leading(settle=3.0, outputs_hot_days=0.000001) as leader:
            await leader.back_up()
            outcome = await leader.clean_up()
            assert (outcome.state, outcome.counts["outputs"]) == ("done", 1), outcome
            await house.rows("UPDATE moves SET grace_until = now() RETURNING 1")
            await leader.work.moves.resume_all()

    run(cold())
    assert not (house.outputs / DAY / name).exists()
    assert sorted(os.listdir(day)) == sorted([name, "notes.txt"])
    assert (day / name).stat().st_size == len(content)
    began = time.monotonic()
    assert (day / name).read_bytes() == content
    assert time.monotonic() - began < COLD_READ_SECONDS
    run(heard(house, url, "SELECT 1 FROM generated_outputs WHERE access_count >= 1"))
    (day / name).unlink()
    assert os.listdir(day) == ["notes.txt"]
    run(heard(house, url, "SELECT 1 FROM generated_outputs WHERE removed_at IS NOT NULL"))
    run(deleted(house, url))
    assert not list((house.root / "objects").rglob(name)), "what a user removed is deleted everywhere"
    assert run(house.rows("SELECT 1 FROM generated_outputs")) == []


async def deleted(house: House, url: str, until: str = "SELECT 1 FROM output_erasures WHERE state = 'deleted'") -> None:
    """Carry deletions on, with what nodes are told and say, until the books say so."""
    async with controller_of(house.dsn, url) as controller, house.leading() as leader:
        news = ErasureNews(controller.database, controller.redis, b"outputs")
        async with asyncio.timeout(SECONDS):
            while not await controller.rows(until):
                await controller()
                await leader.back_up()
                await leader.work.output_work.deletion.round()
                await leader.work.output_work.erasure.round()
                await house.rows("UPDATE output_erasures SET hidden_at = hidden_at - interval '5 s' RETURNING 1")
                await news.round()
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("where", ["hot", "cold"])
def test_who_reads_a_deleted_output_reads_on_and_then_it_is_gone(
    house: House, overlay_mount: MountFactory, url: str, telling: dict[str, Any], where: str
) -> None:
    content = os.urandom(12_000_000)
    path = house.make(content=content)

    async def prepare() -> None:
        async with house.leading(settle=0.0) as leader:
            await leader.scan()
            await leader.back_up()
            if where == "cold":
                await leader.clean_up()
                await house.rows("UPDATE moves SET grace_until = now() RETURNING 1")
                await leader.work.moves.resume_all()

    run(prepare())
    mount = overlay_mount(house.root / "source", objects=str(house.root / "objects"), prefetch="no", **telling)
    run(heard(house, url, "SELECT 1 FROM nodes"))
    with open(mount.mountpoint / "outputs" / path, "rb", buffering=0) as reader:
        assert reader.read(100) == content[:100]
        run(wish(house, path))
        run(deleted(house, url, "SELECT 1 FROM output_erasures WHERE state <> 'planned'"))
        assert not (house.outputs / path).exists()
        if where == "cold":
            run(told_and_heard(house, url))
            assert house.object(path) == content, "somebody reads it"
        assert os.pread(reader.fileno(), len(content), 0) == content
    run(deleted(house, url))
    assert house.object(path) is None
    assert path.rpartition("/")[2] not in os.listdir((mount.mountpoint / "outputs" / path).parent)


async def wish(house: House, path: str) -> None:
    async with connected(house.dsn) as connection:
        name = UUID(path.rpartition("/")[2][:36])
        await output_deletion.ask(connection, path.split("/", maxsplit=1)[0], name, "test")


async def told_and_heard(house: House, url: str) -> None:
    """Nodes are told of all deletions, report twice, and what can be done is done."""
    async with controller_of(house.dsn, url) as controller, house.leading() as leader:
        await house.rows("UPDATE output_erasures SET hidden_at = hidden_at - interval '5 s' RETURNING 1")
        await ErasureNews(controller.database, controller.redis, b"outputs").round()
        for _ in range(2):
            ((before,),) = await controller.rows("SELECT last_seen FROM nodes")
            async with asyncio.timeout(SECONDS):
                while await controller.rows("SELECT 1 FROM nodes WHERE last_seen = $1", before):
                    await controller()
                    await asyncio.sleep(0.1)
        await leader.work.output_work.erasure.round()
        assert await controller.rows("SELECT 1 FROM output_erasure_nodes") == []


def test_a_redis_that_is_away_loses_no_news(
    house: House, overlay_mount: MountFactory, url: str, telling: dict[str, Any], redis_server: RedisServer
) -> None:
    mount = overlay_mount(house.root / "source", **telling)
    mount.allow_log("publish_failing")  # if it tries while Redis is away
    redis_server.stop()
    (mount.mountpoint / "outputs" / DAY).mkdir(parents=True)
    (mount.mountpoint / "outputs" / DAY / f"{uuid4()}.wav").write_bytes(b"sound")
    redis_server.start()
    run(heard(house, url, "SELECT 1 FROM generated_outputs WHERE output_type = 'audio'"))


@pytest.mark.campaign
def test_a_controller_and_a_node_delete_what_is_removed_and_what_is_asked_for(
    tmp_path: Path, database: str, overlay_mount: MountFactory, url: str, telling: dict[str, Any]
) -> None:
    """All of it, by processes of their own."""
    password = telling["redis_password_file"]
    site = Site(tmp_path, database, redis=telling["redis"], redis_password_file=str(password), nodes_report=True)
    mount = overlay_mount(site.source, objects=str(site.objects), **telling)
    day = mount.mountpoint / "outputs" / DAY
    day.mkdir(parents=True)
    removed, asked, stays = (day / f"{uuid4()}.png" for _ in range(3))
    for file in (removed, asked, stays):
        file.write_bytes(os.urandom(1000))

    def stored(file: Path) -> bool:
        return bool(list(site.objects.rglob(file.name)))

    with running(site) as controller:
        query = "SELECT count(*) FROM generated_outputs WHERE cold_storage"
        until(lambda: site.value(query) == 3, SECONDS, controller.text)
        removed.unlink()
        words = ("outputs", "delete", "--user", DAY.split("/")[0], "--output", asked.stem, "--yes", "--wait", "55")
        done = site.tierd(*words, source=None, objects=None)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr + controller.text()
        until(lambda: not stored(removed), SECONDS, controller.text)
    assert os.listdir(day) == [stays.name]
    assert [stored(file) for file in (removed, asked, stays)] == [False, False, True]
    assert site.value("SELECT count(*) FROM generated_outputs") == 1
