"""Redis, PostgreSQL and the object store, each away for a minute, twenty times, while files are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import pytest

from tests.campaigns import house
from tests.conftest import DirectoryFactory, MountFactory
from tests.outages import SERVERS, WAYS, Scene, scene_of

pytestmark = pytest.mark.campaign

SECONDS = float(os.environ.get("TIERD_OUTAGE_SECONDS", "60"))
ROUNDS = int(os.environ.get("TIERD_OUTAGE_ROUNDS", "20"))
"""Of each server; every second one is frozen instead of stopped."""


@pytest.fixture
def scene(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> Iterator[Scene]:
    with scene_of(new_directory, overlay_mount) as made:
        yield made


def test_a_server_that_is_away_for_long_is_noticed_by_nobody_who_reads(scene: Scene) -> None:
    for number, server in product(range(ROUNDS), SERVERS):
        scene.outage(server, WAYS[number % len(WAYS)], SECONDS)
        scene.check_counts()
    house.report(
        "outages",
        rounds=ROUNDS,
        seconds_each=SECONDS,
        reads=scene.reads.done,
        failed_reads=len(scene.reads.failures),
        leaderships=len(scene.controller.log("leading")),
    )
