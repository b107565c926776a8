"""What statistics cost the database does not grow with the nodes: the benchmark's short form, with its bars."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis
from rich.console import Console

from bench.statistics_scale import Figures, run, show, work_directory
from tests import servers
from tests.conftest import DirectoryFactory
from tests.servers import PostgresServer, RedisServer
from tierd.redis_options import redis_options


@pytest.fixture(scope="module")
def counting_postgres(new_directory: DirectoryFactory) -> Iterator[PostgresServer]:
    """One that counts its statements."""
    options = {"shared_preload_libraries": "pg_stat_statements"}
    with PostgresServer(new_directory("postgres"), options=options) as server:
        yield server


def test_ten_times_the_nodes_cost_the_same(counting_postgres: PostgresServer, redis_server: RedisServer) -> None:
    redis_server.start()
    figures: list[Figures] = []
    for nodes in (3, 30):
        with Redis(**redis_options(redis_server.url())) as client:
            client.flushall()
        with work_directory() as work:
            dsn = counting_postgres.create_database()
            one = run(dsn, redis_server.url(), work, nodes=nodes, models=20, minutes=2)
            figures.append(servers.run(one))
    few, many = figures
    assert show(figures, Console(quiet=True)), figures
    assert many.messages > 9 * few.messages
    assert few.a_minute > 20, "the count is one"
