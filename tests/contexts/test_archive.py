"""The archive job moves what is due, all of it, once, as it was; whoever else is at work, and wherever it is killed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.contexts.house import House, archive
from tests.servers import run
from tierd.controller.contexts import archive as context_archive
from tierd.controller.contexts.archive import ArchiveProgress, LostRows, archive_old_contexts
from tierd.controller.leader import NotLeaderError, begin_epoch
from tierd.errors import DatabaseError
from tierd.metrics import ContextMetrics
from tierd.postgres import connected

COLUMNS = "user_id, conversation_id, messages::text, created_at, updated_at, version"
FILL = """
INSERT INTO user_contexts (user_id, conversation_id, messages, created_at, updated_at, version)
SELECT 'u' || n % 7, 'c' || n, jsonb_build_array(jsonb_build_object('n', n)), now() - interval '90 days',
    now() - interval '31 days' - n * interval '1 second', 1 + n % 5
FROM generate_series(1, $1::int) n
"""


async def fill(house: House, count: int) -> list[tuple[Any, ...]]:
    await house.sql(FILL, count)
    return sorted(await house.sql(f"SELECT {COLUMNS} FROM user_contexts"))


async def archived(house: House) -> list[tuple[Any, ...]]:
    """What is in the archive, by way of its keys; each row must have one, and each key a row."""
    joined = await house.sql(
        f"SELECT {', '.join('a.' + column.strip() for column in COLUMNS.split(','))} FROM user_contexts_archive a"
        " JOIN context_archive_keys k USING (user_id, conversation_id, archived_at)"
    )
    for table in ("user_contexts_archive", "context_archive_keys"):
        assert await house.sql(f"SELECT count(*) FROM {table}") == [(len(joined),)]
    return sorted(joined)


def test_only_what_is_old_is_moved_with_all_its_columns(house: House) -> None:
    told: list[ArchiveProgress] = []
    registry = CollectorRegistry()

    async def main() -> None:
        before = await fill(house, 1200)
        await house.sql("INSERT INTO user_contexts (user_id, conversation_id, messages) VALUES ('new', 'c', '[]')")
        await house.sql(
            "INSERT INTO user_contexts (user_id, conversation_id, messages, updated_at)"
            " VALUES ('nearly', 'c', '[]', now() - interval '29 days 23 hours')"
        )
        async with house.database() as database:
            done = await archive_old_contexts(database, progress=told.append, metrics=ContextMetrics(registry))
            assert (done.due, done.moved, done.superseded, done.failures) == (1200, 1200, 0, 0)
            assert await archived(house) == before
            assert sorted(await house.sql("SELECT user_id FROM user_contexts")) == [("nearly",), ("new",)]
            assert (await archive_old_contexts(database)).moved == 0
            assert (await archive_old_contexts(database, days=29)).moved == 1, "the age is a setting"

    run(main())
    assert [each.moved for each in told] == sorted(each.moved for each in told)
    assert (told[0].due, told[0].moved, told[-1].moved) == (1200, 0, 1200)
    assert registry.get_sample_value("tierd_context_moves_total", {"move": "archived"}) == 1200


def test_a_backlog_is_counted_no_further_than_a_statement_may_take(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_archive, "DUE_MAX", 20)

    async def main() -> None:
        await fill(house, 50)
        async with house.database() as database:
            done = await archive_old_contexts(database)
        assert (done.due, done.moved) == (20, 50)

    run(main())


def test_what_others_hold_is_left_and_blocks_nobody(house: House) -> None:
    async def main() -> None:
        before = await fill(house, 50)
        async with house.database() as database, connected(house.settings()) as other:
            async with other.transaction():
                await other.fetch("SELECT FROM user_contexts WHERE conversation_id IN ('c1', 'c2') FOR UPDATE")
                assert (await archive_old_contexts(database, workers=3)).moved == 48
            assert (await archive_old_contexts(database)).moved == 2
        assert await archived(house) == before

    run(main())


def test_what_others_let_go_of_meanwhile_is_moved_too(house: House) -> None:
    """The oldest row of all, which the job has long gone past."""
    held, let_go = threading.Event(), threading.Event()

    async def hold() -> None:
        async with connected(house.settings()) as other, other.transaction():
            await other.fetch("SELECT FROM user_contexts WHERE conversation_id = 'c20' FOR UPDATE")
            held.set()
            let_go.wait()

    def told(progress: ArchiveProgress) -> None:
        if progress.batches == 2:
            let_go.set()
            holder.join()

    async def main() -> None:
        await fill(house, 20)
        holder.start()
        await asyncio.to_thread(held.wait)
        async with house.database() as database:
            done = await archive_old_contexts(database, workers=1, batch_rows_max=5, progress=told)
        assert done.moved == 20

    holder = threading.Thread(target=lambda: run(hold()))
    run(main())


@pytest.mark.parametrize(("recent", "old", "stays"), [(2, 1, "recent"), (1, 1, "recent"), (1, 2, "old")])
def test_a_conversation_that_was_archived_before(house: House, recent: int, old: int, stays: str) -> None:
    """The newer one stays, and the batch goes on: rows that the old code left in both tables must not stop it."""

    async def main() -> None:
        await fill(house, 20)
        await house.sql(
            "WITH k AS (INSERT INTO context_archive_keys SELECT user_id, conversation_id, now()"
            " FROM user_contexts WHERE conversation_id = 'c7' RETURNING *) INSERT INTO user_contexts_archive"
            " (user_id, conversation_id, messages, created_at, version, archived_at)"
            " SELECT user_id, conversation_id, '[\"old\"]', 'epoch', $1, archived_at FROM k",
            old,
        )
        await house.sql(
            "UPDATE user_contexts SET version = $1, messages = '[\"recent\"]' WHERE conversation_id = 'c7'", recent
        )
        async with house.database() as database:
            done = await archive_old_contexts(database)
        assert (done.moved, done.superseded) == (20, 1)
        found = [row for row in await archived(house) if row[1] == "c7"]
        assert [(row[2], row[5]) for row in found] == [(f'["{stays}"]', max(recent, old))]
        assert len(await archived(house)) == 20

    run(main())


class Killed(BaseException):
    """As if the process had gone."""


class MortalDatabase:
    """One whose transactions end before or after they are committed, each in its turn."""

    def __init__(self, database: Any, dies: set[int], *, before: bool) -> None:
        self._database = database
        self._dies = dies
        self._before = before
        self.begun = 0

    def connection(self) -> Any:
        """A connection that lives."""
        return self._database.connection()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """One that may end."""
        self.begun += 1
        dies = self.begun in self._dies
        async with self._database.transaction() as connection:
            yield connection
            if dies and self._before:
                raise Killed
        if dies:
            raise Killed


@pytest.mark.parametrize("before", [True, False], ids=["before the commit", "after it"])
def test_killed_at_each_batch(house: House, before: bool) -> None:
    async def main() -> None:
        every = await fill(house, 90)
        async with house.database() as database:
            for number in range(1, 5):
                mortal: Any = MortalDatabase(database, {number}, before=before)
                with pytest.raises(Killed):
                    await archive_old_contexts(mortal, batch_rows_max=5, workers=1)
                moved, there = await archived(house), await house.sql(f"SELECT {COLUMNS} FROM user_contexts")
                assert sorted(moved + there) == every
            await archive_old_contexts(database)
        assert await archived(house) == every

    run(main())


def test_the_database_goes_away_in_the_middle(house: House) -> None:
    pauses: list[float] = []
    starting = asyncio.Lock()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        async with starting:
            await asyncio.to_thread(house.postgres.start)

    def told(progress: ArchiveProgress) -> None:
        if progress.batches == 3 and not pauses:
            house.postgres.kill()

    async def main() -> None:
        every = await fill(house, 90)
        async with house.database() as database:
            done = await archive_old_contexts(database, batch_rows_max=5, progress=told, pause=pause)
        assert done.failures >= 1
        assert await archived(house) == every

    run(main())


def test_one_that_stays_away_ends_the_job(house: House) -> None:
    async def no_pause(_: float) -> None:
        return

    async def main() -> None:
        await fill(house, 20)
        async with house.database() as database:
            with pytest.raises(DatabaseError):
                await archive_old_contexts(
                    database, batch_rows_max=5, progress=lambda _: house.postgres.kill(), pause=no_pause
                )

    run(main())
    house.postgres.start()


def test_who_no_longer_leads_moves_nothing(house: House) -> None:
    async def main() -> None:
        await fill(house, 20)
        async with house.database() as database, connected(house.settings()) as leader:
            epoch = await begin_epoch(leader, "test")
            with pytest.raises(NotLeaderError):
                await archive_old_contexts(database, epoch=epoch - 1)
            assert await archived(house) == []
            assert (await archive_old_contexts(database, epoch=epoch)).moved == 20

    run(main())


def test_a_batch_that_does_not_add_up_is_undone(house: House) -> None:
    """Here by a rule that drops what is written, as `ON CONFLICT DO NOTHING` would."""

    async def main() -> None:
        every = await fill(house, 20)
        await house.sql(
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ begin"
            " if NEW.conversation_id = 'c7' then RETURN NULL; end if; RETURN NEW; end $$"
        )
        await house.sql(
            "CREATE TRIGGER lose BEFORE INSERT ON user_contexts_archive FOR EACH ROW EXECUTE FUNCTION lose()"
        )
        async with house.database() as database:
            with pytest.raises(LostRows, match=r"does not add up: gone 20, written 19, keys 20$"):
                await archive_old_contexts(database)
        assert sorted(await house.sql(f"SELECT {COLUMNS} FROM user_contexts")) == every
        assert await archived(house) == []

    run(main())


def test_moves_both_ways_at_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers archive all the time, whatever its age; readers and writers bring it back. Nothing is lost or doubled."""
    names = [f"c{n}" for n in range(12)]

    async def mover(database: Any, stop: asyncio.Event) -> int:
        moved = 0
        while not stop.is_set():
            moved += (await archive_old_contexts(database, days=0, workers=2, batch_rows_max=5)).moved
        return moved

    async def scene() -> None:
        acknowledged: dict[str, int] = dict.fromkeys(names, 0)
        async with house.contexts() as first, house.contexts() as second, house.database() as database:
            stop = asyncio.Event()
            created = {name: (await first.save("u", name, [], version=0)).created_at for name in names}
            movers = [asyncio.create_task(mover(database, stop)) for _ in range(2)]

            async def use(name: str, number: int) -> None:
                for n in range(15):
                    library = (first, second)[(n + number) % 2]
                    await library.append("u", name, [{"who": number, "n": n}])
                    acknowledged[name] += 1
                    seen = acknowledged[name]
                    found = await (first, second)[n % 2].get("u", name)
                    assert found is not None
                    assert len(found.messages) >= seen, "older than acknowledged"
                    assert found.created_at == created[name]

            await asyncio.gather(*(use(name, number) for name in names for number in range(2)))
            stop.set()
            assert sum(await asyncio.gather(*movers)) > len(names), "it did move"
            await archive_old_contexts(database, days=0)
        assert [(row[1], row[3]) for row in await archived(house)] == sorted(created.items())
        assert {row[5] for row in await archived(house)} == {31}

    run(scene(), 120)


def test_what_is_archived_by_the_tests_is_like_it(house: House) -> None:
    """`house.archive` stands for the job in other tests."""

    async def main() -> None:
        before = await fill(house, 10)
        async with connected(house.settings()) as connection, connection.transaction():
            await archive(connection)
        assert await archived(house) == before

    run(main())


def test_batches_shrink_and_grow_with_the_time_they_take() -> None:
    assert [context_archive._next_rows(500, seconds, 800) for seconds in (0.1, 0.5, 1.5)] == [800, 500, 250]
    assert context_archive._next_rows(1, 9.0, 800) == 1
