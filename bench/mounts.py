"""What benchmarks stand on: mounts, page cache, trees of files, readers as load; it measures nothing itself.

The context managers leave no mount, process or file behind, also after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from bench import guard
from tierd import client
from tierd.errors import TierdError

Option = bool | int | float | str | Path | None | Sequence[str]

MIB = 1 << 20
COMMAND_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 10.0
READERS_START_TIMEOUT_S = 120.0
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REPOSITORY = Path(__file__).resolve().parent.parent


class MountError(RuntimeError):
    """A mount could not be made, asked or taken down; the text says which and what the command printed."""


@dataclass(frozen=True)
class Tierd:
    """A running tierd over one mount. The methods ask it each time; nothing is cached."""

    source: Path
    mountpoint: Path
    state_dir: Path
    process: psutil.Process

    def status(self) -> dict[str, Any]:
        """What `tierd status MOUNTPOINT --json` prints; MountError when it prints something else."""
        return _status(self.mountpoint)

    def ask(self, path: str) -> Any:
        """The daemon's answer on its admin socket, such as of /v1/models: as `tierd models --json`, in a
        millisecond instead of the half second that a new interpreter takes. MountError without an answer.
        """
        try:
            return client.get(client.find(self.mountpoint), path)
        except TierdError as error:
            raise MountError(f"{error}; {error.hint}") from error

    def cpu_seconds(self) -> float:
        """User and system time that the daemon and its children have used so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in family))

    def rss_bytes(self) -> int:
        """Resident memory (VmRSS) of the daemon and its children, in bytes."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(int(process.memory_info().rss) for process in family)

    def metrics(self) -> str:
        """The text of /metrics."""
        url = f"http://{self.status()['metrics_address']}/metrics"
        with urllib.request.urlopen(url, timeout=COMMAND_TIMEOUT_S) as answer:
            return bytes(answer.read()).decode()

    def series(self) -> set[str]:
        """The series at /metrics: name and labels of every line that is not a comment."""
        lines = (line for line in self.metrics().splitlines() if line and not line.startswith("#"))
        return {line[: line.rindex("}") + 1] if "}" in line else line.split(" ")[0] for line in lines}

    def settle(self, quiet_s: float = 0.2, timeout_s: float = 30.0) -> None:
        """Waits until the daemon uses no CPU time for `quiet_s`: queued forgets are done, not in the way."""
        deadline = time.monotonic() + timeout_s
        used, since = self._cpu_s(), time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < quiet_s:
            time.sleep(quiet_s / 10)
            # One clock tick (10 ms) is housekeeping; real work goes beyond it within `quiet_s`.
            if (now := self._cpu_s()) > used + 0.011:
                used, since = now, time.monotonic()

    def _cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def tierd_mount(source: Path, mountpoint: Path, **options: Option) -> Iterator[Tierd]:
    """Mounts the overlay of `source` at `mountpoint` in a daemon of its own, and takes both down.

    The mountpoint is made if it is missing, and removed if it was. Options become flags: `foo_bar=3` is
    `--foo-bar 3`, True a bare flag, a list a repeated flag, None and False nothing. `state_dir` defaults to
    a temporary directory beside the mountpoint, `metrics` to a free port. MountError has tierd's output.
    """
    mountpoint = mountpoint.resolve()
    created = not mountpoint.exists()
    mountpoint.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{mountpoint.name}-state-", dir=mountpoint.parent))
    settings: dict[str, Option] = {"state_dir": scratch / "state", "metrics": "127.0.0.1:0", **options}
    settings.setdefault("cache_dir", scratch / "cache")
    try:
        with deferred():
            tierd_command(["mount", str(source), str(mountpoint), "--background", *_flags(settings)], scratch)
            if not guard.mounts_under(mountpoint):
                raise MountError("tierd mount reported success, and nothing is mounted at the mountpoint")
            process = psutil.Process(int(_status(mountpoint)["daemon_pid"]))
        yield Tierd(source, mountpoint, Path(str(settings["state_dir"])), process)
    finally:
        with deferred():
            problem = _take_down(mountpoint, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            if created and not guard.mounts_under(mountpoint):
                mountpoint.rmdir()
        # An error of the body is the one to see, so this one is raised only on its own.
        if problem is not None and sys.exc_info()[0] is None:
            raise MountError(problem)


@contextlib.contextmanager
def work_directory(parent: Path | None = None) -> Iterator[Path]:
    """A new directory for everything a benchmark makes, removed afterwards.

    Without `parent` it lies in the system's temporary directory if that is on the file system of the
    repository, otherwise in the repository: a tmpfs would measure memory.
    """
    if parent is None:
        parent = Path(tempfile.gettempdir())
        if parent.stat().st_dev != REPOSITORY.stat().st_dev:
            parent = REPOSITORY
    path = Path(tempfile.mkdtemp(prefix="tierd-bench-", dir=parent)).resolve()
    try:
        with _terminate_as_interrupt():
            yield path
    finally:
        with deferred():
            # Removing through a mount that is still there would delete from its source.
            left = guard.mounts_under(path)
            if not left:
                shutil.rmtree(path)
        if left:
            raise MountError(f"still mounted, and so not removed: {left[0].mountpoint}")


def drop_caches(level: int) -> None:
    """Writes back dirty pages, then drops clean pages (1), dentries and inodes (2) or both (3).

    See Documentation/admin-guide/sysctl/vm.rst of the kernel. MountError without the right to do it.
    """
    os.sync()
    try:
        DROP_CACHES.write_text(f"{level}\n")
    except OSError as error:
        raise MountError(f"{DROP_CACHES}: {error.strerror}; cold figures need root on the host") from error


def drop_pages(path: Path) -> None:
    """Asks the kernel to forget the cached pages of one file (posix_fadvise DONTNEED)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def fill(path: Path, size_bytes: int) -> None:
    """Writes random bytes, which neither JuiceFS nor a disk can compress."""
    with path.open("wb") as file:
        for offset in range(0, size_bytes, MIB):
            file.write(os.urandom(min(MIB, size_bytes - offset)))


def tree_names(directory: int, files: int) -> list[str]:
    """Paths, relative to the root of `make_tree`, of the files of one of its directories."""
    return [f"{directory:04}/{file:06}" for file in range(files)]


def make_tree(root: Path, directories: int, files: int, content: bytes = b"") -> None:
    """Makes `directories` directories with `files` small files each."""
    for directory in range(directories):
        (root / f"{directory:04}").mkdir(parents=True)
        for name in tree_names(directory, files):
            (root / name).write_bytes(content)


def read_through(path: Path | str) -> int:
    """Opens a file, reads it from start to end with 1 MiB preads, closes it; returns the bytes read."""
    buffer, offset = bytearray(MIB), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while got := os.preadv(descriptor, [buffer], offset):
            offset += got
    finally:
        os.close(descriptor)
    return offset


@contextlib.contextmanager
def streaming(paths: Sequence[Path], *, drop: bool = True) -> Iterator[Callable[[], int]]:
    """Runs a process per file that streams it until the end of the block; yields how to ask for bytes moved.

    The block starts when every process has read something. With `drop` a reader drops the file's pages after
    each pass, so that it keeps reaching the disk or the daemon.
    """
    context = get_context("fork")  # 32 new interpreters would keep a small machine busy for a whole round
    moved: Any = context.RawArray("Q", len(paths) + 1)  # one slot per reader, and the last one says stop
    readers = [
        context.Process(target=_stream, args=(str(path), moved, index, drop), daemon=True)
        for index, path in enumerate(paths)
    ]
    try:
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + READERS_START_TIMEOUT_S
        while not all(moved[:-1]):
            if time.monotonic() > deadline or not all(reader.is_alive() for reader in readers):
                raise RuntimeError("a reader of the load ended, or could not read anything")
            time.sleep(0.05)
        yield lambda: sum(moved[:-1])
    finally:
        moved[len(paths)] = 1
        with deferred():
            for reader in (reader for reader in readers if reader.pid is not None):
                reader.join(EXIT_TIMEOUT_S)
                reader.kill()
                reader.join(EXIT_TIMEOUT_S)


def leave_signals_to_parent() -> None:
    """For a child that the parent stops: Ctrl-C reaches the whole terminal and is not its business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stream(path: str, moved: Any, index: int, drop: bool) -> None:
    leave_signals_to_parent()
    buffer, parent = bytearray(MIB), os.getppid()
    while os.getppid() == parent:
        descriptor, offset = os.open(path, os.O_RDONLY), 0
        while got := os.preadv(descriptor, [buffer], offset):
            offset += got
            moved[index] += got
            if moved[len(moved) - 1]:
                return
        if drop:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _flags(options: dict[str, Option]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, (str, Path)) or (isinstance(value, (int, float)) and value is not False):
            flags += [flag, str(value)]
        elif isinstance(value, Sequence):
            flags += [word for item in value for word in (flag, item)]
    return flags


def tierd_command(arguments: list[str], scratch: Path) -> None:
    """Runs a tierd command; MountError with what it printed if it fails.

    Its output goes to a file: a daemon that keeps a pipe open would hang us.
    """
    log = scratch / f"{arguments[0]}.log"
    with log.open("wb") as sink:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tierd", *arguments],
                check=False,
                cwd=REPOSITORY,  # finds a checkout that is not installed
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                timeout=COMMAND_TIMEOUT_S,
                start_new_session=True,  # the terminal's Ctrl-C is for the benchmark alone
            )
        except subprocess.TimeoutExpired as error:
            raise MountError(f"tierd {arguments[0]} did not end: {_tail(log)}") from error
    if done.returncode != 0:
        raise MountError(f"tierd {arguments[0]} ended with {done.returncode}: {_tail(log)}")


def _status(mountpoint: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tierd", "status", str(mountpoint), "--json"]
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode != 0 or not isinstance(answer, dict):
        printed = (done.stderr or done.stdout)[-500:]
        raise MountError(f"tierd status --json ended with {done.returncode}: {printed}")
    return answer


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1000:] or "it printed nothing"


def _take_down(mountpoint: Path, scratch: Path) -> str | None:
    """Unmounts, by force if need be, and ends every process of the mount; says what did not go the ordinary way."""
    family = _family(mountpoint)
    problem = None
    if guard.mounts_under(mountpoint):
        try:
            tierd_command(["umount", str(mountpoint)], scratch)
        except MountError as error:
            problem = str(error)
    if guard.mounts_under(mountpoint):
        problem = problem or "tierd umount reported success, and the mount was still there"
        guard.unmount(mountpoint, lazy=True)
    for process in _still_there(family):
        process.kill()
        problem = problem or f"tierd ran on for {EXIT_TIMEOUT_S:.0f} s after the unmount, and was killed"
    return problem


def _family(mountpoint: Path) -> list[psutil.Process]:
    """The keeper of a mount and what it started, or the daemon alone; none if nobody serves it."""
    try:
        record = client.find(mountpoint)
        first = psutil.Process(record.keeper_pid or record.pid)
        return [first, *first.children(recursive=True)]
    except (TierdError, psutil.NoSuchProcess):
        return []


def _still_there(family: list[psutil.Process]) -> list[psutil.Process]:
    """Waits for processes that should end by themselves: those that did not. A zombie that no init reaps has ended."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while left := [process for process in family if not _ended(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _ended(process: psutil.Process) -> bool:
    # psutil tells a process from a later one with its number by the start time.
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the body is done: half a mount or half a cleanup helps nobody.

    With a handler of Python's, since SIG_IGN would be inherited by the daemon.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    saved = {number: signal.signal(number, lambda got, _frame: held.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)
        if held:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt, so that `timeout` and CI unwind the same way as Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    saved = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, saved)
