"""Stands for Redis where no server is needed: a stream that can be read and lost, acknowledgements, and being away."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from tierd.statistics import FIELD, STREAM, Message, decode


class FakePipeline:
    """Commands that are carried out together."""

    def __init__(self, redis: FakeRedis) -> None:
        self._redis = redis
        self._added: list[bytes] = []

    def xadd(self, name: str, fields: dict[bytes, bytes], *, maxlen: int, approximate: bool) -> None:
        """Later."""
        assert name == STREAM
        assert approximate
        assert maxlen > 0
        self._added.append(fields[FIELD])

    def execute(self) -> list[Any]:
        """Now."""
        self._redis.answer()
        self._redis.entries += self._added
        return [b"1-1"] * len(self._added)


class FakeRedis:
    """As much of `redis.Redis` as a node asks for."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.applied: dict[tuple[str, str], bytes] = {}
        self.sorted_sets: dict[str, list[bytes]] = {}
        self.values: dict[str, bytes] = {}
        self.away = False
        self.clients = 0
        self.closed = 0

    def connect(self) -> FakeRedis:
        """A client."""
        self.clients += 1
        return self

    def answer(self) -> None:
        """Raises as the client does if Redis is away."""
        if self.away:
            raise RedisConnectionError("Error 111 connecting to redis:6379. Connection refused.")

    def hget(self, name: str, key: str) -> bytes | None:
        """A field."""
        self.answer()
        return self.applied.get((name, key))

    def zrange(self, name: str, start: int, end: int) -> list[bytes]:
        """Members of a sorted set."""
        self.answer()
        return sorted(self.sorted_sets.get(name, []))[start : end + 1]

    def get(self, name: str) -> bytes | None:
        """A value."""
        self.answer()
        return self.values.get(name)

    def pipeline(self, transaction: bool = True) -> FakePipeline:
        """A new one."""
        return FakePipeline(self)

    def close(self) -> None:
        """Count it."""
        self.closed += 1

    def take(self) -> list[Message]:
        """What was sent since the last call."""
        taken, self.entries = self.entries, []
        return [decode(data) for data in taken]
