"""What the library promises, however it is run: with Redis, without, and with one that is away."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.contexts.house import HELLO, MORE, House
from tierd.contexts import Contexts, InvalidContext, NotConfirmed, VersionConflict


def test_what_is_saved_is_there(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        assert await contexts.get("u", "c") is None
        saved = await contexts.save("u", "c", HELLO, version=0)
        assert saved.version == 1
        for _ in range(2):
            found = await contexts.get("u", "c")
            assert found is not None
            assert (found.messages, found.version) == (HELLO, 1)
            assert (found.created_at, found.updated_at) == (saved.created_at, saved.updated_at)
        again = await contexts.save("u", "c", MORE, version=1)
        assert (again.version, again.created_at) == (2, saved.created_at)
        assert again.updated_at > saved.updated_at
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == MORE

    any_house.play(scene)


def test_a_stale_writer_is_told(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        for version in (0, 2, 7):
            for write in (contexts.save, contexts.append):
                with pytest.raises(VersionConflict, match=r"^conversation 'c' of 'u' is at version 1, not ") as caught:
                    await write("u", "c", MORE, version=version)
                assert caught.value.current == 1
        with pytest.raises(VersionConflict):
            await contexts.delete("u", "c", version=2)
        with pytest.raises(VersionConflict, match=r"is at version 0, not 1$"):
            await contexts.save("u", "never", MORE, version=1)
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.messages, found.version) == (HELLO, 1)
        assert (await contexts.save("u", "c", MORE, version=None)).version == 2, "who wants to may overwrite"

    any_house.play(scene)


def test_appending(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        first = await contexts.append("u", "c", HELLO)
        assert first.version == 1
        second = await contexts.append("u", "c", MORE, version=1)
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.messages, found.version, found.created_at) == (HELLO + MORE, 2, first.created_at)
        assert found.updated_at == second.updated_at

    any_house.play(scene)


def test_appending_at_once_loses_nothing(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        async with any_house.contexts() as other:
            await asyncio.gather(
                *(
                    each.append("u", "c", [{"who": number, "n": n}])
                    for n in range(10)
                    for number, each in enumerate((contexts, other))
                )
            )
            for each in (contexts, other):
                found = await each.get("u", "c")
                assert found is not None
                assert found.version == 20
                assert sorted((m["who"], m["n"]) for m in found.messages) == [*itertools.product(range(2), range(10))]

    any_house.play(scene)


def test_only_one_of_many_writers_wins(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        async with any_house.contexts() as other:
            for version in range(5):
                both = [
                    each.save("u", "c", [{"who": who, "version": version}], version=version)
                    for who, each in enumerate((contexts, other) * 2)
                ]
                ends = await asyncio.gather(*both, return_exceptions=True)
                won = [who for who, end in enumerate(ends) if not isinstance(end, BaseException)]
                assert len(won) == 1, ends
                assert all(isinstance(end, VersionConflict) for who, end in enumerate(ends) if who not in won)
                for each in (contexts, other):
                    found = await each.get("u", "c")
                    assert found is not None
                    assert found.messages == [{"who": won[0], "version": version}]

    any_house.play(scene)


def test_what_was_archived_comes_back_whole(any_house: House) -> None:
    columns = "user_id, conversation_id, messages::text, created_at, updated_at, version"

    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "c", HELLO, version=0)
        await contexts.save("u", "c", MORE, version=1)
        before = await any_house.sql(f"SELECT {columns} FROM user_contexts")
        await any_house.archive()
        if any_house.client is not None and contexts._cache is not None and not contexts._cache.circuit.is_open:
            any_house.client.flushall()
        found = await contexts.get("u", "c")
        assert found is not None
        assert (found.messages, found.version, found.tier) == (MORE, 2, "archive")
        assert await any_house.sql(f"SELECT {columns} FROM user_contexts") == before
        assert await any_house.sql("SELECT FROM user_contexts_archive") == []
        assert await any_house.sql("SELECT FROM context_archive_keys") == []

    any_house.play(scene)


@pytest.mark.parametrize("how", ["save", "append", "overwrite"])
def test_writing_to_what_was_archived(any_house: House, how: str) -> None:
    """No write may begin a second conversation, or forget when the first one began."""

    async def scene(contexts: Contexts) -> None:
        first = await contexts.save("u", "c", HELLO, version=0)
        await any_house.archive()
        with pytest.raises(VersionConflict):
            await contexts.save("u", "c", MORE, version=0)
        assert len(await any_house.sql("SELECT FROM user_contexts_archive")) == 1, "a refusal moves nothing"
        if how == "append":
            saved = await contexts.append("u", "c", MORE)
        else:
            saved = await contexts.save("u", "c", MORE, version=1 if how == "save" else None)
        assert (saved.version, saved.created_at) == (2, first.created_at)
        found = await contexts.get("u", "c")
        assert found is not None
        assert found.messages == (HELLO + MORE if how == "append" else MORE)
        for table in ("user_contexts_archive", "context_archive_keys"):
            assert await any_house.sql(f"SELECT FROM {table}") == []

    any_house.play(scene)


def test_what_was_deleted_is_gone(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        await contexts.save("u", "warm", HELLO, version=0)
        await contexts.save("u", "old", HELLO, version=0)
        await any_house.archive()
        await contexts.save("u", "warm", HELLO, version=1)
        for name in ("warm", "old"):
            assert await contexts.delete("u", name) is True
            assert await contexts.get("u", name) is None
            assert await contexts.delete("u", name) is False
        assert await contexts.list("u") == []
        again = await contexts.save("u", "warm", MORE, version=0)
        assert again.version == 3, "versions go on: whoever holds an old one is told"

    any_house.play(scene)


def test_listing(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        for number in range(5):
            await contexts.save("u", f"c{number}", HELLO, version=0)
        await any_house.archive()
        for number in range(5, 8):
            await contexts.save("u", f"c{number}", HELLO, version=0)
        await contexts.save("other", "c", HELLO, version=0)
        every = await contexts.list("u")
        assert [(each.conversation_id, each.tier) for each in every] == [
            *((f"c{number}", "warm") for number in (7, 6, 5)),
            *((f"c{number}", "archive") for number in (4, 3, 2, 1, 0)),
        ]
        pages, after = [], None
        while page := await contexts.list("u", limit=3, after=after):
            pages += page
            after = page[-1]
        assert pages == every
        with pytest.raises(InvalidContext):
            await contexts.list("u", limit=0)

    any_house.play(scene)


IDS = [
    "a", "a:b", "b:c", "a%3Ab", "%",
    "*", "a*", "[a]", "?", "\\", "'", '"', "'; DROP TABLE user_contexts; --", " ", "a ",
    "\u00e9", "e\u0301", "안녕", "🙂", "\n", "x" * 255, "안" * 85, "/", "..", "{a}", "a\x01",
]  # fmt: skip


def test_strange_names_are_kept_apart(any_house: House) -> None:
    names = [(user, name) for user in IDS for name in IDS[:6]] + [("a", name) for name in IDS]
    names = list(dict.fromkeys(names))

    async def scene(contexts: Contexts) -> None:
        for number, (user, name) in enumerate(names):
            await contexts.save(user, name, [{"n": number}], version=0)
        for number, (user, name) in enumerate(names):
            found = await contexts.get(user, name)
            assert found is not None
            assert found.messages == [{"n": number}], (user, name)
        if away:
            with pytest.raises(NotConfirmed):
                await contexts.delete_user("a")
        else:
            assert (await contexts.delete_user("a")).warm == len(IDS)
        for number, (user, name) in enumerate(names):
            found = await contexts.get(user, name)
            assert (found.messages if found else None) == (None if user == "a" else [{"n": number}]), (user, name)

    away = any_house.redis is not None and not any_house.redis.alive
    any_house.play(scene)


@pytest.mark.parametrize("bad", ["", "a\0b", "x" * 256, "안" * 86, "\ud800", None, 7, b"a"])
def test_names_that_cannot_be_are_refused(any_house: House, bad: Any) -> None:
    async def scene(contexts: Contexts) -> None:
        calls = [
            lambda: contexts.get(bad, "c"), lambda: contexts.get("u", bad), lambda: contexts.list(bad),
            lambda: contexts.save(bad, "c", HELLO, version=0), lambda: contexts.save("u", bad, HELLO, version=0),
            lambda: contexts.append("u", bad, HELLO), lambda: contexts.delete("u", bad),
            lambda: contexts.delete_user(bad), lambda: contexts.templates.save(bad, "t", "x"),
            lambda: contexts.templates.get("u", bad),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(InvalidContext) as caught:
                await call()
            assert "\n" not in f"{caught.value}{caught.value.hint}"
            assert caught.value.hint
        assert await any_house.sql("SELECT FROM user_contexts") == []

    any_house.play(scene)


@pytest.mark.parametrize(
    "bad",
    [
        "text", None, {"role": "user"}, ["text"], [1], [{"a": float("nan")}], [{"a": float("inf")}], [{"a": object()}],
        [{1: "a"}], [{"a": {None: 1}}], [{"a": "\0"}], [{"a\0": 1}], [{"a": "\\\0"}], [{"a": "\ud800"}],
        [{"a": b"x"}], [{"a": 10**5000}],
    ],
)  # fmt: skip
def test_messages_that_cannot_be_stored_are_refused(any_house: House, bad: Any) -> None:
    async def scene(contexts: Contexts) -> None:
        for write in (contexts.save, contexts.append):
            with pytest.raises(InvalidContext) as caught:
                await write("u", "c", bad, version=0)
            assert "\n" not in f"{caught.value}{caught.value.hint}"
        assert await contexts.get("u", "c") is None

    any_house.play(scene)


def test_messages_nested_without_end_are_refused(any_house: House) -> None:
    deep: dict[str, Any] = {}
    endless: dict[str, Any] = {}
    endless["self"] = endless
    fine: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for _ in range(63):
        fine = {"a": [fine]} if _ % 2 else {"a": fine}

    async def scene(contexts: Contexts) -> None:
        for bad in (deep, endless):
            with pytest.raises(InvalidContext, match="nested more than 64 deep"):
                await contexts.save("u", "c", [bad], version=0)

    any_house.play(scene)
    while deep:
        deep = deep["a"]  # or its end is as deep as it is


def test_sizes(any_house: House) -> None:
    def sized(size: int) -> list[dict[str, str]]:
        return [{"c": "안" * ((size - 10) // 3) + "x" * ((size - 10) % 3)}]

    async def scene(contexts: Contexts) -> None:
        for version, size in enumerate((100, 1 << 20, 2 << 20)):
            await contexts.save("u", "c", sized(size), version=version)
            for _ in range(2):
                found = await contexts.get("u", "c")
                assert found is not None
                assert found.messages == sized(size)
        with pytest.raises(InvalidContext, match=r"^messages have 2097153 bytes as JSON, 2097152 are allowed$"):
            await contexts.save("u", "c", sized((2 << 20) + 1), version=3)
        for name in ("c", "old"):
            await contexts.save("u", name, sized((2 << 20) - 2), version=None)
        await any_house.archive()
        await contexts.get("u", "c")
        for name in ("c", "old"):
            with pytest.raises(InvalidContext, match=r"are allowed$"):
                await contexts.append("u", name, [{}])
            found = await contexts.get("u", name)
            assert found is not None
            assert found.messages == sized((2 << 20) - 2), "nothing of it was kept"

    any_house.play(scene, max_bytes=2 << 20)


def test_templates(any_house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        templates = contexts.templates
        assert await templates.get("u", "t") is None
        first = await templates.save("u", "t", "Be kind.", version=0)
        second = await templates.save("u", "t", "Be brief. 안녕", version=1)
        assert (first.version, second.version) == (1, 2)
        assert await templates.get("u", "t") == second
        assert await templates.get("u", "t", 1) == first
        assert await templates.get("u", "t", 3) is None
        for version in (0, 1, 3):
            with pytest.raises(VersionConflict):
                await templates.save("u", "t", "x", version=version)
        other = await templates.save("u", "a", "x")
        await templates.save("v", "t", "x")
        assert await templates.list("u") == [other, second]
        assert await templates.list("u", after="a") == [second]
        for bad in ("a\0", "\ud800", "x" * ((1 << 20) + 1)):
            with pytest.raises(InvalidContext):
                await templates.save("u", "t", bad)

    any_house.play(scene)
