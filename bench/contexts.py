"""What chat contexts cost: `python -m bench.contexts --help`. Needs no root; servers of its own, in a new directory.

Archive throughput is measured beside a bare `INSERT … SELECT` of the same rows in the same run; `get` for each tier,
each call beside one of a bare client, so that their ratio says something on a busy machine, too; the purge of a month;
memory of Redis for each session. PostgreSQL runs with fsync, as shipped but for `--shared`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rich.console import Console
from rich.table import Table

from tierd.contexts import Contexts, open_contexts, sql
from tierd.contexts.entries import Stored, pack
from tierd.contexts.names import entry_key
from tierd.contexts.settings import load
from tierd.controller.contexts.archive import archive_old_contexts
from tierd.controller.contexts.months import drop_month, is_sealed, months, seal_month, sweep_keys
from tierd.controller.migrate import known, migrate
from tierd.postgres import Database, connected
from tierd.redis_options import redis_options

USERS = 1000
_WORDS = (
    *("the", "of", "model", "answer", "question", "please", "explain", "code", "weights", "안녕", "context"),
    *("window", "token", "memory", "fast", "disk", "node"),
)
# Old rows with about `size` bytes of messages; texts that differ, so that nothing is gained by their being the same.
_FILL = """
INSERT INTO user_contexts (user_id, conversation_id, messages, created_at, updated_at)
SELECT 'user-' || n % $2, 'conversation-' || n, jsonb_build_array(jsonb_build_object('role', 'user', 'content',
        (SELECT string_agg(md5(n::text || i), ' ') FROM generate_series(1, $3::int / 33) i))),
    now() - interval '100 days', now() - interval '60 days' + n * interval '1 second'
FROM generate_series($1::int, $4::int) n
"""
_MONTH = """
WITH keys AS (
    INSERT INTO context_archive_keys
    SELECT 'user-' || n % 1000, 'month-' || extract(epoch FROM $1::timestamptz) || n, $1::timestamptz
    FROM generate_series(1, $2::int) n RETURNING *
)
INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at, archived_at)
SELECT user_id, conversation_id, jsonb_build_array(repeat('x', $3)), archived_at, archived_at FROM keys
"""
_COLUMNS = "user_id, conversation_id, messages, created_at, updated_at, version"
_ROWS_AT_ONCE = 50_000


@dataclass(frozen=True)
class Rig:
    """Both servers, and the library's settings for them."""

    dsn: str
    redis_url: str
    rows: int
    size: int

    def settings(self, **more: Any) -> Any:
        """What reaches both."""
        given = {"postgres": self.dsn, "redis": self.redis_url, "postgres_statement_timeout": 600.0, **more}
        return load(given)

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncIterator[Database]:
        """A pool."""
        async with Database(self.settings()) as made:
            yield made


async def fill(rig: Rig) -> None:
    """A database with `rows` old conversations."""
    async with connected(rig.settings()) as connection:
        await migrate(connection, known())
        for first in range(1, rig.rows + 1, _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE - 1, rig.rows)
            await connection.execute(_FILL, first, USERS, rig.size, last)
        await connection.execute("VACUUM ANALYZE user_contexts")
        await connection.execute("CHECKPOINT")


async def bare(rig: Rig, target: str, extra: str = "") -> float:
    """Rows a second of one `INSERT … SELECT` of all of them."""
    async with connected(rig.settings()) as connection:
        await connection.execute(f"CREATE TABLE {target} (LIKE user_contexts_archive INCLUDING DEFAULTS); {extra}")
        started = time.monotonic()
        await connection.execute(f"INSERT INTO {target} ({_COLUMNS}) SELECT {_COLUMNS} FROM user_contexts")
        seconds = time.monotonic() - started
        await connection.execute(f"DROP TABLE {target}")
        await connection.execute("CHECKPOINT")
    return rig.rows / seconds


async def archive(rig: Rig, workers: int) -> tuple[float, float]:
    """Rows a second of the job, and the processor's microseconds for a row in this process; the rest is PostgreSQL."""
    async with rig.database() as database:
        started, used = time.monotonic(), time.process_time()
        done = await archive_old_contexts(database, workers=workers)
        seconds, used = time.monotonic() - started, time.process_time() - used
        assert done.moved == rig.rows, done
        assert done.failures == 0, done
    return done.moved / seconds, used / done.moved * 1e6


@dataclass(frozen=True)
class Timed:
    """Of many calls: milliseconds of each, sorted, and the processor's microseconds in this process for one."""

    times: list[float]
    cpu_us: float

    def __str__(self) -> str:
        p50, p99 = percentile(self.times, 0.5), percentile(self.times, 0.99)
        return f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, {self.cpu_us:.0f} us of CPU"


_Call = Callable[[int], Awaitable[object]]


async def timed(calls: Sequence[_Call], count: int) -> list[Timed]:
    """So many calls of each, one after the other and by turns: whatever else the machine does hits them all."""
    times: list[list[float]] = [[] for _ in calls]
    cpu = [0.0 for _ in calls]
    for number in range(count):
        for which, call in enumerate(calls):
            started, used = time.perf_counter(), time.process_time()
            await call(number)
            times[which].append((time.perf_counter() - started) * 1000)
            cpu[which] += time.process_time() - used
    return [Timed(sorted(each), used / count * 1e6) for each, used in zip(times, cpu, strict=True)]


async def reads(rig: Rig, count: int) -> dict[str, list[Timed]]:
    """`get` of conversations in the archive, then in the table that this brought them to, then in Redis.

    Beside each of the latter two: what a bare client takes for the same row, or entry.
    """
    chance = random.Random(1)
    chosen = [(f"user-{n % USERS}", f"conversation-{n}") for n in chance.sample(range(1, rig.rows + 1), count)]
    found = {}
    async with (
        open_contexts(rig.settings()) as contexts,
        connected(rig.settings()) as connection,
        AsyncRedis(**redis_options(rig.redis_url)) as client,
    ):
        await connection.execute("VACUUM ANALYZE user_contexts_archive, context_archive_keys, user_contexts")
        await contexts.get("nobody", "nothing")

        def read(tier: str, library: Contexts) -> _Call:
            async def one(number: int) -> None:
                got = await library.get(*chosen[number])
                assert got is not None
                assert got.tier == tier, (got.tier, tier)

            return one

        async def row(number: int) -> object:
            return await connection.fetchrow(sql.READ, *chosen[number])

        async def entry(number: int) -> object:
            return await client.get(entry_key(*chosen[number]))

        found["archive"] = await timed([read("archive", contexts)], count)
        found["redis"] = await timed([read("redis", contexts), entry], count)
        await client.delete(*(entry_key(*each) for each in chosen))
        found["warm"] = await timed([read("warm", contexts), row], count)
    return found


async def purge(rig: Rig) -> list[tuple[int, float, float, int, float]]:
    """For a small month and a large one: rows, seconds of sealing, of the drop, keys swept, seconds of that."""
    found = []
    async with rig.database() as database:
        for number, rows in enumerate((rig.rows // 120, rig.rows // 12)):
            async with database.connection() as connection:
                ((at,),) = await connection.fetch(
                    "SELECT now() - interval '500 days' + $1 * interval '40 days'", number
                )
                await connection.fetch("SELECT make_context_month($1)", at)
                await connection.execute(_MONTH, at, rows, rig.size)
                month = next(each for each in await months(connection) if each.begins <= at < each.ends)
            began = time.monotonic()
            async with database.transaction() as connection:
                await seal_month(connection, month)
            sealed = time.monotonic()
            async with database.transaction() as connection:
                assert await is_sealed(connection, month)
                await drop_month(connection, month)
            dropped = time.monotonic()
            swept = await sweep_keys(database, month.begins, month.ends)
            found.append((rows, sealed - began, dropped - sealed, swept, time.monotonic() - dropped))
    return found


def memory(rig: Rig, sizes: tuple[int, ...]) -> list[tuple[int, int, int, float]]:
    """Bytes of Redis for a session of so many bytes: plain, compressed, and the milliseconds that compressing takes."""
    chance = random.Random(2)
    found = []
    with contextlib.closing(Redis(**redis_options(rig.redis_url))) as client:
        for size in sizes:
            text = " ".join(chance.choices(_WORDS, k=size // 6))
            text = '[{"role":"user","content":"' + text[: size - 30] + '"}]'
            now = datetime.now(UTC)
            plain, small = (pack(Stored(1, now, now, text), limit, b"0" * 16) for limit in (0, 1))
            started = time.perf_counter()
            pack(Stored(1, now, now, text), 1, b"0" * 16)
            milliseconds = (time.perf_counter() - started) * 1000
            used = []
            for value in (plain, small):
                client.set("context:user-000001:conversation-000001", value, ex=86_400)
                used.append(int(str(client.memory_usage("context:user-000001:conversation-000001"))))
            found.append((size, used[0], used[1], milliseconds))
    return found


@contextlib.contextmanager
def servers(shared: str) -> Iterator[tuple[str, str]]:
    """A PostgreSQL with fsync and a Redis, of the tests' making."""
    made = importlib.import_module("tests.servers")
    with tempfile.TemporaryDirectory(prefix="tierd-bench-") as name, contextlib.ExitStack() as stack:
        base = Path(name)
        base.chmod(0o755)
        (base / "postgres").mkdir()
        (base / "redis").mkdir()
        options = {"shared_buffers": shared, "max_wal_size": "8GB", "wal_compression": "off"}
        postgres = stack.enter_context(made.PostgresServer(base / "postgres", fsync=True, options=options))
        redis = stack.enter_context(made.RedisServer(base / "redis"))
        yield postgres.create_database(), redis.url(1)


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(int(len(values) * share), len(values) - 1)]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether the bars were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1024, help="bytes of messages")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--reads", type=int, default=3000)
    parser.add_argument("--shared", default="1GB", help="shared_buffers of PostgreSQL")
    given = parser.parse_args(arguments)
    console = Console()
    table = Table("what", "figure", "bar")
    ok = True
    with servers(given.shared) as (dsn, redis_url):
        rig = Rig(dsn, redis_url, given.rows, given.size)
        asyncio.run(fill(rig))
        barest = asyncio.run(bare(rig, "barest"))
        indexed = asyncio.run(bare(rig, "indexed", "CREATE INDEX ON indexed (user_id, conversation_id)"))
        table.add_row("bare INSERT … SELECT, no index", f"{barest:,.0f} rows/s", "")
        table.add_row("the same into a table with the archive's index", f"{indexed:,.0f} rows/s", "")
        workers = given.workers[0]
        rate, cpu_us = asyncio.run(archive(rig, workers))
        ok &= rate >= 30_000 and rate >= 0.3 * indexed
        table.add_row(
            f"archive, {workers} workers",
            f"{rate:,.0f} rows/s, {rate / indexed:.2f} and {rate / barest:.2f} of these"
            f"; of CPU, {cpu_us:.1f} us a row outside of PostgreSQL",
            "30,000; 0.3",
        )
        if given.reads:
            for (tier, (get, *bare_ones)), bar in zip(
                asyncio.run(reads(rig, given.reads)).items(), (100, 1, 10), strict=True
            ):
                ok &= percentile(get.times, 0.99) <= bar
                table.add_row(f"get, {tier}", str(get), f"p99 {bar} ms")
                for one in bare_ones:
                    ratios = (percentile(get.times, share) / percentile(one.times, share) for share in (0.5, 0.99))
                    told = " and ".join(f"{ratio:.1f}" for ratio in ratios)
                    table.add_row("  a bare client beside it", f"{one}: get takes {told} times that", "")
        for size, plain, small, milliseconds in memory(rig, (1024, 10_240, 102_400, 1 << 20)):
            figure = f"{plain:,} bytes, compressed {small:,} in {milliseconds:.2f} ms"
            table.add_row(f"Redis, a session of {size:,} bytes", figure, "")
        for rows, sealing, seconds, swept, sweeping in asyncio.run(purge(rig)):
            figure = f"{seconds:.3f} s (sealed in {sealing:.3f} s), then {swept:,} keys in {sweeping:.1f} s"
            table.add_row(f"drop of a month of {rows:,}", figure, "constant")
    console.print(table)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
