"""The benchmark of kills and upgrades, in its quickest form: it ends, no call fails, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import guard
from bench.handover import MEASUREMENTS
from tests.conftest import DirectoryFactory
from tests.mounts import REPOSITORY, environment, wait_until

RUN_SECONDS = 120
STOP_SECONDS = 40


@pytest.fixture
def work(new_directory: DirectoryFactory) -> Iterator[Path]:
    """Where it works, and leaves nothing."""
    path = new_directory("bench")
    yield path
    assert guard.mounts_under(path) == []
    assert list(path.iterdir()) == []


def start(work: Path, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.handover", "--work-dir", work, "--rounds", "1", "--scale", "0.01", *words]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=pipe, stderr=both, encoding="utf-8")


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_quick_run(name: str, work: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    with start(work, "--only", name, "--json", found) as process:
        printed, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, printed
    (section,) = json.loads(found.read_text())["sections"]
    assert [bar for bar in section["bars"] if "fails" in bar["limit"] and not bar["met"]] == [], printed
    assert "kill" in printed or "upgrade" in printed


def test_an_interrupted_run_leaves_nothing(work: Path) -> None:
    with start(work, "--only", "kill") as process:
        wait_until(lambda: bool(guard.mounts_under(work)), RUN_SECONDS, "it is mounted")
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 130, printed
