"""Two at once on one conversation, in the order that is worst: each waits where the other holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.contexts.house import HELLO, MORE, House, archive
from tests.controller.house import until
from tests.servers import run
from tierd.contexts import Contexts, VersionConflict
from tierd.contexts.flights import Flights
from tierd.postgres import connected

WAITS = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
$$ begin PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW; end $$
"""
CALLS: dict[str, Callable[[Contexts], Awaitable[Any]]] = {
    "save": lambda contexts: contexts.save("u", "c", MORE, version=1),
    "append": lambda contexts: contexts.append("u", "c", MORE),
    "delete": lambda contexts: contexts.delete("u", "c"),
    "delete_user": lambda contexts: contexts.delete_user("u"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_archived_just_now(house: House, call: str) -> None:
    """The archive has the row, and commits while the other waits for it: that one must look for it where it went."""

    async def scene(contexts: Contexts) -> None:
        first = await contexts.save("u", "c", HELLO, version=0)
        async with connected(house.settings()) as mover, connected(house.settings()) as watcher:
            async with mover.transaction():
                await archive(mover)
                other = asyncio.create_task(CALLS[call](contexts))  # type: ignore[arg-type]
                await until(watcher, WAITS)
            await other
        found = await contexts.get("u", "c")
        assert (found and found.messages) == {"save": MORE, "append": HELLO + MORE}.get(call)
        assert found is None or (found.version, found.created_at) == (2, first.created_at)
        rows = await house.sql("SELECT FROM user_contexts UNION ALL SELECT FROM user_contexts_archive")
        assert len(rows) == (1 if found else 0)

    house.play(scene)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_promoted_just_now(house: House, call: str) -> None:
    """The reader took it from the archive, and has not put it where it belongs yet."""

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        await house.archive()
        assert house.client is not None
        house.client.flushall()
        await house.sql(HOLD)
        await house.sql("CREATE TRIGGER hold BEFORE INSERT ON user_contexts FOR EACH ROW EXECUTE FUNCTION hold()")
        async with connected(house.settings()) as holder, connected(house.settings()) as watcher:
            async with holder.transaction():
                await holder.execute("SELECT pg_advisory_xact_lock(42)")
                reader = asyncio.create_task(contexts.get("u", "c"))
                await until(watcher, WAITS)
                other = asyncio.create_task(CALLS[call](contexts))  # type: ignore[arg-type]
                await until(watcher, "SELECT count(*) > 1 FROM pg_locks WHERE NOT granted")
            await asyncio.gather(reader, other)
        found = await contexts.get("u", "c")
        assert (found and found.messages) == {"save": MORE, "append": HELLO + MORE}.get(call)
        rows = await house.sql("SELECT FROM user_contexts UNION ALL SELECT FROM user_contexts_archive")
        assert len(rows) == (1 if found else 0)

    house.play(scene)


def test_an_erasure_is_later_than_all_that_it_waited_for(house: House) -> None:
    """Or an export would have what looks as if it had begun after the erasure, and be restored."""

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        async with connected(house.settings()) as holder, connected(house.settings()) as watcher:
            async with holder.transaction():
                await holder.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended($1, 7))", "u")
                eraser = asyncio.create_task(contexts.delete_user("u"))
                await until(watcher, WAITS)
                await house.archive()
                ((archived_at,),) = await house.sql("SELECT archived_at FROM user_contexts_archive")
            assert (await eraser).archive == 1
        assert await house.sql("SELECT erased_at > $1 FROM context_tombstones", archived_at) == [(True,)]

    house.play(scene)


def test_nobody_joins_a_read_that_began_before_a_write(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        if any_house.client is not None and any_house.redis is not None and any_house.redis.alive:
            any_house.client.flushall()
        read, entered, go_on = contexts._tiers.read, asyncio.Event(), asyncio.Event()

        async def slow(*names: str) -> Any:
            found = await read(*names)
            entered.set()
            await go_on.wait()
            return found

        contexts._tiers.read = slow  # type: ignore[method-assign]
        early = asyncio.create_task(contexts.get("u", "c"))
        await entered.wait()
        contexts._tiers.read = read  # type: ignore[method-assign]
        await contexts.save("u", "c", MORE, version=1)
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == MORE
        go_on.set()
        await early
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == MORE

    any_house.play(scene)


def test_nobody_trusts_a_look_that_began_before_a_write(house: House) -> None:
    """A reader looks what is owed; then this process owes something; a second reader joins the first one's look."""

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        assert house.client is not None
        assert contexts._cache is not None
        house.client.delete("context-trust")
        debts, entered, go_on = contexts._tiers.debts, asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            contexts._tiers.debts = debts  # type: ignore[method-assign]
            found = await debts()
            entered.set()
            await go_on.wait()
            return found

        contexts._tiers.debts = slow  # type: ignore[method-assign]
        first = asyncio.create_task(contexts.get("u", "c"))
        await entered.wait()
        contexts._cache.circuit.failed()
        await contexts.save("u", "c", MORE, version=1)
        contexts._cache.circuit.succeeded()
        second = asyncio.create_task(contexts.get("u", "c"))
        while contexts._settling._flying[None][1] != [2]:  # noqa: ASYNC110 (nobody is told of it)
            await asyncio.sleep(0)
        go_on.set()
        await first
        found = await second
        assert found is not None
        assert found.messages == MORE

    house.play(scene)


def test_nobody_joins_a_read_of_somebody_who_was_erased(house: House) -> None:
    async def main() -> None:
        async with House(house.dsn, house.postgres, None, None).contexts() as contexts:
            await contexts.save("u", "c", HELLO, version=0)
            read, entered, go_on = contexts._tiers.read, asyncio.Event(), asyncio.Event()

            async def slow(*names: str) -> Any:
                found = await read(*names)
                entered.set()
                await go_on.wait()
                return found

            contexts._tiers.read = slow  # type: ignore[method-assign]
            early = asyncio.create_task(contexts.get("u", "c"))
            await entered.wait()
            contexts._tiers.read = read  # type: ignore[method-assign]
            await contexts.delete_user("u")
            assert await contexts.get("u", "c") is None
            go_on.set()
            await early

    run(main())


def test_a_write_that_was_killed_after_its_commit(house: House) -> None:
    """Redis has the state before. Whoever goes by it is told, and then finds what is there."""

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        async with house.contexts() as killed:
            await killed._tiers.save("u", "c", '[{"n":2}]', 1)
        old = await contexts.get("u", "c")
        assert old is not None
        with pytest.raises(VersionConflict):
            await contexts.save("u", "c", MORE, version=old.version)
        new = await contexts.get("u", "c")
        assert new is not None
        assert (new.messages, new.version) == ([{"n": 2}], 2)

    house.play(scene)


def test_who_gives_up_takes_nobody_with_them() -> None:
    async def main() -> None:
        flights: Flights[str, int] = Flights()
        go_on, calls = asyncio.Event(), 0

        async def call() -> int:
            nonlocal calls
            calls += 1
            await go_on.wait()
            return calls

        first, second = (asyncio.create_task(flights.run("k", call)) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        go_on.set()
        assert await second == 1
        assert await flights.run("k", call) == 2, "it is remembered by nobody"
        go_on.clear()
        last = asyncio.create_task(flights.run("k", call))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        assert flights._flying == {}

    run(main())


def test_a_failure_is_everybodys() -> None:
    async def main() -> None:
        flights: Flights[str, int] = Flights()

        async def call() -> int:
            await asyncio.sleep(0)
            raise KeyError

        both = await asyncio.gather(*(flights.run("k", call) for _ in range(2)), return_exceptions=True)
        assert [type(each) for each in both] == [KeyError, KeyError]

    run(main())
