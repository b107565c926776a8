"""Redis away, frozen, back with old states; PostgreSQL away; and erasures, which both must confirm."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.contexts.house import HELLO, KEY, MORE, House, client_of, slowly, tier_of
from tests.servers import run
from tierd.contexts import Contexts, NotConfirmed, VersionConflict
from tierd.contexts.circuit import Circuit
from tierd.errors import DatabaseError
from tierd.metrics import ContextMetrics


def test_what_redis_missed_is_not_served_when_it_is_back(house: House) -> None:
    """It kept the old states over its restart; nobody but the database knows that they are old."""
    redis = house.redis
    assert redis is not None

    async def main() -> None:
        async with house.contexts() as writer, house.contexts() as idle:
            for name in ("saved", "appended", "deleted"):
                await writer.save("u", name, HELLO, version=0)
            await idle.get("u", "saved")
            redis.stop()
            await writer.save("u", "saved", MORE, version=1)
            await writer.append("u", "appended", MORE)
            await writer.delete("u", "deleted")
            redis.start()
            client_of(house).delete("context-trust")  # as if its two seconds were over
            assert client_of(house).exists("context:u:saved", "context:u:appended", "context:u:deleted") == 3
            async with house.contexts() as new:
                for contexts in (idle, new, writer):
                    for name, messages in (("saved", MORE), ("appended", HELLO + MORE), ("deleted", None)):
                        found = await contexts.get("u", name)
                        assert (found.messages if found else None) == messages, name
            assert await house.sql("SELECT FROM context_cache_debts") == []

    run(main())


def test_the_writer_itself_never_sees_what_redis_missed(house: House) -> None:
    """Not even while Redis is still trusted."""
    redis = house.redis
    assert redis is not None

    async def main() -> None:
        async with house.contexts() as writer:
            await writer.save("u", "c", HELLO, version=0)
            await writer.get("u", "c")
            redis.stop()
            await writer.save("u", "c", MORE, version=1)
            redis.start()
            client_of(house).set("context-trust", "1", ex=60)
            for _ in range(3):
                found = await writer.get("u", "c")
                assert found is not None
                assert found.messages == MORE
                assert writer._cache is not None
                writer._cache.circuit.succeeded()

    run(main())


def test_redis_goes_between_commit_and_put(house: House) -> None:
    redis = house.redis
    assert redis is not None

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as other:
            await contexts.save("u", "c", HELLO, version=0)
            async with slowly(contexts) as held:
                writer = asyncio.create_task(contexts.save("u", "c", MORE, version=1))
                await held.entered.wait()
                redis.stop()
                held.go_on.set()
                await writer
            assert await house.sql("SELECT conversation_id FROM context_cache_debts") == [("c",)]
            redis.start()
            found = await other.get("u", "c")
            assert found is not None
            assert found.messages == MORE

    run(main())


@pytest.mark.parametrize("change", ["save", "append", "delete", "delete_user"])
def test_what_redis_forgot_when_it_crashed_is_not_served(house: House, change: str) -> None:
    """As does one that crashed, or a replica that took over: it is back with all that had been replaced or erased."""
    redis = house.redis
    assert redis is not None

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as slow:
            await contexts.save("u", "c", HELLO, version=0)
            await contexts.save("u", "other", HELLO, version=0)
            await contexts.save("v", "as it was", HELLO, version=0)
            assert tier_of(await contexts.get("u", "c")) == "redis"
            before = everything(house)
            client_of(house).delete("context:u:other")
            async with slowly(slow) as held:
                reader = asyncio.create_task(slow.get("u", "other"))
                await held.entered.wait()
                await changed(contexts, change)
                redis.restart()
                put_back(house, before)
                for _ in range(2):  # the first finds out, the others would be served what it put there
                    for each in (contexts, slow):
                        found = await each.get("u", "c")
                        assert (found and found.messages) == {"save": MORE, "append": HELLO + MORE}.get(change)
                held.go_on.set()
                await reader
            assert not client_of(house).exists("context:u:other")
            found = await contexts.get("u", "other")
            assert (found is None) == (change == "delete_user"), "nor what was read before that"
            if change in ("save", "append"):
                assert tier_of(await contexts.get("u", "c")) == "redis", "a new generation has begun"
            assert [tier_of(await contexts.get("v", "as it was")) for _ in range(2)] == ["warm", "redis"]

    run(main())


def test_a_generation_goes_on_while_redis_does(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        for _ in range(3):
            client_of(house).delete("context-trust")
            assert tier_of(await contexts.get("u", "c")) == "redis"

    house.play(scene)


def everything(house: House) -> dict[bytes, bytes]:
    """What is in Redis, but for the mark that it is trusted."""
    client = client_of(house)
    return {key: client.get(key) for key in client.scan_iter() if key != b"context-trust"}


def put_back(house: House, before: dict[bytes, bytes]) -> None:
    client_of(house).flushdb()
    client_of(house).mset(before)


async def changed(contexts: Contexts, change: str) -> None:
    if change == "save":
        await contexts.save("u", "c", MORE, version=1)
    elif change == "append":
        await contexts.append("u", "c", MORE)
    elif change == "delete":
        assert await contexts.delete("u", "c")
    else:
        await contexts.delete_user("u")


def test_a_write_that_is_cancelled_after_its_commit_leaves_nothing_old(house: House) -> None:
    """Its client hung up, say; it was never acknowledged, but a list shows it, and so shall a read."""

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as other:
            await contexts.save("u", "c", HELLO, version=0)
            async with slowly(contexts) as held:
                writer = asyncio.create_task(contexts.save("u", "c", MORE, version=1))
                await held.entered.wait()
                writer.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await writer
            for each in (contexts, other):
                found = await each.get("u", "c")
                assert found is not None
                assert (found.messages, found.version) == (MORE, 2)

    run(main())


def test_a_write_of_which_nobody_knows_whether_it_was_done_is_not_done_twice(house: House) -> None:
    """The database was lost after it had committed and before it said so; whoever repeats it names the version."""

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        append = contexts._tiers.append

        async def lost(*args: Any, **options: Any) -> Any:
            contexts._tiers.append = append  # type: ignore[method-assign]
            await append(*args, **options)
            raise DatabaseError("lost", hint="in the middle of the commit")

        contexts._tiers.append = lost  # type: ignore[method-assign]
        with pytest.raises(DatabaseError):
            await contexts.append("u", "c", MORE, version=1)
        with pytest.raises(VersionConflict) as caught:
            await contexts.append("u", "c", MORE, version=1)
        assert caught.value.current == 2
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == HELLO + MORE

    house.play(scene)


def test_while_more_is_owed_than_can_be_paid_soon_no_entry_counts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database answers, so it is not away; only Redis is slow to be told."""
    monkeypatch.setattr("tierd.contexts.library._SETTLE_SECONDS", 0.2)

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as writer:
            await contexts.save("u", "c", HELLO, version=0)
            assert writer._cache is not None
            writer._cache.circuit.failed()
            await writer.save("u", "c", MORE, version=1)
            client_of(house).delete("context-trust")
            assert contexts._cache is not None
            never = asyncio.Event()
            forget, contexts._cache.forget = contexts._cache.forget, lambda _: never.wait()  # type: ignore
            for _ in range(2):
                found = await contexts.get("u", "c")
                assert found is not None
                assert found.messages == MORE
            contexts._cache.forget = forget  # type: ignore[method-assign]
            await contexts.get("u", "c")
            assert await house.sql("SELECT FROM context_cache_debts") == []

    run(main())


def test_many_debts_are_paid_at_once(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        for user in ("a:b", "a", "v"):
            for name in ("b:c", "c", "*"):
                await contexts.save(user, name, HELLO, version=0)
        client_of(house).delete("context-trust")
        owed = [("a", "c"), ("a:b", "*"), ("v", ""), ("w", "")]
        await house.sql(
            "INSERT INTO context_cache_debts SELECT * FROM unnest($1::text[], $2::text[])", *zip(*owed, strict=True)
        )
        tiers = {
            (user, name): tier_of(await contexts.get(user, name))
            for user in ("a:b", "a", "v") for name in ("b:c", "c", "*")
        }  # fmt: skip
        gone = {key for key, tier in tiers.items() if tier == "warm"}
        assert gone == {("a", "c"), ("a:b", "*"), ("v", "b:c"), ("v", "c"), ("v", "*")}
        assert await house.sql("SELECT FROM context_cache_debts") == []

    house.play(scene)


def test_a_frozen_redis_slows_one_call_and_not_each(house: House) -> None:
    redis = house.redis
    assert redis is not None
    registry = CollectorRegistry()

    async def main() -> None:
        async with house.contexts(ContextMetrics(registry), redis_timeout=0.2) as contexts:
            clock = Clock()
            assert contexts._cache is not None
            contexts._cache.circuit = Circuit(clock=clock)
            await contexts.save("u", "c", HELLO, version=0)
            with redis.frozen():
                asked = 0
                call = contexts._cache._redis.execute_command

                async def counting(*args: Any, **options: Any) -> Any:
                    nonlocal asked
                    asked += 1
                    return await call(*args, **options)

                contexts._cache._redis.execute_command = counting
                for version in range(1, 20):
                    await contexts.save("u", "c", MORE, version=version)
                    found = await contexts.get("u", "c")
                    assert found is not None
                    assert found.version == version + 1
                assert asked == 1, "all the others did not wait"
                clock.now_s += 0.3
                await contexts.get("u", "c")
                assert asked == 2, "one looks whether it is back"
            clock.now_s += 60
            client_of(house).delete("context-trust")
            found = await contexts.get("u", "c")
            assert found is not None
            assert found.version == 20
            assert tier_of(await contexts.get("u", "c")) == "redis"

    run(main())
    assert (registry.get_sample_value("tierd_context_cache_failures_total") or 0) > 20


def test_a_full_redis_is_one_that_is_away_but_for_erasures(house: House) -> None:
    client = client_of(house)

    async def scene(contexts: Contexts) -> None:
        for name in ("c", "d"):
            await contexts.save("u", name, HELLO, version=0)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        assert contexts._cache is not None
        await contexts.save("u", "c", MORE, version=1)
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.messages, found.tier) == (MORE, "warm")
        contexts._cache.circuit.succeeded()  # its pause is over
        assert (await contexts.delete_user("u")).redis == 2
        assert await contexts.get("u", "d") is None

    try:
        house.play(scene)
    finally:
        client.config_set("maxmemory", 0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_the_circuit() -> None:
    clock = Clock()
    circuit = Circuit(pause_s=1.0, clock=clock)
    assert circuit.allow()
    circuit.failed()
    assert not circuit.allow()
    clock.now_s += 1.0
    assert circuit.allow()
    assert not circuit.allow(), "one at a time"
    circuit.failed()
    clock.now_s += 1.9
    assert not circuit.allow(), "each failure doubles the pause"
    clock.now_s += 0.2
    assert circuit.allow()
    circuit.succeeded()
    assert circuit.allow()
    assert circuit.allow()
    for _ in range(20):
        circuit.failed()
    clock.now_s += 5.0
    assert circuit.allow(), "but not without end"


def test_without_the_database_sessions_go_on(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        await contexts.save("u", "gone", HELLO, version=0)
        client_of(house).delete("context:u:gone", "context-trust")
        house.postgres.stop()
        for _ in range(5):
            found = await contexts.get("u", "c")
            assert found is not None
            assert (found.messages, found.tier) == (HELLO, "redis")
        for call in (
            lambda: contexts.get("u", "gone"), lambda: contexts.save("u", "c", MORE, version=1),
            lambda: contexts.append("u", "c", MORE), lambda: contexts.delete("u", "gone"), lambda: contexts.list("u"),
            lambda: contexts.delete_user("u"), lambda: contexts.templates.get("u", "t"),
        ):  # fmt: skip
            with pytest.raises(DatabaseError) as caught:
                await call()
            assert caught.value.hint
        house.postgres.start()
        assert (await contexts.save("u", "c", MORE, version=1)).version == 2
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == MORE

    house.play(scene)


def test_a_silent_database_holds_up_sessions_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Redis can be trusted is asked of the database; one that says nothing is not asked at each read."""
    monkeypatch.setattr("tierd.contexts.library._SETTLE_SECONDS", 0.1)
    asked = 0

    async def scene(contexts: Contexts) -> None:
        nonlocal asked
        await contexts.save("u", "c", HELLO, version=0)
        client_of(house).delete("context-trust")
        debts = contexts._tiers.debts

        async def counting() -> Any:
            nonlocal asked
            asked += 1
            return await debts()

        contexts._tiers.debts = counting  # type: ignore[method-assign]
        contexts._clock = Clock()
        with house.postgres.frozen():
            for _ in range(5):
                assert tier_of(await contexts.get("u", "c")) == "redis"

    house.play(scene, postgres_statement_timeout=1)
    assert asked == 1


# --- erasure ---


def test_erasing_a_user(house: House) -> None:
    client = client_of(house)

    async def scene(contexts: Contexts) -> None:
        for user in ("u", "u:", "v"):
            for name in ("old", "recent", "cached"):
                await contexts.save(user, name, HELLO, version=0)
            await contexts.templates.save(user, "t", "x")
            await contexts.templates.save(user, "t", "y")
        await house.archive()
        client.flushall()
        for user in ("u", "u:", "v"):
            await contexts.save(user, "recent", MORE, version=1)
            await contexts.get(user, "cached")
        client.copy("context:u:cached", "context:u:unknown")
        erased = await contexts.delete_user("u")
        assert (erased.redis, erased.warm, erased.archive, erased.templates) == (3, 2, 1, 2)
        for name in ("old", "recent", "cached", "unknown"):
            assert await contexts.get("u", name) is None
        assert await contexts.templates.get("u", "t") is None
        for user in ("u:", "v"):
            assert len(await contexts.list(user)) == 3
            assert tier_of(await contexts.get(user, "recent")) == "redis"
        again = await contexts.delete_user("u")
        assert (again.redis, again.warm, again.archive, again.templates) == (0, 0, 0, 0)
        assert (await contexts.save("u", "recent", [], version=0)).version == 3, "they may come back, as somebody new"
        for table in ("user_contexts_archive", "context_archive_keys", "context_cache_debts"):
            assert await house.sql(f"SELECT FROM {table} WHERE user_id = 'u'") == []

    house.play(scene)


def test_an_erasure_is_not_confirmed_without_redis(house: House) -> None:
    redis = house.redis
    assert redis is not None

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as other:
            await contexts.save("u", "c", HELLO, version=0)
            redis.stop()
            with pytest.raises(NotConfirmed, match=r"^user 'u' is erased in the database, Redis has not confirmed"):
                await contexts.delete_user("u")
            redis.start()
            assert client_of(house).exists(KEY)
            client_of(house).delete("context-trust")
            assert await other.get("u", "c") is None, "it is owed, and paid by whoever comes first"
            assert not client_of(house).exists(KEY)
            assert contexts._cache is not None
            contexts._cache.circuit.succeeded()
            await contexts.delete_user("u")

    run(main())


def test_nothing_of_a_user_escapes_by_moving_meanwhile(house: House) -> None:
    """Conversations go to the archive and back while their user is erased."""

    async def main() -> None:
        async with house.contexts() as contexts, house.contexts() as other:
            for turn in range(10):
                for name in range(6):
                    await contexts.save("u", f"{turn} {name}", HELLO, version=0)
                await house.archive("u")
                client_of(house).flushall()
                await asyncio.gather(
                    *(other.get("u", f"{turn} {name}") for name in range(6)),
                    contexts.delete_user("u"),
                    house.archive("u"),
                )
                assert await contexts.list("u") == []
                for table in ("user_contexts", "user_contexts_archive", "context_archive_keys"):
                    assert await house.sql(f"SELECT FROM {table}") == []
                for name in range(6):
                    assert await other.get("u", f"{turn} {name}") is None

    run(main(), 120)


def test_a_longer_timeout_than_the_client_s_own_is_kept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gave up after its five seconds, whatever redis_timeout was."""
    monkeypatch.setattr("tierd.redis_options._DEADLINE_SECONDS", 0.1)

    async def main() -> None:
        async with house.contexts(redis_timeout=10.0) as contexts:
            await contexts.save("u", "c", HELLO, version=0)
            client_of(house).client_pause(500)
            assert tier_of(await contexts.get("u", "c")) == "redis"

    run(main())
