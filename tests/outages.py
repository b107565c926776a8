"""A node, a controller and their three servers, of which one is away at a time while files are read.

Holds what must be true of it: every read of a hot file and of the node tier succeeds with the right bytes, the
controller lives and goes on, what nodes counted arrives exactly, and the logs stay readable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.controller.controllers import Controller, Site, running, until
from tests.integration.tiered import Model, content, make_model
from tests.mounts import OverlayMount
from tests.servers import PostgresServer, RedisServer, S3Server, Server

MIB: Final = 1 << 20
SERVERS: Final = ("redis", "postgres", "s3")
WAYS: Final = ("stopped", "frozen")
NODE: Final = "gpu-1"
DRAIN_SECONDS: Final = 180.0
"""A node that failed to publish tries again within a minute; S3 and moves, within some."""
LOUD_LINES_MAX: Final = 30
"""Warnings of the controller in one outage, however long it is."""
READ_PAUSE_SECONDS: Final = 0.02


@dataclass
class Reads:
    """What the readers of a scene came to."""

    done: int = 0
    failures: list[str] = field(default_factory=list)


class Scene:
    """See the module."""

    def __init__(self, site: Site, mount: OverlayMount, controller: Controller, servers: Mapping[str, Server]) -> None:
        self.site = site
        self.mount = mount
        self.controller = controller
        self.servers = servers
        self.reads = Reads()
        self._stop = threading.Event()
        self._outages = 0
        self._lines_judged = 0
        self.hot = mount.mountpoint / "plain" / "data"
        self.hot_bytes = content(2 * MIB, "plain")
        (mount.source / "plain").mkdir()
        (mount.source / "plain" / "data").write_bytes(self.hot_bytes)
        self.local: Model = make_model(mount, "local", {"a.safetensors": MIB, "b.safetensors": 300_000}).filled()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hot and local files are read for the length of a `with`."""
        self._stop.clear()
        thread = threading.Thread(target=self._read)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _read(self) -> None:
        while not self._stop.wait(READ_PAUSE_SECONDS):
            for path, data in (
                (self.hot, self.hot_bytes),
                *((self.local.through(name), data) for name, data in self.local.files.items()),
            ):
                try:
                    if path.read_bytes() != data:
                        self.reads.failures.append(f"{path}: wrong bytes")
                except OSError as error:
                    self.reads.failures.append(f"{path}: {error}")
                self.reads.done += 1

    def outage(self, server: str, way: str, seconds: float) -> None:
        """One server is away for so long, under readers; afterwards everything goes on."""
        self._outages += 1
        self.mount.allow_log("publish_failing", "wishes_failing")
        with self.reading():
            if server == "s3":
                self._begin_demotion()
            with self._away(self.servers[server], way):
                before = self.reads.done
                threading.Event().wait(seconds)
                until(lambda: self.reads.done > before, what=lambda: "nobody reads")
        assert self.reads.failures == []
        self._check_controller(server)
        self._check_log()

    @contextmanager
    def _away(self, server: Server, way: str) -> Iterator[None]:
        if way == "frozen":
            with server.frozen():
                yield
            return
        server.stop()
        try:
            yield
        finally:
            server.start()

    def _begin_demotion(self) -> None:
        """A model is demoted meanwhile."""
        name = f"models/old-{self._outages}"
        self.site.model(name, size=MIB)
        self.site.ask(
            "INSERT INTO model_locations (model_id, tier, size_bytes, last_access)"
            " VALUES ($1, 'hot', 1, now() - interval '90 days')",
            name,
        )
        self._ask("cleanup-unused-models")
        planned = "SELECT FROM moves WHERE subject = $1"
        until(lambda: self.site.ask(planned, name), DRAIN_SECONDS, self.controller.text)

    def _ask(self, job: str) -> None:
        self.site.ask(
            "INSERT INTO job_runs (job, state, requested_by) VALUES ($1, 'requested', 'test') ON CONFLICT DO NOTHING",
            job,
        )

    def _check_controller(self, server: str) -> None:
        """It lives, leads, works on what it is asked, and what it had begun comes to its end."""
        assert self.controller.process.poll() is None, self.controller.text()
        self._ask("scan-catalogue")
        waiting = "SELECT FROM job_runs WHERE finished_at IS NULL AND job = 'scan-catalogue'"
        until(lambda: not self.site.ask(waiting), DRAIN_SECONDS, self.controller.text)
        assert self.controller.tell("/readyz") == (200, "ok\n")
        if server == "s3":
            name = f"models/old-{self._outages}"
            cold = "SELECT FROM model_locations WHERE model_id = $1 AND tier = 'cold'"
            until(lambda: self.site.ask(cold, name), DRAIN_SECONDS, self.controller.text)

    def check_counts(self) -> None:
        """What the node counted is what the catalogue has, and nothing waits any more."""
        self.mount.settled()

        def same() -> bool:
            rows = {row["model_id"]: row["hits"] for row in self.site.ask("SELECT model_id, hits FROM model_locations")}
            told = self.mount.models()["models/local"]["hits"]
            return rows.get("models/local") == told and not self.mount.status()["publish"]["backlog_batches"]

        until(same, DRAIN_SECONDS, lambda: f"{self.mount.status()['publish']} {self.controller.text()}")

    def _check_log(self) -> None:
        lines = self.controller.log()[self._lines_judged :]
        self._lines_judged += len(lines)
        loud = [line for line in lines if line["level"] not in ("debug", "info")]
        assert len(loud) <= LOUD_LINES_MAX, loud
        assert not [line for line in loud if line["level"] in ("error", "critical")], loud
        assert "Traceback" not in self.controller.text(), self.controller.text()


@contextmanager
def scene_of(new_directory: Callable[[str], Path], mount_factory: Any) -> Iterator[Scene]:
    """A scene with servers of its own, because these are stopped and frozen."""
    with (
        PostgresServer(new_directory("postgres")) as postgres,
        RedisServer(new_directory("redis")) as redis,
        S3Server(new_directory("s3")) as s3,
        _scene(new_directory("site"), mount_factory, postgres, redis, s3) as made,
    ):
        yield made


@contextmanager
def _scene(
    directory: Path, mount_factory: Any, postgres: PostgresServer, redis: RedisServer, s3: S3Server
) -> Iterator[Scene]:
    keys = {}
    for name, key in (("access", s3.access_key), ("secret", s3.password)):
        keys[f"{name}_key_file"] = str(directory / name)
        (directory / name).write_text(key)
    objects = {"endpoint": s3.url, "stall_timeout": 2, **keys}
    site = Site(
        directory,
        postgres.create_database(),
        redis=redis.url(),
        objects=objects,
        nodes_report=True,
        cleanup_share_max=1.0,
        cleanup_models_max=1000,
        lease_report_max_age=3600,
        postgres_connect_timeout=3,
        postgres_statement_timeout=5,
    )
    (directory / "password").write_text(redis.password)
    url = redis.url().replace(f":{redis.password}@", "")
    mount = mount_factory(
        site.source,
        redis=url,
        redis_password_file=directory / "password",
        node_name=NODE,
        publish_interval=1,
        load_idle_gap=0.3,
    )
    with running(site) as controller:
        controller.wait_for("leading")
        yield Scene(site, mount, controller, {"redis": redis, "postgres": postgres, "s3": s3})
        assert controller.end() == 0
