"""Tells nodes by way of Redis which outputs are deleted, until each has said that it has none. Deletes nothing.

Everything is written again in each round: a Redis that lost it has it again soon, and what nobody waits for expires.
What nodes answer comes with their reports (`statistics/`).

Contract: one task.
"""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis

from tierd.controller.outputs import erasure_sql as sql
from tierd.erasures import ERASURES_MAX, WAITING, encode, key_of
from tierd.postgres import Database

_EXPIRE_SECONDS: Final = 600


class ErasureNews:
    """See the module. `root` is the outputs root."""

    def __init__(self, database: Database, redis: Redis, root: bytes) -> None:
        self._database = database
        self._redis = redis
        self._root = root

    async def round(self) -> None:
        """Raises RedisError, OSError, DatabaseError."""
        async with self._database.connection() as connection:
            numbers = [row["id"] for row in await connection.fetch(sql.TO_TELL, ERASURES_MAX)]
            paths = {number: await connection.fetch(sql.PATHS, number) for number in numbers}
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(WAITING)
            for number, rows in paths.items():
                told = encode([self._root + b"/" + row["path"].encode() for row in rows])
                pipeline.set(key_of(number), told, ex=_EXPIRE_SECONDS)
            if numbers:
                pipeline.zadd(WAITING, {str(number): at for at, number in enumerate(numbers)})
                pipeline.expire(WAITING, _EXPIRE_SECONDS)
            await pipeline.execute()
