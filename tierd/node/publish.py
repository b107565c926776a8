"""Tells the controller what was accessed and what is open: from the outbox into a Redis stream, round by round.

Nothing waits for it and nothing is lost by it: a batch stays in the outbox until the controller says that it applied
it, and is sent again until then, so the stream, the acknowledgements and Redis itself may vanish at any time. Every
round ends with a report of the models with open files, which also says that this node lives.

Contract: `Exchange` blocks, and is used by one worker thread at a time; `Publisher` belongs to the trio thread.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, Protocol

import structlog
import trio
from redis.exceptions import RedisError

from tierd import promote_wishes
from tierd.errors import TierdError
from tierd.metrics import PublishMetrics
from tierd.node.answers import iso_time
from tierd.node.outbox import Outbox
from tierd.node.wishes import Wishes
from tierd.promote_wishes import PromoteWish
from tierd.statistics import (
    FIELD,
    LEASES_MAX,
    STREAM,
    Message,
    NumberedBatch,
    OpenReport,
    applied_key,
    encode,
    model_id_of,
)

log = structlog.get_logger(__name__)

STREAM_MESSAGES_MAX: Final = 50_000
"""What Redis keeps of the stream, about. 1,000 nodes that report every 10 s fill it in 8 minutes; what is cut off is
sent again."""
RESEND_SECONDS: Final = 60.0
"""After this time a batch that is not acknowledged is sent again; the time doubles with each try, up to 16-fold."""
_RESEND_DOUBLINGS_MAX: Final = 4
BACKOFF_SECONDS_MAX: Final = 60.0
_JITTER: Final = 0.2
_LOOK_SECONDS: Final = 2.0
"""How long a round waits for the source to say how large models are and which ones are open."""


class Pipeline(Protocol):
    """What is asked of a pipeline of `redis.Redis`."""

    def xadd(self, name: str, fields: dict[bytes, bytes], *, maxlen: int, approximate: bool) -> Any:
        """Append to a stream."""

    def execute(self) -> list[Any]:
        """Send all of it, and wait for the answers."""


class Client(Protocol):
    """What is asked of `redis.Redis`."""

    def hget(self, name: str, key: str) -> Any:
        """A field of a hash, None if it is not there."""

    def zrange(self, name: str, start: int, end: int) -> Any:
        """Members of a sorted set."""

    def get(self, name: str) -> Any:
        """A value, None if it is not there."""

    def pipeline(self, transaction: bool = True) -> Pipeline:
        """Commands that go together."""

    def close(self) -> None:
        """Hang up."""


class Exchange:
    """What a round says to Redis, and hears. `connect` makes a client; `now_ns` is the wall clock that accesses are
    recorded with. May raise RedisError, OSError, sqlite3.Error, TierdError: then `hang_up`, and begin anew."""

    def __init__(
        self,
        outbox: Outbox,
        connect: Callable[[], Client],
        node_id: str,
        *,
        version: str,
        wishes: Wishes | None = None,
        forget: Callable[[Client], tuple[int, ...]] = lambda client: (),
        clock: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.outbox = outbox
        self.node_id = node_id
        self._connect = connect
        self._version = version
        self.wishes = wishes if wishes is not None else Wishes()
        self._forget = forget
        self._clock = clock
        self._now_ns = now_ns
        self._erased: tuple[int, ...] = ()
        """Erasures of whose outputs nothing is here."""
        self._client: Client | None = None
        self._sent: dict[int, tuple[float, int]] = {}
        """By sequence, when a batch was sent last, and how often. Only batches of the outbox are in it."""
        self.backlog = 0
        """Batches that wait for their acknowledgement."""
        self.resent = 0
        self.acknowledged = 0

    def receive(self) -> list[bytes]:
        """Take the acknowledgement; the models whose accesses can be sent now."""
        outbox = self.outbox
        if not outbox.begun:
            outbox.begin()
        if self._client is None:
            self._client = self._connect()
        answer = self._client.hget(applied_key(self.node_id), str(outbox.boot))
        if answer is not None:
            self.acknowledged += outbox.acknowledge(_sequence(answer))
        self._erased = self._forget(self._client)
        return outbox.unsent()

    def send(self, sizes: Mapping[bytes, int | None], leases: Collection[bytes] | None) -> None:
        """Freeze the accesses of the models in `sizes`; send what is due, and which models are open (None: not
        known)."""
        client = self._client
        assert client is not None, "receive comes first"
        self.outbox.freeze(sizes)
        waiting = self.outbox.waiting()
        oldest = waiting[0].sequence if waiting else self.outbox.sequence + 1
        due = [batch for batch in waiting if self._is_due(batch.sequence)]
        pipeline = client.pipeline(transaction=False)
        for message in (*(self._message(oldest, batch=batch) for batch in due), self._report(oldest, leases)):
            fields = {FIELD: encode(message)}
            pipeline.xadd(STREAM, fields, maxlen=STREAM_MESSAGES_MAX, approximate=True)
        asked = self._ask(pipeline)
        for answer in pipeline.execute():
            if isinstance(answer, Exception):
                raise answer
        self.wishes.sent(asked)
        self._note_sent(waiting, due)

    def _ask(self, pipeline: Pipeline) -> tuple[str, ...]:
        """Which models shall become hot; nothing waits for an answer."""
        asked = self.wishes.due()
        if asked:
            fields = {FIELD: promote_wishes.encode(PromoteWish(node_id=self.node_id, models=asked))}
            most = promote_wishes.STREAM_MESSAGES_MAX
            pipeline.xadd(promote_wishes.STREAM, fields, maxlen=most, approximate=True)
        return asked

    def hang_up(self) -> None:
        """Close the connection. Whatever waits is sent again by the next one: who was away may have lost it."""
        client, self._client = self._client, None
        self._sent.clear()
        if client is not None:
            client.close()

    def _is_due(self, sequence: int) -> bool:
        at, times = self._sent.get(sequence, (0.0, 0))
        wait_s = RESEND_SECONDS * 2 ** min(times - 1, _RESEND_DOUBLINGS_MAX)
        return times == 0 or self._clock() - at >= wait_s

    def _note_sent(self, waiting: list[NumberedBatch], due: list[NumberedBatch]) -> None:
        self.backlog = len(waiting)
        known = self._sent
        self._sent = {batch.sequence: known[batch.sequence] for batch in waiting if batch.sequence in known}
        for batch in due:
            _, times = self._sent.get(batch.sequence, (0.0, 0))
            self.resent += times > 0
            self._sent[batch.sequence] = self._clock(), times + 1

    def _report(self, oldest: int, leases: Collection[bytes] | None) -> Message:
        """A model that no catalogue can name cannot be demoted: it needs no lease."""
        names = None
        if leases is not None:
            names = tuple(sorted(name for model in leases if (name := model_id_of(model)) is not None))
        if names is not None and len(names) > LEASES_MAX:
            names = None
        return self._message(oldest, report=OpenReport(leases=names, erased=self._erased))

    def _message(self, oldest: int, *, batch: NumberedBatch | None = None, report: OpenReport | None = None) -> Message:
        return Message(
            node_id=self.node_id,
            boot=self.outbox.boot,
            version=self._version,
            sent_ns=max(0, self._now_ns()),
            oldest=oldest,
            batch=batch,
            report=report,
        )


def _sequence(answer: Any) -> int:
    try:
        return int(answer)
    except ValueError:
        raise TierdError("the acknowledgement in Redis is no number", hint="does anybody else use that key?") from None


def pause_s(failures: int, interval_s: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds until the next round: the interval, longer after failures in a row, bounded, and never all at once."""
    most_s = max(interval_s, BACKOFF_SECONDS_MAX)
    return min(interval_s * 2.0 ** min(failures, 32), most_s) * uniform(1 - _JITTER, 1 + _JITTER)


class Publisher:
    """See the module. `open_models` tells which models are open, `size_of` (blocking) how many bytes a model has.

    After a failure nothing is tried for a while, each time longer (`pause_s`). Only a change between success and
    failure is logged.
    """

    def __init__(
        self,
        exchange: Exchange,
        metrics: PublishMetrics,
        *,
        address: str,
        interval_s: float,
        open_models: Callable[[], Awaitable[Collection[bytes]]],
        size_of: Callable[[bytes], int | None],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.exchange = exchange
        self._metrics = metrics
        self._address = address
        self._interval_s = interval_s
        self._open_models = open_models
        self._size_of = size_of
        self._uniform = uniform
        self._talking = trio.CapacityLimiter(1)
        self._looking = trio.CapacityLimiter(1)
        self._failures = 0
        self.error: str | None = None
        self.last_success_s: float | None = None
        """When the last round succeeded, seconds since the epoch."""

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await self.round()
            await trio.sleep(pause_s(self._failures, self._interval_s, self._uniform))

    async def round(self) -> None:
        """Hear what was applied, send what is due. Raises nothing for what is away: the next round tries again."""
        try:
            models = await self._talk(self.exchange.receive)
            sizes = await self._sizes(models)
            leases = await self._leases()  # last, so that it is fresh
            await self._talk(self.exchange.send, sizes, leases)
        except (RedisError, OSError, sqlite3.Error, TierdError) as error:
            await self._talk(self.exchange.hang_up)
            self._failed(error)
        else:
            self._succeeded()

    async def _talk(self, function: Callable[..., Any], *args: Any) -> Any:
        """What is given up at the end of the daemon ends by its own deadlines."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._talking, abandon_on_cancel=True)

    async def _sizes(self, models: list[bytes]) -> dict[bytes, int | None]:
        """The models' bytes, None for those of which the source did not tell in time."""
        sizes: dict[bytes, int | None] = dict.fromkeys(models)
        with trio.move_on_after(_LOOK_SECONDS):
            for model in models:
                sizes[model] = await trio.to_thread.run_sync(
                    self._size_of, model, limiter=self._looking, abandon_on_cancel=True
                )
        return sizes

    async def _leases(self) -> Collection[bytes] | None:
        with trio.move_on_after(_LOOK_SECONDS):
            return await self._open_models()
        return None

    def status(self) -> dict[str, Any]:
        """The `publish` part of `tierd status --json`."""
        exchange, outbox = self.exchange, self.exchange.outbox
        return {
            "enabled": True,
            "node": exchange.node_id,
            "boot": str(outbox.boot) if outbox.begun else None,
            "last_success": iso_time(int(self.last_success_s * 1e9)) if self.last_success_s is not None else None,
            "backlog_batches": exchange.backlog,
            "dropped": outbox.dropped,
            "error": self.error,
        }

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._metrics.failed()
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.error is None:
            log.warning("publish_failing", redis=self._address, reason=reason, consequence="accesses are kept")
        self.error = reason

    def _succeeded(self) -> None:
        exchange = self.exchange
        if self.error is not None or self.last_success_s is None:
            log.info("publishing", redis=self._address, node=exchange.node_id, backlog_batches=exchange.backlog)
        self._failures = 0
        self.error = None
        self.last_success_s = time.time()
        self._metrics.succeeded(self.last_success_s)
