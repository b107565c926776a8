"""The life of an output through a real mount: written, told by way of Redis, backed up, cold, read, removed."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.outputs import DAY, House
from tests.controller.reporting import controller_of
from tests.servers import RedisServer, run

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

    async def told() -> list[tuple[Any, ...]]:
        async with house.leading() as leader:
            await leader.back_up()
        return await house.rows("SELECT hot_storage, cold_storage, vanished_at IS NOT NULL FROM generated_outputs")

    assert run(told()) == [(False, True, True)], "it is removed, and nobody has deleted the object"


def test_a_redis_that_is_away_loses_no_news(
    house: House, overlay_mount: MountFactory, url: str, telling: dict[str, Any], redis_server: RedisServer
) -> None:
    mount = overlay_mount(house.root / "source", **telling)
    redis_server.stop()
    (mount.mountpoint / "outputs" / DAY).mkdir(parents=True)
    (mount.mountpoint / "outputs" / DAY / f"{uuid4()}.wav").write_bytes(b"sound")
    redis_server.start()
    run(heard(house, url, "SELECT 1 FROM generated_outputs WHERE output_type = 'audio'"))
