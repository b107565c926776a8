"""The first tier: what Redis holds of conversations. Only a cache; nobody waits long for it, and it decides nothing.

What must never come back is what was current before: a slow reader that puts an old state there, a slow writer that
puts an erased one. Two comparisons inside Redis see to it. Versions: what is there is never replaced by what is older.
Fences: whoever is going to put something takes its user's token *before* asking the database; each change to one of
the user's conversations leaves another token; with an old one nothing is put (and what is older is removed). So
nothing depends on an entry or a mark still being there: it may expire, be evicted or flushed at any time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tierd.contexts.circuit import Circuit
from tierd.contexts.entries import Stored, pack, unpack
from tierd.contexts.names import TRUST, entry_key, fence_key, user_prefix

_Answer = TypeVar("_Answer")
_SCAN_COUNT: Final = 1000
_THREAD_BYTES: Final = 256 << 10
"""From here on (de)compressing would hold up the event loop for a millisecond."""

# KEYS: entry, fence. ARGV: token held, new token or '', version, content, seconds.
_PUT: Final = """
local held = string.match(redis.call('GETRANGE', KEYS[1], 0, 31), '^1 (%d+) ')
local same = redis.call('GET', KEYS[2]) == ARGV[1]
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
if held and tonumber(held) >= tonumber(ARGV[3]) then return 0 end
if same then redis.call('SET', KEYS[1], ARGV[4], 'EX', ARGV[5]) return 1 end
if held then redis.call('DEL', KEYS[1]) end
return 0
"""
# KEYS: fence. ARGV: new token. The one that counts: in one round trip, and never one that is gone again.
_CLAIM: Final = """
local there = redis.call('GET', KEYS[1])
if there then return there end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
"""
# KEYS: fence, entries. ARGV: new token. How many entries there were.
_FORGET: Final = """
redis.call('SET', KEYS[1], ARGV[1])
local found = 0
for i = 2, #KEYS do found = found + redis.call('DEL', KEYS[i]) end
return found
"""


class CacheAway(Exception):
    """Redis did not answer, or not in time, or was not asked because it did not the last time."""


class Found(NamedTuple):
    """What a look shows: `trusted` if somebody saw lately that no change is owed to this Redis.

    `token` is what `Cache.token` would give, or None if it has to be made: a miss need not ask twice.
    """

    stored: Stored | None
    trusted: bool
    token: bytes | None


class Cache:
    """Contract: one event loop, any number of tasks. Every method but `close` raises CacheAway.

    A call takes `timeout_s` at most; after a failure none is made for a moment, so that they do not all wait.
    """

    def __init__(
        self, redis: Redis, *, timeout_s: float, compress_from: int, connections: int, circuit: Circuit | None = None
    ) -> None:
        self._redis: Any = redis  # its types know of no client that leaves bytes alone
        self._timeout_s = timeout_s
        self._compress_from = compress_from
        self._slots = asyncio.Semaphore(connections)
        self.circuit = circuit or Circuit()
        self._put: Any = redis.register_script(_PUT)
        self._claim: Any = redis.register_script(_CLAIM)
        self._forget: Any = redis.register_script(_FORGET)

    async def find(self, user_id: str, conversation_id: str) -> Found:
        """The entry of a conversation, if there is one."""
        keys = [entry_key(user_id, conversation_id), TRUST, fence_key(user_id)]
        entry, trust, token = await self._asked(lambda: self._redis.mget(keys))
        if entry is not None and len(entry) >= _THREAD_BYTES:
            return Found(await asyncio.to_thread(unpack, entry), trust is not None, token)
        return Found(unpack(entry) if entry is not None else None, trust is not None, token)

    async def token(self, user_id: str) -> bytes:
        """What `put` wants to see; to be taken before the database is asked."""
        token: bytes = await self._asked(lambda: self._claim(keys=[fence_key(user_id)], args=[_new_token()]))
        return token

    async def put(
        self, user_id: str, conversation_id: str, stored: Stored, token: bytes, seconds: int, *, changed: bool
    ) -> bool:
        """Keep what was read, or (`changed`) written, unless it may be old by now; whether it is kept."""
        if len(stored.text) >= _THREAD_BYTES:
            content = await asyncio.to_thread(pack, stored, self._compress_from)
        else:
            content = pack(stored, self._compress_from)
        keys = [entry_key(user_id, conversation_id), fence_key(user_id)]
        values = [token, _new_token() if changed else b"", stored.version, content, seconds]
        return bool(await self._asked(lambda: self._put(keys=keys, args=values)))

    async def forget(self, user_id: str, conversation_id: str) -> int:
        """The conversation is not there afterwards, nor will who reads it now put it there; how many entries went."""
        return await self._forgotten(user_id, [entry_key(user_id, conversation_id)])

    async def forget_user(self, user_id: str) -> int:
        """The same for all of a user's conversations, whether or not anybody knows of them."""
        await self._forgotten(user_id, [])
        pattern = f"{user_prefix(user_id)}*"

        def page(cursor: int) -> Awaitable[tuple[int, list[bytes]]]:
            answer: Awaitable[tuple[int, list[bytes]]] = self._redis.scan(cursor, match=pattern, count=_SCAN_COUNT)
            return answer

        cursor, removed, more = 0, 0, True
        while more:
            cursor, keys = await self._asked(partial(page, cursor))
            removed += await self._forgotten(user_id, [key.decode() for key in keys]) if keys else 0
            more = cursor != 0
        return removed

    async def trust(self, seconds: float) -> None:
        """Note that no change is owed: for so long nobody need look."""
        await self._asked(lambda: self._redis.set(TRUST, b"1", px=int(seconds * 1000)))

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def _forgotten(self, user_id: str, keys: list[str]) -> int:
        known = [fence_key(user_id), *keys]
        return int(await self._asked(lambda: self._forget(keys=known, args=[_new_token()])))

    async def _asked(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        if not self.circuit.allow():
            raise CacheAway("it failed a moment ago")
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                answer = await call()
        except (RedisError, OSError) as error:  # TimeoutError too
            self.circuit.failed()
            raise CacheAway(" ".join(str(error).split()) or type(error).__name__) from error
        self.circuit.succeeded()
        return answer


def _new_token() -> bytes:
    return secrets.token_bytes(8)
