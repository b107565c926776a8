"""Archives under kills, restarts, readers and writers, and proves afterwards that nothing was lost. Short or long."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from tests.contexts.house import House
from tests.controller.house import environment
from tierd.contexts import Contexts, VersionConflict
from tierd.controller.contexts.archive import archive_old_contexts
from tierd.errors import DatabaseError

_FILL = """
INSERT INTO user_contexts (user_id, conversation_id, messages, created_at, updated_at)
SELECT 'u' || n % 1000, n::text, jsonb_build_array(jsonb_build_object('n', 0, 'content', repeat(md5(n::text), $3))),
    $4::timestamptz + n * interval '1 second', now() - interval '40 days' + n * interval '1 millisecond'
FROM generate_series($1::int, $2::int) n
"""
# A conversation's version is the number of its messages, which are numbered; its ID tells when it began.
_WRONG = """
SELECT count(*) FROM (
    SELECT conversation_id, created_at, version, messages FROM user_contexts
    UNION ALL SELECT conversation_id, created_at, version, messages FROM user_contexts_archive) c
WHERE created_at <> $1::timestamptz + conversation_id::int * interval '1 second'
    OR jsonb_array_length(messages) <> version
    OR (SELECT bool_or((message ->> 'n')::int <> place - 1)
        FROM jsonb_array_elements(messages) WITH ORDINALITY AS m (message, place))
"""
_PLACES = """
SELECT count(*), count(DISTINCT conversation_id) FROM (
    SELECT conversation_id FROM user_contexts UNION ALL SELECT conversation_id FROM user_contexts_archive) c
"""
_UNKEYED = """
SELECT (SELECT count(*) FROM user_contexts_archive a FULL JOIN context_archive_keys k
    USING (user_id, conversation_id, archived_at) WHERE a.version IS NULL OR k.archived_at IS NULL)
"""
_FILL_ROWS = 100_000


@dataclass
class Books:
    """What was acknowledged."""

    versions: Counter[int] = field(default_factory=Counter)
    doubtful: set[int] = field(default_factory=set)
    reads: int = 0
    writes: int = 0
    failures: int = 0
    kills: int = 0


async def carry_on(
    house: House, *, conversations: int, workers: int, kills: int, restarts: int, batch: int, words: int, seed: int = 0
) -> Books:
    """So many conversations, moved by so many processes, of which so many are killed. AssertionError if any is lost."""
    began = await _fill(house, conversations, words)
    chance, books = random.Random(seed), Books()
    async with house.contexts(postgres_connections=8) as contexts:
        stop = asyncio.Event()
        users = [
            asyncio.create_task(_use(contexts, books, stop, random.Random(number), number, conversations, began))
            for number in range(4)
        ]
        every = max(kills // max(restarts, 1), 1)
        left = iter(range(kills))
        gate = asyncio.Lock()

        async def restart() -> None:
            async with gate:
                end = house.postgres.kill if chance.random() < 0.5 else house.postgres.stop
                await asyncio.to_thread(end)
                await asyncio.to_thread(house.postgres.start)

        async def keep_killing() -> None:
            for number in left:
                await _kill_after(house, batch, chance.randint(1, 6))
                books.kills += 1
                if number % every == every - 1:
                    await restart()

        await asyncio.gather(*(keep_killing() for _ in range(workers)))
        stop.set()
        await asyncio.gather(*users)
        async with house.database() as database:
            await archive_old_contexts(database, workers=2)
        await _check(house, contexts, books, conversations, began)
    return books


async def _fill(house: House, conversations: int, words: int) -> datetime:
    ((began,),) = await house.sql("SELECT date_trunc('second', now()) - interval '100 days'")
    for first in range(1, conversations + 1, _FILL_ROWS):
        last = min(first + _FILL_ROWS - 1, conversations)
        await house.sql(_FILL, first, last, words, began)
    await house.sql("ANALYZE user_contexts")
    moment: datetime = began
    return moment


async def _kill_after(house: House, batch: int, lines: int) -> None:
    """Start an archiver, and kill it when it has told of so many batches: in the middle of the next one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.contexts.archiver", str(batch),
        env=environment({"TIERDCTX_POSTGRES": house.dsn}),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(lines):
        assert await process.stdout.readline(), "it ended by itself"
    process.kill()
    await process.wait()


async def _use(
    contexts: Contexts, books: Books, stop: asyncio.Event, chance: random.Random, mine: int, count: int, began: datetime
) -> None:
    """Read any conversation; write to one's own."""
    while not stop.is_set():
        number = chance.randrange(1, count + 1)
        owned = number % 4 == mine
        try:
            if owned and chance.random() < 0.5:
                await _write(contexts, books, number)
            else:
                await _read(contexts, books, number, began)
        except DatabaseError:
            books.failures += 1


async def _read(contexts: Contexts, books: Books, number: int, began: datetime) -> Any:
    acknowledged = books.versions[number] + 1
    found = await contexts.get(f"u{number % 1000}", str(number))
    assert found is not None, number
    assert found.version >= acknowledged, "older than acknowledged"
    assert [message["n"] for message in found.messages] == list(range(found.version))
    assert found.created_at == began + timedelta(seconds=number)
    books.reads += 1
    return found


async def _write(contexts: Contexts, books: Books, number: int) -> None:
    version = books.versions[number] + 1
    books.doubtful.add(number)
    try:
        saved = await contexts.append(f"u{number % 1000}", str(number), [{"n": version}], version=version)
    except VersionConflict as conflict:
        if conflict.current != version + 1:  # not: it was done, and not acknowledged
            raise
        books.versions[number] += 1
    else:
        assert saved.version == version + 1
        books.versions[number] += 1
        books.writes += 1
    books.doubtful.discard(number)


async def _check(house: House, contexts: Contexts, books: Books, conversations: int, began: datetime) -> None:
    assert await house.sql(_PLACES) == [(conversations, conversations)], "lost or doubled"
    assert await house.sql(_WRONG, began) == [(0,)]
    assert await house.sql(_UNKEYED) == [(0,)]
    for number, written in books.versions.items():
        found = await _read(contexts, books, number, began)
        assert found.version - written - 1 in ((0, 1) if number in books.doubtful else (0,)), number
