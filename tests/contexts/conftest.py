"""What tests of contexts start from: a database with all tables, an empty Redis, and the library over both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from redis import Redis as SyncRedis

from tests.contexts.house import House
from tests.controller.house import migrated
from tests.objects.conftest import new_store, rclone
from tests.servers import PostgresServer, RedisServer, run
from tierd.redis_options import redis_options

__all__ = ["new_store", "rclone"]


@pytest.fixture
def schema(database: str) -> str:
    """The URL of a database with all tables."""
    run(migrated(database))
    return database


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[SyncRedis]:
    """A client of the Redis database that the library uses, which is empty."""
    redis_server.start()
    with closing(SyncRedis(**redis_options(redis_server.url(1)))) as made:
        made.flushall()
        yield made


@pytest.fixture
def house(schema: str, postgres: PostgresServer, redis_server: RedisServer, client: SyncRedis) -> House:
    """Everything, with Redis."""
    return House(schema, postgres, redis_server, client)


@pytest.fixture(params=["redis", "no redis", "redis away"])
def any_house(request: pytest.FixtureRequest, schema: str, postgres: PostgresServer) -> Iterator[House]:
    """Each way there is to run the library, in its turn."""
    kind: str = request.param
    if kind == "no redis":
        yield House(schema, postgres, None, None)
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    client: SyncRedis = request.getfixturevalue("client")
    if kind == "redis away":
        server.stop()
    yield House(schema, postgres, server, client)
    server.start()
