"""Redis is a cache that never tells of what is over: old states, what was erased, what it missed while it was away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.contexts.house import HELLO, KEY, MORE, House, client_of, slowly, tier_of
from tests.servers import run
from tierd.contexts import Contexts
from tierd.contexts.names import entry_key
from tierd.metrics import ContextMetrics


def test_keys_and_times_are_those_of_the_platform(house: House) -> None:
    client = client_of(house)

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        assert 86_390 <= client.ttl(KEY) <= 86_400
        assert tier_of(await contexts.get("u", "c")) == "redis"
        client.delete(KEY)
        assert tier_of(await contexts.get("u", "c")) == "warm"
        assert 3590 <= client.ttl(KEY) <= 3600
        assert tier_of(await contexts.get("u", "c")) == "redis"
        await house.archive()
        client.delete(KEY)
        assert tier_of(await contexts.get("u", "c")) == "archive"
        client.delete(KEY)
        assert tier_of(await contexts.get("u", "c")) == "warm"
        assert client.connection_pool.connection_kwargs["db"] == 1

    house.play(scene)
    assert entry_key("a:b", "c") != entry_key("a", "b:c")


def test_times_are_settings(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        assert client_of(house).ttl(KEY) <= 7
        client_of(house).delete(KEY)
        await contexts.get("u", "c")
        assert client_of(house).ttl(KEY) <= 3

    house.play(scene, ttl=7, ttl_read=3)


@pytest.mark.parametrize(
    "entry", [b"", b"1 2", b"2 1 j 0 0\n[]", b"1 1 z 0 0\nnot deflated", b"1 1 j 0 0\n\xff", b"\x00" * 99]
)
def test_what_is_no_entry_is_a_miss(house: House, entry: bytes) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        client_of(house).set(KEY, entry)
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == HELLO

    house.play(scene)


def test_large_ones_are_compressed(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        large = [{"content": "안녕 " * 100_000}]
        await contexts.save("u", "c", large, version=0)
        assert client_of(house).strlen(KEY) < 20_000
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.messages, found.tier) == (large, "redis")

    house.play(scene)


def test_as_many_misses_as_there_are_cost_one_query(house: House) -> None:
    """All of them miss before any is answered: the table is locked."""
    registry = CollectorRegistry()

    async def main() -> None:
        async with house.contexts(ContextMetrics(registry)) as contexts, house.database() as database:
            await contexts.save("u", "c", HELLO, version=0)
            client_of(house).flushall()
            queries = counted(contexts)
            async with database.transaction() as connection:
                await connection.execute("LOCK TABLE user_contexts IN ACCESS EXCLUSIVE MODE")
                readers = [asyncio.create_task(contexts.get("u", "c")) for _ in range(50)]
                while waiting(contexts) < 50:  # noqa: ASYNC110 (nobody is told of it)
                    await asyncio.sleep(0)
            found = await asyncio.gather(*readers)
            assert all(each is not None and each.messages == HELLO for each in found)
            assert len({id(each.messages) for each in found if each}) == 50, "each may change its own"
            assert queries == ["read"]

    run(main())


def counted(contexts: Contexts) -> list[str]:
    """Calls of `Tiers.read` from now on."""
    calls: list[str] = []
    read = contexts._tiers.read

    async def counting(*names: str) -> Any:
        calls.append("read")
        return await read(*names)

    contexts._tiers.read = counting  # type: ignore[method-assign]
    return calls


def waiting(contexts: Contexts) -> int:
    return sum(count[0] for _, count in contexts._reads._flying.values())


# --- slow ones ---


@pytest.mark.parametrize("lost", ["nothing", "the entry", "everything"])
@pytest.mark.parametrize("change", ["save", "append", "delete", "delete_user"])
def test_a_slow_reader_never_puts_back_what_is_over(house: House, change: str, lost: str) -> None:
    """It read before the change, and puts after it; the entry that it would be compared with may be gone by then."""

    async def main() -> None:
        async with house.contexts() as slow, house.contexts() as quick:
            await quick.save("u", "c", HELLO, version=0)
            client_of(house).delete(KEY)
            async with slowly(slow) as held:
                reader = asyncio.create_task(slow.get("u", "c"))
                await held.entered.wait()
                await changed(quick, change)
                if lost == "the entry":
                    client_of(house).delete(KEY)
                elif lost == "everything":
                    client_of(house).flushall()
                held.go_on.set()
                await reader
            for contexts in (slow, quick):
                await as_changed(contexts, change)

    run(main())


@pytest.mark.parametrize("change", ["save", "append", "delete", "delete_user"])
def test_a_slow_writer_never_puts_back_what_is_over(house: House, change: str) -> None:
    async def main() -> None:
        async with house.contexts() as slow, house.contexts() as quick:
            async with slowly(slow) as held:
                writer = asyncio.create_task(slow.save("u", "c", HELLO, version=0))
                await held.entered.wait()
                await changed(quick, change)
                client_of(house).delete(KEY)
                held.go_on.set()
                await writer
            for contexts in (slow, quick):
                await as_changed(contexts, change)

    run(main())


async def changed(contexts: Contexts, change: str) -> None:
    if change == "save":
        await contexts.save("u", "c", MORE, version=1)
    elif change == "append":
        await contexts.append("u", "c", MORE)
    elif change == "delete":
        assert await contexts.delete("u", "c")
    else:
        await contexts.delete_user("u")


async def as_changed(contexts: Contexts, change: str) -> None:
    found = await contexts.get("u", "c")
    messages = found.messages if found else None
    assert messages == {"save": MORE, "append": HELLO + MORE}.get(change)


def test_an_older_version_never_replaces_a_newer_one(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        await contexts.save("u", "c", MORE, version=1)
        cache = contexts._cache
        assert cache is not None
        (old,) = await house.sql("SELECT created_at FROM user_contexts")
        stored, _ = await contexts._tiers.read("u", "c") or pytest.fail("gone")
        older = type(stored)(1, old[0], old[0], "[]")
        for changed_there in (True, False):
            assert not await cache.put("u", "c", older, await cache.token("u"), 60, changed=changed_there)
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.version, found.tier) == (2, "redis")

    house.play(scene)


def test_a_miss_asks_redis_twice_and_postgres_once(house: House) -> None:
    """Each further round trip is a chance to wait for a busy machine."""
    client = client_of(house)

    def commands() -> dict[str, int]:
        stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): stats[name]["calls"] for name in stats}

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        for fence in ("there", "gone"):
            client.delete(KEY)
            if fence == "gone":
                client.flushdb()
            before = commands()
            assert tier_of(await contexts.get("u", "c")) == "warm"
            asked = {name: calls - before.get(name, 0) for name, calls in commands().items()}
            assert asked["mget"] == 1
            assert asked["evalsha"] == (1 if fence == "there" else 2)
            last = "SELECT query FROM pg_stat_activity WHERE application_name = 'tierd' AND pid <> pg_backend_pid()"
            assert all("FROM user_contexts" in query for (query,) in await house.sql(last)), "and no reset after it"

    house.play(scene)
