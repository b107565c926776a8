"""Counts what statistics of many nodes cost the database: `python -m bench.statistics_scale --help`. Needs no root.

Nodes are their own code (index, outbox, exchange) in virtual time: every ten seconds of it each one has had models
read, and reports. The controller's fold is its own, too, with its own pauses; Redis and PostgreSQL are real, and the
statements are those that PostgreSQL itself counted (pg_stat_statements), transactions and pool included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry
from redis import Redis
from rich.console import Console
from rich.table import Table

from tierd.controller.migrate import known, migrate
from tierd.controller.redis_client import redis_of
from tierd.controller.settings import ControllerSettings
from tierd.controller.statistics.fold import StatisticsFold
from tierd.metrics import FoldMetrics
from tierd.node.index import Batch, Index, ModelDelta
from tierd.node.outbox import Outbox
from tierd.node.publish import Exchange, pause_s
from tierd.postgres import Database
from tierd.redis_options import redis_options

STATEMENTS_A_MINUTE_MAX = 60.0
DIFFERENCE_MAX = 0.10
INTERVAL_S = 10.0
CATALOGUE = 1000
READ_A_ROUND = 10
MODEL_BYTES = 13 << 30
_COUNT = (
    "SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid"
    " WHERE d.datname = $1"
)


@dataclass(frozen=True)
class Figures:
    """What one run cost and wrote."""

    nodes: int
    minutes: float
    statements: int
    messages: int
    fold_s_max: float
    lost: int
    """Loads that were counted on a node and are not in the database, or are there twice."""

    @property
    def a_minute(self) -> float:
        """Statements in a minute of virtual time."""
        return self.statements / self.minutes


class SimulatedNode:
    """One node's own side. It reads some of its models in each round."""

    def __init__(self, path: Path, number: int, models: int, client: Any, chance: random.Random) -> None:
        self.index = Index(path, unsent=True)
        self.exchange = Exchange(Outbox(self.index), lambda: client, f"node-{number}", version="0", clock=self._clock)
        self._models = [f"models/{chance.randrange(CATALOGUE)}".encode() for _ in range(models)]
        self._chance = chance
        self.now_s = 0.0
        self.loads = 0

    def _clock(self) -> float:
        return self.now_s

    def round(self, now_s: float) -> None:
        """Ten seconds of a node's life."""
        self.now_s = now_s
        read = set(self._chance.sample(self._models, min(READ_A_ROUND, len(self._models))))
        deltas = {model: ModelDelta(opens=8, loads=1, hits=1, last_access_ns=time.time_ns()) for model in read}
        self.index.apply(Batch(models=deltas))
        self.loads += len(read)
        self.report(read)

    def report(self, leases: set[bytes]) -> None:
        """What a publisher does."""
        models = self.exchange.receive()
        self.exchange.send(dict.fromkeys(models, MODEL_BYTES), leases)


class Over(Exception):
    """The time is up."""


class Fleet:
    """All nodes, and the clock that they share with the controller."""

    def __init__(self, directory: Path, nodes: int, models: int, client: Any) -> None:
        self._chance = random.Random(nodes)
        self._client = client
        self.nodes = [SimulatedNode(directory / f"{n}.db", n, models, client, self._chance) for n in range(nodes)]
        self._due = [(self._chance.uniform(0, INTERVAL_S), number) for number in range(nodes)]
        heapq.heapify(self._due)
        self.now_s = 0.0

    def until(self, now_s: float) -> None:
        """Let time pass."""
        while self._due[0][0] <= now_s:
            at_s, number = self._due[0]
            self.nodes[number].round(at_s)
            heapq.heapreplace(self._due, (at_s + pause_s(0, INTERVAL_S, self._chance.uniform), number))
        self.now_s = now_s

    def close(self) -> None:
        """Close the indexes."""
        for node in self.nodes:
            node.index.close()


async def simulate(
    settings: ControllerSettings, directory: Path, *, nodes: int, models: int, minutes: float
) -> Figures:
    """One run in a migrated, otherwise unused database with pg_stat_statements, and an empty Redis."""
    assert settings.redis is not None
    registry = CollectorRegistry()
    with contextlib.closing(Redis(**redis_options(settings.redis.get_secret_value()))) as client:
        fleet = Fleet(directory, nodes, models, client)
        try:
            async with Database(settings) as database, redis_of(settings) as redis, counting(settings) as count:

                async def pause(seconds: float) -> None:
                    if fleet.now_s + seconds > minutes * 60:
                        raise Over
                    await asyncio.to_thread(fleet.until, fleet.now_s + seconds)

                fold = StatisticsFold(database, redis, FoldMetrics(registry), pause=pause)
                started = await count()
                with contextlib.suppress(Over):
                    await fold.run()
                statements = await count() - started
                await _settle(fleet, fold)
                written = await _hits(database)
        finally:
            fleet.close()
    return Figures(
        nodes,
        minutes,
        statements,
        _total(registry, "tierd_statistics_messages_total"),
        _slowest(registry),
        abs(sum(node.loads for node in fleet.nodes) - written),
    )


async def _settle(fleet: Fleet, fold: StatisticsFold) -> None:
    """What was still on its way arrives."""
    for node in fleet.nodes:
        node.report(set())
    while await fold.fold():
        pass


async def _hits(database: Database) -> int:
    async with database.connection() as connection:
        return int(await connection.fetchval("SELECT coalesce(sum(hits), 0)::bigint FROM model_locations"))


@contextlib.asynccontextmanager
async def counting(settings: ControllerSettings) -> Any:
    """A function that tells how many statements the database has seen; it asks from another database."""
    where = settings.database()
    password = where.password.get_secret_value() if where.password else None
    connection = await asyncpg.connect(
        host=where.host, port=where.port, user=where.user, password=password, database="postgres"
    )

    async def count() -> int:
        return int(await connection.fetchval(_COUNT, where.database))

    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        yield count
    finally:
        await connection.close()


def _total(registry: CollectorRegistry, name: str) -> int:
    return int(sum(sample.value for family in registry.collect() for sample in family.samples if sample.name == name))


def _slowest(registry: CollectorRegistry) -> float:
    """The upper bound of the slowest fold's bucket, in seconds."""
    buckets = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "tierd_statistics_fold_seconds_bucket"
    ]
    most = max((bucket.value for bucket in buckets), default=0.0)
    return min((float(bucket.labels["le"]) for bucket in buckets if bucket.value == most), default=0.0)


@contextlib.contextmanager
def _servers(directory: Path) -> Iterator[tuple[Any, Any]]:
    """Private ones, as the tests have them (imported by name: their types are checked with the tests, if at all)."""
    servers = importlib.import_module("tests.servers")
    places = [directory / name for name in ("postgres", "redis")]
    for place in places:
        place.mkdir()
    directory.chmod(0o755)
    options = {"shared_preload_libraries": "pg_stat_statements"}
    with servers.PostgresServer(places[0], options=options) as postgres, servers.RedisServer(places[1]) as redis:
        yield postgres, redis


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A new directory, in memory where there is /dev/shm: a thousand nodes have a thousand disks, and not this one."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tierd-statistics-", dir=memory) as name:
        yield Path(name)


async def run(dsn: str, url: str, directory: Path, *, nodes: int, models: int, minutes: float) -> Figures:
    """`simulate` in a new database."""
    settings = ControllerSettings.model_validate({"postgres": dsn, "redis": url})
    async with Database(settings) as database, database.connection() as connection:
        await migrate(connection, known())
    return await simulate(settings, directory, nodes=nodes, models=models, minutes=minutes)


def show(figures: Sequence[Figures], console: Console) -> bool:
    """Print a table; whether all bars are held."""
    table = Table(
        "nodes", "statements a minute", "messages a minute", "slowest fold (s, at most)", "loads lost or twice"
    )
    for one in figures:
        messages = f"{one.messages / one.minutes:.0f}"
        table.add_row(str(one.nodes), f"{one.a_minute:.1f}", messages, f"{one.fold_s_max:g}", str(one.lost))
    console.print(table)
    rates = [one.a_minute for one in figures]
    difference = max(rates) / min(rates) - 1
    held = max(rates) <= STATEMENTS_A_MINUTE_MAX and difference <= DIFFERENCE_MAX and not any(f.lost for f in figures)
    console.print(
        f"bars: at most {STATEMENTS_A_MINUTE_MAX:.0f} a minute, {DIFFERENCE_MAX:.0%} between them"
        f" ({difference:.1%} here), 0 lost: {'held' if held else 'not held'}"
    )
    return held


def main() -> int:
    """Runs what the command line asks for; 1 if a bar is not held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 1000], help="one run each")
    parser.add_argument("--models", type=int, default=100, help="models of each node (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of virtual time (default: %(default)s)")
    options = parser.parse_args()
    figures = []
    with work_directory() as work, _servers(work) as (postgres, redis):
        for nodes in options.nodes:
            with contextlib.closing(Redis(**redis_options(redis.url()))) as client:
                client.flushall()
            place = work / f"nodes-{nodes}"
            place.mkdir()
            dsn = postgres.create_database()
            one = run(dsn, redis.url(), place, nodes=nodes, models=options.models, minutes=options.minutes)
            figures.append(asyncio.run(one))
    return 0 if show(figures, Console()) else 1


if __name__ == "__main__":
    sys.exit(main())
