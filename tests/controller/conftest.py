"""What tests of statistics start from: an empty Redis, a database with all tables, a node."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis as SyncRedis

from tests.controller.house import migrated
from tests.controller.moving import Site, site_of
from tests.controller.reporting import Node, node_of
from tests.servers import PostgresServer, RedisServer, run
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


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """The URL of a database with all tables, which others are copies of: that is faster than to migrate each."""
    dsn = postgres.create_database()
    run(migrated(dsn))
    return dsn


@pytest.fixture
def schema(postgres: PostgresServer, migrated_template: str) -> Iterator[str]:
    """The URL of a database with all tables."""
    dsn = postgres.create_database(migrated_template)
    yield dsn
    postgres.drop_database(dsn)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """As `tmp_path`, in memory if there is /dev/shm: for tests that would wait for the disk at thousands of steps."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tierd-tests-", dir=memory) as directory:
        yield Path(directory)


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
