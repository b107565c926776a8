"""A million outputs in ten thousand directories: what looks at all of them needs little memory, and is fast if nothing
changed. TIERD_OUTPUTS_DIRECTORIES makes it smaller."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from tests.campaigns.house import report
from tests.controller.house import REPOSITORY, connected, environment, migrated
from tests.controller.outputs import OLD_NS, House
from tests.servers import run

DIRECTORIES = int(os.environ.get("TIERD_OUTPUTS_DIRECTORIES", "10000"))
PER_DIRECTORY = 100
OUTPUTS = DIRECTORIES * PER_DIRECTORY
LEAVING_DIRECTORIES = 10
AGAIN_SECONDS_MAX = 10.0
MEMORY_BYTES_MAX = 200_000_000
COMMAND_SECONDS = 1800.0
TEST_SECONDS = 3600.0
MAKERS = 2

pytestmark = pytest.mark.campaign


class Done(NamedTuple):
    """A command that ended well."""

    counts: dict[str, Any]
    seconds: float
    peak_bytes: int


def day_of(number: int) -> str:
    """A hundred days for each user."""
    return f"user{number // 100}/2023/{1 + number % 100 // 28:02}/{1 + number % 100 % 28:02}"


def make(outputs: Path, first: int) -> None:
    """Sparse files of one byte, in every MAKERS-th directory: what is looked at is names and attributes."""
    for number in range(first, DIRECTORIES, MAKERS):
        day = outputs / day_of(number)
        day.mkdir(parents=True, exist_ok=True)
        for file in range(PER_DIRECTORY):
            fd = os.open(day / f"{UUID(int=number * PER_DIRECTORY + file)}.png", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.ftruncate(fd, 1)
            os.utime(fd, ns=(OLD_NS, OLD_NS))
            os.close(fd)
        os.utime(day, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: what is measured is the controller, not a disk."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    path = Path(tempfile.mkdtemp(prefix="tierd-outputs-", dir=base))
    yield path
    shutil.rmtree(path)


def tierd_job(house: House, name: str, *words: str, **settings: str) -> Done:
    """A job as a process of its own, as a CronJob has it."""
    peak = house.root / "peak"
    env = environment(
        {
            "TIERDCTL_POSTGRES": house.dsn,
            "TIERDCTL_SOURCE": str(house.root / "source"),
            "TIERDCTL_OBJECTS": str(house.root / "objects"),
            "TIERDCTL_STATE_DIR": str(house.root / "state"),
            "TIERDCTL_NODES_REPORT": "no",
            **settings,
        }
    )
    command = [sys.executable, "-m", "tests.campaigns.peak", str(peak), "job", name, "--json", *words]
    began = time.monotonic()
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    return Done(json.loads(done.stdout)["counts"], seconds, int(peak.read_text(encoding="ascii")))


async def execute(house: House, query: str, *values: object) -> None:
    """A statement that may take long."""
    async with connected(house.dsn, postgres_statement_timeout=COMMAND_SECONDS) as connection:
        await connection.execute(query, *values)


async def say_backed_up(house: House) -> None:
    """As if all but those of the first directories had been."""
    await execute(
        house,
        "UPDATE generated_outputs SET cold_storage = true, version = 1, size_bytes = 1,"
        " sha256 = decode(repeat('00', 32), 'hex'), pending_since = NULL WHERE user_id <> 'user0' OR filename > $1",
        day_of(LEAVING_DIRECTORIES).partition("/")[2],
    )


async def back_up_the_others(house: House) -> None:
    """For real; the rest has come to the hot tier just now."""
    async with house.leading() as leader:
        await leader.back_up()
    await execute(house, "UPDATE generated_outputs SET hot_since = now() WHERE mtime_ns IS NULL")


def test_an_unchanged_second_run_is_fast_and_memory_stays_bounded(memory_path: Path, database: str) -> None:
    run(migrated(database))
    house = House(memory_path, database)
    with get_context("spawn").Pool(MAKERS) as pool:
        pool.starmap(make, [(house.outputs, first) for first in range(MAKERS)])
    scans = [tierd_job(house, "scan-outputs")]
    assert (scans[0].counts["days"], scans[0].counts["new"]) == (DIRECTORIES, OUTPUTS)
    run(say_backed_up(house), seconds=TEST_SECONDS)
    scans.append(tierd_job(house, "scan-outputs"))
    assert (scans[1].counts["days"], scans[1].counts["read"]) == (DIRECTORIES, 0)
    foreseen = tierd_job(house, "cleanup-old-outputs", "--dry-run", TIERDCTL_OUTPUTS_CLEANUP_MAX=str(OUTPUTS))
    leaving = min(DIRECTORIES, LEAVING_DIRECTORIES) * PER_DIRECTORY
    assert foreseen.counts["outputs"] == OUTPUTS - leaving
    run(back_up_the_others(house), seconds=TEST_SECONDS)
    cleanups = [tierd_job(house, "cleanup-old-outputs") for _ in range(2)]
    assert [one.counts["outputs"] for one in cleanups] == [leaving, 0]
    peak = max(one.peak_bytes for one in (*scans, foreseen, *cleanups))
    report(
        "outputs scale",
        outputs=OUTPUTS,
        directories=DIRECTORIES,
        scan_s=round(scans[0].seconds, 1),
        unchanged_scan_s=round(scans[1].seconds, 1),
        foreseen_cleanup_s=round(foreseen.seconds, 1),
        cleanup_outputs=leaving,
        cleanup_s=round(cleanups[0].seconds, 1),
        unchanged_cleanup_s=round(cleanups[1].seconds, 1),
        peak_mb=round(peak / 1e6, 1),
    )
    assert peak < MEMORY_BYTES_MAX
    assert max(scans[1].seconds, cleanups[1].seconds) < AGAIN_SECONDS_MAX
