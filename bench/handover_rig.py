"""A mount whose daemon is replaced, for `handover.py`: who serves it, how to kill and upgrade it, what is put on it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import handover_load, mounts
from bench.handover_load import Work
from bench.mounts import MIB, MountError, Tierd
from bench.report import Spread
from tierd import client
from tierd.errors import TierdError
from tierd.runtime import MountRecord

MB = 1e6
COLUMNS = ("what", "unit", "undisturbed", "handed over")
MODEL = "models/hot"
HOT_FILES = 4
HOT_BYTES = 4 * MIB
SMALL_BYTES = 100_000  # below what passthrough is used for: the daemon itself answers these reads
STAT_BYTES = 1
SUCCESSOR_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0
FILL_TIMEOUT_S = 300.0
POLL_S = 0.002


@dataclass(frozen=True)
class Line:
    """One quantity: `found` when the daemon was replaced, `undisturbed` when it was not."""

    what: str
    unit: str
    found: Spread
    undisturbed: Spread | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """The line as text, in the order of `COLUMNS`."""
        return self.what, self.unit, "-" if self.undisturbed is None else str(self.undisturbed), str(self.found)

    def as_json(self) -> dict[str, Any]:
        undisturbed = self.undisturbed and self.undisturbed.as_json()
        return {"what": self.what, "unit": self.unit, "undisturbed": undisturbed, "found": self.found.as_json()}


class Serving:
    """A mount of tierd, asked for the processes behind it each time: they change."""

    def __init__(self, tierd: Tierd) -> None:
        self.tierd = tierd
        self.mountpoint = tierd.mountpoint

    def record(self) -> MountRecord:
        """Who serves it now. MountError if nobody does."""
        try:
            return client.find(self.mountpoint)
        except TierdError as error:
            raise MountError(f"{error}; {error.hint}") from error

    def status(self) -> dict[str, Any]:
        """What `tierd status --json` prints."""
        status: dict[str, Any] = self.tierd.ask("/v1/status")
        return status

    def kill(self) -> tuple[int, float]:
        """SIGKILL for the daemon: its process ID, and when."""
        pid = self.record().pid
        at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return pid, at

    def succeeded(self, pid: int) -> None:
        """Waits until another daemon than `pid` answers its admin socket."""
        deadline = time.monotonic() + SUCCESSOR_TIMEOUT_S
        while self.record().pid == pid:
            if time.monotonic() > deadline:
                raise MountError(f"no daemon came after process {pid} within {SUCCESSOR_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        self.status()

    def upgrade(self) -> None:
        """Runs `tierd upgrade`. MountError if it fails, or the daemon is the same afterwards."""
        pid = self.record().pid
        mounts.tierd_command(["upgrade", str(self.mountpoint)], self.tierd.state_dir.parent)
        if self.record().pid == pid:
            raise MountError("tierd upgrade reported success, and the daemon is the same")

    def rss_mb(self) -> float:
        """Resident memory of the daemon, pages included that it shares with its template."""
        return psutil.Process(self.record().pid).memory_info().rss / MB

    def keeper_rss_mb(self) -> float:
        """Resident memory of the keeper."""
        return psutil.Process(self.record().keeper_pid).memory_info().rss / MB

    def await_copies(self, copies: int) -> None:
        """Waits until the node tier holds so many files. MountError after `FILL_TIMEOUT_S`."""
        deadline = time.monotonic() + FILL_TIMEOUT_S
        while (held := self.status()["node_tier"]["copies"]) < copies:
            if time.monotonic() > deadline:
                raise MountError(f"the node tier holds {held} of {copies} files after {FILL_TIMEOUT_S:.0f} s")
            time.sleep(0.1)


@contextlib.contextmanager
def serving(source: Path, mountpoint: Path) -> Iterator[Serving]:
    """An overlay of `source`; nothing comes to its node tier but what is opened."""
    with mounts.tierd_mount(source, mountpoint, prefetch="no") as tierd:
        if tierd.ask("/v1/status")["handover"] != "resend":
            raise MountError("this kernel cannot hand a mount over: it needs Linux 6.9")
        yield Serving(tierd)


def write_files(root: Path, names: Sequence[str], size_bytes: int) -> dict[str, bytes]:
    """Files of random bytes below `root`, by name; what they hold."""
    files = {name: random.randbytes(size_bytes) for name in names}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


class Tree:
    """What a load works on, below `source` and as the pods see it: hot and small files, names, a place to write."""

    def __init__(self, source: Path, mountpoint: Path, stat_files: int) -> None:
        hot = write_files(source, [f"{MODEL}/{number}.safetensors" for number in range(HOT_FILES)], HOT_BYTES)
        small = write_files(source, ["small"], SMALL_BYTES)
        names = [f"names/{number // 100:03}/{number % 100:02}" for number in range(stat_files)]
        write_files(source, names, STAT_BYTES)
        for name in ("renamed", "appended"):
            (source / name).mkdir()
        self.hot = {str(mountpoint / name): data for name, data in hot.items()}
        self.small = {str(mountpoint / name): data for name, data in small.items()}
        self.names = [str(mountpoint / name) for name in names]
        self.directories = {name: str(mountpoint / name) for name in ("renamed", "appended")}

    def fill(self, serving: Serving) -> None:
        """Loads the hot model until the node tier has it."""
        for name in self.hot:
            mounts.read_through(name)
        serving.await_copies(len(self.hot))

    def works(self) -> dict[str, Work]:
        """One thread of each kind. What `BY_KERNEL` names, the kernel answers by itself."""
        name, data = next(iter(self.hot.items()))
        ((small, small_data),) = self.small.items()
        return {
            "read of an open hot file": handover_load.reads(name, data, drop=False),
            "open, read, close of hot files": handover_load.opens(self.hot),
            "read through the daemon": handover_load.reads(small, small_data, drop=True),
            **self.source_works(),
        }

    def source_works(self) -> dict[str, Work]:
        """Those of them that need the source."""
        return {
            "stat": handover_load.stats(self.names, STAT_BYTES),
            "create, rename, unlink": handover_load.renames(self.directories["renamed"]),
            "append": handover_load.appends(self.directories["appended"]),
        }


BY_KERNEL = frozenset({"read of an open hot file"})


def stat_call(name: str | Path, size_bytes: int) -> Callable[[], None]:
    """Asks for the attributes of a file, and checks them."""

    def call() -> None:
        if os.stat(name).st_size != size_bytes:
            raise RuntimeError(f"wrong size of {name}")

    return call


def open_call(name: str | Path, data: bytes) -> Callable[[], None]:
    """Opens and reads a file, and checks it."""

    def call() -> None:
        if Path(name).read_bytes() != data:
            raise RuntimeError(f"wrong bytes of {name}")

    return call


def answered(calls: Mapping[str, Callable[[], None]], since: float | None = None) -> dict[str, float]:
    """Makes all calls at once, a thread for each; seconds from `since`, or now, to each one's end."""
    began = time.monotonic() if since is None else since
    ended: dict[str, float] = {}
    failed: list[str] = []

    def run(what: str, call: Callable[[], None]) -> None:
        try:
            call()
            ended[what] = time.monotonic() - began
        except Exception as error:
            failed.append(f"{what}: {error}")

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_TIMEOUT_S)
    if len(ended) < len(calls):
        raise RuntimeError("; ".join(failed) or f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
    return ended
