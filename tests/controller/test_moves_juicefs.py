"""The enumeration of kills over JuiceFS, where each call takes milliseconds: some effects here, all in the campaign."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.controller.kills import CASES, Bench, watched
from tests.controller.moving import Site, site_of
from tests.servers import run

NAMES = ("demote", "delete", "promote")
SAMPLES = 8
SECONDS = 1800.0


@pytest.fixture
def site(schema: str, memory_path: Path, juicefs: Path) -> Site:
    (memory_path / "source").symlink_to(tempfile.mkdtemp(dir=juicefs))
    return site_of(memory_path, schema, lease_reports=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [SAMPLES, pytest.param(0, marks=pytest.mark.campaign)])
def test_killed_between_any_two_effects(name: str, samples: int, site: Site) -> None:
    """And between any two of the undisturbed move somebody opens the model. `samples` 0: all."""
    bench = Bench(site, CASES[name])
    effects = run(bench.one(0, watched))
    count = len(effects)
    assert count > 20
    numbers = {1 + (2 * number + 1) * count // (2 * samples) for number in range(samples)} or range(1, count + 1)
    run(bench.each(sorted(numbers), effects), SECONDS)
