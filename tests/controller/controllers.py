"""Controllers as processes of their own, over a source and an object directory; and what tests ask of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from bench import guard
from tests.controller.house import connected, environment, migrated
from tests.servers import run

WAIT_SECONDS = 30.0
POLL_SECONDS = 0.02


class Site:
    """A source with models, a place for objects, a database with all tables: what controllers share."""

    def __init__(self, directory: Path, dsn: str, **more: Any) -> None:
        self.directory = directory
        self.dsn = dsn
        self.source = directory / "source"
        self.objects = directory / "objects"
        self.source.mkdir()
        self.objects.mkdir()
        (self.source / "models").mkdir()
        self.settings: dict[str, Any] = {
            "postgres": dsn,
            "source": str(self.source),
            "objects": {"directory": str(self.objects)},
            "state_dir": str(directory / "controller"),
            "metrics": "127.0.0.1:0",
            "nodes_report": False,
            "cleanup_at": "never",
            "archive_at": "never",
            "purge_contexts_at": "never",
            **more,
        }
        run(migrated(dsn))

    def model(self, model_id: str, size: int = 10_000, files: int = 2) -> None:
        """Make a model, `files` files of `size` bytes."""
        (self.source / model_id).mkdir(parents=True)
        for number in range(files):
            (self.source / model_id / f"part-{number}.safetensors").write_bytes(os.urandom(size))

    def config(self, **more: Any) -> Path:
        """A file with the settings."""
        path = self.directory / f"controller-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(self.settings | more), encoding="utf-8")
        return path

    def ask(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Rows of the database."""

        async def main() -> list[dict[str, Any]]:
            async with connected(self.dsn) as connection:
                return [dict(row) for row in await connection.fetch(query, *values)]

        return run(main())

    def value(self, query: str, *values: object) -> Any:
        """The one value that a query gives."""
        return next(iter(self.ask(query, *values)[0].values()))

    def grow_old(self, days: int = 40) -> None:
        """Nobody has read any model for so long."""
        self.ask("UPDATE model_locations SET last_access = now() - make_interval(days => $1)", days)

    def tierd(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """A command with these settings, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "tierd", *words],
            env=environment({"TIERDCTL_CONFIG": str(self.config(**more))}),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


class Controller:
    """A process `tierd controller`, and its log."""

    def __init__(self, site: Site, **more: Any) -> None:
        self.site = site
        self._log = site.directory / f"controller-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tierd", "controller", "--config", str(site.config(**more))],
                env=environment({}), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=guard.die_with_parent(signal.SIGKILL),  # noqa: PLW1509 (no threads here)
            )  # fmt: skip

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Its log, or the lines of one event."""
        lines = []
        for line in self._log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if event is None or line.get("event") == event]

    def text(self) -> str:
        """All that it printed."""
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, event: str, count: int = 1, seconds: float = WAIT_SECONDS) -> dict[str, Any]:
        """The line of an event, or of its occurrence number `count`."""
        until(lambda: len(self.log(event)) >= count or self.process.poll() is not None, seconds, self.text)
        assert len(self.log(event)) >= count, self.text()
        return self.log(event)[count - 1]

    @property
    def address(self) -> str:
        """Where it tells metrics."""
        found: str = self.wait_for("started")["metrics"]
        return found

    def tell(self, path: str) -> tuple[int, str]:
        """What it answers over HTTP."""
        try:
            with urlopen(f"http://{self.address}{path}", timeout=WAIT_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(WAIT_SECONDS)

    def end(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(WAIT_SECONDS)


def until(holds: Callable[[], object], seconds: float = WAIT_SECONDS, what: Callable[[], str] = lambda: "") -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what() or "not in time"
        time.sleep(POLL_SECONDS)


@contextmanager
def running(site: Site, **more: Any) -> Iterator[Controller]:
    """A controller for the length of a `with`. No defect may be in its log."""
    controller = Controller(site, **more)
    try:
        yield controller
    finally:
        controller.kill()
        assert "Traceback" not in controller.text()
