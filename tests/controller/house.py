"""What the tests of the controller share: settings for a test's database, and commands in processes of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from tierd import postgres
from tierd.controller import migrate
from tierd.controller.settings import ControllerSettings, load

REPOSITORY = Path(__file__).parents[2]
COMMAND_SECONDS = 60
POLL_SECONDS = 0.02


def settings_for(dsn: str, **more: Any) -> ControllerSettings:
    """Settings that reach a database."""
    return load({"postgres": dsn, **more})


HEEDS_CTRL_C = ("env", "--default-signal=INT")
"""Before a command: tests that a shell started in the background ignore SIGINT, and so would what they start."""


def connected(dsn: str, **more: Any) -> AbstractAsyncContextManager[postgres.Connection]:
    """A connection of its own."""
    return postgres.connected(settings_for(dsn, **more))


async def migrated(dsn: str) -> None:
    """Bring a database up to date."""
    async with connected(dsn) as connection:
        await migrate.migrate(connection, migrate.known())


async def until(connection: postgres.Connection, query: str, *values: object) -> None:
    """Wait for something that the server alone knows, and cannot be asked to tell."""
    while not await connection.fetchval(query, *values):  # noqa: ASYNC110 (see above)
        await asyncio.sleep(POLL_SECONDS)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Ours, without settings of tierd, and with these."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TIERD")}
    return {**ours, "PYTHONPATH": str(REPOSITORY), **env}


def start(*words: str, **env: str) -> subprocess.Popen[str]:
    """A tierd command that goes on beside the test."""
    return subprocess.Popen(
        [sys.executable, "-m", "tierd", *words],
        env=environment(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def tierd(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A tierd command, to its end."""
    process = start(*words, **env)
    out, err = process.communicate(timeout=COMMAND_SECONDS)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
