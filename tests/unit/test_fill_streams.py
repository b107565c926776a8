"""The streams of a fill: runs in order, two per file, and no chunk that a reader waits for is left to nobody."""

from __future__ import annotations

import errno
import os
import random
import threading
from typing import Any

import pytest

from tests.unit.copies import (
    WAIT_SECONDS,
)
from tests.unit.shop import CHUNK, Shop, break_reads, names, worked
from tierd.node import fetch as fetch_module
from tierd.node import fill as fill_module
from tierd.node.fill import Fill, Outcome


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
    real = fetch_module.read_block

    def read(fd: int, block: memoryview, offset: int) -> None:
        by.append((offset // CHUNK, fd))
        real(fd, block, offset)

    monkeypatch.setattr(fetch_module, "read_block", read)
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
