"""Private PostgreSQL and Redis servers: Debian's programs, in directories and on ports of their own.

They can be stopped, killed, frozen and started again with the same port and data, and they end with the process that
started them, however it ends (bench/guard.py). Nothing of the machine's own servers is touched, or even looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from bench import binaries, guard, s3

HOST = "127.0.0.1"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.02
LOG_TAIL_LINES = 15
_PORT_MIN = 10_000
_T = TypeVar("_T")


class ServerError(RuntimeError):
    """A server is missing, or did not do what was asked; the end of its log is attached as a note."""


def run(main: Coroutine[Any, Any, _T], seconds: float = 60.0) -> _T:
    """Run asyncio code to its end, in a test that is no coroutine: pytest runs those with trio."""
    return asyncio.run(asyncio.wait_for(main, seconds))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, and that stays free while its server is stopped.

    Not from the range that the kernel gives to clients: one of them may get the port meanwhile, and a client that
    tries again and again to connect to it may even be connected to itself.
    """
    clients_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(_PORT_MIN, max(clients_from, _PORT_MIN + 1000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def find_program(name: str, package: str) -> Path:
    """A server's program: on PATH, or where Debian keeps PostgreSQL's (the newest version). Raises ServerError."""
    if found := shutil.which(name):
        return Path(found)
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    if versions:
        return versions[-1]
    raise ServerError(f"no {name} here; `make test` as root installs it, or: apt-get install {package}")


class Server:
    """A server process. `directory` must be new and reachable for other users; everything of the server lies in it.

    As root the server runs as another user (PostgreSQL refuses root), who owns the directory.
    """

    _stop_signal = signal.SIGTERM

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.password = secrets.token_hex(16)
        self.ca = directory / "server.crt" if tls else None
        """The certificate that clients shall trust, of a server with TLS."""
        self._user = _other_user()
        self._guard: subprocess.Popen[bytes] | None = None
        self._starts = 0
        directory.chmod(0o700)
        if tls:
            _make_certificate(directory)
        self._own(directory)

    def start(self) -> None:
        """Start it, if it does not run, and wait until it takes connections. Raises ServerError."""
        if self.alive:
            return
        self._starts += 1
        self._guard = guard.start(self._as_user(*self._command()), self.directory, self.log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if not self.alive or time.monotonic() > deadline:
                self.close()
                raise self._failure(f"{type(self).__name__} did not come up")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Shut it down as an operator does; clients are disconnected, nothing is lost."""
        if (process := self._process()) is not None:
            process.send_signal(self._stop_signal)
        self._wait()

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as if the machine had gone but for its disks."""
        if (process := self._process()) is not None:
            members = [process, *process.children(recursive=True)]
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            while any(_lives(member) for member in members):
                time.sleep(POLL_S)
        self._wait()

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """All its processes are stopped (SIGSTOP) for the length of a `with`: connections hang, none fails."""
        process = self._process()
        if process is None:
            raise ServerError(f"{type(self).__name__} does not run")
        members = [process, *process.children(recursive=True)]
        try:
            for member in members:
                member.send_signal(signal.SIGSTOP)
            yield
        finally:
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, by force where asking does not help. Safe to repeat."""
        try:
            self.stop()
        except ServerError:
            assert self._guard is not None
            self._guard.terminate()  # which kills the server
            self._wait()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def log(self) -> Path:
        """What it printed since its last start."""
        return self.directory / f"server-{self._starts}.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError

    def _process(self) -> psutil.Process | None:
        """The server's own process, the guard's only child."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._guard is not None and self._guard.poll() is None:
                return next(iter(psutil.Process(self._guard.pid).children()), None)
        return None

    def _wait(self) -> None:
        if self._guard is None:
            return
        try:
            self._guard.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._failure(f"{type(self).__name__} did not end within {STOP_TIMEOUT_S:.0f} s") from None

    def _as_user(self, *command: str | Path) -> list[str]:
        """`command` in the server's directory, as its user; PostgreSQL wants a working directory that it may enter."""
        inside = ["env", f"--chdir={self.directory}", *map(str, command)]
        if self._user is None:
            return inside
        # The signal at the parent's death is lost with a change of user, so it is asked for again (prctl(2)).
        ids = [f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups", "--pdeathsig", "TERM"]
        return ["setpriv", *ids, *inside]

    def _own(self, path: Path) -> None:
        """Give `path` and what lies in it to the server's user."""
        if self._user is not None:
            for part in (path, *path.rglob("*")):
                os.chown(part, self._user.pw_uid, self._user.pw_gid)

    def _failure(self, what: str) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        error = ServerError(f"{what}: {lines[-1] if lines else 'it printed nothing'}")
        error.add_note("\n  ".join([f"end of {self.log}:", *lines[-LOG_TAIL_LINES:]]))
        return error


class PostgresServer(Server):
    """PostgreSQL with one superuser, `tierd`, and a password.

    Without `fsync` a crash of the machine would lose data; `kill()` loses nothing even so, because what was written
    before it lies in the page cache. `options` are settings of postgresql.conf.
    """

    _stop_signal = signal.SIGINT  # "fast": SIGTERM would wait for the clients, postgres(1)
    user = "tierd"

    def __init__(
        self, directory: Path, *, tls: bool = False, fsync: bool = False, options: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, tls=tls)
        self._bin = find_program("initdb", "postgresql").resolve().parent
        self._data = directory / "data"
        self._options = {"fsync": "on" if fsync else "off", "full_page_writes": "on" if fsync else "off"}
        self._options |= {"dynamic_shared_memory_type": "mmap"}  # in the data directory, not in /dev/shm
        self._options |= {"ssl": "on", "ssl_cert_file": "../server.crt", "ssl_key_file": "../server.key"} if tls else {}
        self._options |= options or {}
        self._databases = 0
        self._initialise()

    def dsn(self, database: str = "postgres", *, password: str | None = None) -> str:
        """The URL of a database here, with the password."""
        return f"postgresql://{self.user}:{password or self.password}@{HOST}:{self.port}/{database}"

    def create_database(self, template: str = "template1") -> str:
        """A new database; starts the server if a test left it stopped. Its URL.

        It is empty, or a copy of the one with the URL `template`, which nobody is connected to.
        """
        self.start()
        self._databases += 1
        name = f"test_{self._databases}"
        run(self._execute(f"CREATE DATABASE {name} TEMPLATE {template.rpartition('/')[2]}"))
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Remove a database that `create_database` made, whoever is connected to it."""
        self.start()
        run(self._execute(f"DROP DATABASE {dsn.rpartition('/')[2]} WITH (FORCE)"))

    async def _execute(self, statement: str) -> None:
        import asyncpg

        connection = await asyncpg.connect(self.dsn(), timeout=START_TIMEOUT_S)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def _initialise(self) -> None:
        password = self.directory / "password"
        password.write_text(self.password)
        self._own(password)
        how = ["--username", self.user, "--pwfile", password, "--auth", "scram-sha-256"]
        done = subprocess.run(
            self._as_user(
                self._bin / "initdb", "--pgdata", self._data, "--encoding=UTF8", "--no-locale", "--no-sync", *how
            ),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed: {done.stderr.strip() or done.stdout.strip()}")

    def close(self) -> None:
        """Besides, remove the one thing outside of the directory that a killed server leaves: its lock in memory."""
        super().close()
        with contextlib.suppress(FileNotFoundError, IndexError):
            segment = (self._data / "postmaster.pid").read_text().splitlines()[6].split()[1]  # pidfile.h
            subprocess.run(["ipcrm", "--shmem-id", segment], check=False, capture_output=True)

    def _command(self) -> list[str]:
        settings = {"listen_addresses": HOST, "unix_socket_directories": str(self.directory), **self._options}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port), *words]

    def _ready(self) -> bool:
        """What pg_ctl looks at: line 8 of postmaster.pid, and whose it is (pidfile.h)."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            process = self._process()
            return (
                process is not None and len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready"
            )
        return False


class RedisServer(Server):
    """Redis with a password and an append-only file, so that what it acknowledged survives `kill()`.

    `options` are settings of redis.conf, such as `maxmemory`. With `tls` it takes TLS alone.
    """

    def __init__(self, directory: Path, *, tls: bool = False, options: Mapping[str, str] | None = None) -> None:
        super().__init__(directory, tls=tls)
        self._program = find_program("redis-server", "redis-server")
        settings = {"bind": HOST, "dir": str(directory), "save": '""', "appendonly": "yes", "appendfsync": "no"}
        settings |= {"requirepass": self.password}  # in a file, because everybody can read a command line
        settings |= {"port": "0", "tls-port": str(self.port)} if tls else {"port": str(self.port)}
        if tls:
            settings |= {f"tls-{name}-file": f"{directory}/server.{end}" for name, end in _REDIS_TLS_FILES.items()}
            settings |= {"tls-auth-clients": "no"}
        settings |= options or {}
        config = directory / "redis.conf"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self._own(config)

    def url(self, number: int = 0) -> str:
        """The URL of one of its numbered databases, with the password."""
        return f"{'rediss' if self.ca else 'redis'}://:{self.password}@{HOST}:{self.port}/{number}"

    def _command(self) -> list[str]:
        return [str(self._program), str(self.directory / "redis.conf")]

    def _ready(self) -> bool:
        """It says so itself, after it has loaded its data."""
        return self.log.exists() and b"Ready to accept connections" in self.log.read_bytes()


class S3Server(Server):
    """rclone over a directory, whose sub-directories are the buckets. What it stored survives `kill()`."""

    access_key = "tierd"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._user = None  # the program may lie where only we may look
        self.objects = directory / "objects"
        self.objects.mkdir()
        self._program = shutil.which("rclone") or str(binaries.fetched(s3.RCLONE))

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://{HOST}:{self.port}"

    def _command(self) -> list[str]:
        options = ["--addr", f"{HOST}:{self.port}", "--config", "/dev/null", "--etag-hash", "", "--no-checksum"]
        return [
            *("env", f'RCLONE_AUTH_KEY="{self.access_key},{self.password}"'),
            *(self._program, "serve", "s3", *options, str(self.objects)),
        ]

    def _ready(self) -> bool:
        """It says so itself."""
        return self.log.exists() and b"Starting s3 server on" in self.log.read_bytes()


_REDIS_TLS_FILES = {"cert": "crt", "key": "key", "ca-cert": "crt"}


def _other_user() -> pwd.struct_passwd | None:
    """Whom servers run as where we are root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _make_certificate(directory: Path) -> None:
    """`server.key` and `server.crt` for 127.0.0.1, signed by itself. Newer Pythons want the use of the key named."""
    extensions = ("subjectAltName=IP:127.0.0.1", "keyUsage=critical,digitalSignature,keyCertSign")
    command: Sequence[str] = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "2", "-subj", "/CN=tierd tests", "-keyout", "server.key", "-out", "server.crt"),
        *(word for extension in extensions for word in ("-addext", extension)),
    ]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=START_TIMEOUT_S)
    (directory / "server.key").chmod(0o600)


def _lives(process: psutil.Process) -> bool:
    """It runs; one that ended and that nobody has reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
