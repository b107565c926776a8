"""Folding statistics: exact whatever is killed, lost, late or twice. Real servers, and the node's own side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis as SyncRedis
from redis import asyncio as redis_asyncio
from structlog.testing import capture_logs

from tests.controller.house import connected, migrated, settings_for
from tests.servers import PostgresServer, RedisServer, run
from tierd.controller import statistics as fold_module
from tierd.controller.db import Database
from tierd.controller.redis_client import redis_of
from tierd.controller.statistics import StatisticsFold
from tierd.errors import DatabaseError
from tierd.metrics import FoldMetrics
from tierd.node.index import Batch, Index, ModelDelta
from tierd.node.outbox import Outbox
from tierd.node.publish import Client, Exchange
from tierd.redis_options import redis_options
from tierd.statistics import (
    FIELD,
    GROUP,
    STREAM,
    Message,
    ModelAccess,
    NumberedBatch,
    OpenReport,
    applied_key,
    encode,
)

NS = 1_000_000_000
BOOT = UUID("6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")
OTHER_BOOT = UUID("7f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")
SECONDS = 5.0
"""Within which two times that should be one are taken for one."""


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


# --- the two sides ---


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


@pytest.fixture
def node(tmp_path: Path, client: SyncRedis) -> Iterator[Node]:
    with node_of(tmp_path, client) as made:
        yield made


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


# --- what it writes ---


def test_accesses_arrive_and_are_acknowledged(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    node.leases = frozenset({b"models/a"})
    node.access("models/a")
    node.access("models/a", hits=0)
    node.access("models/b", ago_s=3600)
    node.round()

    async def look(controller: Controller) -> None:
        models = await controller.models()
        assert {name: row[:3] for name, row in models.items()} == {
            "models/a": ("hot", 1000, 1),
            "models/b": ("hot", 1000, 1),
        }
        assert 0 <= models["models/a"][3] < SECONDS
        assert 3600 <= models["models/b"][3] < 3600 + SECONDS
        assert await controller.leases() == {("gpu-1", "models/a")}
        age = await controller.leases_age_s()
        assert age is not None
        assert 0 <= age < SECONDS
        (row,) = await controller.rows("SELECT node_id, boot, version, registered, last_seen <= now() FROM nodes")
        assert row == ("gpu-1", node.exchange.outbox.boot, "0.1.0", True, True)

    fold(schema, url, look)
    assert client.xlen(STREAM) == 0, "what is dealt with leaves the stream"
    assert node.exchange.backlog == 1
    node.round()
    assert (node.exchange.backlog, node.exchange.acknowledged) == (0, 1)


def test_what_the_catalogue_knows_is_only_added_to(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller.rows(
                "INSERT INTO model_locations (model_id, tier, size_bytes, last_access, created_at, version, hits)"
                " VALUES"
                " ('models/cold', 'cold', 77, now() - interval '40 days', now() - interval '50 days', 2, 5),"
                " ('models/new', 'hot', 88, now(), now(), 0, 5)"
            )
            send(client, message(1, access("models/cold"), access("models/new", hits=-9, last_ns=0)))
            await controller()
            models = await controller.models()
            assert models["models/cold"][:3] == ("cold", 77, 6), "neither tier nor size is the node's to say"
            assert models["models/cold"][3] < SECONDS
            assert models["models/new"][:3] == ("hot", 88, 0), "never below 0"
            assert models["models/new"][3] < SECONDS, "nothing is ever made older"
            (row,) = await controller.rows(
                "SELECT now() - created_at > interval '49 days' FROM model_locations WHERE model_id = 'models/cold'"
            )
            assert row == (True,)

    run(main())


def test_a_model_of_unknown_size_is_not_invented(schema: str, url: str, client: SyncRedis) -> None:
    send(client, message(1, access("models/a", size=None), access("models/b")))
    assert fold(schema, url, Controller.hits) == {"models/b": 1}
    send(client, message(2, access("models/a", size=9), access("models/b", size=None)))
    assert fold(schema, url, Controller.hits) == {"models/a": 1, "models/b": 2}


def test_many_nodes_add_up_in_one_fold(schema: str, url: str, client: SyncRedis, tmp_path: Path) -> None:
    for number in range(5):
        with node_of(tmp_path, client, f"gpu-{number}", leases=frozenset({b"models/%d" % number})) as made:
            made.access("models/shared")
            made.access(f"models/{number}")
            made.round()

    async def look(controller: Controller) -> None:
        assert await controller.hits() == {"models/shared": 5, **{f"models/{number}": 1 for number in range(5)}}
        assert await controller.leases() == {(f"gpu-{number}", f"models/{number}") for number in range(5)}

    fold(schema, url, look)


# --- exactly once ---


def test_a_duplicate_counts_once(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    node.access("models/a")
    node.round()
    node.resend()
    assert client.xlen(STREAM) == 4
    assert fold(schema, url, Controller.hits) == {"models/a": 1}
    node.exchange.hang_up()
    client.delete(applied_key(node.name))
    node.access("models/a")
    node.resend()

    async def look(controller: Controller) -> tuple[dict[str, int], float, float]:
        return await controller.hits(), controller.count("applied"), controller.count("duplicate")

    assert fold(schema, url, look) == ({"models/a": 2}, 1, 1)
    node.round()
    assert node.exchange.backlog == 0, "a duplicate is acknowledged anew"


def test_what_comes_out_of_order_is_neither_lost_nor_counted_twice(schema: str, url: str, client: SyncRedis) -> None:
    first, second, third = (message(number, access("models/a", hits=10**number)) for number in (1, 2, 3))

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, second)
            await controller()
            assert await controller.hits() == {}
            assert client.hget(applied_key("gpu-1"), str(BOOT)) == b"0"
            send(client, third, first)
            await controller()
            assert await controller.hits() == {"models/a": 10}
            assert controller.count("gap") == 2
            send(client, third, second, first)  # in one fold the order does not matter
            await controller()
            assert await controller.hits() == {"models/a": 1110}
            assert client.hget(applied_key("gpu-1"), str(BOOT)) == b"3"
            send(client, message(9, access("models/a", hits=5), oldest=8))
            await controller()
            send(client, message(8, access("models/a", hits=5), oldest=8))
            await controller()
            assert await controller.hits() == {"models/a": 1115}, "nothing older than 8 will come: a restored database"

    run(main())


def test_a_bad_message_is_counted_and_skipped(schema: str, url: str, client: SyncRedis) -> None:
    send(client, b"no message", message(1, access("models/a")), b'{"format": 2}')
    client.xadd(STREAM, {b"something": b"else"})
    with capture_logs() as logs:

        async def look(controller: Controller) -> tuple[dict[str, int], float]:
            return await controller.hits(), controller.count("bad")

        assert fold(schema, url, look) == ({"models/a": 1}, 3)
    assert [(line["event"], line["messages"]) for line in logs] == [("statistics_unreadable", 3)]
    assert client.xlen(STREAM) == 0


def test_what_the_database_refuses_does_not_stop_the_rest(schema: str, url: str, client: SyncRedis) -> None:
    """One batch cannot be written: the others are, and those that follow it from its node."""

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller.rows(
                "ALTER TABLE model_locations ADD CONSTRAINT refused CHECK (model_id <> 'models/poison')"
            )
            for number in range(7):
                send(client, message(1, access("models/a"), node_id=f"gpu-{number}", leases=("models/a",)))
            send(client, message(2, access("models/poison"), access("models/b"), node_id="gpu-3"))
            send(client, message(3, access("models/a", hits=100), node_id="gpu-3"))
            with capture_logs() as logs:
                await controller()
            assert [(line["event"], line["node"]) for line in logs] == [("statistics_refused", "gpu-3")]
            assert await controller.hits() == {"models/a": 107}
            assert (controller.count("bad"), controller.count("applied")) == (1, 8)
            assert client.hget(applied_key("gpu-3"), str(BOOT)) == b"3"
            assert client.xlen(STREAM) == 0

    run(main())


# --- kills ---


class Killed(BaseException):
    """As if the process had gone."""


class Fate:
    """Ends the process at the step with a given number; `steps` are those it came by."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        """Before what is named."""
        self.steps.append(name)
        if len(self.steps) == self.last:
            raise Killed


class MortalConnection:
    """A database connection that may not come to its next statement."""

    def __init__(self, connection: Any, fate: Fate) -> None:
        self._connection = connection
        self._fate = fate

    async def fetch(self, query: str, *values: object) -> Any:
        """A statement with rows."""
        self._fate.step(query.split(maxsplit=1)[0] + query.rsplit(maxsplit=1)[-1])
        return await self._connection.fetch(query, *values)

    async def execute(self, query: str, *values: object) -> Any:
        """A statement without."""
        self._fate.step(query.split(maxsplit=1)[0])
        return await self._connection.execute(query, *values)


class MortalDatabase:
    """A database that may be left between any two statements, commit included."""

    def __init__(self, database: Database, fate: Fate) -> None:
        self._database = database
        self._fate = fate

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[MortalConnection]:
        """One that is not committed if the process ends in it."""
        self._fate.step("begin")
        async with self._database.transaction() as connection:
            yield MortalConnection(connection, self._fate)
            self._fate.step("commit")
        self._fate.step("committed")


class MortalPipeline:
    """Commands that may not be sent, or whose answer may not be heard."""

    def __init__(self, pipeline: Any, fate: Fate) -> None:
        self._pipeline = pipeline
        self._fate = fate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    async def __aenter__(self) -> MortalPipeline:
        await self._pipeline.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._pipeline.__aexit__(*details)

    async def execute(self) -> Any:
        """Send them."""
        self._fate.step("pipeline")
        answer = await self._pipeline.execute()
        self._fate.step("answered")
        return answer


class MortalRedis:
    """A client that may be left before and after any command."""

    def __init__(self, redis: redis_asyncio.Redis, fate: Fate) -> None:
        self._redis = redis
        self._fate = fate

    def pipeline(self, transaction: bool) -> MortalPipeline:
        """A pipeline like this."""
        return MortalPipeline(self._redis.pipeline(transaction=transaction), self._fate)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def command(*args: Any, **options: Any) -> Any:
            self._fate.step(name)
            answer = await getattr(self._redis, name)(*args, **options)
            self._fate.step(f"{name} answered")
            return answer

        return command


def test_killed_between_any_two_steps(
    schema: str, url: str, client: SyncRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is tried, not some of them: a fold that is killed there, one that comes after it, and the nodes."""
    monkeypatch.setattr(fold_module, "_READ_MESSAGES", 3)  # so that it reads more than once

    async def one(last: int, number: int) -> list[str]:
        fate = Fate(last)
        with (
            node_of(tmp_path, client, f"a-{number}", leases=frozenset({b"models/a"})) as first,
            node_of(tmp_path, client, f"b-{number}") as second,
        ):
            for sender in (first, second, first):
                sender.access(f"models/{number}")
                sender.round()
            send(client, b"bad")
            async with controller_of(schema, url) as controller:
                mortal: Any = StatisticsFold(
                    MortalDatabase(controller.database, fate),  # type: ignore[arg-type]
                    MortalRedis(controller.redis, fate),  # type: ignore[arg-type]
                    FoldMetrics(CollectorRegistry()),
                )
                with suppress(Killed):
                    await mortal.fold()
            async with controller_of(schema, url) as controller:
                first.round()
                await controller()
                for sender in (first, second):
                    sender.access(f"models/{number}")
                    sender.resend()
                await controller()
                assert (await controller.hits())[f"models/{number}"] == 5, fate.steps
                assert (f"a-{number}", "models/a") in await controller.leases()
                for sender in (first, second):
                    sender.round()
                    assert sender.exchange.backlog == 0, fate.steps
                assert client.xlen(STREAM) <= 2, "the last reports"
                await controller()
                assert client.xpending(STREAM, GROUP)["pending"] == 0
        return fate.steps

    last = 1
    while len(steps := run(one(last, last))) >= last:
        last += 1
    assert len(steps) == last - 1
    assert {"xreadgroup", "time", "begin", "INSERTboot", "commit", "committed", "pipeline", "answered"} <= set(steps)
    assert last > 25, steps


def test_a_node_that_is_killed_goes_on_where_it_was(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    """Between freezing, sending, and hearing of it."""
    for kill_after in ("access", "freeze", "send", "fold"):
        node.access("models/a")
        if kill_after in ("send", "fold"):
            node.round()
        elif kill_after == "freeze":
            node.exchange.outbox.freeze(dict.fromkeys(node.exchange.receive(), 1000))
        if kill_after == "fold":
            fold(schema, url, Controller.hits)
        node.index.close()
        node.start()
    node.round()
    assert fold(schema, url, Controller.hits) == {"models/a": 4}
    node.round()
    assert node.exchange.backlog == 0


# --- servers that go away ---


def test_redis_loses_everything(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    """FLUSHALL at each moment: before the fold, after it, and while a fold has read and not acknowledged."""

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            node.access("models/a")
            node.round()
            client.flushall()
            await controller()
            assert await controller.hits() == {}
            node.resend()
            await controller()
            client.flushall()  # the group and the acknowledgement
            node.access("models/a")
            node.resend()
            await controller()
            assert await controller.hits() == {"models/a": 2}
            node.access("models/a")
            node.round()
            read = await controller.fold._read()
            assert read.entries
            client.flushall()
            node.resend()
            await controller()
            node.round()
            assert await controller.hits() == {"models/a": 3}
            assert node.exchange.backlog == 0

    run(main())


def test_the_stream_is_evicted_or_cut(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    node.access("models/a")
    node.round()

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller.fold._read()  # entries that are pending, and then are no more
            client.xtrim(STREAM, maxlen=0, approximate=False)
            await controller()
            assert client.xpending(STREAM, GROUP)["pending"] == 0
            client.delete(STREAM)
            node.resend()
            await controller()
            assert await controller.hits() == {"models/a": 1}

    run(main())


def test_the_servers_restart_in_the_middle(
    schema: str, postgres: PostgresServer, redis_server: RedisServer, url: str, client: SyncRedis, node: Node
) -> None:
    """A fold that runs all the time: it says once that it fails, and goes on by itself."""
    registry = CollectorRegistry()

    async def main() -> dict[str, int]:
        async with controller_of(schema, url) as controller:
            fold = StatisticsFold(controller.database, controller.redis, FoldMetrics(registry), window_s=0.01)
            running = asyncio.create_task(fold.run())
            try:
                for server in (redis_server, postgres):
                    await asyncio.to_thread(server.stop)
                    node.access("models/a")
                    if server is postgres:
                        await asyncio.to_thread(node.round)  # or there is nothing to write
                    await until(lambda: failures() > failed[-1] or running.done())
                    assert not running.done(), running.exception()
                    await asyncio.to_thread(server.start)
                    node.exchange.hang_up()
                    await until(lambda: heard(node))
                    failed.append(failures())
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            return await controller.hits()

    failed = [0.0]

    def failures() -> float:
        return registry.get_sample_value("tierd_statistics_folds_failed_total") or 0.0

    def heard(node: Node) -> bool:
        node.round()
        return node.exchange.backlog == 0

    with capture_logs() as logs:
        assert run(main(), 120) == {"models/a": 2}
    events = [line["event"] for line in logs if line["event"].startswith("statistics")]
    assert events == ["statistics_failing", "statistics_resumed"] * 2


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.02)


def test_a_database_that_is_away_leaves_everything_as_it_is(
    schema: str, postgres: PostgresServer, url: str, client: SyncRedis, node: Node
) -> None:
    node.access("models/a")
    node.round()

    async def main() -> dict[str, int]:
        async with controller_of(schema, url) as controller:
            postgres.kill()
            for _ in range(3):
                with pytest.raises(DatabaseError):
                    await controller()
            assert client.xpending(STREAM, GROUP)["pending"] == 2
            postgres.start()
            await controller()
            return await controller.hits()

    assert run(main()) == {"models/a": 1}


def test_two_controllers_at_once(schema: str, url: str, client: SyncRedis, tmp_path: Path) -> None:
    """They read and fold the same messages, and each other's, all the time."""

    async def main() -> None:
        async with controller_of(schema, url) as one, controller_of(schema, url) as other:
            for number in range(20):
                for sender in nodes:
                    sender.access("models/a")
                    sender.access(f"models/{number % 3}")
                    sender.resend() if number % 3 == 0 else sender.round()
                await asyncio.gather(one(), other(), one.fold._read())
            for _ in range(3):
                for sender in nodes:
                    sender.resend()
                await asyncio.gather(one(), other())
            for sender in nodes:
                sender.round()
                assert sender.exchange.backlog == 0
            hits = await one.hits()
            assert hits["models/a"] == 20 * len(nodes)
            assert sum(hits.values()) == 40 * len(nodes)

    nodes = [Node(tmp_path / f"{number}.db", client, f"gpu-{number}") for number in range(4)]
    try:
        run(main())
    finally:
        for made in nodes:
            made.index.close()


# --- clocks ---


@pytest.mark.parametrize("skew_s", [-20 * 365 * 86_400.0, -3600.0, 86_400.0, 20 * 365 * 86_400.0])
def test_a_clock_far_off_moves_nothing(schema: str, url: str, client: SyncRedis, tmp_path: Path, skew_s: float) -> None:
    """Neither into the future, which no retention would ever reach, nor into the past, which would demote at once."""
    with node_of(tmp_path, client, skew_s=skew_s) as made:
        made.access("models/a")
        made.access("models/b", ago_s=7200)
        made.round()
    models = fold(schema, url, Controller.models)
    assert 0 <= models["models/a"][3] < SECONDS
    assert 7200 <= models["models/b"][3] < 7200 + SECONDS


def test_an_access_after_its_own_message_is_now(schema: str, url: str, client: SyncRedis) -> None:
    """The node's clock was set back in between."""
    send(client, message(1, access("models/a", last_ns=2**63 - 1), sent_ns=5))

    async def look(controller: Controller) -> list[tuple[Any, ...]]:
        return await controller.rows("SELECT last_access <= now(), now() - last_access < '5s' FROM model_locations")

    assert fold(schema, url, look) == [(True, True)]


# --- leases ---


def test_leases_are_replaced_and_as_old_as_the_message(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, message(leases=("models/a", "models/b")))
            send(client, message(leases=("models/c",), node_id="gpu-2"))
            await controller()
            send(client, message(leases=("models/b", "models/d")))
            await controller()
            assert await controller.leases() == {
                ("gpu-1", "models/b"),
                ("gpu-1", "models/d"),
                ("gpu-2", "models/c"),
            }
            send(client, message(leases=()))
            await controller()
            assert await controller.leases() == {("gpu-2", "models/c")}

    run(main())


def old(client: SyncRedis, data: bytes, seconds: float) -> None:
    """Into the stream, as if it had lain there for so long."""
    client.xadd(STREAM, {FIELD: data}, id=f"{int((time.time() - seconds) * 1000)}-0")


def test_a_report_that_lay_about_is_not_fresh(schema: str, url: str, client: SyncRedis) -> None:
    old(client, message(leases=("models/a",)), 500)

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller()
            age = await controller.leases_age_s()
            assert age is not None
            assert 500 - 1 <= age < 500 + SECONDS
            send(client, message(leases=("models/new",)))
            await controller()
            client.delete(STREAM)
            old(client, message(leases=("models/old",)), 100)  # delivered once more, after the newer one
            await controller()
            assert await controller.leases() == {("gpu-1", "models/new")}
            age = await controller.leases_age_s()
            assert age is not None
            assert age < SECONDS

    run(main())


def test_a_node_that_does_not_know_grows_old(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            old(client, message(leases=("models/a",)), 500)
            await controller()
            send(client, message(report=True), message(1, access("models/a")))
            await controller()
            age = await controller.leases_age_s()
            assert age is not None
            assert age > 499
            assert await controller.leases() == {("gpu-1", "models/a")}
            (row,) = await controller.rows("SELECT now() - last_seen < '5s' FROM nodes")
            assert row == (True,), "but it lives"

    run(main())


def test_a_name_that_two_daemons_use_is_never_fresh(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            for boots in ((BOOT,), (BOOT, OTHER_BOOT), (BOOT,), (OTHER_BOOT,), (OTHER_BOOT, BOOT)):
                for boot in boots:
                    send(client, message(leases=(f"models/{boot.hex[:4]}",), boot=boot))
                with capture_logs() as logs:
                    await controller()
                age = await controller.leases_age_s()
                assert age is not None
                assert (age > 10**9) is (boots != (BOOT,) or bool(contested))
                contested.append([line["event"] for line in logs])
            assert contested == [[], ["node_name_contested"], [], [], []], "said once"

    contested: list[list[str]] = []
    run(main())


def test_a_new_index_is_nothing_unusual(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            for boot in (BOOT, OTHER_BOOT, OTHER_BOOT):
                send(client, message(1, access("models/a"), leases=("models/a",), boot=boot))
                with capture_logs() as logs:
                    await controller()
                assert logs == []
                age = await controller.leases_age_s()
                assert age is not None
                assert age < SECONDS
            assert await controller.hits() == {"models/a": 2}, "each boot counts its own"

    run(main())


def test_who_reports_is_registered(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, message(leases=()))
            await controller()
            await controller.rows("UPDATE nodes SET registered = false")
            send(client, message(leases=()))
            await controller()
            assert await controller.rows("SELECT registered FROM nodes") == [(True,)]

    run(main())


# --- bounds ---


def test_more_than_one_fold_holds(schema: str, url: str, client: SyncRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "MESSAGES_MAX", 10)
    monkeypatch.setattr(fold_module, "_READ_MESSAGES", 4)
    for number in range(1, 31):
        send(client, message(number, access("models/a")))

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            assert await controller.fold.fold()
            assert await controller.hits() == {"models/a": 12}
            await controller()
            assert await controller.hits() == {"models/a": 30}
            monkeypatch.setattr(fold_module, "BYTES_MAX", 1)
            send(client, *(message(number, access("models/a")) for number in range(31, 41)))
            assert await controller.fold.fold()
            assert await controller.hits() == {"models/a": 34}

    run(main())


def test_the_stream_is_bounded(url: str, client: SyncRedis, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.node.publish.STREAM_MESSAGES_MAX", 100)
    for _ in range(400):
        node.round()
    assert client.xlen(STREAM) <= 200, "cut off by whole nodes of 100 entries (stream-node-max-entries)"


def test_two_folds_lock_in_one_order(schema: str, url: str, client: SyncRedis) -> None:
    """Transactions that hold each other's rows would end in a deadlock."""

    async def main() -> None:
        names = [f"models/{number}" for number in range(50)]
        async with controller_of(schema, url) as one, controller_of(schema, url) as other:
            for sequence in range(1, 15):
                for node_id, order in (("gpu-1", names), ("gpu-2", names[::-1])):
                    accesses = [access(name) for name in order]
                    send(client, message(sequence, *accesses, node_id=node_id))
                await asyncio.gather(one(), other())
            hits = await one.hits()
            assert set(hits.values()) <= set(range(14, 29))

    run(main())


async def _tables(dsn: str) -> int:
    async with connected(dsn) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM statistics_applied"))


def test_hostile_names_are_only_names(schema: str, url: str, client: SyncRedis) -> None:
    name = "models/'; DROP TABLE nodes; --"
    send(client, message(1, access(name), leases=(name,), node_id="'; DROP TABLE nodes; --"))

    async def look(controller: Controller) -> tuple[dict[str, int], set[tuple[str, str]]]:
        return await controller.hits(), await controller.leases()

    assert fold(schema, url, look) == ({name: 1}, {("'; DROP TABLE nodes; --", name)})
    assert run(_tables(schema)) == 1


def test_boots_of_all_kinds_are_told_apart(schema: str, url: str, client: SyncRedis) -> None:
    for _ in range(3):
        send(client, message(1, access("models/a"), boot=uuid4()))
    assert fold(schema, url, Controller.hits) == {"models/a": 3}
