"""Folds what nodes report into the database: reads the stream, writes one transaction, acknowledges.

Every window all that waits is folded at once, with the same few statements whatever the number of nodes and models.
Between any two steps this may be killed, and so may Redis and PostgreSQL: what was read and not acknowledged is read
again, and what was committed is found there and not counted twice. Any number may run at once.

Decides nothing itself (`plan.py`), and deletes nothing but entries of the stream that are dealt with.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import asyncpg  # type: ignore[import-untyped]
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tierd.controller.outputs import books as output_books
from tierd.controller.statistics import sql
from tierd.controller.statistics.plan import Boot, Known, Plan, Received, age_ns, plan
from tierd.errors import DatabaseError
from tierd.metrics import FoldMetrics
from tierd.postgres import Connection, Database, heed_cancellation
from tierd.statistics import FIELD, GROUP, STREAM, BadMessage, applied_key, decode

log = structlog.get_logger(__name__)

WINDOW_SECONDS: Final = 20.0
"""Three folds a minute, of a dozen statements each with what the pool adds."""
MESSAGES_MAX: Final = 5000
"""Messages in one fold, about; what is left over is folded at once after it."""
BYTES_MAX: Final = 32 << 20
_READ_MESSAGES: Final = 200
_CONSUMER: Final = "controller"
"""One name for all: a controller that takes over finds at once what the one before it had read."""
_APPLIED_SECONDS: Final = 7 * 86_400
"""How long an acknowledgement is kept; a node that has not read it by then sends again, and gets another."""
_AWAY = (
    RedisError,
    OSError,
    DatabaseError,
    asyncpg.PostgresError,
)
_CONTENT_ERRORS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)


class _Entry(NamedTuple):
    id: bytes
    data: bytes | None
    """None: it was read once, and is no longer in the stream."""


class _Read(NamedTuple):
    entries: list[_Entry]
    now_ms: int
    """The time of Redis, after the last entry was read."""
    at_s: float
    """No later than that, by our clock."""
    waiting: int
    more: bool


@dataclass
class _Done:
    """What was committed."""

    applied: dict[Boot, int] = field(default_factory=dict)
    results: Counter[str] = field(default_factory=Counter)
    contested: set[str] = field(default_factory=set)


class StatisticsFold:
    """See the module. `redis` does not decode answers; `pause` waits between folds, for that many seconds.

    Contract: one task. Nothing is remembered from fold to fold but what was logged.
    """

    def __init__(
        self,
        database: Database,
        redis: Redis,
        metrics: FoldMetrics,
        *,
        window_s: float = WINDOW_SECONDS,
        reads_window_s: float = output_books.READS_WINDOW_SECONDS,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._redis = redis
        self._metrics = metrics
        self._window_s = window_s
        self._reads_window_s = reads_window_s
        self._pause = pause
        self._failing = False
        self._contested: set[str] = set()

    async def run(self) -> None:
        """Fold until cancelled. What is away is logged once, and tried again after each window."""
        while True:
            if not await self._try_fold():
                await self._pause(self._window_s)
            heed_cancellation()

    async def _try_fold(self) -> bool:
        try:
            more = await self.fold()
        except _AWAY as error:
            heed_cancellation(error)
            self._metrics.failed()
            if not self._failing:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("statistics_failing", reason=reason, consequence="nodes keep what they count")
            self._failing = True
            return False
        if self._failing:
            log.info("statistics_resumed")
        self._failing = False
        return more

    async def fold(self) -> bool:
        """One fold of what waits now; True if there is more.

        Raises RedisError, OSError, DatabaseError, asyncpg.PostgresError: then nothing is lost and nothing counts twice.
        """
        started = time.monotonic()
        read = await self._read()
        received, bad = await asyncio.to_thread(_decoded, read)  # seconds of a thousand nodes
        done = await self._write(received, read.at_s) if received else _Done()
        if read.entries:
            await self._acknowledge(read.entries, done.applied)
        done.results["bad"] += bad
        seconds = time.monotonic() - started
        self._metrics.folded(done.results, seconds=seconds, waiting=read.waiting, contested=len(done.contested))
        self._tell_contested(done.contested)
        return read.more

    # --- Redis ---

    async def _read(self) -> _Read:
        """What a controller before this one read and did not acknowledge, then what is new."""
        entries: list[_Entry] = []
        size, start, more = 0, "0", True
        while len(entries) < MESSAGES_MAX and size < BYTES_MAX:
            found = await self._read_some(start)
            entries += found
            size += sum(len(entry.data or b"") for entry in found)
            if not found and start == ">":
                more = False
                break
            start = found[-1].id.decode() if found and start != ">" else ">"
        at_s = time.monotonic()
        seconds, microseconds = await self._redis.time()
        waiting = await self._redis.xlen(STREAM)
        return _Read(entries, seconds * 1000 + microseconds // 1000, at_s, waiting, more)

    async def _read_some(self, start: str) -> list[_Entry]:
        try:
            answer: Any = await self._redis.xreadgroup(GROUP, _CONSUMER, {STREAM: start}, count=_READ_MESSAGES)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self._make_group()
            return []
        return [
            _Entry(entry, fields.get(FIELD, b"") if fields else None)
            for _, entries in answer
            for entry, fields in entries
        ]

    async def _make_group(self) -> None:
        """It is gone with the stream, if that was lost; what is in the stream now is read from its start."""
        try:
            await self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another controller was faster
                raise

    async def _acknowledge(self, entries: Sequence[_Entry], applied: Mapping[Boot, int]) -> None:
        """First what frees memory, which Redis may lack for the rest; nodes that are not told send again."""
        ids = [entry.id for entry in entries]
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xack(STREAM, GROUP, *ids)
            pipeline.xdel(STREAM, *ids)
            await pipeline.execute()
        if not applied:
            return
        async with self._redis.pipeline(transaction=False) as pipeline:
            for (node_id, boot), sequence in applied.items():
                pipeline.hset(applied_key(node_id), str(boot), str(sequence))
                pipeline.expire(applied_key(node_id), _APPLIED_SECONDS)
            await pipeline.execute()

    # --- PostgreSQL ---

    async def _write(self, received: Sequence[Received], at_s: float) -> _Done:
        """Commit all of it at once; if the database refuses something of it, find what that is, and commit the rest."""
        try:
            made = await self._commit(received, at_s)
        except _CONTENT_ERRORS as error:
            if len(received) == 1:
                return await self._write_without_content(received[0], at_s, error)
            middle = len(received) // 2
            done = await self._write(received[:middle], at_s)
            rest = await self._write(received[middle:], at_s)
            done.applied |= rest.applied
            done.results += rest.results
            done.contested |= rest.contested
            return done
        return _Done(made.applied, made.results, set(made.contested))

    async def _write_without_content(self, one: Received, at_s: float, error: Exception) -> _Done:
        """Later batches of the node wait for this one, so its number counts; who is open there is then not known."""
        log.error("statistics_refused", node=one.message.node_id, reason=" ".join(str(error).split()))
        made = await self._commit([one.without_content()], at_s)
        return _Done(made.applied, Counter(bad=1))

    async def _commit(self, received: Sequence[Received], at_s: float) -> Plan:
        async with self._database.transaction() as connection:
            late_ns = int((time.monotonic() - at_s) * 1e9)  # by which the transaction's now() is later, at most
            await connection.execute(sql.PLAN)
            made = plan(received, await _lock(connection, sorted({one.boot for one in received})))
            if made.applied:
                await _apply(connection, made, late_ns, self._reads_window_s)
            await _note_nodes(connection, made, late_ns)
        return made

    def _tell_contested(self, contested: set[str]) -> None:
        for node_id in sorted(contested - self._contested):
            log.warning(
                "node_name_contested",
                node=node_id,
                consequence="nothing is demoted while nobody knows what is open there",
                hint="two daemons use this name, or did before a restart: give each its own --node-name",
            )
        self._contested = contested


def _decoded(read: _Read) -> tuple[list[Received], int]:
    """The messages, and how many were none."""
    received: list[Received] = []
    reasons: list[str] = []
    for entry in read.entries:
        if entry.data is not None:
            try:
                received.append(Received(decode(entry.data), age_ns(entry.id, read.now_ms)))
            except BadMessage as error:
                reasons.append(str(error))
    if reasons:
        log.warning("statistics_unreadable", messages=len(reasons), reason=reasons[0])
    return received, len(reasons)


async def _lock(connection: Connection, boots: Sequence[Boot]) -> dict[Boot, Known]:
    keys = [boot.node_id for boot in boots], [boot.boot for boot in boots]
    new = {Boot(*row) for row in await connection.fetch(sql.ADD_BOOTS, *keys)}
    known = {}
    for node_id, boot, sequence, latest in await connection.fetch(sql.LOCK_BOOTS, *keys):
        key = Boot(node_id, boot)
        known[key] = Known(sequence, None if key in new or latest is None else latest == boot)
    return known


async def _apply(connection: Connection, made: Plan, late_ns: int, reads_window_s: float) -> None:
    boots = list(made.applied)
    await connection.execute(
        sql.SET_APPLIED, [b.node_id for b in boots], [b.boot for b in boots], list(made.applied.values())
    )
    models = list(made.models.values())
    await connection.execute(
        sql.FOLD_MODELS,
        list(made.models),
        [_us(model.age_ns + late_ns) for model in models],
        [model.hits for model in models],
        [model.size_bytes for model in models],
    )
    await output_books.tell(connection, made.outputs, late_ns, reads_window_s)


async def _note_nodes(connection: Connection, made: Plan, late_ns: int) -> None:
    nodes = list(made.nodes.values())
    leases_us = {
        name: _us(node.leases_age_ns + late_ns) if node.leases is not None else None
        for name, node in made.nodes.items()
    }
    ages = await connection.fetch(
        sql.FOLD_NODES,
        list(made.nodes),
        [node.boot for node in nodes],
        [node.version for node in nodes],
        [_us(node.seen_age_ns + late_ns) for node in nodes],
        list(leases_us.values()),
        [node.contested for node in nodes],
    )
    latest = [name for name, age_us in ages if age_us is not None and age_us == leases_us[name]]
    held = [(name, model) for name in latest for model in made.nodes[name].leases or ()]
    await connection.execute(sql.FOLD_LEASES, latest, [name for name, _ in held], [model for _, model in held])
    erased = [(name, number) for name, node in made.nodes.items() if not node.contested for number in node.erased]
    if erased:
        await connection.execute(sql.CONFIRM_ERASURES, [name for name, _ in erased], [number for _, number in erased])


def _us(ns: int) -> int:
    """Microseconds, rounded up: rather too old than too new."""
    return -(-ns // 1000)
