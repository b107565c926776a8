"""A running tierd under test: starts it in the background, asks it, takes it down, and holds it to what it must leave.

Three things are checked of every mount: its log has no line of level warning or above that the test
did not declare, no handler failed, and the kernel's lookups, open files and listings all came back.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from bench import guard
from tierd import client
from tierd.runtime import MountRecord, is_served

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND_SECONDS = 60.0
STOP_SECONDS = 20.0
LEDGER_SECONDS = 5.0
POLL_SECONDS = 0.01
QUIET_LEVELS = frozenset({"debug", "info"})

_MS_NOSUID_NODEV = 2 | 4
_MS_REMOUNT = 32
_libc = ctypes.CDLL(None, use_errno=True)


def tierd(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a tierd command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "tierd", *map(str, arguments)],
        check=False,
        cwd=REPOSITORY,  # finds a checkout that is not installed
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=COMMAND_SECONDS,
    )
    if check:
        assert done.returncode == 0, f"tierd {arguments[0]} exited {done.returncode}: {done.stderr}{done.stdout}"
    return done


def environment() -> dict[str, str]:
    """Ours without settings of tierd, and without the width of a terminal: readline hands that on to processes."""
    hidden = {"COLUMNS", "LINES"}
    return {name: value for name, value in os.environ.items() if not (name.startswith("TIERD") or name in hidden)}


def flags(options: Mapping[str, Any]) -> list[str]:
    """`attr_timeout=0` as `--attr-timeout 0`; True is a bare flag, a list a repeated one."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return words


def wait_until(holds: Callable[[], bool], seconds: float, what: str | Callable[[], str]) -> float:
    """Poll until `holds()`; the seconds it took. AssertionError that says `what` was waited for."""
    started = time.monotonic()
    while not holds():
        passed = time.monotonic() - started
        assert passed < seconds, f"not within {seconds} s: {what if isinstance(what, str) else what()}"
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started


@contextmanager
def raises(number: int) -> Iterator[None]:
    """Expect an OSError with this errno; AssertionError says which one came instead."""
    try:
        yield
    except OSError as error:
        found, wanted = errno.errorcode[error.errno or 0], errno.errorcode[number]
        assert found == wanted, f"{found}, not {wanted}"
    else:
        raise AssertionError(f"no {errno.errorcode[number]}")


def is_mounted(path: Path) -> bool:
    """Something is mounted at exactly this path. Asks /proc, not the mount, which may be dead."""
    return any(entry.mountpoint == str(path) for entry in guard.mounts_under(path))


class OverlayMount:
    """One mount and its daemon. `status`, `models` and `opens` ask the daemon each time."""

    def __init__(self, source: Path, directory: Path, options: Mapping[str, Any] | None = None) -> None:
        """Everything of this mount but its source lies in `directory`."""
        self.source = source
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self.state_dir = directory / "state"
        self.cache_dir = directory / "cache"
        private = {"state_dir": self.state_dir, "cache_dir": self.cache_dir, "metrics": "127.0.0.1:0"}
        self.options = {**private, **(options or {})}
        self.log_file = self.state_dir / "daemon.log"
        self.pid = 0
        self._log_read = 0
        self._log: list[dict[str, Any]] = []
        self._judged = 0
        self._failures_judged = 0
        self._expected: Counter[str] = Counter()
        self._allowed: set[str] = set()
        self.nodes_lost_max = 0
        """How many nodes may stay known: one for a FORGET that a daemon had just read when it was killed."""

    def start(self) -> None:
        """`tierd mount --background`; returns once the mount answers."""
        done = tierd("mount", self.source, self.mountpoint, "--background", *flags(self.options))
        self.refresh()
        self.started_with = done.stdout + done.stderr

    # --- what it tells ---

    record: MountRecord

    def refresh(self) -> None:
        """Look up who serves the mount now: after a daemon died, it is another one."""
        self.record = client.find(self.mountpoint)
        self.pid = self.record.pid

    def status(self) -> dict[str, Any]:
        """What `tierd status --json` prints."""
        told: dict[str, Any] = client.get(self.record, "/v1/status")
        return told

    def models(self) -> dict[str, dict[str, Any]]:
        """What `tierd models --json` prints, by name."""
        return {row["model"]: row for row in client.get(self.record, "/v1/models")}

    def opens(self, limit: int = 1000, model: str | None = None) -> list[dict[str, Any]]:
        """What `tierd opens --json` prints, the latest first."""
        query = urlencode({"limit": limit, **({"model": model} if model else {})}, errors="surrogateescape")
        told: list[dict[str, Any]] = client.get(self.record, f"/v1/opens?{query}")
        return told

    def log(self) -> list[dict[str, Any]]:
        """Every line of the daemon's log so far."""
        if self.log_file.exists():
            with self.log_file.open("rb") as file:
                file.seek(self._log_read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._log_read += len(whole)
            self._log += [json.loads(line) for line in whole.splitlines()]
        return self._log

    # --- what it is held to ---

    def expect_log(self, *events: str) -> None:
        """Each of these events must be logged, as a warning or worse, before the test ends; once or more often."""
        self._expected.update(events)

    def allow_log(self, *events: str) -> None:
        """These events may be logged, as often as it comes: for campaigns, where chance decides."""
        self._allowed.update(events)

    def log_complaints(self) -> list[str]:
        """What is wrong with the log since the last call: undeclared warnings, and declared ones that are missing."""
        fresh = self.log()[self._judged :]
        self._judged += len(fresh)
        loud = [line for line in fresh if line["level"] not in QUIET_LEVELS]
        declared = {*self._expected, *self._allowed}
        complaints = [f"unexpected in the log: {line}" for line in loud if line["event"] not in declared]
        seen = {line["event"] for line in loud}
        complaints += [f"{event} was expected in the log" for event in self._expected if event not in seen]
        self._expected.clear()
        return complaints

    def settled(self) -> None:
        """Wait until no file or listing is open: the kernel releases them some time after close(2)."""
        wait_until(
            lambda: not (self._queues()["open_files"] or self._queues()["open_directories"]),
            LEDGER_SECONDS,
            lambda: f"files and listings are all closed, but {self._queues()}",
        )

    def _queues(self) -> dict[str, int]:
        queues: dict[str, int] = self.status()["queues"]
        return queues

    def ledger_complaints(self) -> list[str]:
        """What is wrong once the kernel has forgotten everything: open files, nodes but the root, failed handlers."""
        try:
            self.settled()
            wait_until(
                self._is_forgotten,
                LEDGER_SECONDS,
                lambda: f"the root is the only node left, but there are {self._queues()['inodes']}",
            )
        except AssertionError as error:
            return [str(error)]
        failures = self.status()["counters"]["handler_failures"] - self._failures_judged
        self._failures_judged += failures
        return [f"{failures} handlers failed; the log says how"] if failures else []

    def _is_forgotten(self) -> bool:
        """The kernel gave its nodes back. It is asked each time: it passes over names that somebody else looks at."""
        self._drop_kernel_caches()
        return self._queues()["inodes"] <= 1 + self.nodes_lost_max

    def _drop_kernel_caches(self) -> None:
        """Make the kernel forget every inode of this mount that nothing uses.

        A remount drops all unused dentries of one file system (`shrink_dcache_sb` in fs/super.c) and FUSE
        keeps no inode without one. Writing 2 to drop_caches would do the same to the whole machine.
        """
        fd = os.open(self.mountpoint, os.O_RDONLY)
        try:
            _libc.syncfs(fd)  # pages written through an mmap keep their inode
        finally:
            os.close(fd)
        self.drop_unused()

    def drop_unused(self) -> None:
        """The same without a request that waits for an answer: what was written must be on its way."""
        if _libc.mount(None, os.fsencode(self.mountpoint), None, _MS_REMOUNT | _MS_NOSUID_NODEV, None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"remount: {os.strerror(number)}")

    # --- how it ends ---

    @property
    def alive(self) -> bool:
        """The daemon runs; a zombie that nobody reaps does not."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state.split()[0] not in "ZX"  # X: being reaped

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the keeper, SIGKILL to the daemon, too; wait until both have ended."""
        pids = [self.record.keeper_pid or self.pid, self.pid]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        try:
            for pidfd in pidfds if number == signal.SIGKILL else pidfds[:1]:
                signal.pidfd_send_signal(pidfd, number)
            for pid, pidfd in zip(pids, pidfds, strict=True):
                wait_for_exit(pidfd, f"process {pid} ends after {signal.Signals(number).name}")
        finally:
            for pidfd in pidfds:
                os.close(pidfd)

    def kill_daemon(self) -> int:
        """SIGKILL for the daemon alone; its process ID. Another one will serve."""
        self.refresh()
        os.kill(self.pid, signal.SIGKILL)
        return self.pid

    def succeeded(self, pid: int, seconds: float = STOP_SECONDS) -> None:
        """Wait until another daemon than `pid` serves."""

        def another() -> bool:
            self.refresh()
            return self.pid != pid

        wait_until(another, seconds, f"another daemon than {pid}")

    def close(self) -> list[str]:
        """Take the mount down if it is still there; everything that is wrong with how it went."""
        complaints = []
        try:
            if self.pid and is_served(self.mountpoint):
                self.refresh()
                complaints += self.ledger_complaints()
                self.end()
            if is_mounted(self.mountpoint):
                complaints.append(f"{self.mountpoint} is still mounted")
        except (AssertionError, OSError) as error:
            complaints.append(str(error))
        finally:
            self._remove_by_force()
        return complaints + self.log_complaints()

    def _remove_by_force(self) -> None:
        if self.pid and self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.record.keeper_pid or self.pid, signal.SIGKILL)
                os.kill(self.pid, signal.SIGKILL)
        while is_mounted(self.mountpoint):
            reason = guard.unmount(self.mountpoint, lazy=True)
            assert reason is None, reason


def wait_for_exit(pidfd: int, what: str) -> None:
    """Block until the process behind a pidfd has ended. AssertionError if it takes too long."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(STOP_SECONDS * 1000), f"not within {STOP_SECONDS} s: {what}"


def as_user(
    uid: int, gid: int, code: str, *arguments: str | Path, groups: Sequence[int] = (), umask: int = 0o22
) -> str:
    """Run Python `code` as another user, with `sys.argv[1:]` as given; what it printed, or `errno NAME`.

    The interpreter starts as root and drops its rights itself: it may lie where only root may go.
    """
    prelude = (
        "import errno, os, socket, sys\n"
        f"os.setgroups({list(groups)}); os.setresgid({gid}, {gid}, {gid}); os.setresuid({uid}, {uid}, {uid})\n"
        f"os.umask({umask})\n"
        "try:\n"
    )
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    epilogue = "except OSError as error:\n    print(errno.errorcode[error.errno])\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + body + epilogue, *map(str, arguments)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
