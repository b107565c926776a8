"""Migrations: each is applied once and as a whole, by one process, and never over what is not known."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.controller.house import COMMAND_SECONDS, connected, start
from tests.servers import run
from tierd.controller.migrate import LOCKS, MIGRATIONS, Migration, known, migrate, require_current, state
from tierd.errors import DatabaseError
from tierd.postgres import Connection

KNOWN = known()
POLL_SECONDS = 0.05


async def rows(connection: Connection, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await connection.fetch(statement, *values)]


async def applied(connection: Connection) -> list[int]:
    return [version for (version,) in await rows(connection, "SELECT version FROM tierd_migrations ORDER BY version")]


ALL = [migration.version for migration in KNOWN]


def test_a_new_database_is_brought_up_to_date_once(database: str) -> None:
    async def main() -> None:
        async with connected(database) as connection:
            assert (await state(connection, KNOWN)).pending == KNOWN
            ledger = await connection.fetchval("SELECT to_regclass('tierd_migrations')")
            assert ledger is None, "looking changes nothing"
            with pytest.raises(DatabaseError, match=r"^the database lacks migration 0001_tables$"):
                await require_current(connection)
            assert await migrate(connection, KNOWN) == KNOWN
            assert await applied(connection) == ALL
            first = await rows(connection, "SELECT * FROM tierd_migrations ORDER BY version")
            assert await migrate(connection, KNOWN) == ()
            assert await rows(connection, "SELECT * FROM tierd_migrations ORDER BY version") == first
            await require_current(connection)
            assert (await state(connection, KNOWN)).pending == ()

    run(main())


def test_several_processes_at_once(database: str) -> None:
    """All of them wait for the same lock before one goes on, so that they do run at once."""
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1::int::oid AND NOT granted"

    async def main() -> list[tuple[str, str, int]]:
        async with connected(database) as connection:
            await connection.execute("SELECT pg_advisory_lock($1, 1)", LOCKS)
            processes = [start("db", "migrate", TIERDCTL_POSTGRES=database) for _ in range(3)]
            while await connection.fetchval(waiting, LOCKS) < len(processes):
                assert all(process.poll() is None for process in processes), "none goes on without the lock"
                await asyncio.sleep(POLL_SECONDS)
            await connection.execute("SELECT pg_advisory_unlock($1, 1)", LOCKS)
            done = [await asyncio.to_thread(process.communicate, None, COMMAND_SECONDS) for process in processes]
            assert await applied(connection) == ALL
            return [(out, err, process.returncode) for (out, err), process in zip(done, processes, strict=True)]

    ends = sorted(run(main()))
    one = "".join(f"applied {migration}\n" for migration in KNOWN)
    assert ends == [(one, "", 0), ("nothing to do\n", "", 0), ("nothing to do\n", "", 0)]


def test_an_applied_file_that_changed_is_refused(database: str) -> None:
    changed = (KNOWN[0], KNOWN[1]._replace(sql=KNOWN[1].sql + "\n-- a comment"), *KNOWN[2:])
    renamed = (KNOWN[0]._replace(name="other"), *KNOWN[1:])

    async def main() -> None:
        async with connected(database) as connection:
            await migrate(connection, KNOWN[:2])
            for others, which in ((changed, KNOWN[1]), (renamed, KNOWN[0])):
                for act in (state, migrate):
                    with pytest.raises(DatabaseError, match=f"^migration {which} of the database is not the "):
                        await act(connection, others)
            assert await applied(connection) == [1, 2]
            assert await migrate(connection, KNOWN) == KNOWN[2:], "the lock was given back"

    run(main())


def test_a_newer_database_is_refused(database: str) -> None:
    newer = (*KNOWN, Migration(len(KNOWN) + 1, "later", "CREATE TABLE later ()"))

    async def main() -> None:
        async with connected(database) as connection:
            await migrate(connection, newer)
            for act in (state, migrate):
                with pytest.raises(DatabaseError, match=f"^the database has migration {newer[-1]}, ") as caught:
                    await act(connection, KNOWN)
                assert "newer tierd" in caught.value.hint

    run(main())


UNWRITABLE = f"ALTER TABLE tierd_migrations ADD CHECK (version <= {len(KNOWN)})"
"""Lets a file pass, and fails its row in the ledger."""


@pytest.mark.parametrize("fault", ["SELECT 1 / 0", "CREATE TABLE moves ()", "nonsense", UNWRITABLE])
def test_a_migration_that_fails_leaves_nothing_of_itself(database: str, fault: str) -> None:
    bad = Migration(len(KNOWN) + 1, "bad", f"CREATE TABLE half (); {fault}; CREATE TABLE rest ()")

    async def main() -> None:
        async with connected(database) as connection:
            with pytest.raises(DatabaseError, match=f"^migration {bad} failed: ") as caught:
                await migrate(connection, (*KNOWN, bad))
            assert "\n" not in str(caught.value)
            assert await applied(connection) == ALL, "those before it stay"
            assert await connection.fetchval("SELECT count(*) FROM pg_class WHERE relname IN ('half', 'rest')") == 0
            assert not connection.is_in_transaction()
            assert await migrate(connection, KNOWN) == ()

    run(main())


def test_tables_of_something_else_are_left_alone(database: str) -> None:
    async def main() -> None:
        async with connected(database) as connection:
            await connection.execute("CREATE TABLE generated_outputs AS SELECT 'mine' AS whose")
            with pytest.raises(DatabaseError, match=r'relation "generated_outputs" already exists$'):
                await migrate(connection, KNOWN)
            assert await rows(connection, "SELECT * FROM generated_outputs") == [("mine",)]
            assert await connection.fetchval("SELECT to_regclass('model_locations')") is None

    run(main())


def test_one_that_waits_too_long_says_so(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.controller.migrate._LOCK_SECONDS", 1)

    async def main() -> None:
        async with connected(database) as holder, connected(database) as connection:
            await holder.execute("SELECT pg_advisory_lock($1, 1)", LOCKS)
            with pytest.raises(DatabaseError, match=r"^another process has been migrating this database for 1 s$"):
                await migrate(connection, KNOWN)

    run(main())


def test_an_upgrade_keeps_the_rows(database: str) -> None:
    insert = {
        "model_locations": "(model_id, tier, size_bytes) VALUES ('models/a', 'hot', 7)",
        "user_contexts": "(user_id, conversation_id, messages) VALUES ('u', 'c', '[1]')",
        "user_contexts_archive": "(user_id, conversation_id, messages, created_at) VALUES ('u', 'c', '[1]', 'epoch')",
        "generated_outputs": "(output_id, user_id, filename, output_type) VALUES (gen_random_uuid(), 'u', 'f', 'png')",
    }

    async def main() -> None:
        async with connected(database) as connection:
            await migrate(connection, KNOWN[:1])
            before = {}
            for table, values in insert.items():
                await connection.execute(f"INSERT INTO {table} {values}")
                before[table] = dict(await connection.fetchrow(f"SELECT * FROM {table}"))
            assert await migrate(connection, KNOWN) == KNOWN[1:]
            for table, row in before.items():
                after = dict(await connection.fetchrow(f"SELECT * FROM {table}"))
                assert after.items() >= row.items(), table

    run(main())


# --- the files ---


def test_files_are_numbered_without_gaps(tmp_path: Path) -> None:
    for name in ("0001_a.sql", "0002_b.sql"):
        (tmp_path / name).write_text("SELECT 1", encoding="utf-8")
    assert [str(migration) for migration in known(tmp_path)] == ["0001_a", "0002_b"]
    for name in ("0004_d.sql", "0002_c.sql", "3_c.sql", "0003-c.sql"):
        wrong = tmp_path / name
        wrong.write_text("SELECT 1", encoding="utf-8")
        with pytest.raises(DatabaseError, match=r"is not migration 000[23]$"):
            known(tmp_path)
        wrong.unlink()


def test_files_leave_the_transaction_alone() -> None:
    assert len(KNOWN) == len(list(MIGRATIONS.glob("*.sql"))) >= 3
    for migration in KNOWN:
        code = re.sub("--.*", "", migration.sql)
        assert not re.search(r"\b(BEGIN|COMMIT|ROLLBACK|SAVEPOINT|CONCURRENTLY|IF NOT EXISTS)\b", code), migration


def test_the_ledger_is_the_runners_alone(database: str) -> None:
    async def main() -> None:
        async with connected(database) as connection:
            await migrate(connection, KNOWN)
            with pytest.raises(asyncpg.UniqueViolationError):
                await connection.execute("INSERT INTO tierd_migrations VALUES (1, 'again', 'x')")

    run(main())
