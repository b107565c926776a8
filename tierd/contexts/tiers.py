"""The second and third tier: conversations in PostgreSQL, and their way back from the archive. Knows no Redis.

Moves between the two tables are one transaction each, with all columns; a version only ever grows, over deletion too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from tierd.contexts import sql
from tierd.contexts.entries import Stored
from tierd.contexts.errors import VersionConflict
from tierd.contexts.messages import check_size, decode, encode
from tierd.contexts.names import conversation_digest, user_digest
from tierd.postgres import Connection, Database

Tier = Literal["redis", "warm", "archive"]
LIST_MAX: Final = 1000
_DEBTS_AT_ONCE: Final = 500


class Listed(NamedTuple):
    """A conversation in a list."""

    conversation_id: str
    version: int
    created_at: datetime
    updated_at: datetime
    tier: Tier


@dataclass(frozen=True)
class Erased:
    """What `delete_user` removed: conversations by tier, and versions of templates."""

    redis: int
    warm: int
    archive: int
    templates: int


class Debt(NamedTuple):
    """A change that Redis has not been told of; without a conversation: all of the user's."""

    id: int
    user_id: str
    conversation_id: str


class _Whose(NamedTuple):
    user_id: str
    conversation_id: str

    def __str__(self) -> str:
        return f"conversation {self.conversation_id!r} of {self.user_id!r}"


_Change = Callable[[Stored | None], str]
"""From what is there to the JSON that shall be."""


class Tiers:
    """Contract: any number of tasks and processes at once; each method is one transaction, or none at all.

    Raises DatabaseError if the database is away: a write may have been done then, or not.
    """

    def __init__(self, database: Database, max_bytes: int, promoted: Callable[[], None] = lambda: None) -> None:
        self._database = database
        self._max_bytes = max_bytes
        self._promoted = promoted

    async def read(self, user_id: str, conversation_id: str) -> tuple[Stored, Tier] | None:
        """A conversation; one that was archived is promoted. None if there is none."""
        whose = _Whose(user_id, conversation_id)
        async with self._database.connection() as connection:
            rows = await connection.fetch(sql.READ, *whose)
            for row in rows:
                if row["text"] is not None:
                    return _stored(row), "warm"
            return await self._promote(connection, whose) if rows else None

    async def save(
        self, user_id: str, conversation_id: str, text: str, expected: int | None, *, owed: bool = False
    ) -> Stored:
        """Write all of a conversation; `owed` notes in the same transaction that Redis cannot be told.

        Raises VersionConflict unless `expected` is None or the version that is there (0: none is).
        """
        whose = _Whose(user_id, conversation_id)
        if expected != 0 and not owed:
            async with self._database.connection() as connection:
                row = await connection.fetchrow(sql.WRITE, *whose, text, expected)
            if row is not None:
                return Stored(row["version"], row["created_at"], row["updated_at"], text)
        return await self._change(whose, lambda _: text, expected, owed)

    async def append(
        self, user_id: str, conversation_id: str, text: str, expected: int | None, *, owed: bool = False
    ) -> Stored:
        """Add messages to a conversation, which is made if there is none. Raises VersionConflict and InvalidContext."""
        whose = _Whose(user_id, conversation_id)
        if expected != 0 and not owed:
            async with self._database.transaction() as connection:
                row = await connection.fetchrow(sql.APPEND, *whose, text, expected)
                if row is not None:
                    self._check(row["text"])
                    return _stored(row)

        def joined(there: Stored | None) -> str:
            return encode([*(decode(there.text) if there else []), *decode(text)], self._max_bytes)

        return await self._change(whose, joined, expected, owed)

    async def delete(self, user_id: str, conversation_id: str, expected: int | None) -> tuple[bool, Debt]:
        """Remove a conversation, bury it, and owe Redis the news; whether there was one. Raises VersionConflict."""
        whose = _Whose(user_id, conversation_id)
        async with self._database.transaction() as connection:
            await connection.execute(sql.LOCK, *whose)
            # In this order: what is archived just now is first there, then here.
            warm: int | None = await connection.fetchval(sql.DELETE_WARM, *whose)
            archived = await _take_archived(connection, whose)
            version = warm or (archived.version if archived else 0)
            _expect(whose, expected, version)
            # Even if there was none: an export may have it.
            await connection.execute(sql.BURY, conversation_digest(*whose), version)
            return version > 0, Debt(await connection.fetchval(sql.OWE, *whose), *whose)

    async def erase(self, user_id: str) -> tuple[Erased, Debt]:
        """Remove everything of a user, bury that, and owe Redis the news: one debt, instead of any others."""
        async with self._database.transaction() as connection:
            await connection.execute(sql.LOCK_USER, user_id)
            warm, newest_warm = await connection.fetchrow(sql.ERASE_WARM, user_id)
            await connection.execute(sql.ERASE_KEYS, user_id)
            archived, newest_archived = await connection.fetchrow(sql.ERASE_ARCHIVED, user_id)
            templates = await connection.fetchval(sql.ERASE_TEMPLATES, user_id)
            await connection.execute(sql.BURY, user_digest(user_id), max(newest_warm, newest_archived))
            await connection.execute(sql.ERASE_DEBTS, user_id)
            debt = Debt(await connection.fetchval(sql.OWE, user_id, ""), user_id, "")
        return Erased(redis=0, warm=warm, archive=archived, templates=templates), debt

    async def page(self, user_id: str, limit: int, after: Listed | None) -> list[Listed]:
        """A page of a user's conversations, the latest first."""
        cursor = (after.updated_at, after.conversation_id) if after else (None, None)
        async with self._database.connection() as connection:
            rows = await connection.fetch(sql.LIST, user_id, *cursor, min(limit, LIST_MAX))
        return [Listed(*row) for row in rows]

    # --- what Redis has not been told ---

    async def owe(self, user_id: str, conversation_id: str) -> None:
        """Note that Redis may hold an old state of a conversation."""
        async with self._database.connection() as connection:
            await connection.execute(sql.OWE, user_id, conversation_id)

    async def debts(self) -> list[Debt]:
        """The oldest of what is owed."""
        async with self._database.connection() as connection:
            return [Debt(*row) for row in await connection.fetch(sql.OWED, _DEBTS_AT_ONCE)]

    async def paid(self, debts: list[Debt]) -> None:
        """Redis knows."""
        async with self._database.connection() as connection:
            await connection.execute(sql.PAID, [debt.id for debt in debts])

    # --- transactions ---

    async def _promote(self, connection: Connection, whose: _Whose) -> tuple[Stored, Tier] | None:
        async with connection.transaction():
            await connection.execute(sql.LOCK, *whose)
            warm = await connection.fetchrow(sql.WARM, *whose)
            if warm is not None:  # another was faster
                return _stored(warm), "warm"
            archived = await _take_archived(connection, whose)
            if archived is None:  # deleted, or its month was dropped
                return None
            await _insert(connection, whose, archived)
        self._promoted()
        return archived, "archive"

    async def _change(self, whose: _Whose, change: _Change, expected: int | None, owed: bool) -> Stored:
        """The long way: a conversation that is not in user_contexts, or may not be, or of which Redis is not told."""
        async with self._database.transaction() as connection:
            await connection.execute(sql.LOCK, *whose)
            row = await connection.fetchrow(sql.WARM, *whose)
            archived = None if row is not None else await _take_archived(connection, whose)
            there = _stored(row) if row is not None else archived
            _expect(whose, expected, there.version if there else 0)
            text = change(there)
            if owed:
                await connection.execute(sql.OWE, *whose)
            if row is not None:
                written = await connection.fetchrow(sql.WRITE, *whose, text, None)
                return Stored(written["version"], written["created_at"], written["updated_at"], text)
            digests = [user_digest(whose.user_id), conversation_digest(*whose)]
            floor = max(there.version if there else 0, await connection.fetchval(sql.FLOOR, digests))
            created_at = there.created_at if there else None
            made = await connection.fetchrow(sql.INSERT, *whose, text, floor + 1, created_at, None)
            return Stored(made["version"], made["created_at"], made["updated_at"], text)

    def _check(self, text: str) -> None:
        """jsonb's own text has blanks in it that do not count."""
        if len(text.encode()) > self._max_bytes:
            check_size(len(encode(decode(text), self._max_bytes * 2).encode()), self._max_bytes)


async def _take_archived(connection: Connection, whose: _Whose) -> Stored | None:
    archived_at: datetime | None = await connection.fetchval(sql.TAKE_KEY, *whose)
    if archived_at is None:
        return None
    row = await connection.fetchrow(sql.TAKE_ARCHIVED, *whose, archived_at)
    return _stored(row) if row is not None else None


async def _insert(connection: Connection, whose: _Whose, stored: Stored) -> None:
    await connection.execute(sql.INSERT, *whose, stored.text, stored.version, stored.created_at, stored.updated_at)


def _expect(whose: _Whose, expected: int | None, current: int) -> None:
    if expected is not None and expected != current:
        raise VersionConflict(str(whose), expected, current)


def _stored(row: Any) -> Stored:
    return Stored(row["version"], row["created_at"], row["updated_at"], row["text"])
