"""What the tables hold, and what they refuse whoever asks."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tests.controller.house import connected, migrated
from tests.servers import run
from tierd.controller.events import purge_events
from tierd.postgres import Connection

SEED_TABLES = {
    "model_locations": "model_id tier size_bytes last_access created_at",
    "user_contexts": "id user_id conversation_id messages created_at updated_at",
    "user_contexts_archive": "id user_id conversation_id messages created_at archived_at",
    "generated_outputs": "output_id user_id filename output_type size_bytes hot_storage cold_storage access_count"
    " created_at last_accessed",
}
SEED_INDEXES = {
    "idx_model_last_access": "model_locations (last_access)",
    "idx_model_tier": "model_locations (tier)",
    "idx_user_updated": "user_contexts (user_id, updated_at)",
    "idx_updated_at": "user_contexts (updated_at)",
    "idx_archive_user": "user_contexts_archive (user_id, conversation_id)",
    "idx_output_user": "generated_outputs (user_id, created_at)",
    "idx_output_hot": "generated_outputs (hot_storage, created_at)",
}
STATISTICS_TABLES = {
    "nodes": "node_id boot first_seen last_seen leases_at version registered",
    "node_leases": "node_id model_id",
    "statistics_applied": "node_id boot sequence applied_at",
}
CONTEXT_TABLES = {
    "context_archive_keys": "user_id conversation_id archived_at",
    "context_tombstones": "digest version erased_at",
    "context_cache_debts": "user_id conversation_id id",
    "context_exports": "month state attempt rows size_bytes sha256 verified_at dropped_at",
    "prompt_templates": "user_id name version template created_at",
}
MODEL = "INSERT INTO model_locations (model_id, tier, size_bytes) VALUES ('models/a', 'hot', 7)"
MOVE = "INSERT INTO moves (kind, subject) VALUES ('demote', 'models/a')"
FILE = "INSERT INTO move_files (move_id, path, size_bytes, mtime_ns, inode, mode, sha256, state)"
CONTEXT = "INSERT INTO user_contexts (user_id, conversation_id, messages) VALUES ('u', 'c', '[]')"
ARCHIVED = (
    "INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at) VALUES ('u', 'c', '[]', now())"
)
ARCHIVED_KEY = "INSERT INTO context_archive_keys VALUES ('u', 'c', now())"
NODE = "INSERT INTO nodes (node_id, boot) VALUES ('n', gen_random_uuid())"


async def columns(connection: Connection, table: str) -> list[str]:
    found = await connection.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_name = $1 ORDER BY ordinal_position", table
    )
    return [row["column_name"] for row in found]


def test_tables_have_the_columns_and_indexes_of_the_platform(database: str) -> None:
    async def main() -> None:
        await migrated(database)
        async with connected(database) as connection:
            for table, names in SEED_TABLES.items():
                assert (await columns(connection, table))[: len(names.split())] == names.split()
            for table, names in {**STATISTICS_TABLES, **CONTEXT_TABLES}.items():
                assert await columns(connection, table) == names.split()
            found = await connection.fetch("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'")
            indexes = {row["indexname"]: row["indexdef"].replace(" ON ONLY ", " ON ") for row in found}
            for name, what in SEED_INDEXES.items():
                assert indexes[name].endswith(f"ON public.{what.replace(' (', ' USING btree (')}")

    run(main())


def test_every_time_has_a_time_zone(database: str) -> None:
    async def main() -> list[str]:
        await migrated(database)
        async with connected(database) as connection:
            found = await connection.fetch(
                "SELECT table_name || '.' || column_name AS name, data_type FROM information_schema.columns"
                " WHERE table_schema = 'public' AND (data_type LIKE 'time%' OR data_type = 'date')"
            )
            assert len(found) > 10
            return [row["name"] for row in found if row["data_type"] != "timestamp with time zone"]

    assert run(main()) == []


def test_defaults_promise_nothing_that_was_not_verified(database: str) -> None:
    async def main() -> dict[str, Any]:
        await migrated(database)
        async with connected(database) as connection:
            output = await connection.fetchrow(
                "INSERT INTO generated_outputs (output_id, user_id, filename, output_type)"
                " VALUES (gen_random_uuid(), 'u', 'f', 'png') RETURNING *, created_at = now() AS new"
            )
            assert (output["hot_storage"], output["cold_storage"], output["access_count"]) == (True, False, 0)
            assert output["new"] is True
            return dict(await connection.fetchrow(f"{MODEL} RETURNING version, files, hits, pinned"))

    assert run(main()) == {"version": 0, "files": None, "hits": 0, "pinned": False}


CHECK, UNIQUE = asyncpg.CheckViolationError, asyncpg.UniqueViolationError
NULL, PARENT = asyncpg.NotNullViolationError, asyncpg.ForeignKeyViolationError
LONG = asyncpg.StringDataRightTruncationError


@pytest.mark.parametrize(
    ("before", "statement", "refusal"),
    [
        ("", MODEL.replace("'hot'", "'warm'"), CHECK),
        ("", MODEL.replace("7", "-1"), CHECK),
        ("", MODEL.replace("7", "NULL"), NULL),
        ("", MODEL.replace("models/a", "m" * 256), LONG),
        ("", MODEL.replace("'hot'", "'cold'"), CHECK),  # no copy of it was ever made
        (MODEL, "UPDATE model_locations SET tier = 'cold'", CHECK),
        (MODEL, MODEL, UNIQUE),
        (MODEL, "UPDATE model_locations SET hits = -1", CHECK),
        (MODEL, "UPDATE model_locations SET files = -1", CHECK),
        (CONTEXT, CONTEXT, UNIQUE),
        (ARCHIVED_KEY, ARCHIVED_KEY.replace("now()", "'2020-01-01Z'"), UNIQUE),  # in whatever month
        ("", ARCHIVED.replace("created_at)", "created_at, version)").replace("now())", "now(), 0)"), CHECK),
        ("", CONTEXT.replace("messages)", "messages, version)").replace("'[]')", "'[]', 0)"), CHECK),
        ("", "INSERT INTO context_tombstones VALUES ('short', 1)", CHECK),
        ("", "INSERT INTO context_exports (month, state) VALUES ('2026-1', 'verified')", CHECK),
        ("", "INSERT INTO context_exports (month, state) VALUES ('2026-01', 'lost')", CHECK),
        ("", ARCHIVED.replace("now()", "NULL"), NULL),
        ("", ARCHIVED.replace(", created_at", "").replace(", now()", ""), NULL),
        ("", MOVE.replace("demote", "teleport"), CHECK),
        (MOVE, MOVE, UNIQUE),
        (MOVE, MOVE.replace("demote", "promote"), UNIQUE),  # two moves of one model, whatever kinds
        (f"{MOVE}; UPDATE moves SET state = 'in_grace'", MOVE.replace("demote", "undo"), UNIQUE),
        (MOVE, "UPDATE moves SET state = 'lost'", CHECK),
        (MOVE, "UPDATE moves SET state = 'done'", CHECK),  # and not finished
        (MOVE, "UPDATE moves SET finished_at = now()", CHECK),  # and not in a state that is an end
        (MOVE, "UPDATE moves SET done_bytes = -1", CHECK),
        (MOVE, "UPDATE moves SET id = 5", asyncpg.GeneratedAlwaysError),
        (MOVE, f"{FILE} SELECT id, 'f', 1, 1, 1, 1, NULL, 'copied' FROM moves", CHECK),
        (MOVE, f"{FILE} SELECT id, 'f', 1, 1, 1, 1, 'short', 'copied' FROM moves", CHECK),
        (MOVE, f"{FILE} SELECT id, 'f', -1, 1, 1, 1, NULL, 'planned' FROM moves", CHECK),
        (MOVE, f"{FILE} SELECT id, 'f', 1, 1, 1, 1, NULL, 'gone' FROM moves", CHECK),
        ("", f"{FILE} VALUES (1, 'f', 1, 1, 1, 1, NULL, 'planned')", PARENT),
        ("", "INSERT INTO leader (one, epoch, holder, backend_pid) VALUES (false, 1, 'x', 1)", CHECK),
        ("", "INSERT INTO leader (epoch, holder, backend_pid) VALUES (1, 'x', 1)", UNIQUE),
        ("", "UPDATE leader SET epoch = -1", CHECK),
        (NODE, NODE, UNIQUE),
        ("", "INSERT INTO node_leases VALUES ('n', 'models/a')", PARENT),
        (
            f"{NODE}; INSERT INTO node_leases VALUES ('n', 'models/a')",
            "INSERT INTO node_leases VALUES ('n', 'models/a')",
            UNIQUE,
        ),
        ("", "INSERT INTO statistics_applied VALUES ('n', gen_random_uuid(), -1)", CHECK),
        (
            "INSERT INTO statistics_applied VALUES ('n', '00000000-0000-0000-0000-000000000000', 1)",
            "INSERT INTO statistics_applied VALUES ('n', '00000000-0000-0000-0000-000000000000', 2)",
            UNIQUE,
        ),
    ],
)
def test_refused(shared: str, before: str, statement: str, refusal: type[Exception]) -> None:
    async def main() -> None:
        async with connected(shared) as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(before or "SELECT 1")
            with pytest.raises(refusal):
                await connection.execute(statement)
            await transaction.rollback()

    run(main())


@pytest.fixture(scope="module")
def shared(postgres: Any) -> Any:
    """One database for tests that roll back what they do."""
    dsn = postgres.create_database()
    run(migrated(dsn))
    yield dsn
    postgres.drop_database(dsn)


def test_accepted(shared: str) -> None:
    """What the refusals above must not take with them."""
    script = f"""
        {MODEL}; UPDATE model_locations SET tier = 'cold', version = 1;
        {MOVE}; UPDATE moves SET state = 'abandoned', finished_at = now();
        {MOVE.replace("demote", "undo")};
        {MOVE.replace("models/a", "models/b")};
        {FILE} SELECT min(id), '\\xff00', 1, -1, -1, 33188, sha256('x'), 'verified' FROM moves;
        {CONTEXT}; {ARCHIVED}; {NODE}; INSERT INTO node_leases VALUES ('n', 'models/never-registered');
        INSERT INTO statistics_applied VALUES ('gone', gen_random_uuid(), 9223372036854775807);
        INSERT INTO move_events (move_id, subject, event) SELECT min(id), 'models/a', 'copied' FROM moves;
        INSERT INTO move_events (subject, event) VALUES ('models/a', 'refused');
        DELETE FROM moves; DELETE FROM nodes;
    """

    async def main() -> None:
        async with connected(shared) as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(script)
            assert await connection.fetchval("SELECT count(*) FROM move_events WHERE move_id IS NULL") == 2
            for emptied in ("move_files", "node_leases"):
                assert await connection.fetchval(f"SELECT count(*) FROM {emptied}") == 0
            assert await connection.fetchval("SELECT count(*) FROM statistics_applied") == 1
            await transaction.rollback()

    run(main())


def test_events_are_purged_by_count(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.controller.events._ROWS_AT_ONCE", 30)

    async def main() -> None:
        await migrated(database)
        async with connected(database) as connection:
            assert await purge_events(connection, 10) == 0
            await connection.execute(
                "INSERT INTO move_events (subject, event) SELECT 'm', n::text FROM generate_series(1, 50) n"
            )
            assert [await purge_events(connection, 10) for _ in range(3)] == [30, 10, 0]
            kept = await connection.fetch("SELECT event FROM move_events ORDER BY id")
            assert [row["event"] for row in kept] == [str(number) for number in range(41, 51)]

    run(main())
