"""Connections to PostgreSQL with deadlines, and errors that a person can act on. Knows no tables.

Every statement has two deadlines: the server ends it after `postgres_statement_timeout`, and a little later the client
no longer waits for a server that has gone silent. Sessions run in UTC.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, Protocol, Self

import asyncpg  # type: ignore[import-untyped]

from tierd.errors import DatabaseError
from tierd.postgres_settings import PostgresAddress, PostgresSettings

_ANSWER_GRACE_SECONDS = 5.0
"""How much longer than the server the client waits: the server's own error says more."""
_CLOSE_SECONDS = 10.0
_IDLE_IN_TRANSACTION = "60s"
"""A transaction that nobody goes on with holds its row locks no longer than this, if its process hangs."""
_KEEPALIVE = {"tcp_keepalives_idle": "20", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "4"}
"""The server ends a session, and with it its locks, a minute after the client's machine has gone; by default hours."""

_AWAY = (
    OSError,  # TimeoutError and ssl.SSLError, too
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down, crashed, starting up, statement timeout
    asyncpg.InsufficientResourcesError,  # disk full, too many connections
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InternalClientError,  # what a connection says that was shut down in the middle of something
)
"""A database that is away, refuses or stalls; what else a statement raises is about the statement."""


class Connection(Protocol):
    """What is used of asyncpg's connections, which come without types. Rows are `asyncpg.Record`."""

    async def execute(self, query: str, *values: object, timeout: float | None = None) -> str: ...
    async def executemany(self, query: str, values: Iterable[Sequence[object]]) -> None: ...
    async def fetch(self, query: str, *values: object) -> list[Any]: ...
    async def fetchrow(self, query: str, *values: object) -> Any: ...
    async def fetchval(self, query: str, *values: object) -> Any: ...
    async def close(self) -> None: ...
    def transaction(self) -> AbstractAsyncContextManager[Any]: ...
    def is_in_transaction(self) -> bool: ...
    def is_closed(self) -> bool: ...
    def terminate(self) -> None: ...
    def get_server_pid(self) -> int: ...
    def add_termination_listener(self, callback: Callable[[object], None]) -> None: ...


class Database:
    """The pool of one process.

    Contract: any task may ask for connections; one that it got is its own for the length of the `with`, and goes back
    without a transaction, and as it was: whoever uses it leaves nothing in its session (SET LOCAL, locks of
    transactions; `connected` is for what lasts longer). More tasks than `postgres_connections` wait, for as long as a
    statement may take. While the database is away, asking for a connection and each statement raise DatabaseError; the
    pool connects again by itself.
    """

    def __init__(self, settings: PostgresSettings) -> None:
        self.address = settings.database()
        self._settings = settings
        self._pool: Any = None

    async def __aenter__(self) -> Self:
        """Raises DatabaseError if the database does not let us in."""
        with _translated(self.address, "cannot connect to"):
            self._pool = await asyncpg.create_pool(
                min_size=1, max_size=self._settings.postgres_connections, **_options(self._settings, self.address)
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), _CLOSE_SECONDS)
        except (TimeoutError, DatabaseError):
            pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool. Raises DatabaseError if there is none to be had."""
        assert self._pool is not None, "the database is used within its `async with`"
        with _translated(self.address, "cannot connect to"):
            connection = await self._pool.acquire(timeout=self._settings.postgres_statement_timeout)
        try:
            yield connection
        except asyncpg.InterfaceError as error:
            if not _is_lost(connection):
                raise
            raise DatabaseError(f"lost database {self.address}: closed", hint=_hint(error)) from error
        except Exception as error:
            heed_cancellation(error)
            raise
        finally:
            await self._release(connection)

    async def _release(self, connection: Connection) -> None:
        """What the block had to say is not hidden by a server that does not answer: the connection is closed then."""
        with suppress(*_AWAY):
            await self._pool.release(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """The same in one transaction, which is rolled back if the block raises."""
        async with self.connection() as connection, connection.transaction():
            yield connection


@asynccontextmanager
async def connected(settings: PostgresSettings) -> AsyncIterator[Connection]:
    """A connection outside of the pool: for what belongs to a session, such as advisory locks. Raises DatabaseError."""
    address = settings.database()
    with _translated(address, "cannot connect to"):
        connection = await asyncpg.connect(**_options(settings, address))
    try:
        yield connection
    finally:
        try:
            await connection.close(timeout=_CLOSE_SECONDS)
        except _AWAY:
            connection.terminate()


def heed_cancellation(error: BaseException) -> None:
    """Raises CancelledError if the task was cancelled: what goes wrong afterwards, such as a rollback, or a wait that
    ends just then, would hide it, and the task would go on for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


def _is_lost(connection: Connection) -> bool:
    """The pool takes a connection away as soon as it is lost, and calls any further use of it wrong."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


@contextmanager
def _translated(address: PostgresAddress, what: str) -> Iterator[None]:
    try:
        yield
    except _AWAY as error:
        raise DatabaseError(f"{what} database {address}: {_reason(error)}", hint=_hint(error)) from error


def _connection_class(address: PostgresAddress) -> type[Connection]:
    """Connections whose statements raise DatabaseError if the database is away.

    Translated here and not around the blocks that use a connection: what else goes wrong in these, such as a timeout of
    the object store, would be blamed on the database.
    """

    class Translating(asyncpg.Connection):  # type: ignore[misc] # without types
        def get_reset_query(self) -> str:
            """None: a round trip for each use of the pool, to undo what nobody does (see Database)."""
            return ""

        async def execute(self, *args: Any, **options: Any) -> Any:
            with self._translated():
                return await super().execute(*args, **options)

        async def executemany(self, *args: Any, **options: Any) -> Any:
            with self._translated():
                return await super().executemany(*args, **options)

        async def fetch(self, *args: Any, **options: Any) -> Any:
            with self._translated():
                return await super().fetch(*args, **options)

        async def fetchrow(self, *args: Any, **options: Any) -> Any:
            with self._translated():
                return await super().fetchrow(*args, **options)

        async def fetchval(self, *args: Any, **options: Any) -> Any:
            with self._translated():
                return await super().fetchval(*args, **options)

        @contextmanager
        def _translated(self) -> Iterator[None]:
            with _translated(address, "lost"):
                if self.is_closed():  # asyncpg calls this a wrong use
                    raise ConnectionResetError(errno.ECONNRESET, "closed")
                yield

    return Translating


def _options(settings: PostgresSettings, address: PostgresAddress) -> dict[str, Any]:
    return {
        "host": address.host,
        "port": address.port,
        "database": address.database,
        "user": address.user,
        "password": address.password.get_secret_value() if address.password else None,
        "ssl": _tls(address),
        "connection_class": _connection_class(address),
        "timeout": settings.postgres_connect_timeout,
        "command_timeout": settings.postgres_statement_timeout + _ANSWER_GRACE_SECONDS,
        "server_settings": {
            "application_name": "tierd",
            "timezone": "UTC",
            "statement_timeout": f"{settings.postgres_statement_timeout * 1000:.0f}",
            "idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION,
            **_KEEPALIVE,
        },
    }


def _tls(address: PostgresAddress) -> ssl.SSLContext | str:
    """A context for the modes that check the certificate; the others mean what libpq means by them."""
    if address.host.startswith("/"):
        return "disable"  # a socket of this machine
    if address.sslmode not in ("verify-ca", "verify-full"):
        return address.sslmode
    try:
        context = ssl.create_default_context(cafile=address.ca)
    except OSError as error:  # ssl.SSLError too
        reason = os.strerror(error.errno) if error.errno and not isinstance(error, ssl.SSLError) else "no certificates"
        raise DatabaseError(f"cannot use the CA {address.ca}: {reason}", hint="check postgres_ca") from None
    context.check_hostname = address.sslmode == "verify-full"
    return context


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


def _hint(error: BaseException) -> str:
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            return "check user, password and the server's pg_hba.conf"
        case asyncpg.InvalidCatalogNameError():
            return "create the database, or check its name"
        case asyncpg.TooManyConnectionsError():
            return "lower postgres_connections, or raise the server's max_connections"
        case asyncpg.InsufficientResourcesError():
            return "the server is out of disk or memory"
        case ssl.SSLError():
            return "check postgres_sslmode and postgres_ca"
        case TimeoutError() | asyncpg.QueryCanceledError():
            return "is it overloaded, locked or out of reach? postgres_connect_timeout, postgres_statement_timeout"
        case _:
            return "is PostgreSQL running there, and does it take connections from here?"
