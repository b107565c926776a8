"""What applications use: conversations by user and ID, wherever they are. Puts Redis before the tables, safely.

The order of a write: take the fence's token, commit, put into Redis. Where Redis cannot be told, the database is told
that it was not (a debt), before the write is acknowledged. The order of a read: Redis; else token, database, Redis.
Readers look for debts, and pay them, at least every `trust` seconds: what Redis missed is served no longer than that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import structlog

from tierd.contexts.cache import Cache, CacheAway, Token
from tierd.contexts.entries import Stored
from tierd.contexts.errors import InvalidContext, NotConfirmed, VersionConflict
from tierd.contexts.flights import Flights
from tierd.contexts.messages import Message, decode, encode
from tierd.contexts.names import check_id
from tierd.contexts.settings import ContextSettings
from tierd.contexts.templates import Templates
from tierd.contexts.tiers import Debt, Erased, Listed, Tier, Tiers
from tierd.errors import DatabaseError
from tierd.metrics import ContextMetrics
from tierd.postgres import Database

log = structlog.get_logger(__name__)

_VERSION_MAX: Final = (1 << 53) - 1
"""The largest that a script in Redis can compare."""
_SETTLE_SECONDS: Final = 1.0
"""How long a read that Redis could answer waits for the database, to know that nothing is owed."""


@dataclass(frozen=True)
class Context:
    """A conversation. `version` is what a `save` of something newer names; `tier` is whence it came."""

    user_id: str
    conversation_id: str
    messages: list[Message]
    version: int
    created_at: datetime
    updated_at: datetime
    tier: Tier


@dataclass(frozen=True)
class Saved:
    """What a write made."""

    version: int
    created_at: datetime
    updated_at: datetime


class Contexts:
    """See `open_contexts` for one that connects by itself.

    Contract: one event loop, any number of tasks. A write that returned is in the database, and every later read in
    this process sees it. One that raised DatabaseError may have been done; repeat it with the version that it had.
    """

    def __init__(
        self,
        database: Database,
        cache: Cache | None,
        settings: ContextSettings,
        metrics: ContextMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._settings = settings
        self._metrics = metrics or ContextMetrics()
        self._clock = clock
        self._tiers = Tiers(database, settings.max_bytes, lambda: self._metrics.moved("promoted", 1))
        self.templates = Templates(database)
        self._reads: Flights[tuple[str, str, Token | None], tuple[Stored, Tier] | None] = Flights()
        self._settling: Flights[None, bool] = Flights()
        self._owed = 0
        """Changes by this process that Redis missed; no entry counts before they have all been paid."""
        self._paid = 0
        """Of these."""
        self._unasked_until_s = 0.0
        """The database did not say what is owed; until then it is not asked again, and entries count."""
        self._answers = 0
        """Of the database, about what is owed."""

    # --- reading ---

    async def get(self, user_id: str, conversation_id: str) -> Context | None:
        """A conversation, or None. One that was archived is brought back to the recent ones.

        Raises InvalidContext for what is no ID, DatabaseError if it is not in Redis and the database is away.
        """
        _check(user_id, conversation_id)
        started = time.perf_counter()
        with self._metrics.timed("get"):
            found, token = await self._cached(user_id, conversation_id)
            if found is None:
                token = token or await self._token(user_id)
                found = await self._reads.run(
                    (user_id, conversation_id, token), lambda: self._fetched(user_id, conversation_id, token)
                )
            if found is None:
                self._metrics.read("none", time.perf_counter() - started)
                return None
            stored, tier = found
            messages = decode(stored.text)  # each caller's own
            self._metrics.read(tier, time.perf_counter() - started)
        return Context(user_id, conversation_id, messages, stored.version, stored.created_at, stored.updated_at, tier)

    async def list(self, user_id: str, *, limit: int = 100, after: Listed | None = None) -> list[Listed]:
        """A user's conversations without their messages, the latest first; `after` is the last one of the page before.

        1000 at most. Raises InvalidContext, DatabaseError.
        """
        check_id("user ID", user_id)
        if limit < 1:
            raise InvalidContext(f"limit {limit} is below 1", hint="ask for 1 to 1000")
        with self._metrics.timed("list"):
            return await self._tiers.page(user_id, limit, after)

    # --- writing ---

    async def save(
        self, user_id: str, conversation_id: str, messages: Sequence[Message], *, version: int | None
    ) -> Saved:
        """Write all of a conversation. `version` is that of what the messages were made from: 0 if there was nothing.

        None overwrites whatever is there. Raises VersionConflict if another version is there, InvalidContext for what
        cannot be stored, DatabaseError.
        """
        _check(user_id, conversation_id, version)
        text = encode(messages, self._settings.max_bytes)
        with self._metrics.timed("save"):
            async with self._told(user_id, conversation_id) as write:
                stored = await self._tiers.save(user_id, conversation_id, text, version, owed=write.owed)
                await self._done(write, stored)
        return Saved(stored.version, stored.created_at, stored.updated_at)

    async def append(
        self, user_id: str, conversation_id: str, messages: Sequence[Message], *, version: int | None = None
    ) -> Saved:
        """Add messages at the end, whatever others added meanwhile; makes the conversation if there is none.

        With `version` it is refused unless that is the version there, so that repeating it adds nothing twice. Raises
        as `save` does.
        """
        _check(user_id, conversation_id, version)
        text = encode(messages, self._settings.max_bytes)
        with self._metrics.timed("append"):
            async with self._told(user_id, conversation_id) as write:
                stored = await self._tiers.append(user_id, conversation_id, text, version, owed=write.owed)
                await self._done(write, stored)
        return Saved(stored.version, stored.created_at, stored.updated_at)

    async def delete(self, user_id: str, conversation_id: str, *, version: int | None = None) -> bool:
        """Remove a conversation from all tiers; whether there was one. Raises VersionConflict, DatabaseError."""
        _check(user_id, conversation_id, version)
        with self._metrics.timed("delete"):
            there, debt = await self._tiers.delete(user_id, conversation_id, version)
            self._reads_are_old(user_id, conversation_id)
            try:
                await self._confirmed(debt)
            except CacheAway:
                self._owed += 1
        return there

    async def delete_user(self, user_id: str) -> Erased:
        """Erase a user: all conversations and templates, in every tier; what an export holds is never restored.

        Returns only when every tier has confirmed. Raises NotConfirmed if Redis has not, DatabaseError; then repeat it.
        """
        check_id("user ID", user_id)
        with self._metrics.timed("delete_user"):
            erased, debt = await self._tiers.erase(user_id)
            self._reads.forget_all()
            try:
                return replace(erased, redis=await self._confirmed(debt))
            except CacheAway as away:
                self._owed += 1
                raise NotConfirmed(
                    f"user {user_id!r} is erased in the database, Redis has not confirmed it: {away}",
                    hint="repeat it when Redis is back",
                ) from away

    # --- Redis ---

    async def _cached(self, user_id: str, conversation_id: str) -> tuple[tuple[Stored, Tier] | None, Token | None]:
        """What Redis has, and the token of that moment, if there was one."""
        if self._cache is None:
            return None, None
        try:
            found = await self._cache.find(user_id, conversation_id)
            if found.stored is not None and (not found.trusted or self._owes):
                if not await self._may_trust():
                    return None, None
                found = await self._cache.find(user_id, conversation_id)  # it may just have been removed
        except CacheAway:
            self._metrics.cache_failed()
            return None, None
        return ((found.stored, "redis") if found.stored else None), found.token

    async def _may_trust(self) -> bool:
        """Whether entries count though nobody has looked lately what is owed: after a look, or if nobody can."""
        if not self._owes and self._clock() < self._unasked_until_s:
            return True
        answers = self._answers
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                return await self._settled() and not self._owes  # since then, if that had begun before
        except (DatabaseError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and self._answers != answers:
                return False  # it is there, and told of more than could be paid so soon
            # The database is away: then nobody writes, and sessions shall go on.
            self._unasked_until_s = self._clock() + self._settings.trust
            return not self._owes

    async def _settled(self) -> bool:
        """Pay what is owed, by whomever; False if Redis cannot be told now. Raises DatabaseError."""
        return await self._settling.run(None, self._settle)

    async def _settle(self) -> bool:
        if self._cache is None:
            return True
        owed = self._owed
        try:
            while debts := await self._tiers.debts():
                self._answers += 1
                await self._told_of(debts)
                await self._tiers.paid(debts)
            self._answers += 1
            await self._cache.trust(self._settings.trust)
        except CacheAway:
            self._metrics.cache_failed()
            return False
        self._paid = max(self._paid, owed)  # what was owed since then may not have been among these
        return True

    async def _confirmed(self, debt: Debt) -> int:
        """Pay a debt; how many entries went. Raises CacheAway: then it stays."""
        removed = await self._told_of([debt])
        await self._tiers.paid([debt])
        return removed

    async def _told_of(self, debts: Sequence[Debt]) -> int:
        if self._cache is None:
            return 0
        names = [(debt.user_id, debt.conversation_id) for debt in debts if debt.conversation_id]
        users = {debt.user_id for debt in debts if not debt.conversation_id}
        removed = await self._cache.forget(names) if names else 0
        return removed + (await self._cache.forget_users(users) if users else 0)

    @property
    def _owes(self) -> bool:
        return self._paid < self._owed

    async def _token(self, user_id: str) -> Token | None:
        """None: Redis cannot be told."""
        if self._cache is None:
            return None
        try:
            return await self._cache.token(user_id)
        except CacheAway:
            self._metrics.cache_failed()
            return None

    async def _fetched(self, user_id: str, conversation_id: str, token: Token | None) -> tuple[Stored, Tier] | None:
        found = await self._tiers.read(user_id, conversation_id)
        if found is not None and token is not None:
            await self._put(user_id, conversation_id, found[0], token, changed=False)
        return found

    async def _put(self, user_id: str, conversation_id: str, stored: Stored, token: Token, *, changed: bool) -> bool:
        """Whether Redis answered."""
        assert self._cache is not None
        seconds = self._settings.ttl if changed else self._settings.ttl_read
        try:
            await self._cache.put(user_id, conversation_id, stored, token, seconds, changed=changed)
        except CacheAway:
            self._metrics.cache_failed()
            return False
        return True

    @asynccontextmanager
    async def _told(self, user_id: str, conversation_id: str) -> AsyncIterator[_Write]:
        """Around a write, so that no tier keeps what was there before it."""
        token = await self._token(user_id)
        write = _Write(user_id, conversation_id, token, owed=token is None and self._cache is not None)
        try:
            yield write
        except (VersionConflict, DatabaseError, asyncio.CancelledError) as error:
            # Somebody went by old news, or it may have been done: what Redis has is worth nothing.
            if isinstance(error, VersionConflict):
                self._metrics.conflict()
            await self._forget(user_id, conversation_id)
            raise
        finally:
            self._reads_are_old(user_id, conversation_id, write.token)

    async def _forget(self, user_id: str, conversation_id: str) -> None:
        """If Redis is there; nothing that was acknowledged depends on it."""
        if self._cache is None:
            return
        try:
            await self._cache.forget([(user_id, conversation_id)])
        except CacheAway:
            self._metrics.cache_failed()

    def _reads_are_old(self, user_id: str, conversation_id: str, token: Token | None = None) -> None:
        for held in {token, None}:
            self._reads.forget((user_id, conversation_id, held))

    async def _done(self, write: _Write, stored: Stored) -> None:
        """A write was committed. Raises DatabaseError: then it is not to be acknowledged."""
        name = (write.user_id, write.conversation_id)
        self._reads_are_old(*name, write.token)
        if write.owed:
            self._owed += 1
        elif write.token is not None and not await self._put(*name, stored, write.token, changed=True):
            self._owed += 1
            await self._tiers.owe(*name)


@dataclass(frozen=True)
class _Write:
    """One write, and what is known of Redis before it."""

    user_id: str
    conversation_id: str
    token: Token | None
    owed: bool
    """Redis cannot be told, and the transaction shall say so."""


@asynccontextmanager
async def open_contexts(settings: ContextSettings, metrics: ContextMetrics | None = None) -> AsyncIterator[Contexts]:
    """The library, connected for the length of a `with`; without a Redis in the settings it works without one.

    Raises DatabaseError if the database does not let us in, UsageError for settings that cannot be.
    """
    made = metrics or ContextMetrics()
    async with Database(settings) as database:
        if settings.redis is None:
            yield Contexts(database, None, settings, made)
            return
        cache = Cache(
            settings.client(deadlines=False),
            timeout_s=settings.redis_timeout,
            compress_from=settings.compress_from,
            connections=settings.redis_connections,
        )
        try:
            yield Contexts(database, cache, settings, made)
        finally:
            await cache.close()


def _check(user_id: str, conversation_id: str, version: int | None = None) -> None:
    check_id("user ID", user_id)
    check_id("conversation ID", conversation_id)
    if version is not None and not 0 <= version <= _VERSION_MAX:
        raise InvalidContext(f"version {version} is none", hint="pass what `get` or `save` returned, 0 for a new one")
