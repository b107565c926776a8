"""Moves end as if nothing had happened, though the source or the database fails, or is not there, at any effect."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.controller.kills import CASES, Bench, failing, leave, unmounted
from tests.controller.moving import Site, site_of
from tests.servers import run

NAMES = ("demote", "delete", "undo", "promote", pytest.param("abandon", marks=pytest.mark.campaign))
STEP = 3
"""Of the effects with an unmounted source each third is tried here, all are in the campaign."""
SECONDS = 600.0


@pytest.fixture
def site(schema: str, memory_path: Path) -> Site:
    return site_of(memory_path, schema, lease_reports=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [errno.EIO, pytest.param(errno.ENOSPC, marks=pytest.mark.campaign)])
def test_any_call_may_fail_once(name: str, number: int, site: Site) -> None:
    """The one before an effect: the call did nothing. The one after it: it did, and said that it did not."""
    bench = Bench(site, CASES[name])
    effects = run(bench.one(0, leave))
    run(bench.each(range(1, len(effects) + 1), effects, failing(number)), SECONDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [STEP, pytest.param(1, marks=pytest.mark.campaign)])
def test_nothing_is_concluded_from_a_source_that_is_not_mounted(name: str, step: int, site: Site) -> None:
    """Not that models are hot, files deleted, or moves at their end; and nothing is left in the empty directory."""
    bench = Bench(site, CASES[name])
    effects = run(bench.one(0, leave))
    run(bench.each(range(1, len(effects) + 1, step), effects, unmounted), SECONDS)
