"""Redis, PostgreSQL and the object store, each away for two seconds while files are read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.outages import SERVERS, WAYS, Scene, scene_of

SECONDS = 2.0


@pytest.fixture
def scene(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> Iterator[Scene]:
    with scene_of(new_directory, overlay_mount) as made:
        yield made


def test_a_server_that_is_away_is_noticed_by_nobody_who_reads(scene: Scene) -> None:
    for server, way in product(SERVERS, WAYS):
        scene.outage(server, way, SECONDS)
    scene.check_counts()
