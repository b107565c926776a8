"""Fills: one per file, ranges as they land, and a source that changes, fails, stalls or runs out of space meanwhile."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import (
    MODEL,
    WAIT_SECONDS,
    ByHand,
    Ended,
    Reader,
    content,
    identify,
    identity_of,
    no_need,
    own_store,
    read_copy,
    small_chunks,
)
from tests.unit.descriptors import open_descriptors
from tierd.node import fill as fill_module
from tierd.node.copies import Identity
from tierd.node.fill import WORKERS, Fill, Filler, Outcome, Priority, Refused, Wanted
from tierd.node.store import Store

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
            "make_room": no_need,
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
            filler.stop()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, and no wait for a tick of the clock."""
    small_chunks(monkeypatch, CHUNK)
    monkeypatch.setattr(fill_module, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(fill_module, "_TICK_SECONDS", 0.0)


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
        self._real = fill_module._read_block
        self.open = threading.Event()
        self.asked = threading.Semaphore(0)
        self.before: Callable[[int], None] = lambda _: None
        monkeypatch.setattr(fill_module, "_read_block", self._read)

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


# --- one fill per file ---


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 20 * CHUNK + 77])
def test_a_file_becomes_a_copy(shop: Shop, size: int) -> None:
    data = shop.write("x", size)
    filler = shop.filler()
    reader = shop.read(filler, "x")
    assert reader.read(0, size + 100) == data
    fill, copy, reason = shop.ended.next()
    assert (fill.outcome, reason, fill.bytes_landed) == (Outcome.COMPLETE, "", size)
    assert copy is not None
    assert (copy.path, copy.model, copy.identity) == (b"x", MODEL, identity_of(shop.source / "x"))
    assert (shop.copy_of("x"), filler.source_bytes, filler.active()) == (data, size, [])
    assert reader.target.fd != reader.source_fd, "the rest of this open comes from the node"
    assert reader.read(0, size) == data
    assert shop.store.verify(copy, deep=True) is None


def test_the_real_chunk_size(tmp_path: Path) -> None:
    with own_store(tmp_path / "cache") as store:
        shop = Shop(tmp_path, store)
        data = shop.write("x", 9 << 20)
        reader = shop.read(shop.filler(), "x")
        assert reader.read((5 << 20) - 7, 100) == data[(5 << 20) - 7 :][:100]
        assert shop.ended.outcome() is Outcome.COMPLETE
        assert shop.copy_of("x") == data
        shop.close()


def test_many_openers_at_once_share_one_fill(shop: Shop, tap: Tap) -> None:
    data = shop.write("x", 30 * CHUNK + 5)
    filler = shop.filler()
    start = threading.Barrier(16)
    found: list[tuple[Reader, bytes]] = []

    def open_and_read(number: int) -> None:
        start.wait(WAIT_SECONDS)
        reader = shop.read(filler, "x")
        found.append((reader, reader.read(number * CHUNK, 3 * CHUNK)))

    threads = [threading.Thread(target=open_and_read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    tap.open.set()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert len({id(reader.fill) for reader, _ in found}) == 1
    assert sorted(read for _, read in found) == sorted(data[n * CHUNK : (n + 3) * CHUNK] for n in range(16))
    assert filler.source_bytes == len(data), "each byte was fetched once"
    assert shop.ended.told.empty()
    assert len(shop.store) == 1


def test_another_version_of_a_file_on_its_way_gets_no_fill(shop: Shop) -> None:
    shop.write("x", CHUNK)
    filler = shop.filler(ByHand)
    fill = shop.begin(filler, "x")
    assert shop.begin(filler, "x") is fill
    os.utime(shop.source / "x", ns=(1, 1))
    assert shop.begin(filler, "x") is None


# --- ranges as they land ---


def test_ranges_land_in_any_order_and_each_read_goes_on_with_its_own(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_module, "_NEARLY_THERE_CHUNKS", 0)
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", 1)
    monkeypatch.setattr(fill_module, "_STREAMS_PER_FILE", 6)
    data = shop.write("x", 6 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    early = reader.ask(10, 20)
    assert not early.is_set()
    filler.do(filler.take())  # the space is reserved
    assert not early.is_set()
    asks = {
        "0": early,
        "2": reader.ask(2 * CHUNK, CHUNK),
        "2 and 3": reader.ask(3 * CHUNK - 1, 2),
        "5": reader.ask(5 * CHUNK, 10 * CHUNK),
    }
    jobs = {job.chunk: job for job in (filler.take() for _ in range(6))}
    assert sorted(jobs) == [0, 1, 2, 3, 4, 5]

    def ready() -> set[str]:
        return {name for name, event in asks.items() if event.is_set()}

    for chunk, then in (
        (4, set()),
        (5, {"5"}),
        (3, {"5"}),
        (2, {"5", "2", "2 and 3"}),
        (1, {"5", "2", "2 and 3"}),
        (0, {"5", "2", "2 and 3", "0"}),
    ):
        filler.do(jobs[chunk])
        assert ready() == then
        assert os.pread(reader.target.fd, CHUNK, chunk * CHUNK) == data[chunk * CHUNK : (chunk + 1) * CHUNK]
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert shop.copy_of("x") == data


def test_a_read_of_what_is_there_does_not_wait(shop: Shop) -> None:
    data = shop.write("x", 3 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    reader.ask(CHUNK, 1)
    filler.do(filler.take())
    filler.do(filler.take())
    assert reader.read(CHUNK, CHUNK) == data[CHUNK : 2 * CHUNK]
    assert not reader.ask(CHUNK, CHUNK + 1).is_set()


@pytest.mark.parametrize("offset", [2 * CHUNK, 2 * CHUNK + 1, 50 * CHUNK])
@pytest.mark.parametrize("reserved", [False, True])
def test_a_read_beyond_the_end_is_not_parked_for_ever(shop: Shop, offset: int, reserved: bool) -> None:
    """The kernel may believe that the file is longer: it was truncated beneath a moment ago."""
    shop.write("x", 2 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    if reserved:
        filler.do(filler.take())
    assert reader.read(offset, 4096) == b""
    assert reader.ask(0, 0).is_set()


def names(jobs: list[Any]) -> list[tuple[bytes, int]]:
    return [(job.fill.path, job.chunk) for job in jobs]


def test_what_readers_wait_for_comes_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", 4)
    shop.write("a", 10 * CHUNK)
    shop.write("b", 10 * CHUNK)
    filler = shop.filler(ByHand)
    first, second = shop.read(filler, "a"), shop.read(filler, "b")
    for _ in range(2):
        filler.do(filler.take())
    second.ask(7 * CHUNK, 2 * CHUNK)
    first.ask(3 * CHUNK, 1)
    second.ask(8 * CHUNK, 1)
    order = [filler.take() for _ in range(4)]
    assert names(order) == [
        (b"a", 3),
        (b"b", 7),
        (b"a", 4),
        (b"b", 8),
    ], "then runs on from where a reader is"
    assert filler.take() is None, "two streams are in each"
    for job in order:
        filler.do(job)
    assert filler.finish() == 16


# --- streams ---


def worked(shop: Shop, size: int, monkeypatch: pytest.MonkeyPatch, run: int = 4) -> tuple[Any, Reader]:
    """A filler worked by hand, and a reader of a file `x` whose space is reserved."""
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", run)
    shop.write("x", size)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    filler.do(filler.take())
    return filler, reader


def test_a_worker_follows_its_run_and_then_takes_the_next_free_one(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    filler, _ = worked(shop, 16 * CHUNK, monkeypatch)
    job, other = filler.take(), filler.take()
    assert names([job, other]) == [(b"x", 0), (b"x", 4)]
    seen = []
    while job is not None:
        filler.do(job)
        seen.append(job.chunk)
        job = filler.take(0.0, job)
    assert seen == [0, 1, 2, 3, *range(8, 16)], "all but the run of the other"
    while other is not None:
        filler.do(other)
        other = filler.take(0.0, other)
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_a_stream_that_is_alone_goes_on_beyond_its_run(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    filler, _ = worked(shop, 10 * CHUNK, monkeypatch)
    job, seen = filler.take(), []
    while job is not None:
        filler.do(job)
        seen.append(job.chunk)
        job = filler.take(0.0, job)
    assert seen == list(range(10))
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_two_streams_are_in_a_file_whoever_comes_between(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a worker is between two chunks, another one may take its place; it must not come back as a third."""
    filler, reader = worked(shop, 16 * CHUNK, monkeypatch)
    first, second = filler.take(), filler.take()
    assert filler.take() is None
    filler.do(first)
    reader.fill._front = 12
    third = filler.take()
    assert third.chunk == 12
    back = filler.take(0.0, first)
    assert back is None, "a third stream"
    for job in (second, third):
        filler.do(job)
    filler.finish()
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_no_more_than_two_streams_by_threads(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody waits for a chunk."""
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", 4)
    most = 0
    real = Fill._take

    def take(self: Fill, chunk: int) -> int:
        nonlocal most
        taken = real(self, chunk)
        most = max(most, self.in_work)
        return taken

    monkeypatch.setattr(Fill, "_take", take)
    shop.write("x", 200 * CHUNK)
    filler = shop.filler(workers=6)
    shop.read(filler, "x")
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert most == 2


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_a_chunk_that_a_stream_will_reach_is_left_to_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    filler, reader = worked(shop, 16 * CHUNK, monkeypatch, run=16)
    stream = filler.take()
    asked = reader.ask(ahead * CHUNK, 1)
    other = filler.take()
    assert (other.chunk if other else None) == (3 if ahead == 3 else None)
    while not asked.is_set():
        assert stream is not None
        filler.do(stream)
        if other is not None:
            filler.do(other)
        stream, other = filler.take(0.0, stream), None
    if stream is not None:
        filler.do(stream)
    filler.finish()


def test_a_chunk_left_to_a_stream_that_went_elsewhere_is_fetched_by_another(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, reader = worked(shop, 8 * CHUNK, monkeypatch, run=16)
    stream = filler.take()
    asked = reader.ask(2 * CHUNK, 1)
    assert filler.take() is None
    filler.do(stream)  # and its worker takes up another file
    rescue = filler.take()
    assert rescue.chunk == 2
    filler.do(rescue)
    assert asked.is_set()
    filler.finish()


def test_a_chunk_left_to_a_stream_that_fails_is_read_from_the_source(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, reader = worked(shop, 8 * CHUNK, monkeypatch, run=16)
    stream = filler.take()
    asked = reader.ask(2 * CHUNK, 10)
    assert filler.take() is None
    break_reads(monkeypatch)
    filler.do(stream)
    assert shop.ended.outcome() is Outcome.FAILED
    assert asked.is_set()
    assert reader.target.fd == reader.source_fd


def test_every_reader_that_jumps_about_is_served(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four workers, many readers of several files at random places: nobody's chunk is left to nobody."""
    monkeypatch.setattr(fill_module, "_RUN_CHUNKS", 4)
    files = {f"{number}": shop.write(f"{number}", (20 + number) * CHUNK + number) for number in range(3)}
    filler = shop.filler()
    wrong: list[object] = []

    def jump(seed: int) -> None:
        dice = random.Random(seed)
        name = f"{seed % 3}"
        reader = shop.read(filler, name)
        for _ in range(30):
            offset, size = dice.randrange(len(files[name])), dice.randrange(1, 3 * CHUNK)
            try:
                if reader.read(offset, size) != files[name][offset : offset + size]:
                    wrong.append((seed, offset, size))
            except AssertionError as error:
                wrong.append((seed, offset, size, error))

    threads = [threading.Thread(target=jump, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_SECONDS)
    assert wrong == []
    assert sorted(shop.ended.outcome().value for _ in files) == ["complete"] * 3


def test_a_stream_reads_on_by_the_same_descriptor(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its position is what a network file system reads ahead from."""
    by: list[tuple[int, int]] = []
    real = fill_module._read_block

    def read(fd: int, block: memoryview, offset: int) -> None:
        by.append((offset // CHUNK, fd))
        real(fd, block, offset)

    monkeypatch.setattr(fill_module, "_read_block", read)
    filler, reader = worked(shop, 16 * CHUNK, monkeypatch)
    first, second = filler.take(), filler.take()
    while first is not None and first.chunk < 3:
        filler.do(first)
        filler.do(second)
        first, second = filler.take(0.0, first), filler.take(0.0, second)
    of = {chunk: {fd for at, fd in by if at == chunk} for chunk, _ in by}
    assert of[0] == of[1] == of[2] != of[4] == of[5] == of[6]
    assert all(len(fds) == 1 for fds in of.values())
    assert reader.fill.source_fd not in of[0] | of[4]
    for job in (first, second):
        if job is not None:
            filler.do(job)
    filler.finish()
    assert len({fd for _, fd in by}) <= 3


def test_the_source_is_opened_without_the_lock(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open of a source that hangs must not hold up the event loop, which takes the lock for attach and detach."""
    filler, reader = worked(shop, 4 * CHUNK, monkeypatch)
    real = os.open
    held: list[bool] = []

    def opened(path: Any, *more: Any, **keys: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            free = threading.Event()

            def probe() -> None:
                reader.fill.ready(0, 1, lambda: None)
                free.set()

            threading.Thread(target=probe, daemon=True).start()
            held.append(not free.wait(1.0))
        return real(path, *more, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        filler.do(filler.take())
    filler.finish()
    assert held == [False]


def test_no_descriptor_for_a_stream_sends_readers_to_the_source(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    filler, reader = worked(shop, 4 * CHUNK, monkeypatch)
    real = os.open

    def opened(path: Any, *more: Any, **keys: Any) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *more, **keys)

    asked = reader.ask(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        filler.do(filler.take())
    assert shop.ended.outcome() is Outcome.FAILED
    assert asked.is_set()


def test_a_file_that_is_read_backwards_is_filled_whole(shop: Shop) -> None:
    data = shop.write("x", 5 * CHUNK + 1)
    filler = shop.filler()
    reader = shop.read(filler, "x")
    for chunk in range(5, -1, -1):
        assert reader.read(chunk * CHUNK, CHUNK) == data[chunk * CHUNK :][:CHUNK]
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert shop.copy_of("x") == data


def test_a_reader_that_leaves_does_not_end_the_fill(shop: Shop, tap: Tap) -> None:
    data = shop.write("x", 3 * CHUNK)
    filler = shop.filler()
    reader = shop.read(filler, "x")
    tap.wait_for_a_read()
    shop.readers.remove(reader)
    reader.close()
    tap.open.set()
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert shop.copy_of("x") == data


def test_a_reader_that_comes_too_late_reads_the_source(shop: Shop) -> None:
    data = shop.write("x", CHUNK)
    filler = shop.filler(ByHand)
    fill = shop.begin(filler, "x")
    filler.finish()
    assert shop.ended.outcome() is Outcome.COMPLETE
    reader = Reader(shop.source / "x").join(fill)
    shop.readers.append(reader)
    assert (reader.target.gate, reader.target.fd) == (None, reader.source_fd)
    assert reader.read(0, CHUNK) == data


# --- the source changes ---


def test_a_source_rewritten_during_the_fill(shop: Shop, tap: Tap) -> None:
    shop.write("x", 3 * CHUNK)
    filler = shop.filler()
    reader = shop.read(filler, "x")
    tap.wait_for_a_read()
    new = content("new", 3 * CHUNK)
    with (shop.source / "x").open("r+b") as file:
        file.write(new)
    tap.open.set()
    assert shop.ended.outcome() is Outcome.CHANGED
    assert reader.target.fd == reader.source_fd
    assert reader.read(0, 3 * CHUNK) == new
    assert (len(shop.store), os.listdir(shop.store.directory)) == (0, [])
    assert shop.begin(filler, "x") is not None, "the new version is welcome at once"
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert shop.copy_of("x") == new


def test_a_rewrite_of_the_same_size_and_time(shop: Shop, tap: Tap) -> None:
    shop.write("x", 3 * CHUNK)
    filler = shop.filler()
    reader = shop.read(filler, "x")
    tap.wait_for_a_read()
    st = (shop.source / "x").stat()
    with (shop.source / "x").open("r+b") as file:
        file.write(b"other")
    os.utime(shop.source / "x", ns=(st.st_atime_ns, st.st_mtime_ns))
    tap.open.set()
    assert shop.ended.outcome() is Outcome.CHANGED
    assert reader.read(0, 5) == b"other"
    assert len(shop.store) == 0


def test_a_change_before_the_fill_began(shop: Shop) -> None:
    shop.write("x", CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    parked = reader.ask(0, 1)
    os.utime(shop.source / "x", ns=(1, 1))
    filler.do(filler.take())
    assert shop.ended.outcome() is Outcome.CHANGED
    assert parked.is_set()
    assert (shop.store.reserved_bytes, os.listdir(shop.store.directory)) == (0, [])


def test_a_truncation_during_the_fill(shop: Shop) -> None:
    shop.write("x", 3 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    filler.do(filler.take())
    parked = [reader.ask(chunk * CHUNK, 1) for chunk in range(3)]
    filler.do(filler.take())
    os.truncate(shop.source / "x", CHUNK + 10)
    filler.do(filler.take())
    assert shop.ended.outcome() is Outcome.CHANGED
    assert all(event.is_set() for event in parked)
    assert reader.target.fd == reader.source_fd
    assert len(reader.read(0, 3 * CHUNK)) == CHUNK + 10
    assert filler.take() is None


def test_a_file_deleted_during_its_fill_is_read_to_its_end_and_not_kept(shop: Shop) -> None:
    """Its inode number is free for another file once the last descriptor is closed."""
    data = shop.write("x", 2 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    filler.do(filler.take())
    os.unlink(shop.source / "x")
    filler.finish()
    assert shop.ended.outcome() is Outcome.CHANGED, "the link count went, and ctime with it"
    assert reader.read(0, 2 * CHUNK) == data


# --- failures ---


def break_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source answers reads with an error."""

    def fail(fd: int, block: memoryview, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fill_module, "_read_block", fail)


def test_a_read_error_ends_the_fill_and_readers_go_on(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shop.write("x", 3 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")
    parked = reader.ask(2 * CHUNK, 10)
    with monkeypatch.context() as patch:
        break_reads(patch)
        filler.finish()
    fill, copy, reason = shop.ended.next()
    assert (fill.outcome, copy, reason) == (Outcome.FAILED, None, "Input/output error")
    assert parked.is_set()
    assert reader.read(2 * CHUNK, 10) == data[2 * CHUNK :][:10]
    assert os.listdir(shop.store.directory) == []
    assert shop.begin(filler, "x") is None, "not again at once"
    assert shop.want(filler, "x", Priority.ASKED)
    filler.finish()
    assert shop.ended.told.empty()
    now = fill_module.time.monotonic()
    monkeypatch.setattr(fill_module.time, "monotonic", lambda: now + fill_module._COOLING_SECONDS + 1)
    assert shop.begin(filler, "x") is not None, "but later"
    filler.finish()
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_what_cools_is_bounded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "_COOLING_MAX", 3)
    filler = shop.filler(ByHand)
    for number in range(5):
        shop.write(f"{number}", 1)
        shop.begin(filler, f"{number}")
        with monkeypatch.context() as patch:
            break_reads(patch)
            filler.finish()
        assert shop.ended.outcome() is Outcome.FAILED
    assert [shop.begin(filler, f"{number}") is None for number in range(5)] == [False, False, True, True, True]
    filler.finish()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_no_space_at_any_step(shop: Shop, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    data = shop.write("x", 3 * CHUNK)
    filler = shop.filler(ByHand)
    reader = shop.read(filler, "x")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        parked = reader.ask(0, 3 * CHUNK)
        filler.finish()
    assert shop.ended.outcome() is Outcome.NO_SPACE
    assert parked.is_set()
    assert reader.target.fd == reader.source_fd
    assert reader.read(0, 3 * CHUNK) == data
    assert (os.listdir(shop.store.directory), shop.store.reserved_bytes) == ([], 0)
    assert shop.begin(filler, "x") is None


def test_a_refused_fill_sends_its_readers_to_the_source(shop: Shop) -> None:
    data = shop.write("x", 2 * CHUNK)

    def refuse(model: bytes, size: int, priority: Priority) -> None:
        raise Refused(f"{size} bytes for {model!r} at {priority.name}")

    filler = shop.filler(make_room=refuse)
    reader = shop.read(filler, "x")
    assert reader.read(0, 2 * CHUNK) == data
    fill, copy, reason = shop.ended.next()
    assert (fill.outcome, copy) == (Outcome.REFUSED, None)
    assert reason == f"{2 * CHUNK} bytes for {MODEL!r} at READER"
    assert reader.target.fd == reader.source_fd
    assert os.listdir(shop.store.directory) == []


def test_too_few_descriptors_for_a_fill_are_no_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write("x", CHUNK)
    filler = shop.filler(ByHand)

    def fail(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", fail)
    assert shop.begin(filler, "x") is None


def test_no_two_fills_count_on_the_same_room(shop: Shop) -> None:
    """Judging room and reserving it is one step, however many workers start fills."""
    limit = 3 * CHUNK
    together = threading.Barrier(2)

    def make_room(model: bytes, size: int, priority: Priority) -> None:
        if shop.store.reserved_bytes + shop.store.held_bytes + size > limit:
            raise Refused("full")
        try:
            together.wait(0.2)  # one that could be judged at the same time now would be
        except threading.BrokenBarrierError:
            together.reset()

    filler = shop.filler(make_room=make_room)
    for number in range(4):
        shop.write(f"{number}", 2 * CHUNK)
        shop.begin(filler, f"{number}")
    outcomes = sorted(shop.ended.outcome().value for _ in range(4))
    assert outcomes == ["complete", "refused", "refused", "refused"]
    assert shop.store.held_bytes == 2 * CHUNK


# --- what is wanted ---


def test_a_file_is_wanted_once_and_at_its_most_urgent(shop: Shop) -> None:
    for name in "abc":
        shop.write(name, 1)
    filler = shop.filler(ByHand)
    assert shop.want(filler, "a", Priority.PREFETCH)
    assert shop.want(filler, "b", Priority.PREFETCH)
    assert not shop.want(filler, "a", Priority.PREFETCH)
    assert shop.want(filler, "c", Priority.ASKED)
    assert shop.want(filler, "b", Priority.ASKED), "more urgent than before"
    assert not shop.want(filler, "b", Priority.PREFETCH)
    assert [(one.path, one.priority.name) for one in filler.queued()] == [
        (b"c", "ASKED"),
        (b"b", "ASKED"),
        (b"a", "PREFETCH"),
    ]
    filler.finish()
    assert [shop.ended.next()[0].path for _ in range(3)] == [b"c", b"b", b"a"]
    assert shop.want(filler, "a", Priority.ASKED), "the filler does not know; whoever asks does"
    assert filler.finish() == 1
    assert shop.ended.told.empty(), "there is a copy already"


def test_a_file_on_its_way_is_not_wanted_again(shop: Shop) -> None:
    shop.write("x", 1)
    filler = shop.filler(ByHand)
    shop.begin(filler, "x")
    assert not shop.want(filler, "x", Priority.ASKED)
    filler.finish()


def test_a_wanted_file_that_somebody_opened_meanwhile_is_filled_once(shop: Shop) -> None:
    data = shop.write("x", 2 * CHUNK)
    filler = shop.filler(ByHand)
    assert shop.want(filler, "x", Priority.ASKED)
    reader = shop.read(filler, "x")
    filler.do(filler.take())
    chunks = [filler.take(), filler.take()]
    filler.do(filler.take())  # the queue's turn: it finds the file on its way
    assert filler.active() == [reader.fill]
    for job in chunks:
        filler.do(job)
    filler.finish()
    assert shop.ended.outcome() is Outcome.COMPLETE
    assert shop.ended.told.empty()
    assert filler.source_bytes == len(data)
    assert reader.read(0, len(data)) == data


def test_a_reader_makes_a_prefetch_urgent(shop: Shop) -> None:
    shop.write("x", 2 * CHUNK)
    filler = shop.filler(ByHand)
    shop.want(filler, "x", Priority.PREFETCH)
    filler.do(filler.take())
    (fill,) = filler.active()
    assert (fill.priority, filler.busy_for_readers()) == (Priority.PREFETCH, False)
    shop.read(filler, "x")
    assert (fill.priority, filler.busy_for_readers()) == (Priority.READER, True)
    filler.finish()


def test_the_queue_is_bounded_and_what_is_dropped_is_counted(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "QUEUE_MAX", 3)
    filler = shop.filler(ByHand)
    assert [shop.want(filler, f"{n}", Priority.PREFETCH) for n in range(5)] == [True] * 3 + [False] * 2
    assert [shop.want(filler, f"a{n}", Priority.ASKED) for n in range(5)] == [True] * 3 + [False] * 2
    assert (len(filler.queued()), filler.dropped) == (6, 4)
    filler.finish()
    assert filler.queued() == []


def test_files_wanted_that_are_not_there(shop: Shop) -> None:
    shop.write("later", 1)
    (shop.source / "empty").touch()
    filler = shop.filler(ByHand)
    with capture_logs() as logs:
        for name in ("missing", "later/below", "empty", "later"):
            assert shop.want(filler, name, Priority.ASKED)
        filler.finish()
    assert shop.ended.next()[0].path == b"later"
    assert (shop.ended.told.empty(), logs) == (True, [])


def test_a_source_that_does_not_say_its_version_costs_no_descriptor(shop: Shop) -> None:
    shop.write("x", 1)

    def fail(fd: int) -> Identity:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    filler = shop.filler(ByHand, identify=fail)
    before = open_descriptors()
    with capture_logs() as logs:
        for _ in range(3):
            shop.want(filler, "x", Priority.ASKED)
            filler.finish()
    assert open_descriptors() == before
    assert [line["event"] for line in logs] == ["fill_not_begun"] * 3


def test_forget(shop: Shop) -> None:
    filler = shop.filler(ByHand)
    for name, model, priority in (
        ("a", b"m", Priority.ASKED),
        ("b", b"n", Priority.ASKED),
        ("c", b"m", Priority.PREFETCH),
    ):
        shop.want(filler, name, priority, model)
    filler.forget(b"m")
    assert [one.path for one in filler.queued()] == [b"b"]


def test_prefetch_waits_while_readers_files_are_filled(shop: Shop) -> None:
    shop.write("p", 4 * CHUNK)
    shop.write("q", CHUNK)
    shop.write("r", 2 * CHUNK)
    filler = shop.filler(ByHand)
    shop.want(filler, "p", Priority.PREFETCH)
    filler.do(filler.take())  # opened
    filler.do(filler.take())  # reserved
    filler.do(filler.take())  # its first chunk
    reader = shop.read(filler, "r")
    shop.want(filler, "q", Priority.PREFETCH)
    filler.do(filler.take())
    order = []
    job = None
    while (job := filler.take(0.0, job)) is not None:
        order.append((job[0].path, job[1]))
        assert filler.take() is None, "nothing of p or q while r is on its way"
        filler.do(job)
        if job[1] == 1:
            break
    assert order == [(b"r", 0), (b"r", 1)]
    assert shop.ended.next()[0].path == b"r"
    filler.finish()
    assert {shop.ended.next()[0].path for _ in range(2)} == {b"p", b"q"}
    assert reader.fill is not None


def test_what_was_asked_for_by_name_does_not_wait_for_readers(shop: Shop) -> None:
    shop.write("asked", CHUNK)
    shop.write("read", 40 * CHUNK)
    filler = shop.filler(ByHand)
    shop.read(filler, "read")
    filler.do(filler.take())
    shop.want(filler, "asked", Priority.ASKED)
    order = [filler.take() for _ in range(3)]
    assert [job.chunk for job in order[:2]] == [0, fill_module._RUN_CHUNKS]
    assert order[2] == (None, None), "then the one asked for"
    for job in order:
        filler.do(job)
    filler.finish()


def test_only_so_many_files_at_once(shop: Shop) -> None:
    for number in range(10):
        shop.write(f"{number}", CHUNK)
    filler = shop.filler(ByHand)
    for number in range(10):
        shop.want(filler, f"{number}", Priority.ASKED)
    opening = [filler.take() for _ in range(fill_module._FILES_AT_ONCE)]
    assert opening == [(None, None)] * fill_module._FILES_AT_ONCE
    assert filler.take() is None
    for job in opening:
        filler.do(job)
    assert len(filler.active()) == fill_module._FILES_AT_ONCE
    filler.finish()
    assert len(shop.store) == 10


# --- bandwidth ---


def test_bandwidth_is_for_those_whom_nobody_waits_for(shop: Shop) -> None:
    """One chunk per second; times are arguments."""
    shop.write("x", 6 * CHUNK)
    filler = shop.filler(ByHand, bandwidth=CHUNK)
    reader = shop.read(filler, "x")
    filler.do(filler.take(100.0))
    first = filler.take(100.0)
    assert first.chunk == 0
    filler.do(first)
    assert filler.take(100.0, first) is None, "nor on in its run"
    assert filler.take(100.9) is None
    reader.ask(3 * CHUNK, 1)
    reader.ask(5 * CHUNK, 1)
    three = filler.take(100.0)
    assert three.chunk == 3, "a waiting reader is served at once, and is not charged"
    assert filler.take(100.0) is None, "the other one by the same stream"
    filler.do(three)
    five = filler.take(100.0, three)
    assert five.chunk == 5
    filler.do(five)
    assert filler.take(100.9) is None
    job = filler.take(101.0)
    assert job.chunk == 1
    filler.do(job)
    assert filler.take(101.9, job) is None
    job = filler.take(110.0, job)
    assert job.chunk == 2
    filler.do(job)
    assert filler.take(110.9) is None, "idle time is not saved up"
    filler.do(filler.take(111.0))
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_a_limited_filler_goes_on_by_itself(shop: Shop) -> None:
    shop.write("x", 4 * CHUNK)
    filler = shop.filler(bandwidth=100 * CHUNK)
    assert shop.want(filler, "x", Priority.PREFETCH)
    assert shop.ended.outcome() is Outcome.COMPLETE


# --- the end ---


def test_a_stop_in_the_middle_resumes_all_and_leaves_nothing(shop: Shop, tap: Tap) -> None:
    names = [f"{number}" for number in range(12)]
    data = {name: shop.write(name, 5 * CHUNK) for name in names}
    filler = shop.filler()
    readers = {name: shop.read(filler, name) for name in names}
    for _ in range(WORKERS):
        tap.wait_for_a_read()
    parked = [reader.ask(chunk * CHUNK, CHUNK) for reader in readers.values() for chunk in range(5)]
    assert not any(event.is_set() for event in parked)
    release = threading.Thread(target=lambda: parked[0].wait(WAIT_SECONDS) and tap.open.set())
    release.start()
    filler.stop()
    release.join(WAIT_SECONDS)
    assert all(event.wait(WAIT_SECONDS) for event in parked)
    for name, reader in readers.items():
        assert reader.target.fd == reader.source_fd
        assert reader.read(CHUNK, CHUNK) == data[name][CHUNK : 2 * CHUNK]
    assert (os.listdir(shop.store.directory), shop.store.reserved_bytes) == ([], 0)
    assert shop.begin(filler, "0") is None
    assert filler.active() == []


def test_a_stop_while_space_is_reserved(shop: Shop) -> None:
    """The draft comes too late: nobody may read its zeros."""
    data = shop.write("x", 2 * CHUNK)
    reserving, go_on = threading.Event(), threading.Event()

    def make_room(model: bytes, size: int, priority: Priority) -> None:
        reserving.set()
        assert go_on.wait(WAIT_SECONDS)

    filler = shop.filler(make_room=make_room, workers=1)
    reader = shop.read(filler, "x")
    parked = reader.ask(0, 1)
    assert reserving.wait(WAIT_SECONDS)
    resumed = threading.Thread(target=lambda: parked.wait(WAIT_SECONDS) and go_on.set())
    resumed.start()
    filler.stop()
    resumed.join(WAIT_SECONDS)
    assert parked.is_set()
    assert reader.target.fd == reader.source_fd
    assert reader.read(0, 2 * CHUNK) == data
    assert (os.listdir(shop.store.directory), shop.store.reserved_bytes) == ([], 0)


def test_a_stop_while_a_copy_is_committed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fill is over already; the copy is whole and stays."""
    data = shop.write("x", CHUNK)
    syncing, go_on = threading.Event(), threading.Event()
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        syncing.set()
        assert go_on.wait(WAIT_SECONDS)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    filler = shop.filler(workers=1)
    reader = shop.read(filler, "x")
    assert syncing.wait(WAIT_SECONDS)
    assert reader.fill is not None
    released = threading.Event()

    def release() -> None:
        with filler._change:
            assert filler._change.wait_for(lambda: filler._stopped, WAIT_SECONDS)
        go_on.set()
        released.set()

    thread = threading.Thread(target=release)
    thread.start()
    filler.stop()
    thread.join(WAIT_SECONDS)
    assert released.is_set()
    assert reader.read(0, CHUNK) == data
    assert shop.store.reserved_bytes == 0
    assert shop.copy_of("x") == data


def test_a_filler_that_never_started_can_be_stopped(shop: Shop) -> None:
    """A daemon that fails before its mount stops what it has built."""
    shop.write("x", CHUNK)
    filler = Filler(shop.store, open_source=shop.open_source, identify=identify, make_room=no_need, finished=shop.ended)
    reader = shop.read(filler, "x")
    parked = reader.ask(0, 1)
    filler.stop()
    assert parked.is_set()


def test_no_descriptor_is_left_by_any_outcome(shop: Shop) -> None:
    filler = shop.filler(ByHand)
    before = open_descriptors()
    for number in range(5):
        name = f"{number}"
        shop.write(name, 2 * CHUNK)
        reader = Reader(shop.source / name).join(shop.begin(filler, name))
        if number == 1:
            os.utime(shop.source / name, ns=(1, 1))
        if number == 2:
            filler.do(filler.take())
            os.truncate(shop.source / name, 1)
        if number != 3:
            filler.finish()
        reader.close()
        filler.finish()
    assert len(shop.store) == 3
    assert open_descriptors() == before
