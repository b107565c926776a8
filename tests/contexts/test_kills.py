"""Archive workers are killed and PostgreSQL restarts, under readers and writers: nothing is lost, nothing doubled.

The campaign has a million conversations, and runs for the better part of an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis as SyncRedis

from tests.contexts.house import House
from tests.contexts.kills import carry_on
from tests.controller.house import migrated
from tests.servers import PostgresServer, RedisServer, run


def test_twenty_thousand(house: House) -> None:
    books = run(carry_on(house, conversations=20_000, workers=3, kills=6, restarts=2, batch=400, words=8), seconds=240)
    assert books.kills == 6
    assert books.reads > 100
    assert books.writes > 10


@pytest.mark.campaign
def test_a_million(new_directory: Callable[[str], Path], redis_server: RedisServer, client: SyncRedis) -> None:
    """A server of its own, with room; conversations of 1 KB."""
    options = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
    with PostgresServer(new_directory("postgres"), options=options) as postgres:
        dsn = postgres.create_database()
        run(migrated(dsn))
        house = House(dsn, postgres, redis_server, client)
        books = run(
            carry_on(house, conversations=1_000_000, workers=8, kills=100, restarts=20, batch=2000, words=30),
            seconds=3600,
        )
    print(books.kills, books.reads, books.writes, books.failures)
    assert books.kills == 100
    assert books.writes > 100
