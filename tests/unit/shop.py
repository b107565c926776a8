"""What the tests of fills share: a source, a store, fillers with threads or worked by hand, and a tap on the source."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.copies import (
    MODEL,
    WAIT_SECONDS,
    ByHand,
    Ended,
    Reader,
    content,
    from_store,
    identify,
    identity_of,
    own_store,
    read_copy,
    small_chunks,
)
from tests.unit.descriptors import open_descriptors
from tierd.node import fetch as fetch_module
from tierd.node import fill as fill_module
from tierd.node import filler as filler_module
from tierd.node.fill import Fill
from tierd.node.filler import Filler
from tierd.node.store import Store
from tierd.node.wanted import Priority, Wanted

CHUNK = 64 << 10
BLOCK = 16 << 10


class Shop:
    """A source directory, a store, and fillers that end with the test."""

    def __init__(self, base: Path, store: Store) -> None:
        self.source = base / "source"
        self.source.mkdir()
        self.store = store
        self.ended = Ended()
        self.fillers: list[Filler] = []
        self.readers: list[Reader] = []

    def path(self, path: bytes) -> Path:
        return self.source / os.fsdecode(path)

    def open_source(self, path: bytes) -> int:
        return os.open(self.path(path), os.O_RDONLY)

    def write(self, name: str, size: int) -> bytes:
        data = content(name, size)
        (self.source / name).write_bytes(data)
        return data

    def filler(self, kind: type[Filler] = Filler, **more: Any) -> Any:
        """Started, unless it is worked by hand."""
        arguments = {
            "open_source": self.open_source,
            "identify": identify,
            "reserve": from_store(self.store),
            "finished": self.ended,
            **({"workers": 0} if kind is ByHand else {}),
            **more,
        }
        made = kind(self.store, **arguments)
        self.fillers.append(made)
        made.start()
        return made

    def begin(self, filler: Filler, name: str) -> Fill | None:
        """As an open does that has no reader yet."""
        fd = self.open_source(name.encode())
        try:
            return filler.begin(identity_of(self.source / name), name.encode(), MODEL, fd)
        finally:
            os.close(fd)

    def read(self, filler: Filler, name: str) -> Reader:
        """Open a file and be served from its fill."""
        reader = Reader(self.source / name)
        self.readers.append(reader)
        return reader.join(self.begin(filler, name))

    def want(self, filler: Filler, name: str, priority: Priority, model: bytes = MODEL) -> bool:
        return filler.want(Wanted(name.encode(), model, priority))

    def copy_of(self, name: str) -> bytes | None:
        copy = self.store.find(os.stat(self.source / name).st_ino)
        return read_copy(self.store, copy) if copy else None

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        for filler in self.fillers:
            if not filler.stop():  # a disk that is busy with other tests may take longer than a daemon that stops waits
                for thread in filler._threads:
                    thread.join(WAIT_SECONDS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, and no wait for a tick of the clock."""
    small_chunks(monkeypatch, CHUNK)
    monkeypatch.setattr(fetch_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(filler_module, "_TICK_SECONDS", 0.0)


@pytest.fixture
def shop(tmp_path: Path, small: None) -> Iterator[Shop]:
    before = open_descriptors()
    with own_store(tmp_path / "cache") as store:
        made = Shop(tmp_path, store)
        yield made
        made.close()
        assert [line for line in open_descriptors() - before if "/source/" in line or ".fill" in line] == []


class Tap:
    """Lets reads of the source through, one by one or all, and tells which wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = fetch_module.read_block
        self.open = threading.Event()
        self.asked = threading.Semaphore(0)
        self.before: Callable[[int], None] = lambda _: None
        monkeypatch.setattr(fetch_module, "read_block", self._read)

    def _read(self, fd: int, block: memoryview, offset: int) -> None:
        self.asked.release()
        assert self.open.wait(WAIT_SECONDS), "nobody opened the tap"
        self.before(offset)
        self._real(fd, block, offset)

    def wait_for_a_read(self) -> None:
        assert self.asked.acquire(timeout=WAIT_SECONDS)


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch, shop: Shop) -> Iterator[Tap]:
    made = Tap(monkeypatch)
    yield made
    made.open.set()


def break_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source answers reads with an error."""

    def fail(fd: int, block: memoryview, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fetch_module, "read_block", fail)


def names(jobs: list[Any]) -> list[tuple[bytes, int]]:
    return [(job.fill.path, job.chunk) for job in jobs]


def worked(shop: Shop, size: int, monkeypatch: pytest.MonkeyPatch, run: int = 4) -> tuple[Any, Reader]:
    """A filler worked by hand, and a reader of a file `x` whose space is reserved."""
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", run)
    shop.write("x", size)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    filler.do(filler.take())
    return filler, reader
