"""One controller leads; one that lost its session destroys nothing, and the next waits for what is being destroyed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import asyncpg
import pytest

from tests.controller.house import POLL_SECONDS, connected, migrated, until
from tests.servers import run
from tierd.controller.leader import NotLeaderError, assert_leader, begin_epoch
from tierd.postgres import Connection


async def end_session(watcher: Connection, victim: Connection) -> None:
    """As if the network to it had broken, or somebody had restarted a pooler: the server alone knows of it."""
    pid = victim.get_server_pid()
    assert await watcher.fetchval("SELECT pg_terminate_backend($1)", pid)
    await until(watcher, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)


class Sessions(AsyncExitStack):
    """As many connections to a migrated database as are asked for."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._dsn = dsn

    async def __aenter__(self) -> Sessions:
        await migrated(self._dsn)
        return await super().__aenter__()

    async def new(self) -> Connection:
        return await self.enter_async_context(connected(self._dsn))


def test_one_leads_at_a_time_and_each_has_an_epoch_of_its_own(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            first, second = await sessions.new(), await sessions.new()
            assert await begin_epoch(first, "one") == 1
            with pytest.raises(NotLeaderError, match=r"^one leads since [0-9-]+ [0-9:]+ UTC$"):
                await begin_epoch(second, "two")
            await first.close()
            assert await begin_epoch(second, "two") == 2
            row = await second.fetchrow("SELECT holder, since <= now() AS past FROM leader")
            assert tuple(row) == ("two", True)

    run(main())


def test_any_connection_of_the_leader_may_act_in_its_epoch(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            leader, worker = await sessions.new(), await sessions.new()
            epoch = await begin_epoch(leader, "one")
            for _ in range(2):
                async with worker.transaction():
                    await assert_leader(worker, epoch)
            with pytest.raises(AssertionError):
                await assert_leader(worker, epoch)  # without a transaction it would promise nothing

    run(main())


def test_nobody_leads_before_the_first_epoch(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            worker = await sessions.new()
            for epoch in (0, 1):
                with pytest.raises(NotLeaderError):
                    async with worker.transaction():
                        await assert_leader(worker, epoch)

    run(main())


def test_a_leader_whose_session_ended_destroys_nothing(database: str) -> None:
    """Even though nobody has taken over, and its other connections work."""

    async def main() -> None:
        async with Sessions(database) as sessions:
            leader, worker, watcher = await sessions.new(), await sessions.new(), await sessions.new()
            epoch = await begin_epoch(leader, "one")
            await end_session(watcher, leader)
            with pytest.raises(NotLeaderError, match=f"^epoch {epoch} is over: its database session ended$"):
                async with worker.transaction():
                    await assert_leader(worker, epoch)

    run(main())


def test_a_leader_that_was_succeeded_destroys_nothing(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            leader, worker, successor = await sessions.new(), await sessions.new(), await sessions.new()
            epoch = await begin_epoch(leader, "one")
            await end_session(successor, leader)
            assert await begin_epoch(successor, "two") == epoch + 1
            with pytest.raises(NotLeaderError, match=f"^epoch {epoch} is over: two began epoch {epoch + 1}$"):
                async with worker.transaction():
                    await assert_leader(worker, epoch)

    run(main())


def test_a_successor_waits_until_a_transaction_that_destroys_has_ended(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            leader, worker, successor, watcher = [await sessions.new() for _ in range(4)]
            epoch = await begin_epoch(leader, "one")
            transaction = worker.transaction()
            await transaction.start()
            await assert_leader(worker, epoch)
            await end_session(watcher, leader)
            taking_over = asyncio.create_task(begin_epoch(successor, "two"))
            blocked = "SELECT $2 = ANY (pg_blocking_pids($1))"
            while not await watcher.fetchval(blocked, successor.get_server_pid(), worker.get_server_pid()):
                assert not taking_over.done(), "it began an epoch over what is being destroyed"
                await asyncio.sleep(POLL_SECONDS)
            await transaction.commit()
            assert await taking_over == epoch + 1

    run(main())


def test_an_epoch_that_could_not_begin_does_not_keep_others_out(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            first, second = await sessions.new(), await sessions.new()
            await second.execute("ALTER TABLE leader ADD CHECK (holder <> 'bad')")
            with pytest.raises(asyncpg.CheckViolationError):
                await begin_epoch(first, "bad")
            assert first.is_closed()
            await until(second, "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory')")
            assert await begin_epoch(second, "good") == 1

    run(main())


def test_an_epoch_needs_a_connection_without_a_transaction(database: str) -> None:
    async def main() -> None:
        async with Sessions(database) as sessions:
            connection = await sessions.new()
            async with connection.transaction():
                with pytest.raises(AssertionError):
                    await begin_epoch(connection, "one")

    run(main())
