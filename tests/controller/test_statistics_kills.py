"""Statistics are exact though controllers, nodes and servers end between any two steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis as SyncRedis
from redis import asyncio as redis_asyncio
from structlog.testing import capture_logs

from tests.controller.reporting import Controller, Node, access, controller_of, fold, message, node_of, send
from tests.servers import PostgresServer, RedisServer, run
from tierd.controller.statistics import fold as fold_module
from tierd.controller.statistics.fold import StatisticsFold
from tierd.controller.statistics.plan import Received
from tierd.errors import DatabaseError
from tierd.metrics import FoldMetrics
from tierd.postgres import Database
from tierd.statistics import (
    GROUP,
    STREAM,
    decode,
)

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
            assert controller.count("bad") == 0, "what is gone was none of them"

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


def test_a_cancellation_that_a_wait_hid_ends_a_fold(schema: str, url: str) -> None:
    """It went on for ever: a wait that ended at the moment of the cancellation had hidden it."""

    async def main() -> bool:
        async with controller_of(schema, url) as controller:
            pausing = asyncio.Event()

            async def pause(_seconds: float) -> None:
                if not pausing.is_set():
                    pausing.set()
                    with suppress(asyncio.CancelledError):
                        await asyncio.Event().wait()

            fold = StatisticsFold(controller.database, controller.redis, FoldMetrics(CollectorRegistry()), pause=pause)
            running = asyncio.create_task(fold.run())
            await pausing.wait()
            running.cancel()
            await asyncio.wait([running], timeout=10)
            return running.cancelled()

    assert run(main())


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


def test_two_folds_lock_in_one_order(schema: str, url: str) -> None:
    """Transactions that take the same rows in different orders end in a deadlock: one of them is made to fail."""

    def received(node_id: str, sequence: int, names: list[str]) -> Received:
        accesses = [access(name) for name in names]
        return Received(decode(message(sequence, *accesses, node_id=node_id)), 0)

    async def main() -> None:
        names = [f"models/{number}" for number in range(400)]
        async with controller_of(schema, url) as one, controller_of(schema, url) as other:
            for sequence in range(1, 21):
                await asyncio.gather(
                    one.fold._commit([received("gpu-1", sequence, names)], time.monotonic()),
                    other.fold._commit([received("gpu-2", sequence, names[::-1])], time.monotonic()),
                )
            assert set((await one.hits()).values()) == {40}

    run(main())
