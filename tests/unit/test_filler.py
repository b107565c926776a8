"""What the filler does next: the order of what is wanted, the bandwidth, and the end."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import (
    MODEL,
    WAIT_SECONDS,
    ByHand,
    Reader,
    from_store,
    identify,
)
from tests.unit.descriptors import open_descriptors
from tests.unit.shop import CHUNK, Shop, Tap
from tierd.node import fill as fill_module
from tierd.node import filler as filler_module
from tierd.node import wanted as wanted_module
from tierd.node.copies import Draft, Identity
from tierd.node.fill import Fill, Outcome
from tierd.node.filler import WORKERS, Filler
from tierd.node.wanted import Priority

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
    monkeypatch.setattr(wanted_module, "QUEUE_MAX", 3)
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


def test_what_is_forgotten_is_filled_no_further_unless_somebody_reads_it(shop: Shop) -> None:
    """Found by `tierd evict`: the model came back by the fill that ran."""
    shop.write("p", 4 * CHUNK)
    data = shop.write("r", 2 * CHUNK)
    filler = shop.filler(ByHand)
    shop.want(filler, "p", Priority.PREFETCH)
    for _ in range(3):  # opened, reserved, a chunk
        filler.do(filler.take())
    reader = shop.read(filler, "r")
    filler.forget(MODEL)
    assert [fill.path for fill in filler.active()] == [b"r"]
    assert shop.ended.outcome() is Outcome.DROPPED
    filler.finish()
    assert reader.read(0, 2 * CHUNK) == data
    assert (shop.copy_of("p"), shop.copy_of("r")) == (None, data)
    assert shop.want(filler, "p", Priority.ASKED), "it may come again at once"
    filler.finish()
    assert shop.copy_of("p") is not None


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
    opening = [filler.take() for _ in range(filler_module._FILES_AT_ONCE)]
    assert opening == [(None, None)] * filler_module._FILES_AT_ONCE
    assert filler.take() is None
    for job in opening:
        filler.do(job)
    assert len(filler.active()) == filler_module._FILES_AT_ONCE
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


def test_bandwidth_that_is_free_at_this_moment_is_waited_for_by_nobody(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker judged the time twice: had it just become free in between, it waited until somebody called it."""
    shop.write("x", 3 * CHUNK)
    filler = shop.filler(ByHand, bandwidth=CHUNK)
    shop.begin(filler, "x")
    filler.do(filler.take(0.0))
    filler.do(filler.take(0.0))
    times = iter([0.999, 1.0, 1.0])
    waited: list[float | None] = []
    with monkeypatch.context() as patch:
        patch.setattr(filler_module.time, "monotonic", lambda: next(times))
        patch.setattr(filler._change, "wait", waited.append)
        job = filler._next_job(None)
    assert (job.chunk, waited) == (1, [pytest.approx(0.001)])
    filler.do(job)
    filler.finish()


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

    def reserve(fill: Fill) -> Draft:
        reserving.set()
        assert go_on.wait(WAIT_SECONDS)
        return shop.store.begin(fill.identity, fill.path, fill.model)

    filler = shop.filler(reserve=reserve, workers=1)
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
    filler = Filler(
        shop.store, open_source=shop.open_source, identify=identify, reserve=from_store(shop.store), finished=shop.ended
    )
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
