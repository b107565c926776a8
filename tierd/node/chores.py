"""Small jobs that nobody waits for, in threads of their own: bounded, and one of a kind at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import structlog

log = structlog.get_logger(__name__)

_JOIN_SECONDS = 2.0


class Chores:
    """Runs jobs in the order in which they came. One that fails is logged; `dropped` counts what did not fit."""

    def __init__(self, name: str, *, threads: int = 1, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._waiting: OrderedDict[Hashable, Callable[[], None]] = OrderedDict()
        self._running: set[Hashable] = set()
        self._change = threading.Condition()
        self._stopped = False
        self.dropped = 0
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """End after the jobs in work; the others are forgotten. False if one of those did not end."""
        with self._change:
            self._stopped = True
            self._waiting.clear()
            self._change.notify_all()
        return join_all(self._threads)

    def add(self, key: Hashable, job: Callable[[], None]) -> None:
        """Run `job` soon, unless one with this key waits already."""
        with self._change:
            if key in self._waiting or self._stopped:
                return
            if len(self._waiting) >= self._capacity:
                self.dropped += 1
                return
            self._waiting[key] = job
            self._change.notify()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def _work(self) -> None:
        while (item := self._take()) is not None:
            key, job = item
            try:
                job()
            except OSError as error:
                log.warning("chore_failed", chore=str(key), reason=error.strerror)
            except Exception:
                log.exception("chore_failed", chore=str(key))
            with self._change:
                self._running.discard(key)
                self._change.notify_all()

    def _take(self) -> tuple[Hashable, Callable[[], None]] | None:
        with self._change:
            while not self._stopped:
                for key in self._waiting:
                    if key not in self._running:
                        job = self._waiting.pop(key)
                        self._running.add(key)
                        return key, job
                self._change.wait()
            return None


def join_all(threads: Iterable[threading.Thread]) -> bool:
    """Wait for threads, as far as they were started, for two seconds in all; a source that stalls keeps its own: False
    then."""
    threads = list(threads)
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        if thread.ident is not None:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
