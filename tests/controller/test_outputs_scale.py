"""What looks at all outputs asks the database and the source little for each directory; the campaign has a million."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.controller.outputs import OLD_NS, House
from tests.servers import run
from tierd.controller.outputs import files as output_files
from tierd.controller.source import hot_tree

DIRECTORIES = 200
PER_DIRECTORY = 100
STATEMENTS_MAX = 14
"""For a directory that is read, with what begins and ends transactions."""
PAGE_DIRECTORIES = 500
"""Directories that a scan asks the database of at once."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Statements, attributes that were read, descriptors of directories."""
    counted: Counter[str] = Counter()

    def count(where: Any, name: str, what: str) -> None:
        found = getattr(where, name)

        def counting(*words: Any, **more: Any) -> Any:
            counted[what] += 1
            return found(*words, **more)

        monkeypatch.setattr(where, name, counting)

    for name in ("execute", "fetch", "fetchrow", "fetchval"):
        count(asyncpg.Connection, name, "statements")
    for module in (output_files, hot_tree):
        count(module, "forced_stat", "attributes")
    count(hot_tree, "_step", "steps")
    return counted


def make(outputs: Path) -> None:
    for number in range(DIRECTORIES):
        day = outputs / f"user{number // 28}/2023/01/{1 + number % 28:02}"
        day.mkdir(parents=True)
        for file in range(PER_DIRECTORY):
            fd = os.open(day / f"{UUID(int=number * PER_DIRECTORY + file)}.png", os.O_WRONLY | os.O_CREAT)
            os.ftruncate(fd, 1)
            os.utime(fd, ns=(OLD_NS, OLD_NS))
            os.close(fd)
        os.utime(day, ns=(OLD_NS, OLD_NS))


def test_unchanged_directories_cost_next_to_nothing(tmp_path: Path, schema: str, counts: Counter[str]) -> None:
    house = House(tmp_path, schema)
    make(house.outputs)

    @asynccontextmanager
    async def counted() -> AsyncIterator[None]:
        counts.clear()
        yield
        print(dict(counts))

    async def main() -> None:
        async with house.leading() as leader:
            async with counted():
                assert (await leader.scan()).new == DIRECTORIES * PER_DIRECTORY
            assert counts["statements"] <= DIRECTORIES * STATEMENTS_MAX
            assert counts["attributes"] <= DIRECTORIES * (1 + 2 * PER_DIRECTORY), "found, and seen not to be missed"
            assert counts["steps"] <= DIRECTORIES * 6 * 6, "directories are opened, not each file's way to it"
            async with counted():
                assert (await leader.scan()).read == 0
            assert counts["statements"] <= 20 + 10 * (DIRECTORIES // PAGE_DIRECTORIES)
            assert counts["attributes"] <= DIRECTORIES, "one for each directory, none for a file"
            await house.rows(
                "UPDATE generated_outputs SET cold_storage = true, version = 1, size_bytes = 1, pending_since = NULL,"
                " sha256 = decode(repeat('00', 32), 'hex') RETURNING 1"
            )
            async with counted():
                assert (await leader.clean_up(dry_run=True)).counts["outputs"] == DIRECTORIES * PER_DIRECTORY
            assert counts["statements"] <= 20
            assert counts["attributes"] == 0, "the books know which are old"

    run(main(), seconds=300)
