"""Moves end as if nothing had happened, and no byte misses on the way, though processes end between any two effects."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.controller.house import REPOSITORY, environment
from tests.controller.kills import CASES, Bench, leave, watched
from tests.controller.moving import Site, site_of
from tests.servers import run

NAMES = ("demote", "delete", "undo", "promote", "abandon")
RARE = ("renamed", "object lost")
"""Tried in the campaign."""
ENUMERATION_SECONDS = 600.0
KILLS = 5
"""Processes that are killed in each case, spread over its effects."""


@pytest.fixture
def site(schema: str, memory_path: Path) -> Site:
    return site_of(memory_path, schema, lease_reports=False)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.campaign) for name in RARE)])
def test_killed_between_any_two_effects(name: str, site: Site) -> None:
    bench = Bench(site, CASES[name])
    effects = run(bench.one(0, watched))
    assert len(effects) > 20
    run(bench.each(range(1, len(effects) + 1), effects), ENUMERATION_SECONDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_process_that_is_killed(name: str, site: Site) -> None:
    """The same with the real thing, at some of the effects."""
    bench = Bench(site, CASES[name])
    count = len(run(bench.one(0, leave)))

    async def kill(one: Bench, model: Site, last: int) -> list[str]:
        words = [str(model.root), model.dsn, model.model_id, name, str(last)]
        child = [sys.executable, "-m", "tests.controller.move_child", *words]
        process = await asyncio.create_subprocess_exec(*child, env=environment({}), cwd=REPOSITORY)
        assert await process.wait() == -signal.SIGKILL
        return []

    for number in range(KILLS):
        run(bench.one(1 + (2 * number + 1) * count // (2 * KILLS), kill))
