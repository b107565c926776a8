"""One fill: one per file however many opened it, ranges as they land, readers that come and go."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.unit.copies import (
    MODEL,
    WAIT_SECONDS,
    ByHand,
    Reader,
    identity_of,
    own_store,
)
from tests.unit.shop import CHUNK, Shop, Tap, names
from tierd.node import fill as fill_module
from tierd.node import filler as filler_module
from tierd.node.fill import Outcome

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
    monkeypatch.setattr(filler_module, "STREAMS_PER_FILE", 6)
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
