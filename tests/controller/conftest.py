"""What tests of statistics start from: an empty Redis, a database with all tables, a node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis as SyncRedis

from tests.controller.house import migrated
from tests.controller.moving import Site, site_of
from tests.controller.reporting import Node, node_of
from tests.servers import RedisServer, run
from tierd.redis_options import redis_options


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    redis_server.start()
    with closing(SyncRedis(**redis_options(redis_server.url()))) as client:
        client.flushall()
    return redis_server.url()


@pytest.fixture
def client(url: str) -> Iterator[SyncRedis]:
    """A client of it."""
    with closing(SyncRedis(**redis_options(url))) as made:
        yield made


@pytest.fixture
def schema(database: str) -> str:
    """The URL of a database with all tables."""
    run(migrated(database))
    return database


@pytest.fixture
def node(tmp_path: Path, client: SyncRedis) -> Iterator[Node]:
    with node_of(tmp_path, client) as made:
        yield made


@pytest.fixture
def site(schema: str, tmp_path: Path) -> Site:
    """A model, and a node that holds nothing open."""
    made = site_of(tmp_path, schema)
    run(made.register("gpu-1"))
    return made
