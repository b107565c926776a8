"""Publishing: what goes out when, what a failure costs, and what is asked of the source; in virtual time, no server."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.unit.stream import FakeRedis
from tests.unit.test_outbox import MODEL, OTHER, accessed
from tierd.errors import TierdError
from tierd.metrics import PublishMetrics
from tierd.node.handles import FileHandle
from tierd.node.index import Index
from tierd.node.inodes import Node
from tierd.node.open_models import OpenModels
from tierd.node.outbox import BATCHES_MAX, Outbox
from tierd.node.publish import BACKOFF_SECONDS_MAX, RESEND_SECONDS, Exchange, Publisher, pause_s
from tierd.node.sources import Moved
from tierd.statistics import LEASES_MAX, Message, applied_key

NODE = "gpu-1"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(tmp_path / "index.db", unsent=True)) as made:
        yield made


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exchange(index: Index, redis: FakeRedis, clock: Clock) -> Exchange:
    return Exchange(Outbox(index), redis.connect, NODE, version="1", clock=clock, now_ns=lambda: 99)


def go_round(exchange: Exchange, leases: Collection[bytes] | None = frozenset()) -> list[bytes]:
    """A round as the publisher makes it; the models that were asked for."""
    models = exchange.receive()
    exchange.send(dict.fromkeys(models, 100), leases)
    return models


def acknowledge(redis: FakeRedis, exchange: Exchange, sequence: object) -> None:
    """What the controller leaves for a node."""
    redis.applied[applied_key(NODE), str(exchange.outbox.boot)] = str(sequence).encode()


def sequences(messages: list[Message]) -> list[int]:
    """Of the batches among them."""
    return [message.batch.sequence for message in messages if message.batch is not None]


# --- one exchange after another ---


def test_a_round_sends_a_batch_and_ends_with_a_report(index: Index, redis: FakeRedis, exchange: Exchange) -> None:
    accessed(index)
    assert go_round(exchange, {OTHER, MODEL}) == [MODEL]
    batch, report = redis.take()
    assert batch.batch is not None
    assert [access.model_id for access in batch.batch.models] == ["models/a"]
    assert batch.report is None
    assert report.report is not None
    assert report.report.leases == ("models/a", "models/b")
    assert report.batch is None
    for message in (batch, report):
        assert (message.node_id, message.boot, message.version) == (NODE, exchange.outbox.boot, "1")
        assert (message.sent_ns, message.oldest) == (99, 1)


def test_a_report_goes_out_though_nothing_happened(redis: FakeRedis, exchange: Exchange) -> None:
    for _ in range(3):
        go_round(exchange)
    assert [message.report.leases for message in redis.take() if message.report is not None] == [()] * 3
    assert redis.clients == 1


def test_what_is_acknowledged_is_not_sent_again(
    index: Index, redis: FakeRedis, exchange: Exchange, clock: Clock
) -> None:
    accessed(index)
    go_round(exchange)
    assert exchange.backlog == 1
    acknowledge(redis, exchange, 1)
    clock.now += 10_000
    redis.take()
    go_round(exchange)
    (report,) = redis.take()
    assert report.oldest == 2, "nothing before the next batch will come"
    assert (exchange.backlog, exchange.acknowledged, exchange.resent) == (0, 1, 0)


def test_what_is_not_acknowledged_is_sent_again_less_and_less_often(
    index: Index, redis: FakeRedis, exchange: Exchange, clock: Clock
) -> None:
    accessed(index)
    began = clock.now
    sent_at = []
    for _ in range(500):
        go_round(exchange)
        sent_at += [clock.now - began] * len(sequences(redis.take()))
        clock.now += 10
    waits = [after - before for before, after in itertools.pairwise(sent_at)]
    assert waits[:6] == [RESEND_SECONDS * factor for factor in (1, 2, 4, 8, 16, 16)]
    assert exchange.resent == len(waits)


def test_a_new_batch_does_not_wait_for_the_one_before(
    index: Index, redis: FakeRedis, exchange: Exchange, clock: Clock
) -> None:
    for number in range(3):
        accessed(index, at_ns=number)
        go_round(exchange)
        clock.now += 10
    messages = redis.take()
    assert sequences(messages) == [1, 2, 3]
    assert {message.oldest for message in messages} == {1}


def test_after_a_failure_all_is_sent_again_at_once(index: Index, redis: FakeRedis, exchange: Exchange) -> None:
    """Redis may have been away because it lost everything."""
    accessed(index)
    go_round(exchange)
    redis.take()
    exchange.hang_up()
    assert redis.closed == 1
    go_round(exchange)
    assert sequences(redis.take()) == [1]
    assert redis.clients == 2


def test_while_redis_is_away_nothing_is_frozen(index: Index, redis: FakeRedis, exchange: Exchange) -> None:
    exchange.receive()
    redis.away = True
    for at_ns in range(100):
        accessed(index, at_ns=at_ns)
        with pytest.raises(Exception, match="refused"):
            exchange.receive()
        exchange.hang_up()
    redis.away = False
    go_round(exchange)
    batch, _ = redis.take()
    assert batch.batch is not None
    assert batch.batch.models[0].opens == 100


def test_while_the_controller_is_away_the_backlog_is_bounded(
    index: Index, redis: FakeRedis, exchange: Exchange, clock: Clock
) -> None:
    for at_ns in range(1, 3 * BATCHES_MAX + 1):
        accessed(index, at_ns=at_ns)
        go_round(exchange)
        clock.now += 10
    assert exchange.backlog == BATCHES_MAX
    assert len(exchange._sent) == BATCHES_MAX
    acknowledge(redis, exchange, BATCHES_MAX)
    redis.take()
    go_round(exchange)
    (last,) = [message.batch for message in redis.take() if message.batch is not None]
    assert (last.sequence, last.models[0].opens, last.models[0].last_access_ns) == (
        BATCHES_MAX + 1,
        2 * BATCHES_MAX,
        3 * BATCHES_MAX,
    )


@pytest.mark.parametrize(
    ("leases", "told"),
    [
        (None, None),
        ({b"models/\xff"}, ()),
        ({b"m/%d" % number for number in range(LEASES_MAX)}, LEASES_MAX),
        ({b"m/%d" % number for number in range(LEASES_MAX + 1)}, None),
    ],
)
def test_a_node_that_cannot_tell_says_so(
    redis: FakeRedis, exchange: Exchange, leases: Collection[bytes] | None, told: object
) -> None:
    go_round(exchange, leases)
    (message,) = redis.take()
    assert message.report is not None
    found = message.report.leases
    assert found == told or (found is not None and len(found) == told)


def test_an_acknowledgement_that_is_no_number(redis: FakeRedis, exchange: Exchange) -> None:
    go_round(exchange)
    acknowledge(redis, exchange, "many")
    with pytest.raises(TierdError, match="no number"):
        exchange.receive()


# --- rounds ---


@pytest.fixture
def _no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual clock does not wait for threads."""

    async def run_sync(work: Callable[..., Any], *args: Any, limiter: object, abandon_on_cancel: bool) -> Any:
        assert abandon_on_cancel
        await trio.lowlevel.checkpoint()
        return work(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


async def nothing_open() -> Collection[bytes]:
    """As it says."""
    return ()


def publisher_of(
    exchange: Exchange,
    *,
    open_models: Callable[[], Awaitable[Collection[bytes]]] = nothing_open,
    size_of: Callable[[bytes], int | None] = lambda model: 100,
    uniform: Callable[[float, float], float] = lambda low, high: 1.0,
) -> Publisher:
    """One that comes round every 10 s, to the second."""
    return Publisher(
        exchange,
        PublishMetrics(CollectorRegistry()),
        address="redis:6379",
        interval_s=10.0,
        open_models=open_models,
        size_of=size_of,
        uniform=uniform,
    )


async def run_for(publisher: Publisher, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await publisher.run()


@pytest.mark.usefixtures("_no_thread")
async def test_rounds_come_by_the_clock(autojump_clock: MockClock, redis: FakeRedis, exchange: Exchange) -> None:
    publisher = publisher_of(exchange)
    with capture_logs() as logs:
        await run_for(publisher, 35)
    assert len(redis.take()) == 4
    assert [line["event"] for line in logs] == ["publishing"], "said once"
    told = publisher.status()
    assert told.pop("last_success").endswith("Z")
    assert told == {
        "enabled": True,
        "node": NODE,
        "boot": str(exchange.outbox.boot),
        "backlog_batches": 0,
        "dropped": 0,
        "error": None,
    }


@pytest.mark.usefixtures("_no_thread")
async def test_a_failure_is_logged_once_and_tried_again_ever_later(
    autojump_clock: MockClock, redis: FakeRedis, index: Index, clock: Clock
) -> None:
    tried: list[float] = []

    def connect() -> FakeRedis:
        tried.append(trio.current_time())
        return redis.connect()

    exchange = Exchange(Outbox(index), connect, NODE, version="1", clock=clock, now_ns=lambda: 99)
    publisher = publisher_of(exchange)
    redis.away = True
    with capture_logs() as logs:
        await run_for(publisher, 400)
    assert [after - before for before, after in itertools.pairwise(tried)][:6] == [20, 40, 60, 60, 60, 60]
    assert [(line["event"], line["log_level"]) for line in logs] == [("publish_failing", "warning")]
    told = publisher.status()
    assert "refused" in told["error"]
    assert told["last_success"] is None
    redis.away = False
    accessed(index)
    with capture_logs() as logs:
        await run_for(publisher, 35)
    assert [line["event"] for line in logs] == ["publishing"]
    assert len(redis.take()) == 5, "four rounds, one batch: the interval is what it was"
    assert publisher.status()["error"] is None


@pytest.mark.usefixtures("_no_thread")
async def test_a_damaged_or_full_index_is_a_failure_like_another(
    autojump_clock: MockClock, redis: FakeRedis, exchange: Exchange, index: Index
) -> None:
    publisher = publisher_of(exchange)
    await publisher.round()
    accessed(index)
    with closing(sqlite3.connect(index.path)) as db:
        db.execute("ALTER TABLE unacknowledged RENAME TO elsewhere")
        db.commit()
    with capture_logs() as logs:
        await publisher.round()
        await publisher.round()
    assert [line["event"] for line in logs] == ["publish_failing"]
    assert "unacknowledged" in str(publisher.error)
    with closing(sqlite3.connect(index.path)) as db:
        db.execute("ALTER TABLE elsewhere RENAME TO unacknowledged")
        db.commit()
    redis.take()
    await publisher.round()
    assert sequences(redis.take()) == [1]


@given(st.integers(0, 10_000), st.floats(1, 3600), st.floats(0, 1))
def test_pauses_are_bounded_and_never_short(failures: int, interval_s: float, chance: float) -> None:
    pause = pause_s(failures, interval_s, lambda low, high: low + chance * (high - low))
    assert 0.8 * interval_s <= pause <= 1.2 * max(interval_s, BACKOFF_SECONDS_MAX)
    if failures == 0:
        assert pause <= 1.2 * interval_s


def test_pauses_are_not_all_the_same() -> None:
    asked = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    assert pause_s(0, 10, uniform) == 12
    assert asked == [(0.8, 1.2)]


# --- what the source is asked, with real threads ---


async def test_a_source_that_hangs_costs_sizes_and_leases_but_no_report(
    index: Index, redis: FakeRedis, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierd.node.publish._LOOK_SECONDS", 0.1)
    hangs = threading.Event()

    async def open_models() -> Collection[bytes]:
        await trio.to_thread.run_sync(hangs.wait, abandon_on_cancel=True)
        return ()

    def size_of(model: bytes) -> int | None:
        if model == OTHER:
            hangs.wait()
        return 7

    accessed(index)
    accessed(index, OTHER)
    try:
        publisher = publisher_of(exchange, open_models=open_models, size_of=size_of)
        for _ in range(2):
            await publisher.round()
        messages = redis.take()
    finally:
        hangs.set()
    batch = messages[0].batch
    assert batch is not None
    assert {access.model_id: access.size_bytes for access in batch.models} == {"models/a": 7, "models/b": None}
    assert [message.report.leases for message in messages if message.report is not None] == [None, None]
    assert publisher.error is None


async def test_the_event_loop_goes_on_while_redis_hangs(exchange: Exchange) -> None:
    hangs = threading.Event()
    asked = threading.Event()

    class Stuck(FakeRedis):
        def hget(self, name: str, key: str) -> bytes | None:
            asked.set()
            hangs.wait()
            return None

    exchange._connect = Stuck().connect
    publisher = publisher_of(exchange)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publisher.run)
            await trio.to_thread.run_sync(asked.wait)
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()  # and the daemon does not wait for it either
    finally:
        hangs.set()


# --- which models are open ---


def handle(fh: int, node: Node, *, model: bytes | None = None, recorded: bytes | None = None) -> FileHandle:
    """An open file."""
    made = FileHandle(fh, node, -1, False)
    made.model, made.recorded_path = model, recorded
    return made


async def test_open_models_by_lease_by_path_and_by_what_was_recorded() -> None:
    paths = {1: b"models/c/x", 2: b"notes.txt"}
    nodes = {number: Node(number, number, None, b"") for number in range(5)}

    def path_of(node: Node) -> bytes:
        try:
            return paths[node.id]
        except KeyError:
            raise Moved from None

    def model_of(path: bytes) -> bytes | None:
        return path.rpartition(b"/")[0] or None

    files = {
        1: handle(1, nodes[0], model=b"models/a"),
        2: handle(2, nodes[1]),
        3: handle(3, nodes[1]),
        4: handle(4, nodes[2]),
        5: handle(5, nodes[3], recorded=b"models/gone/y"),
        6: handle(6, nodes[4]),
    }
    assert await OpenModels(lambda: files, path_of, model_of)() == {b"models/a", b"models/c", b"models/gone"}


async def test_others_get_their_turn_while_many_handles_are_looked_at() -> None:
    node = Node(1, 1, None, b"")
    files = {fh: handle(fh, node, model=b"models/%d" % (fh % 7)) for fh in range(5000)}
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        found = await OpenModels(lambda: files, lambda node: b"", lambda path: None)()
        nursery.cancel_scope.cancel()
    assert len(found) == 7
    assert turns >= 4, "about one every thousand"
