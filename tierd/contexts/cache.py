"""The first tier: what Redis holds of conversations. Only a cache; nobody waits long for it, and it decides nothing.

What must never come back is what was current before: a slow reader that puts an old state there, a slow writer that
puts an erased one. Two comparisons inside Redis see to it. Versions: what is there is never replaced by what is older.
Fences: whoever is going to put something takes its user's token *before* asking the database; each change to one of
the user's conversations leaves another token, or none; with an old one nothing is put (and what is older is removed).
So nothing depends on an entry or a mark still being there: it may expire, be evicted or flushed at any time.

Nor on what Redis acknowledged still being there: one that crashed lacks its last second, a replica that took over may
lack more, and either has entries, and fences, that had been replaced. So each entry names a generation, and counts
in no other. It ends when `trust` finds that another process of Redis runs, or another server, than that it began in.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tierd.contexts.circuit import Circuit
from tierd.contexts.entries import Stored, pack, unpack
from tierd.contexts.names import RUN, TRUST, entry_key, fence_key, user_prefix

_Answer = TypeVar("_Answer")
_SCAN_COUNT: Final = 1000
_THREAD_BYTES: Final = 256 << 10
"""From here on (de)compressing would hold up the event loop for a millisecond."""

# What is at `context-run`: the server's own name for this run of it, and ours, which is the generation.
_RUN: Final = """
local function run() return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') end
"""
# KEYS: entry, fence, run. ARGV: token held, new token or '', version, content, seconds, generation.
_PUT: Final = """
local version, of = string.match(redis.call('GETRANGE', KEYS[1], 0, 127), '^1 (%d+) %a %-?%d+ %-?%d+ (%x+)\\n')
local generation = string.match(redis.call('GET', KEYS[3]) or '', ' (%x+)$')
local same = generation == ARGV[6] and redis.call('GET', KEYS[2]) == ARGV[1]
if ARGV[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2]) end
if version and of == generation and tonumber(version) >= tonumber(ARGV[3]) then return 0 end
if same then redis.call('SET', KEYS[1], ARGV[4], 'EX', ARGV[5]) return 1 end
if version then redis.call('DEL', KEYS[1]) end
return 0
"""
# KEYS: fence, run. ARGV: new token, new generation. Those that count: in one round trip, and none that is gone again.
_CLAIM: Final = f"""{_RUN}
local fence, held = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
if not fence then
    fence = ARGV[1]
    redis.call('SET', KEYS[1], fence)
end
if not held then
    held = run() .. ' ' .. ARGV[2]
    redis.call('SET', KEYS[2], held)
end
return {{fence, held}}
"""
# KEYS: trust, run. ARGV: milliseconds, new generation.
_TRUST: Final = f"""{_RUN}
local now = run()
if string.match(redis.call('GET', KEYS[2]) or '', '^%x+') ~= now then
    redis.call('SET', KEYS[2], now .. ' ' .. ARGV[2])
end
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
"""
# KEYS: fences, entries. ARGV: how many fences. How many entries there were. A fence that is gone is as good as another
# one, and a Redis that is full lets nothing be set.
_FORGET: Final = """
local found = 0
for i = 1, #KEYS do
    local there = redis.call('DEL', KEYS[i])
    if i > tonumber(ARGV[1]) then found = found + there end
end
return found
"""


class CacheAway(Exception):
    """Redis did not answer, or not in time, or was not asked because it did not the last time."""


class Token(NamedTuple):
    """What was true before the database was asked, and must be so still for what it said to be put."""

    fence: bytes
    generation: bytes


class Found(NamedTuple):
    """What a look shows: `trusted` if somebody saw lately that no change is owed to this Redis.

    `token` is what `Cache.token` would give, or None if it has to be made: a miss need not ask twice.
    """

    stored: Stored | None
    trusted: bool
    token: Token | None


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
        self._trust: Any = redis.register_script(_TRUST)
        self._forget: Any = redis.register_script(_FORGET)

    async def find(self, user_id: str, conversation_id: str) -> Found:
        """The entry of a conversation, if there is one."""
        keys = [entry_key(user_id, conversation_id), TRUST, fence_key(user_id), RUN]
        entry, trust, fence, run = await self._asked(lambda: self._redis.mget(keys))
        generation = _generation(run)
        token = Token(fence, generation) if fence is not None and generation else None
        if entry is None:
            return Found(None, trust is not None, token)
        if len(entry) >= _THREAD_BYTES:
            return Found(await asyncio.to_thread(unpack, entry, generation), trust is not None, token)
        return Found(unpack(entry, generation), trust is not None, token)

    async def token(self, user_id: str) -> Token:
        """What `put` wants to see; to be taken before the database is asked."""
        values = [_new_token(), _new_generation()]
        fence, run = await self._asked(lambda: self._claim(keys=[fence_key(user_id), RUN], args=values))
        return Token(fence, _generation(run))

    async def put(
        self, user_id: str, conversation_id: str, stored: Stored, token: Token, seconds: int, *, changed: bool
    ) -> bool:
        """Keep what was read, or (`changed`) written, unless it may be old by now; whether it is kept."""
        if len(stored.text) >= _THREAD_BYTES:
            content = await asyncio.to_thread(pack, stored, self._compress_from, token.generation)
        else:
            content = pack(stored, self._compress_from, token.generation)
        keys = [entry_key(user_id, conversation_id), fence_key(user_id), RUN]
        new = _new_token() if changed else b""
        values = [token.fence, new, stored.version, content, seconds, token.generation]
        return bool(await self._asked(lambda: self._put(keys=keys, args=values)))

    async def forget(self, names: Iterable[tuple[str, str]]) -> int:
        """These conversations are not there afterwards, nor will who reads one now put it there; how many were."""
        names = list(names)
        entries = [entry_key(user_id, conversation_id) for user_id, conversation_id in names]
        return await self._forgotten({user_id for user_id, _ in names}, entries)

    async def forget_users(self, users: Set[str]) -> int:
        """The same for all conversations of some users, whether or not anybody knows of them: looks at all keys."""
        await self._forgotten(users, [])
        prefixes = tuple(user_prefix(user_id).encode() for user_id in users)
        pattern = prefixes[0] + b"*" if len(prefixes) == 1 else b"context:*"

        def page(cursor: int) -> Awaitable[tuple[int, list[bytes]]]:
            answer: Awaitable[tuple[int, list[bytes]]] = self._redis.scan(cursor, match=pattern, count=_SCAN_COUNT)
            return answer

        cursor, removed, more = 0, 0, True
        while more:
            cursor, found = await self._asked(partial(page, cursor))
            keys = [key for key in found if key.startswith(prefixes)]
            removed += await self._forgotten(users, keys) if keys else 0
            more = cursor != 0
        return removed

    async def trust(self, seconds: float) -> None:
        """Note that no change is owed: for so long nobody need look. Begins a generation, if Redis is another one."""
        values = [int(seconds * 1000), _new_generation()]
        await self._asked(lambda: self._trust(keys=[TRUST, RUN], args=values))

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def _forgotten(self, users: Set[str], entries: Sequence[str | bytes]) -> int:
        fences = {fence_key(user_id) for user_id in users}
        return int(await self._asked(lambda: self._forget(keys=[*fences, *entries], args=[len(fences)])))

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


def _new_generation() -> str:
    return secrets.token_hex(8)


def _generation(run: bytes | None) -> bytes:
    """Of what is at RUN; nothing's, if there is nothing."""
    return run.rpartition(b" ")[2] if run is not None else b""
