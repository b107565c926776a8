"""Both sides of the statistics, for tests: nodes with their own code, a controller, messages made by hand."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prometheus_client import CollectorRegistry
from redis import Redis as SyncRedis

from tests.controller.house import settings_for
from tests.servers import run
from tierd.controller.redis_client import redis_of
from tierd.controller.statistics.fold import StatisticsFold
from tierd.metrics import FoldMetrics
from tierd.node.index import Batch, Index, ModelDelta
from tierd.node.outbox import Outbox
from tierd.node.publish import Client, Exchange
from tierd.postgres import Database
from tierd.statistics import (
    FIELD,
    STREAM,
    Message,
    ModelAccess,
    NumberedBatch,
    OpenReport,
    encode,
)

NS = 1_000_000_000
BOOT = UUID("6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")
OTHER_BOOT = UUID("7f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")


@dataclass
class Node:
    """A node's own side: its index, its outbox, and what it says in a round; its clock is `skew_s` off."""

    path: Path
    client: SyncRedis
    name: str = "gpu-1"
    skew_s: float = 0.0
    leases: frozenset[bytes] | None = frozenset()
    monotonic: float = 0.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin, or go on after a kill."""
        self.index = Index(self.path, unsent=True)
        self.exchange = Exchange(
            Outbox(self.index),
            self._connect,
            self.name,
            version="0.1.0",
            clock=lambda: self.monotonic,
            now_ns=self.now_ns,
        )

    def _connect(self) -> Client:
        client: Any = self.client
        return client  # type: ignore[no-any-return]

    def now_ns(self) -> int:
        """The node's wall clock."""
        return time.time_ns() + int(self.skew_s * NS)

    def access(self, model: str, *, hits: int = 1, ago_s: float = 0.0) -> None:
        """Somebody read a model."""
        at_ns = self.now_ns() - int(ago_s * NS)
        delta = ModelDelta(opens=2, loads=1, hits=hits, bytes_read=10, last_access_ns=at_ns)
        self.index.apply(Batch(models={model.encode(): delta}))

    def round(self, size: int | None = 1000) -> None:
        """What a publisher does every ten seconds."""
        self.monotonic += 10
        self.exchange.send(dict.fromkeys(self.exchange.receive(), size), self.leases)

    def resend(self) -> None:
        """A round of which everything is due."""
        self.monotonic += 10_000
        self.round()


@contextmanager
def node_of(tmp_path: Path, client: SyncRedis, name: str = "gpu-1", **more: Any) -> Iterator[Node]:
    """A node until the end of a `with`."""
    made = Node(tmp_path / f"{name}.db", client, name, **more)
    try:
        yield made
    finally:
        made.index.close()


@dataclass
class Controller:
    """A fold with its two servers, and what the database holds."""

    database: Any
    redis: Any
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self.fold = StatisticsFold(self.database, self.redis, FoldMetrics(self.registry))

    async def __call__(self) -> None:
        """Fold all that waits."""
        while await self.fold.fold():
            pass

    async def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What a query finds."""
        async with self.database.connection() as connection:
            return [tuple(row) for row in await connection.fetch(query, *values)]

    async def models(self) -> dict[str, tuple[str, int, int, float]]:
        """Tier, size, hits and the age of the last access in seconds, by model."""
        age = "extract(epoch FROM clock_timestamp() - last_access)::float"
        rows = await self.rows(f"SELECT model_id, tier, size_bytes, hits, {age} FROM model_locations")
        return {name: (tier, size, hits, seconds) for name, tier, size, hits, seconds in rows}

    async def hits(self) -> dict[str, int]:
        """By model."""
        return dict(await self.rows("SELECT model_id, hits FROM model_locations"))  # type: ignore[arg-type]

    async def leases(self) -> set[tuple[str, str]]:
        """Node and model."""
        return set(await self.rows("SELECT node_id, model_id FROM node_leases"))  # type: ignore[arg-type]

    async def leases_age_s(self, node_id: str = "gpu-1") -> float | None:
        """How old a node's report is."""
        query = "SELECT extract(epoch FROM clock_timestamp() - leases_at)::float FROM nodes WHERE node_id = $1"
        rows = await self.rows(query, node_id)
        return rows[0][0] if rows else None

    def count(self, result: str) -> float:
        """Messages that had this result."""
        return self.registry.get_sample_value("tierd_statistics_messages_total", {"result": result}) or 0.0


@asynccontextmanager
async def controller_of(dsn: str, url: str) -> AsyncIterator[Controller]:
    """A controller until the end of an `async with`."""
    settings = settings_for(dsn, redis=url)
    async with Database(settings) as database, redis_of(settings) as redis:
        yield Controller(database, redis)


def fold(dsn: str, url: str, then: Callable[[Controller], Awaitable[Any]]) -> Any:
    """Fold what waits, and look."""

    async def main() -> Any:
        async with controller_of(dsn, url) as controller:
            await controller()
            return await then(controller)

    return run(main())


def message(
    sequence: int | None = None,
    *models: ModelAccess,
    node_id: str = "gpu-1",
    boot: UUID = BOOT,
    oldest: int = 1,
    leases: tuple[str, ...] | None = None,
    report: bool = False,
    sent_ns: int = 1000 * NS,
) -> bytes:
    """One as a node might send it."""
    batch = NumberedBatch(sequence=sequence, models=models) if sequence is not None else None
    said = OpenReport(leases=leases) if report or leases is not None else None
    made = Message(
        node_id=node_id, boot=boot, version="0.1.0", sent_ns=sent_ns, oldest=oldest, batch=batch, report=said
    )
    return encode(made)


def access(model_id: str, *, hits: int = 1, size: int | None = 1000, last_ns: int = 1000 * NS) -> ModelAccess:
    """One model of a batch."""
    return ModelAccess(
        model_id=model_id, opens=1, loads=1, hits=hits, bytes_read=0, last_access_ns=last_ns, size_bytes=size
    )


def send(client: SyncRedis, *messages: bytes) -> None:
    """Into the stream."""
    for data in messages:
        client.xadd(STREAM, {FIELD: data})
