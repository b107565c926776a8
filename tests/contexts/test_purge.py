"""Months that are over are exported, verified, dropped, and can be brought back; nothing is dropped that was not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from tests.contexts.house import House
from tests.controller.controllers import until
from tests.objects.servers import Beneath
from tests.servers import run
from tierd.contexts import Contexts
from tierd.controller.contexts import files
from tierd.controller.contexts.archive import archive_old_contexts
from tierd.controller.contexts.months import months, span
from tierd.controller.contexts.purge import PurgeRefused, PurgeRules, Step, purge_expired_contexts
from tierd.controller.contexts.restore import Restored, later_exports, restore_contexts
from tierd.controller.leader import NotLeaderError
from tierd.errors import TierdError, UsageError
from tierd.metrics import ContextMetrics
from tierd.objects.store import ObjectStore

BUCKET = "context-archive"
COLUMNS = "user_id, conversation_id, messages::text, created_at, updated_at, version"
NOW = PurgeRules(grace_days=0, share_max=1.0, months_max=12)
"""Drops at the second run what the first one exported."""
FILL = """
WITH keys AS (
    INSERT INTO context_archive_keys SELECT 'u' || n % 5, 'c' || n || to_char($1::timestamptz, '-YYYYMM'), $1
    FROM generate_series(1, $2::int) n RETURNING *
)
INSERT INTO user_contexts_archive
    (user_id, conversation_id, messages, created_at, updated_at, version, archived_at)
SELECT user_id, conversation_id, jsonb_build_array(jsonb_build_object('content', E'안녕\\n"\\u2028')),
    '2020-02-29T12:00:00.000001Z', '2020-03-01Z', 7, archived_at FROM keys
"""


@pytest.fixture(params=["directory", "rclone"])
def stored(request: pytest.FixtureRequest, new_store: Callable[..., tuple[ObjectStore, Beneath]]) -> Any:
    """An object store of each kind, and what lies beneath."""
    return new_store(request.param)


@pytest.fixture
def directory(new_store: Callable[..., tuple[ObjectStore, Beneath]]) -> tuple[ObjectStore, Beneath]:
    """A directory for one."""
    return new_store("directory")


async def fill(house: House, ages: dict[int, int]) -> list[str]:
    """Months so many days ago, with so many conversations each; their names. The archive has only these."""
    names = []
    (now,) = (await house.sql("SELECT now()"))[0]
    async with house.database() as database, database.connection() as connection:
        await connection.execute(f"DROP TABLE {(await months(connection))[0].table}")
        for days, count in ages.items():
            at = (now - timedelta(days=days)).replace(day=15, hour=0, minute=0, second=0, microsecond=0)
            await connection.fetch("SELECT make_context_month($1)", at)
            await connection.execute(FILL, at, count)
            names.append(f"{at:%Y-%m}")
    return names


async def rows(house: House) -> list[tuple[Any, ...]]:
    return sorted(await house.sql(f"SELECT {COLUMNS} FROM user_contexts_archive"))


async def purge(house: House, store: ObjectStore | None, rules: PurgeRules = NOW, **more: Any) -> list[Step]:
    async with house.database() as database:
        return await purge_expired_contexts(database, store, rules, bucket=BUCKET, **more)


async def restore(house: House, store: ObjectStore, month: str, **more: Any) -> Restored:
    async with house.database() as database:
        return await restore_contexts(database, store, month, bucket=BUCKET, **more)


def test_there_and_back(house: House, stored: tuple[ObjectStore, Beneath]) -> None:
    store, beneath = stored
    registry = CollectorRegistry()

    async def main() -> None:
        old, _ = await fill(house, {500: 30, 30: 5})
        before = await rows(house)
        told: list[Step] = []
        steps = await purge(house, store, progress=told.append)
        assert [step.action for step in steps] == ["export", "keep"]
        assert told == steps
        assert await rows(house) == before, "exported and not dropped"
        metrics = ContextMetrics(registry)
        assert [step.action for step in await purge(house, store, metrics=metrics)] == ["drop", "keep"]
        assert len(await rows(house)) == 5
        assert await house.sql("SELECT count(*) FROM context_archive_keys") == [(5,)]
        assert [step.action for step in await purge(house, store)] == ["keep"]
        assert {key for key in beneath.keys(BUCKET) if not key.startswith(".tierd/")} == {
            f"contexts/{old}/1.jsonl.gz", f"contexts/{old}/1.manifest.json"
        }  # fmt: skip
        assert await restore(house, store, old, metrics=metrics) == Restored(30, 30, 0, 0)
        assert await rows(house) == before, "as it was, created_at and all"
        assert await restore(house, store, old) == Restored(30, 0, 0, 30), "once"
        assert await rows(house) == before
        assert {step.action for step in await purge(house, store)} == {"keep"}, "retention began anew"

    run(main(), 120)
    for move in ("purged", "restored"):
        assert registry.get_sample_value("tierd_context_moves_total", {"move": move}) == 30


def test_what_was_deleted_or_is_newer_is_not_restored(house: House, directory: tuple[ObjectStore, Beneath]) -> None:
    store, _ = directory

    async def scene(contexts: Contexts) -> None:
        (old,) = await fill(house, {500: 20})
        await purge(house, store)
        await contexts.delete_user("u1")
        gone = (await contexts.list("u2"))[0].conversation_id
        await contexts.delete("u2", gone)
        read = (await contexts.list("u3"))[0].conversation_id
        await contexts.append("u3", read, [{"new": 1}])
        purged = (await contexts.list("u4"))[0].conversation_id
        await purge(house, store)
        assert await contexts.delete("u4", purged) is False, "an export has it, but that is no tier"
        back = (await contexts.list("u3"))[0]
        assert (back.conversation_id, back.version) == (read, 8)
        again = await contexts.save("u2", gone, [{"begun": "anew"}], version=0)
        assert again.version == 8
        done = await restore(house, store, old)
        assert done == Restored(20, 13, 6, 1)
        assert await contexts.list("u1") == []
        found = await contexts.get("u2", gone)
        assert found is not None
        assert found.messages == [{"begun": "anew"}]
        found = await contexts.get("u3", read)
        assert found is not None
        assert found.messages[-1] == {"new": 1}
        assert len(await contexts.list("u3")) == 4
        assert (await contexts.save("u1", "new", [], version=0)).version == 8

    house.play(scene)


@pytest.mark.parametrize("order", ["older first", "latest first"])
@pytest.mark.parametrize("meanwhile", ["nothing", "read", "written"])
def test_a_conversation_of_two_exports(
    house: House, directory: tuple[ObjectStore, Beneath], order: str, meanwhile: str
) -> None:
    """Exported, brought back before the drop, and archived again. The later state wins, whichever comes first."""
    store, _ = directory
    rules = replace(NOW, retention_days=-60)

    async def main() -> None:
        async with house.contexts() as contexts:
            (old,) = await fill(house, {500: 1})
            await purge(house, store)
            (listed,) = await contexts.list("u1")
            name = listed.conversation_id
            for number in range(2):
                await contexts.append("u1", name, [{"new": number}])
            await purge(house, store)
            await house.sql("UPDATE user_contexts SET updated_at = updated_at - interval '40 days'")
            async with house.database() as database:
                await archive_old_contexts(database)
            for _ in range(2):
                late = [step.month for step in await purge(house, store, rules) if step.rows or step.action == "drop"]
            assert await rows(house) == []
            flushed(house)
            async with house.database() as database:
                assert late[0] in await later_exports(database, old)
            months = [old, late[0]] if order == "older first" else [late[0], old]
            await restore(house, store, months[0])
            if meanwhile == "read":
                await contexts.get("u1", name)
            elif meanwhile == "written":
                await contexts.append("u1", name, [{"written": 1}])
            second = await restore(house, store, months[1])
            replaced = order == "older first" and meanwhile != "written"
            assert second == Restored(1, 0, 0, int(not replaced), int(replaced))
            assert await restore(house, store, months[1]) == Restored(1, 0, 0, 1)
            found = await contexts.get("u1", name)
            assert found is not None
            expected = [] if order == "older first" and meanwhile == "written" else [{"new": 0}, {"new": 1}]
            assert found.messages[1:] == expected + ([{"written": 1}] if meanwhile == "written" else [])
            assert found.created_at == listed.created_at
            count = "SELECT (SELECT count(*) FROM user_contexts_archive) + (SELECT count(*) FROM user_contexts)"
            assert await house.sql(count) == [(1,)]

    run(main(), 120)


def flushed(house: House) -> None:
    """As a year later."""
    assert house.client is not None
    house.client.flushall()


def test_dry_runs_and_graces(house: House, directory: tuple[ObjectStore, Beneath]) -> None:
    store, _ = directory

    async def main() -> None:
        old, _ = await fill(house, {500: 3, 30: 3})
        for _ in range(2):
            steps = await purge(house, store, dry_run=True)
            assert (steps[0].month, steps[0].action) == (old, "export")
        assert await house.sql("SELECT FROM context_exports") == []
        rules = replace(NOW, grace_days=7)
        await purge(house, store, rules)
        for _ in range(2):
            assert [step.action for step in await purge(house, store, rules)] == ["wait", "keep"]
        await house.sql("UPDATE context_exports SET verified_at = now() - interval '7 days 1 minute'")
        assert [step.action for step in await purge(house, store, rules, dry_run=True)] == ["drop", "keep"]
        assert len(await rows(house)) == 6
        await purge(house, store, rules)
        assert len(await rows(house)) == 3

    run(main())


def test_no_more_than_the_caps(house: House) -> None:
    async def main() -> None:
        names = await fill(house, {700: 3, 600: 3, 500: 3, 30: 3})
        rules = PurgeRules(export=False)
        steps = await purge(house, None, rules)
        assert [step.action for step in steps] == ["drop", "refuse", "refuse", "keep"]
        assert steps[1].reason == "1 months in a run are the most"
        steps = await purge(house, None, replace(rules, months_max=5, share_max=0.5))
        assert [step.action for step in steps] == ["drop", "refuse", "keep"]
        assert steps[1].reason == "67% of the archive in a run is more than 50%"
        assert await house.sql("SELECT month, state FROM context_exports ORDER BY 1") == [
            (name, "done") for name in names[:2]
        ]
        assert len(await rows(house)) == 6

    run(main())


def test_without_a_store_nothing_is_dropped(house: House) -> None:
    async def main() -> None:
        await fill(house, {500: 3})
        with pytest.raises(PurgeRefused, match=r"^no object store to export to$"):
            await purge(house, None)
        assert len(await rows(house)) == 3

    run(main())


@pytest.mark.parametrize("damage", ["lines changed", "lines gone", "manifest gone", "manifest changed", "seal broken"])
def test_an_export_that_is_not_as_it_was_verified(
    house: House, directory: tuple[ObjectStore, Beneath], damage: str
) -> None:
    store, beneath = directory

    async def main() -> None:
        (old,) = await fill(house, {500: 12})
        await purge(house, store)
        lines, manifest = files.lines_key(old, 1), files.manifest_key(old, 1)
        content = beneath.get(BUCKET, lines)
        if damage == "lines changed":
            beneath.put(BUCKET, lines, content + b"x")
        elif damage == "lines gone":
            beneath.remove(BUCKET, lines)
        elif damage == "manifest gone":
            beneath.remove(BUCKET, manifest)
        elif damage == "manifest changed":
            beneath.put(BUCKET, manifest, beneath.get(BUCKET, manifest).replace(b'"rows": 12', b'"rows": 13'))
        else:
            await house.sql(f"ALTER TABLE {table_of(old)} DROP CONSTRAINT tierd_exported")
            await write_into(house, old)
        with pytest.raises(TierdError) as caught:
            await purge(house, store)
        assert caught.value.hint
        assert len(await rows(house)) >= 12, "nothing is dropped"
        assert (await house.sql("SELECT state FROM context_exports")) == [("verified",)]
        if damage == "seal broken":
            await house.sql("UPDATE context_exports SET state = 'exporting'")  # as the hint says
            for expected in ("export", "drop"):
                assert [step.action for step in await purge(house, store)] == [expected]
            assert (await restore(house, store, old)).restored == 13
        else:
            before = await rows(house)
            with pytest.raises((TierdError, UsageError)):
                await restore(house, store, old)
            assert await rows(house) == before

    run(main())


def table_of(month: str) -> str:
    return f"user_contexts_archive_{month.replace('-', 'm')}"


async def write_into(house: House, month: str) -> None:
    """Somebody whose clock, or whose SQL, is wrong."""
    await house.sql(
        "INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at, archived_at)"
        " VALUES ('late', 'c', '[]', now(), $1)",
        span(month)[0],
    )


def test_what_is_exported_takes_no_more_rows_and_lets_them_go(
    house: House, directory: tuple[ObjectStore, Beneath]
) -> None:
    """So what was exported is all there is at the drop, and nobody need count."""
    store, _ = directory

    async def scene(contexts: Contexts) -> None:
        (old,) = await fill(house, {500: 12})
        await write_into(house, old)
        assert [step.action for step in await purge(house, store)] == ["export"]
        with pytest.raises(asyncpg.CheckViolationError):
            await write_into(house, old)
        name = (await contexts.list("u1"))[0].conversation_id
        assert await contexts.get("u1", name) is not None, "promoted"
        assert await contexts.delete("u2", (await contexts.list("u2"))[0].conversation_id)
        assert (await contexts.delete_user("u3")).archive > 0
        assert [step.action for step in await purge(house, store)] == ["drop"]
        assert (await house.sql("SELECT rows FROM context_exports")) == [(13,)]
        assert (await contexts.list("u1"))[0].tier == "warm"

    house.play(scene)


def test_who_is_writing_into_a_month_is_waited_for_before_it_is_read(
    house: House, directory: tuple[ObjectStore, Beneath]
) -> None:
    store, _ = directory

    async def main() -> None:
        (old,) = await fill(house, {500: 3})
        async with house.database() as database:
            async with database.transaction() as writer:
                await writer.execute(
                    "INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at, archived_at)"
                    " VALUES ('slow', 'c', '[]', now(), $1)",
                    span(old)[0],
                )
                task = asyncio.create_task(purge(house, store))
                await waiting_for_a_lock(house)
            await task
        assert await house.sql("SELECT rows FROM context_exports") == [(4,)]

    run(main())


async def waiting_for_a_lock(house: House) -> None:
    """Until somebody does."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    await asyncio.to_thread(until, lambda: run(house.sql(query))[0][0])


def test_a_drop_leaves_no_bloat(house: House) -> None:
    """The other months are not touched; the keys' dead rows are what vacuum needs one round for."""

    async def main() -> None:
        old, young = await fill(house, {500: 6000, 30: 500})
        await house.sql("CREATE EXTENSION pgstattuple")
        await purge(house, None, replace(NOW, export=False))
        tables = "SELECT relname FROM pg_class WHERE relname LIKE 'user_contexts_archive_2%' AND relkind = 'r'"
        assert [name for (name,) in await house.sql(tables)] == [table_of(young)]
        assert await house.sql("SELECT dead_tuple_count FROM pgstattuple($1::text::regclass)", table_of(young)) == [
            (0,)
        ]
        assert await house.sql("SELECT to_regclass($1::text) IS NULL", table_of(old)) == [(True,)]
        size = "SELECT pg_relation_size('context_archive_keys')"
        before = await house.sql(size)
        options = "SELECT 'autovacuum_vacuum_scale_factor=0.05' = ANY (reloptions) FROM pg_class"
        assert await house.sql(f"{options} WHERE relname = 'context_archive_keys'") == [(True,)], "soon, by itself"
        await house.sql("VACUUM context_archive_keys")
        assert await house.sql("SELECT dead_tuple_count FROM pgstattuple('context_archive_keys')") == [(0,)]
        await house.sql(
            "INSERT INTO context_archive_keys SELECT 'u' || n % 5, 'new' || n, now() FROM generate_series(1, 5500) n"
        )
        assert await house.sql(size) == before, "the next month's keys fill the room of the old one's"

    run(main())


def test_a_byte_that_turned(house: House, directory: tuple[ObjectStore, Beneath]) -> None:
    """Of the same length, so that only reading it shows: a restore reads, and brings nothing of it."""
    store, beneath = directory

    async def main() -> None:
        (old,) = await fill(house, {500: 12})
        await purge(house, store)
        content = bytearray(beneath.get(BUCKET, files.lines_key(old, 1)))
        content[len(content) // 2] ^= 1
        beneath.put(BUCKET, files.lines_key(old, 1), bytes(content))
        await house.sql("DELETE FROM user_contexts_archive")
        with pytest.raises(TierdError, match="damaged"):
            await restore(house, store, old)
        assert await rows(house) == []

    run(main())


class Killed(BaseException):
    """As if the process had gone."""


@pytest.mark.parametrize("at", ["writing", "storing", "verifying", "dropping", "sweeping", "after"])
def test_killed_anywhere(
    house: House, directory: tuple[ObjectStore, Beneath], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierd.controller.contexts import purge as context_purge

    store, _ = directory

    def kill(*_: Any, **__: Any) -> Any:
        raise Killed

    targets: dict[str, tuple[Any, str]] = {
        "writing": (files, "write_lines"), "storing": (store, "put_file"), "verifying": (files, "pages"),
        "dropping": (context_purge, "drop_month"), "sweeping": (context_purge, "sweep_keys"),
        "after": (context_purge, "span"),
    }  # fmt: skip

    async def main() -> None:
        (old,) = await fill(house, {500: 12})
        before = await rows(house)
        if at in ("dropping", "sweeping", "after"):
            await purge(house, store)
        with monkeypatch.context() as patch:
            patch.setattr(*targets[at], kill)
            with pytest.raises(Killed):
                await purge(house, store)
        if at not in ("sweeping", "after"):
            assert await rows(house) == before
        for _ in range(3):
            await purge(house, store)
        assert await rows(house) == []
        assert await house.sql("SELECT state FROM context_exports") == [("done",)]
        assert await house.sql("SELECT FROM context_archive_keys") == []
        assert (await restore(house, store, old)).restored == 12
        assert await rows(house) == before

    run(main())


@pytest.mark.parametrize("fault", ["a line is missing", "a byte turned"])
def test_an_export_that_cannot_be_read_back_is_none(
    house: House, directory: tuple[ObjectStore, Beneath], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, beneath = directory
    pages, put_file = files.pages, store.put_file

    def fewer(path: Path, count: int) -> Any:
        return ([*page[:-1]] for page in pages(path, count))

    def damaging(bucket: str, key: str, *rest: Any) -> Any:
        done = put_file(bucket, key, *rest)
        content = bytearray(beneath.get(bucket, key))
        content[len(content) // 2] ^= 1
        beneath.put(bucket, key, bytes(content))
        return done

    async def main() -> None:
        (old,) = await fill(house, {500: 12})
        with monkeypatch.context() as patch:
            if fault == "a line is missing":
                patch.setattr(files, "pages", fewer)
            else:
                patch.setattr(store, "put_file", damaging)
            with pytest.raises(TierdError):
                await purge(house, store)
        assert await house.sql("SELECT state FROM context_exports") == [("exporting",)]
        assert files.latest_attempt(store, BUCKET, old) is None, "it has no manifest"
        for action in ("export", "drop"):
            assert [step.action for step in await purge(house, store)] == [action]
        assert files.latest_attempt(store, BUCKET, old) == 2
        assert (await restore(house, store, old)).restored == 12

    run(main())


def test_who_no_longer_leads_drops_nothing(house: House, directory: tuple[ObjectStore, Beneath]) -> None:
    store, _ = directory

    async def main() -> None:
        await fill(house, {500: 3})
        with pytest.raises(NotLeaderError):
            await purge(house, store, epoch=7)
        await purge(house, store)
        with pytest.raises(NotLeaderError):
            await purge(house, store, epoch=7)
        assert len(await rows(house)) == 3

    run(main())


def test_a_month_that_is_read_all_the_time(house: House) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def main() -> None:
        await fill(house, {500: 3})
        async with house.database() as database, database.transaction() as reader:
            await reader.fetch("SELECT FROM user_contexts_archive")
            with pytest.raises(PurgeRefused, match=r"is read without end$"):
                await purge(house, None, replace(NOW, export=False), pause=pause)
        assert len(pauses) == 4
        assert len(await rows(house)) == 3

    run(main())


def test_a_key_whose_month_is_gone_is_no_conversation(house: House) -> None:
    """As between the drop and the sweep."""

    async def scene(contexts: Contexts) -> None:
        await fill(house, {500: 2})
        (name,) = [each.conversation_id for each in await contexts.list("u1")]
        async with house.database() as database, database.connection() as connection:
            await connection.execute(f"DROP TABLE {(await months(connection))[0].table}")
        assert await contexts.get("u1", name) is None
        assert await contexts.list("u1") == []
        assert (await contexts.save("u1", name, [], version=0)).version >= 1
        await house.sql("UPDATE user_contexts SET updated_at = now() - interval '31 days'")
        async with house.database() as database:
            assert (await archive_old_contexts(database)).moved == 1
        found = await contexts.get("u1", name)
        assert found is not None

    house.play(scene)


@pytest.mark.parametrize("month", ["2026-13", "", "2026", "../..", "2026-1-1"])
def test_what_is_no_month_is_refused(house: House, directory: tuple[ObjectStore, Beneath], month: str) -> None:
    with pytest.raises(UsageError, match=r"is no month$"):
        run(restore(house, directory[0], month))


def test_what_was_never_exported(house: House, directory: tuple[ObjectStore, Beneath]) -> None:
    directory[0].ensure_bucket(BUCKET)
    with pytest.raises(UsageError, match=r"^2020-01 was never exported"):
        run(restore(house, directory[0], "2020-01"))
