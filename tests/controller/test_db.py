"""Connections: what they are like, and what is said when the database is away, refuses or stalls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.controller.house import connected, settings_for
from tests.servers import PostgresServer, free_port, run
from tierd import postgres as db
from tierd.errors import DatabaseError

DirectoryFactory = Callable[[str], Path]


async def ask(dsn: str, statement: str = "SELECT 1", **more: Any) -> Any:
    async with connected(dsn, **more) as connection:
        return await connection.fetchval(statement)


def refusal(dsn: str, statement: str = "SELECT 1", **more: Any) -> DatabaseError:
    """The one error that this gives: one line and a hint, without the password."""
    with pytest.raises(DatabaseError) as caught:
        run(ask(dsn, statement, **more))
    error = caught.value
    assert "\n" not in f"{error}{error.hint}"
    assert error.hint
    password = settings_for(dsn).database().password
    assert password is not None
    assert password.get_secret_value() not in f"{error!r}{error.hint}{error.__cause__!r}"
    return error


def where(dsn: str) -> str:
    return str(settings_for(dsn).database())


# --- in ---


def test_sessions_have_the_database_clock_in_utc_and_their_deadlines(database: str) -> None:
    show = "SELECT current_setting('TimeZone') || ' ' || current_setting('statement_timeout')"
    assert run(ask(database, show, postgres_statement_timeout=7.5)) == "UTC 7500ms"
    assert run(ask(database, "SELECT current_setting('application_name')")) == "tierd"
    assert run(ask(database, "SELECT current_setting('tcp_keepalives_idle')")) == "20", "hours by default"


def test_a_password_from_a_file(postgres: PostgresServer, database: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(postgres.password, encoding="utf-8")
    without = database.replace(f":{postgres.password}", "")
    assert run(ask(without, postgres_password_file=str(file))) == 1


def test_over_a_socket(postgres: PostgresServer, database: str) -> None:
    name = database.rpartition("/")[2]
    url = f"postgresql://{postgres.user}:{postgres.password}@/{name}?host={postgres.directory}"
    assert run(ask(url, postgres_port=postgres.port)) == 1


# --- away ---


def test_nobody_listens() -> None:
    port = free_port()
    error = refusal(f"postgresql://ann:secret@127.0.0.1:{port}/books")
    assert str(error) == f"cannot connect to database 127.0.0.1:{port}/books: Connection refused"


def test_a_host_that_is_not_there() -> None:
    error = refusal("postgresql://ann:secret@nowhere.invalid/books")
    assert str(error).startswith("cannot connect to database nowhere.invalid:5432/books: ")


def test_a_wrong_password(postgres: PostgresServer, database: str) -> None:
    error = refusal(database.replace(postgres.password, "wrong-one"))
    assert str(error).startswith(f"cannot connect to database {where(database)}: password authentication failed")
    assert "password" in error.hint or "user" in error.hint


def test_a_missing_database(postgres: PostgresServer, database: str) -> None:
    error = refusal(postgres.dsn("missing"))
    assert str(error).endswith('database "missing" does not exist')
    assert error.hint == "create the database, or check its name"


def test_too_many_connections(new_directory: DirectoryFactory) -> None:
    few = {"max_connections": "4", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    with PostgresServer(new_directory("postgres"), options=few) as server:

        async def crowd() -> None:
            settings = settings_for(server.dsn(), postgres_connections=10)
            async with db.Database(settings) as database, asyncio.TaskGroup() as tasks:
                for _ in range(10):
                    tasks.create_task(hold(database))

        async def hold(database: db.Database) -> None:
            async with database.connection() as connection:
                await connection.execute("SELECT pg_sleep(60)")

        with pytest.raises(ExceptionGroup) as caught:
            run(crowd())
    error = caught.value.exceptions[0]
    assert isinstance(error, DatabaseError)
    assert error.hint == "lower postgres_connections, or raise the server's max_connections"


def test_a_server_that_does_not_answer(postgres: PostgresServer, database: str) -> None:
    with postgres.frozen():
        error = refusal(database, postgres_connect_timeout=0.3)
    assert str(error) == f"cannot connect to database {where(database)}: no answer in time"


def test_a_statement_that_takes_too_long(database: str) -> None:
    error = refusal(database, "SELECT pg_sleep(60)", postgres_statement_timeout=0.2)
    assert str(error).startswith(f"lost database {where(database)}: canceling statement due to statement timeout")


def test_a_server_that_goes_silent_during_a_statement(
    postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "_ANSWER_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(db, "_CLOSE_SECONDS", 0.1)

    async def main() -> None:
        async with connected(database, postgres_statement_timeout=0.2) as connection:
            with postgres.frozen():
                await connection.execute("SELECT 1")

    with pytest.raises(DatabaseError, match=r"no answer in time$"):
        run(main(), seconds=20)


@pytest.mark.parametrize("within", ["connection", "transaction"])
def test_a_task_that_is_cancelled_while_the_server_is_silent_ends(
    postgres: PostgresServer, database: str, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving a connection back, and rolling back, fail then: that must not hide that it was cancelled."""
    monkeypatch.setattr(db, "_ANSWER_GRACE_SECONDS", 0.2)

    async def work(pool: db.Database, begun: asyncio.Event) -> None:
        while True:
            try:
                async with getattr(pool, within)() as connection:
                    await connection.execute("SELECT 1")
                    begun.set()
                    await connection.execute("SELECT pg_sleep(60)")
            except (DatabaseError, OSError):
                begun.set()

    async def main() -> None:
        async with db.Database(settings_for(database, postgres_statement_timeout=2)) as pool:
            begun = asyncio.Event()
            task = asyncio.create_task(work(pool, begun))
            await begun.wait()
            with postgres.frozen():
                task.cancel()
                await asyncio.wait([task], timeout=20)
            assert task.cancelled()

    run(main())


def test_the_pool_connects_again_after_an_outage(postgres: PostgresServer, database: str) -> None:
    lost = f"^lost database {where(database)}: "

    async def lose(pool: db.Database, uses: int) -> None:
        """The first use shows the loss, the next is one of a connection that is known to be lost."""
        async with pool.transaction() as connection:
            postgres.kill()
            for _ in range(uses - 1):
                with pytest.raises((DatabaseError, asyncpg.InterfaceError)):
                    await connection.fetch("SELECT 1")
            await connection.fetch("SELECT 1")

    async def main() -> None:
        async with db.Database(settings_for(database)) as pool:
            for uses in (1, 2):
                with pytest.raises(DatabaseError, match=lost):
                    await lose(pool, uses)
                postgres.start()
            postgres.kill()
            with pytest.raises(DatabaseError, match=r"^cannot connect to database .*: Connection refused$"):
                async with pool.connection():
                    pytest.fail("there is no server")
            postgres.start()
            async with pool.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1

    run(main())


def test_a_task_does_not_wait_for_ever_for_a_connection(database: str) -> None:
    async def main() -> None:
        settings = settings_for(database, postgres_connections=1, postgres_statement_timeout=0.2)
        async with db.Database(settings) as pool, pool.connection():
            with pytest.raises(DatabaseError, match=r"no answer in time$"):
                async with pool.connection():
                    pytest.fail("the only connection is taken")

    run(main())


# --- what is not the database's fault ---


def test_other_errors_in_the_block_are_not_blamed_on_the_database(database: str) -> None:
    async def main(error: Exception) -> None:
        async with db.Database(settings_for(database)) as pool, pool.connection() as connection:
            await connection.fetchval("SELECT 1")
            raise error

    for error in (TimeoutError("the object store"), FileNotFoundError("a file"), ConnectionResetError("elsewhere")):
        with pytest.raises(type(error), match=str(error)):
            run(main(error))


def test_errors_of_a_statement_keep_their_kind(database: str) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        run(ask(database, "SELECT * FROM missing"))


def test_a_transaction_is_rolled_back_if_its_block_raises(database: str) -> None:
    async def fail(pool: db.Database) -> None:
        async with pool.transaction() as connection:
            await connection.execute("CREATE TABLE made ()")
            raise ZeroDivisionError

    async def main() -> None:
        async with db.Database(settings_for(database)) as pool:
            with pytest.raises(ZeroDivisionError):
                await fail(pool)
            async with pool.transaction() as connection:
                assert await connection.fetchval("SELECT to_regclass('made')") is None
                await connection.execute("CREATE TABLE made ()")
            async with pool.connection() as connection:
                assert await connection.fetchval("SELECT to_regclass('made')") is not None

    run(main())


# --- TLS ---

SSL = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@pytest.fixture(scope="module")
def tls_server(new_directory: DirectoryFactory) -> Any:
    with PostgresServer(new_directory("postgres-tls"), tls=True) as server:
        yield server


@pytest.mark.parametrize(("mode", "encrypted"), [("disable", False), ("prefer", True), ("require", True)])
def test_modes_that_check_nothing(mode: str, encrypted: bool, tls_server: PostgresServer) -> None:
    assert run(ask(tls_server.dsn(), SSL, postgres_sslmode=mode)) is encrypted


def test_a_ca_alone_checks_certificate_and_host(tls_server: PostgresServer) -> None:
    assert run(ask(tls_server.dsn(), SSL, postgres_ca=str(tls_server.ca))) is True
    other_name = tls_server.dsn().replace("127.0.0.1", "localhost")
    error = refusal(other_name, postgres_ca=str(tls_server.ca))
    assert "certificate" in str(error)
    assert error.hint == "check postgres_sslmode and postgres_ca"
    assert run(ask(other_name, SSL, postgres_ca=str(tls_server.ca), postgres_sslmode="verify-ca")) is True


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_a_certificate_that_nobody_signed_is_refused(mode: str, tls_server: PostgresServer) -> None:
    assert "certificate" in str(refusal(tls_server.dsn(), postgres_sslmode=mode))


def test_a_server_without_tls_is_refused_where_it_is_asked_for(database: str, tls_server: PostgresServer) -> None:
    assert "SSL" in str(refusal(database, postgres_sslmode="require"))
    assert "SSL" in str(refusal(database, postgres_ca=str(tls_server.ca)))


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file or directory"), ("nonsense", "no certificates")])
def test_a_ca_that_is_none(content: str | None, reason: str, database: str, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content, encoding="utf-8")
    assert str(refusal(database, postgres_ca=str(file))) == f"cannot use the CA {file}: {reason}"
