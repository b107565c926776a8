"""What pods do to a mount whose daemon is replaced: calls without a pause, in threads of a process of its own.

Every call is timed, and every answer checked: a call that fails, or answers wrongly, is a failure. Times are those of
CLOCK_MONOTONIC, in seconds, which all processes share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import mounts

FAILURES_MAX = 100
COMPLAINTS_MAX = 5
READ_BYTES = 64 * 1024
RECORD = b"%08d\n"
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0


class Calls:
    """The calls of one thread, in order: when each began and was answered; how many failed, and how."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.began = array("d")
        self.ended = array("d")
        self.failed = 0
        self.complaints: list[str] = []

    def fail(self, what: str) -> None:
        """One call was not answered as it must be."""
        self.failed += 1
        if len(self.complaints) < COMPLAINTS_MAX:
            self.complaints.append(f"{self.kind}: {what}")

    def longest(self, since: float, until: float) -> float:
        """Seconds of the longest call that was in work between two moments; 0 if none was."""
        first, last = bisect_left(self.ended, since), bisect_left(self.began, until)
        return max((self.ended[i] - self.began[i] for i in range(first, last)), default=0.0)

    def waited(self, at: float) -> float | None:
        """Seconds from a moment to the answer of the call that was in flight then; None if none was."""
        last = bisect_left(self.began, at) - 1
        return self.ended[last] - at if last >= 0 and self.ended[last] > at else None


class Worker:
    """One thread's side: times and counts what it calls. `slot` of the shared numbers says since when it waits."""

    def __init__(self, calls: Calls, shared: Any, slot: int) -> None:
        self.calls = calls
        self.random = random.Random(calls.kind)
        self._shared = shared
        self._slot = slot
        self._parent = os.getppid()

    def goes_on(self) -> bool:
        """Whether there is more to do."""
        told = self._shared[len(self._shared) - 1]
        return not told and os.getppid() == self._parent and self.calls.failed < FAILURES_MAX

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Time the one call that is made inside."""
        began = self._shared[self._slot] = time.monotonic()
        try:
            yield
        finally:
            self.calls.began.append(began)
            self.calls.ended.append(time.monotonic())
            self._shared[self._slot] = 0.0

    def check(self, holds: bool, what: str) -> None:
        """A failure unless it holds."""
        if not holds:
            self.calls.fail(what)


Work = Callable[[Worker], None]
"""Calls until the worker need not go on; begun anew after a call that failed."""


def opens(files: Mapping[str, bytes]) -> Work:
    """Open one of some files, read a part of it, close it."""
    names = list(files)

    def work(w: Worker) -> None:
        while w.goes_on():
            name = w.random.choice(names)
            data, at = files[name], w.random.randrange(len(files[name]))
            with w.call():
                fd = os.open(name, os.O_RDONLY)
            try:
                with w.call():
                    got = os.pread(fd, READ_BYTES, at)
                w.check(got == data[at : at + READ_BYTES], f"wrong bytes of {name} at {at}")
            finally:
                with w.call():
                    os.close(fd)

    return work


def reads(name: str, data: bytes, *, drop: bool) -> Work:
    """Read parts of a file that stays open; with `drop` its pages are dropped first, so that the daemon is asked."""

    def work(w: Worker) -> None:
        fd = os.open(name, os.O_RDONLY)
        try:
            while w.goes_on():
                at = w.random.randrange(len(data))
                if drop:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                with w.call():
                    got = os.pread(fd, READ_BYTES, at)
                w.check(got == data[at : at + READ_BYTES], f"wrong bytes of {name} at {at}")
        finally:
            os.close(fd)

    return work


def stats(names: Sequence[str], size: int) -> Work:
    """Ask for the attributes of files in turn: of so many that the kernel does not know them any longer."""

    def work(w: Worker) -> None:
        for name in itertools.cycle(names):
            if not w.goes_on():
                return
            with w.call():
                st = os.stat(name)
            w.check(st.st_size == size, f"wrong size of {name}")

    return work


def renames(directory: str) -> Work:
    """Make a file that must not exist, write it, rename it, remove it."""
    numbers = itertools.count()

    def work(w: Worker) -> None:
        while w.goes_on():
            made = f"{directory}/{next(numbers)}"
            with w.call():
                fd = os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                with w.call():
                    w.check(os.write(fd, b"data") == 4, f"short write to {made}")
            finally:
                with w.call():
                    os.close(fd)
            with w.call():
                os.rename(made, made + ".renamed")
            with w.call():
                os.unlink(made + ".renamed")

    return work


def appends(directory: str) -> Work:
    """Append numbered records to a file that stays open; at the end each is there once, in order."""
    tries = itertools.count()

    def work(w: Worker) -> None:
        name, written = f"{directory}/{next(tries)}", 0
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        try:
            while w.goes_on():
                with w.call():
                    os.write(fd, RECORD % written)
                written += 1
        finally:
            os.close(fd)
        found = Path(name).read_bytes()
        w.check(found == b"".join(RECORD % number for number in range(written)), f"{name} has not each record once")

    return work


class Load:
    """A load that runs. `calls` are there once it has ended."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self.calls: list[Calls] = []

    def shortest_wait(self) -> float:
        """Seconds for which all threads have been waiting for an answer; 0 if one of them does not."""
        began = list(self._shared[:-1])
        return time.monotonic() - max(began) if all(began) else 0.0

    def longest_wait(self) -> float:
        """Seconds for which some thread has been waiting for an answer; 0 if none does."""
        return max((time.monotonic() - began for began in self._shared[:-1] if began), default=0.0)

    @property
    def failed(self) -> int:
        """Calls that failed, or were answered wrongly."""
        return sum(calls.failed for calls in self.calls)

    @property
    def complaints(self) -> list[str]:
        """Some of them, in words."""
        return [complaint for calls in self.calls for complaint in calls.complaints]

    def waits(self, moments: Iterable[float], kinds: Iterable[str]) -> list[float]:
        """Seconds from each moment to the answer of each call of such threads that was in flight then."""
        some = [calls for calls in self.calls if calls.kind in set(kinds)]
        return [wait for at in moments for calls in some if (wait := calls.waited(at)) is not None]


@contextlib.contextmanager
def running(works: Mapping[str, Work]) -> Iterator[Load]:
    """Runs a thread for each work, by kind, until the end of the block. RuntimeError if that ends badly."""
    context = get_context("fork")
    shared: Any = context.RawArray("d", len(works) + 1)  # since when each thread waits, and the last one says stop
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(works, shared, sender), daemon=True)
    load = Load(shared)
    try:
        process.start()
        sender.close()
        _receive(receiver, START_TIMEOUT_S, "begin")
        yield load
        shared[len(works)] = 1.0
        load.calls = _receive(receiver, END_TIMEOUT_S, "end")
    finally:
        shared[len(works)] = 1.0
        with mounts.deferred():
            if process.pid is not None:
                process.join(1.0)
                process.kill()
                process.join(mounts.EXIT_TIMEOUT_S)


def _receive(receiver: Connection, timeout_s: float, what: str) -> Any:
    try:
        if not receiver.poll(timeout_s):
            raise RuntimeError(f"the load did not {what} within {timeout_s:.0f} s")
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the load did not {what}: its process died") from None


def _run(works: Mapping[str, Work], shared: Any, sender: Connection) -> None:
    mounts.leave_signals_to_parent()
    workers = [Worker(Calls(kind), shared, slot) for slot, kind in enumerate(works)]
    threads = [
        threading.Thread(target=_work, args=(work, worker), daemon=True)
        for work, worker in zip(works.values(), workers, strict=True)
    ]
    for thread in threads:
        thread.start()
    while not all(worker.calls.ended or worker.calls.failed for worker in workers):
        time.sleep(0.01)
    sender.send(None)
    for thread in threads:
        thread.join()
    sender.send([worker.calls for worker in workers])


def _work(work: Work, worker: Worker) -> None:
    while worker.goes_on():
        try:
            work(worker)
        except Exception as error:
            worker.calls.fail(f"{type(error).__name__}: {error}")
