"""The servers that other tests rely on: same port and data after a stop or a kill, and gone with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.controller.house import COMMAND_SECONDS, REPOSITORY
from tests.mounts import wait_for_exit
from tests.servers import PostgresServer, RedisServer, Server, ServerError, free_port, run

DirectoryFactory = Callable[[str], Path]


async def execute(dsn: str, statement: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(statement)
    finally:
        await connection.close()


ENDS = {"stop": Server.stop, "kill": Server.kill}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_postgres_keeps_port_and_data(end: Callable[[Server], None], new_directory: DirectoryFactory) -> None:
    with PostgresServer(new_directory("postgres")) as server:
        dsn = server.create_database()
        run(execute(dsn, "CREATE TABLE kept AS SELECT 1 AS number"))
        end(server)
        assert not server.alive
        with pytest.raises(ConnectionRefusedError):
            run(execute(dsn, "SELECT 1"))
        server.start()
        assert run(execute(dsn, "SELECT number FROM kept"))[0]["number"] == 1


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_redis_keeps_port_and_data(end: Callable[[Server], None], new_directory: DirectoryFactory) -> None:
    with RedisServer(new_directory("redis")) as server:
        client = redis.Redis.from_url(server.url())
        client.set("kept", 1)
        end(server)
        assert not server.alive
        with pytest.raises(redis.exceptions.ConnectionError):
            client.get("kept")
        server.start()
        assert client.get("kept") == b"1"
        client.close()


def test_a_frozen_server_answers_after_it_thawed(redis_server: RedisServer) -> None:
    redis_server.start()
    client = redis.Redis.from_url(redis_server.url(), socket_timeout=0.2)
    with redis_server.frozen(), pytest.raises(redis.exceptions.TimeoutError):
        client.ping()
    assert client.ping()
    client.close()


def test_redis_wants_its_password_and_takes_tls(new_directory: DirectoryFactory) -> None:
    with RedisServer(new_directory("redis"), tls=True) as server:
        assert server.ca is not None
        trusting = redis.Redis.from_url(server.url(), ssl_ca_certs=str(server.ca))
        assert trusting.ping()
        trusting.close()
        address = {"host": "127.0.0.1", "port": server.port, "retry": Retry(NoBackoff(), 0)}
        stranger = redis.Redis(**address, ssl=True, ssl_ca_certs=str(server.ca))
        with pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
        stranger.close()


_PARENT = """
import pathlib, sys, tests.servers as servers
server = getattr(servers, sys.argv[1])(pathlib.Path(sys.argv[2])).__enter__()
print(server._process().pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["PostgresServer", "RedisServer"])
def test_it_ends_with_its_parent(kind: str, new_directory: DirectoryFactory) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, kind, str(new_directory("orphan"))],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    server = os.pidfd_open(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=COMMAND_SECONDS)
    wait_for_exit(server, "the server ends")
    os.close(server)


def test_servers_run_as_somebody_else_than_root(postgres: PostgresServer, redis_server: RedisServer) -> None:
    for server in (postgres, redis_server):
        server.start()
        process = server._process()
        assert process is not None
        assert process.uids().real != 0
        assert psutil.Process(process.pid).cwd().startswith(str(server.directory))


def test_a_server_that_cannot_start_says_why(new_directory: DirectoryFactory) -> None:
    server = RedisServer(new_directory("redis"), options={"maxmemory": "plenty"})
    with pytest.raises(ServerError, match="RedisServer did not come up") as caught:
        server.start()
    assert any("maxmemory" in note for note in caught.value.__notes__)
    assert not server.alive


def test_ports_are_not_those_of_clients() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < max(low, 11_000) for _ in range(100))
