"""Programs that work on a mount without a pause, know what each call must do, and say what went otherwise.

Each runs in a process of its own until told to stop. A call that fails, hangs, or does its work twice or not at all is
a complaint. Calls that took long are kept with their times: they may span a moment at which the daemon was killed.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
SLOW_SECONDS = 0.02
"""Faster calls are not kept: no death of a daemon is over so soon."""
COMPLAINTS_MAX = 20


@dataclass
class Told:
    """What a worker did: calls made, those that took long as (start, end) of CLOCK_MONOTONIC, what went wrong."""

    name: str
    calls: int = 0
    slow: list[tuple[float, float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Worker:
    """One program's calls. `call` makes one and times it; a failure is a complaint and ends the step."""

    def __init__(self, name: str, seed: int) -> None:
        self.told = Told(name)
        self.random = random.Random(f"{name} {seed}")

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Time what is done inside; several calls in a row count as one."""
        started = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.told.calls += 1
            if ended - started > SLOW_SECONDS:
                self.told.slow.append((started, ended, what))

    def check(self, holds: bool, what: str) -> None:
        """Complain if it does not hold."""
        if not holds:
            self.told.wrong.append(what)

    def run(self, step: Callable[[Worker], None], stop: Event) -> None:
        """Take steps until told to stop, or too much went wrong."""
        while not stop.is_set() and len(self.told.wrong) < COMPLAINTS_MAX:
            try:
                step(self)
            except Exception:
                self.told.wrong.append(traceback.format_exc(limit=-3))


def rename2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2)."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(old))


def reads(files: Mapping[Path, bytes]) -> Callable[[Worker], None]:
    """Read files whole, in parts, and through mmap: every byte is right."""
    names = list(files)

    def step(w: Worker) -> None:
        path = w.random.choice(names)
        data, how = files[path], w.random.choice(["whole", "part", "mmap", "hold"])
        with w.call(f"open {path.name}"):
            fd = os.open(path, os.O_RDONLY)
        try:
            if how == "mmap":
                with w.call("mmap"), mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
                    w.check(view[:] == data, f"{path}: wrong bytes by mmap")
            elif how == "whole":
                with w.call("read"):
                    found = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
                w.check(found == data, f"{path}: {len(found)} bytes, not those of {len(data)}")
            else:
                for _ in range(8 if how == "hold" else 2):
                    at = w.random.randrange(len(data))
                    with w.call("pread"):
                        found = os.pread(fd, 70_000, at)
                    w.check(found == data[at : at + 70_000], f"{path}: wrong bytes at {at}")
                    if how == "hold":
                        time.sleep(w.random.random() * 0.05)
            with w.call("fstat"):
                w.check(os.fstat(fd).st_size == len(data), f"{path}: wrong size")
        finally:
            with w.call("close"):
                os.close(fd)

    return step


def appends(directory: Path) -> Callable[[Worker], None]:
    """Append numbered records to files, kept open and opened anew; each is there once, in order."""
    directory.mkdir(exist_ok=True)
    written: dict[Path, int] = {}

    def step(w: Worker) -> None:
        path = directory / f"log-{w.random.randrange(3)}"
        with w.call("open O_APPEND"):
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for _ in range(w.random.randrange(1, 30)):
            number = written.get(path, 0)
            with w.call("append"):
                os.write(fd, b"%08d\n" % number)
            written[path] = number + 1
        with w.call("close"):
            os.close(fd)
        with w.call("read back"):
            lines = path.read_bytes().splitlines()
        count = written[path]
        w.check(lines == [b"%08d" % n for n in range(count)], f"{path}: {len(lines)} records, not {count} in order")
        if count > 2000:
            with w.call("unlink"):
                path.unlink()
            written[path] = 0

    return step


def truncates(directory: Path) -> Callable[[Worker], None]:
    """Write and truncate one file, by name and by descriptor."""
    directory.mkdir(exist_ok=True)
    path = directory / "cut"

    def step(w: Worker) -> None:
        first, second = w.random.randrange(1, 5000), w.random.randrange(5000)
        with w.call("write anew"):
            path.write_bytes(b"a" * first)
        with w.call("truncate"):
            os.truncate(path, second)
        with w.call("append"), path.open("ab") as file:
            file.write(b"end")
        expected = (b"a" * first)[:second].ljust(second, b"\0") + b"end"
        with w.call("read back"):
            found = path.read_bytes()
        w.check(found == expected, f"{path}: {len(found)} bytes after {first}, truncate to {second}, 3 more")
        with w.call("open r+"), path.open("r+b") as file:
            file.truncate(0)
            w.check(os.fstat(file.fileno()).st_size == 0, f"{path}: not empty after ftruncate")

    return step


class Names:
    """Create, link, rename, exchange and remove names; each takes effect once. `there` is what must lie where. No
    exchange and no second names where the source is not `faithful`: JuiceFS 0.14 takes an exchange for a plain rename,
    and drops the content of a file when one of its names goes, with and without an overlay (docs/SEMANTICS.md)."""

    def __init__(self, directory: Path, *, faithful: bool) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.names = [directory / f"n{number}" for number in range(8)]
        self.there: dict[Path, bytes] = {}
        self.serial = 0
        self.faithful = faithful

    def step(self, w: Worker) -> None:
        """One call, or a few that belong together."""
        ways = [self.create, self.create, self.unlink, self.rename, self.replace]
        ways += [self.exchange, self.link] * self.faithful
        w.random.choice([*ways, self.symlink, self.directories, self.look])(w)

    def _free(self, w: Worker) -> Path | None:
        return next((name for name in w.random.sample(self.names, len(self.names)) if name not in self.there), None)

    def _some(self, w: Worker, count: int) -> list[Path]:
        """Names that are there; none if they are fewer."""
        return w.random.sample(list(self.there), count) if len(self.there) >= count else []

    def create(self, w: Worker) -> None:
        name = self._free(w)
        if name is None:
            return
        self.serial += 1
        self.there[name] = data = b"file %d" % self.serial
        with w.call("create O_EXCL"):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        with w.call("write"):
            os.write(fd, data)
        with w.call("close"):
            os.close(fd)

    def unlink(self, w: Worker) -> None:
        for name in self._some(w, 1):
            with w.call("unlink"):
                name.unlink()
            del self.there[name]

    def rename(self, w: Worker) -> None:
        new = self._free(w)
        for old in self._some(w, 1) if new is not None else []:
            assert new is not None
            with w.call("rename"):
                rename2(old, new, w.random.choice([0, _NOREPLACE]))
            self.there[new] = self.there.pop(old)

    def replace(self, w: Worker) -> None:
        """Between two names of one file rename(2) does nothing."""
        pair = self._some(w, 2)
        if pair and self.there[pair[0]] != self.there[pair[1]]:
            with w.call("rename over"):
                pair[0].rename(pair[1])
            self.there[pair[1]] = self.there.pop(pair[0])

    def exchange(self, w: Worker) -> None:
        pair = self._some(w, 2)
        if pair:
            with w.call("exchange"):
                rename2(*pair, _EXCHANGE)
            self.there[pair[0]], self.there[pair[1]] = self.there[pair[1]], self.there[pair[0]]

    def link(self, w: Worker) -> None:
        new = self._free(w)
        for old in self._some(w, 1) if new is not None else []:
            assert new is not None
            with w.call("link"):
                os.link(old, new)
            self.there[new] = self.there[old]

    def symlink(self, w: Worker) -> None:
        path = self.directory / "a link"
        with w.call("symlink"):
            os.symlink("somewhere", path)
        with w.call("readlink"):
            w.check(os.readlink(path) == "somewhere", "a link leads elsewhere")
        with w.call("unlink of a link"):
            path.unlink()

    def directories(self, w: Worker) -> None:
        path, other = self.directory / "inner", self.directory / "other"
        with w.call("mkdir"):
            path.mkdir()
        with w.call("create in it"):
            (path / "x").touch(exist_ok=False)
        with w.call("rename of a directory"):
            path.rename(other)
        with w.call("unlink in it"):
            (other / "x").unlink()
        with w.call("rmdir"):
            other.rmdir()

    def look(self, w: Worker) -> None:
        with w.call("list"):
            found = sorted(os.listdir(self.directory))
        w.check(found == sorted(name.name for name in self.there), f"{found}, not {sorted(self.there)}")
        for name, data in self.there.items():
            with w.call("read"):
                found_data = name.read_bytes()
            w.check(found_data == data, f"{name}: {found_data!r}, not {data!r}")


def open_unlinked(directory: Path) -> Callable[[Worker], None]:
    """Write and read files that have no name any more, or another file's."""
    directory.mkdir(exist_ok=True)
    path = directory / "gone"

    def step(w: Worker) -> None:
        with w.call("create"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with w.call("write"):
            os.write(fd, b"before")
        with w.call("unlink"):
            path.unlink()
        for number in range(5):
            time.sleep(w.random.random() * 0.1)
            with w.call("pwrite without a name"):
                os.pwrite(fd, b"%05d" % number, 6)
            with w.call("pread without a name"):
                w.check(os.pread(fd, 100, 0) == b"before%05d" % number, "an unlinked file lost what was written")
        with w.call("close"):
            os.close(fd)

    return step


def lists(directory: Path, count: int) -> Callable[[Worker], None]:
    """List a large directory that does not change, slowly: every name once."""
    directory.mkdir(exist_ok=True)
    expected = {f"entry-{number:05}" for number in range(count)}
    for name in expected:
        (directory / name).touch()

    def step(w: Worker) -> None:
        found = []
        with w.call("scandir"):
            entries = os.scandir(directory)
        with entries:
            for number, entry in enumerate(entries):
                found.append(entry.name)
                if number % 40 == 0:
                    time.sleep(0.01)
        w.check(len(found) == len(set(found)), f"{directory}: {len(found) - len(set(found))} names twice")
        w.check(set(found) == expected, f"{directory}: {len(expected - set(found))} names missing")
        for name in w.random.sample(sorted(expected), 20):
            with w.call("stat"):
                os.stat(directory / name)

    return step


class Crew:
    """Workers in processes of their own, for the length of a `with`; `told` afterwards."""

    def __init__(self, steps: Mapping[str, Callable[[Worker], None]], seed: int) -> None:
        self._context = multiprocessing.get_context("fork")
        self._stop = self._context.Event()
        self._steps = steps
        self._seed = seed
        self._running: list[tuple[Any, Connection]] = []
        self.told: list[Told] = []

    def __enter__(self) -> Crew:
        for name, step in self._steps.items():
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=self._work, args=(name, step, theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))
        return self

    def _work(self, name: str, step: Callable[[Worker], None], pipe: Connection) -> None:
        worker = Worker(name, self._seed)
        worker.run(step, self._stop)
        pipe.send(worker.told)

    def failed(self) -> bool:
        """Somebody gave up: too much went wrong."""
        return any(not process.is_alive() for process, _ in self._running)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for (process, pipe), name in zip(self._running, self._steps, strict=True):
            told = pipe.recv() if pipe.poll(30) else Told(name, wrong=["it hangs"])
            self.told.append(told)
            process.kill()
            process.join()
