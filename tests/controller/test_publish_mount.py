"""From a read on a real mount to the controller's tables, by way of a real Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MountFactory
from tests.controller.house import migrated
from tests.controller.reporting import Controller, controller_of
from tests.mounts import OverlayMount, wait_until
from tests.servers import RedisServer, run

SECONDS = 30.0


@pytest.fixture
def source(new_directory: Any) -> Path:
    path: Path = new_directory("source")
    (path / "models/llama").mkdir(parents=True)
    (path / "models/llama/model.safetensors").write_bytes(bytes(300_000))
    return path


def published(mount: OverlayMount) -> dict[str, Any]:
    """What `tierd status --json` says of it."""
    told: dict[str, Any] = mount.status()["publish"]
    return told


@pytest.mark.parametrize("cache_size", ["1GiB", "0"])
def test_what_is_read_arrives_while_it_is_open(
    overlay_mount: MountFactory,
    source: Path,
    database: str,
    redis_server: RedisServer,
    url: str,
    tmp_path: Path,
    cache_size: str,
) -> None:
    run(migrated(database))
    password = tmp_path / "password"
    password.write_text(redis_server.password + "\n")
    bare = url.replace(f":{redis_server.password}@", "")
    options = {"redis": bare, "redis_password_file": password, "publish_interval": 1, "cache_size": cache_size}
    mount = overlay_mount(source, node_name=f"node-{cache_size}", **options)

    async def seen() -> tuple[list[tuple[Any, ...]], set[tuple[str, str]]]:
        async with controller_of(database, url) as controller:
            await controller()
            rows = await controller.rows("SELECT model_id, tier, size_bytes FROM model_locations")
            return rows, {lease for lease in await Controller.leases(controller) if lease[0] == f"node-{cache_size}"}

    with (mount.mountpoint / "models/llama/model.safetensors").open("rb") as file:
        assert len(file.read()) == 300_000
        lease = (f"node-{cache_size}", "models/llama")
        wait_until(lambda: lease in run(seen())[1], SECONDS, "the lease")
        rows = [("models/llama", "hot", 300_000)]
        wait_until(lambda: run(seen())[0] == rows, SECONDS, lambda: f"the access: {run(seen())[0]}")
    wait_until(lambda: not run(seen())[1], SECONDS, "its end")
    wait_until(lambda: published(mount)["backlog_batches"] == 0, SECONDS, "the acknowledgement")
    told = published(mount)
    assert (told["enabled"], told["node"], told["error"], told["dropped"]) == (True, lease[0], None, 0)
    assert told["last_success"]
    boot = told["boot"]

    redis_server.kill()
    mount.expect_log("publish_failing", "daemon_died")
    wait_until(lambda: published(mount)["error"] is not None, SECONDS, "the failure is told")
    assert (mount.mountpoint / "models/llama/model.safetensors").stat().st_size == 300_000
    assert len((mount.mountpoint / "models/llama/model.safetensors").read_bytes()) == 300_000
    before = mount.kill_daemon()
    mount.succeeded(before)
    redis_server.start()
    wait_until(lambda: published(mount)["last_success"] is not None, 2 * SECONDS, "the next daemon publishes")
    assert published(mount)["boot"] == boot
    wait_until(lambda: run(seen()) and published(mount)["backlog_batches"] == 0, SECONDS, "all arrives")


def test_without_redis_nothing_is_told(overlay_mount: MountFactory, source: Path) -> None:
    mount = overlay_mount(source)
    assert published(mount) == {"enabled": False}
    assert "publishing" not in {line["event"] for line in mount.log()}
