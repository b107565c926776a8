"""The library over a test's servers, and looks past it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis as SyncRedis

from tests.servers import PostgresServer, RedisServer, run
from tierd.contexts import Contexts, ContextSettings, open_contexts
from tierd.contexts.library import Tier
from tierd.contexts.settings import load
from tierd.metrics import ContextMetrics
from tierd.postgres import Connection, Database, connected

HELLO = [{"role": "user", "content": '안녕 \\u0000 "x" 🙂', "n": [1, 2.5, None, True, {"a": {}}]}]
MORE = [{"role": "assistant", "content": "hello"}]
KEY = "context:u:c"
"""Where `c` of `u` is in Redis."""
_PATIENCE_S = 30.0
"""For a busy machine; nothing here waits for it to pass."""


@dataclass(frozen=True)
class House:
    """A database, and maybe a Redis."""

    dsn: str
    postgres: PostgresServer
    redis: RedisServer | None
    client: SyncRedis | None

    def settings(self, **more: Any) -> ContextSettings:
        """What reaches both."""
        reach = {"postgres": self.dsn, "redis_timeout": 2.0, "postgres_statement_timeout": _PATIENCE_S}
        if self.redis is not None:
            reach["redis"] = self.redis.url(1)
        return load({**reach, **more})

    @asynccontextmanager
    async def contexts(self, metrics: ContextMetrics | None = None, **more: Any) -> AsyncIterator[Contexts]:
        """One process's library."""
        async with open_contexts(self.settings(**more), metrics) as made:
            yield made

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Database]:
        """A pool."""
        async with Database(self.settings()) as made:
            yield made

    def play(self, scene: Callable[[Contexts], Awaitable[Any]], **more: Any) -> Any:
        """Run `scene` with the library, to its end."""

        async def main() -> Any:
            async with self.contexts(**more) as contexts:
                return await scene(contexts)

        return run(main(), 120)

    async def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows, past the library."""
        async with connected(self.settings()) as connection:
            return [tuple(row) for row in await connection.fetch(query, *values)]

    async def archive(self, user_id: str | None = None) -> None:
        """Everything, or all of a user, into the archive; without the worker that does it in batches."""
        async with connected(self.settings()) as connection, connection.transaction():
            await archive(connection, user_id)


async def archive(connection: Connection, user_id: str | None = None) -> None:
    """See House.archive."""
    await connection.execute(
        """
        WITH gone AS (DELETE FROM user_contexts WHERE $1::text IS NULL OR user_id = $1 RETURNING *),
        keys AS (INSERT INTO context_archive_keys SELECT user_id, conversation_id, now() FROM gone)
        INSERT INTO user_contexts_archive
            (user_id, conversation_id, messages, created_at, updated_at, version, archived_at)
        SELECT user_id, conversation_id, messages, created_at, updated_at, version, now() FROM gone
        """,
        user_id,
    )


def tier_of(found: Any) -> Tier:
    """Where it came from; it must be there."""
    assert found is not None
    tier: Tier = found.tier
    return tier


def client_of(house: House) -> Any:
    """Past the library."""
    assert house.client is not None
    return house.client


class Held:
    """What a reader or writer puts into Redis is held up from `entered` to `go_on`."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()


@asynccontextmanager
async def slowly(contexts: Contexts) -> AsyncIterator[Held]:
    """One who has asked the database, and is about to tell Redis."""
    cache = contexts._cache
    assert cache is not None
    put, held = cache.put, Held()

    async def slow(*args: Any, **options: Any) -> bool:
        held.entered.set()
        await held.go_on.wait()
        return await put(*args, **options)

    cache.put = slow  # type: ignore[method-assign]
    yield held
    cache.put = put  # type: ignore[method-assign]
