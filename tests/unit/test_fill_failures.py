"""A source that changes, fails or stalls during a fill, and a node without space: readers go on from the source."""

from __future__ import annotations

import errno
import os

import pytest

from tests.unit.copies import (
    MODEL,
    ByHand,
    content,
)
from tests.unit.shop import CHUNK, Shop, Tap, break_reads
from tierd.node import filler as filler_module
from tierd.node.copies import Draft
from tierd.node.fill import Fill, Outcome
from tierd.node.filler import Refused
from tierd.node.wanted import Priority

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
    now = filler_module.time.monotonic()
    monkeypatch.setattr(filler_module.time, "monotonic", lambda: now + filler_module._COOLING_SECONDS + 1)
    assert shop.begin(filler, "x") is not None, "but later"
    filler.finish()
    assert shop.ended.outcome() is Outcome.COMPLETE


def test_what_cools_is_bounded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filler_module, "_COOLING_MAX", 3)
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

    def refuse(fill: Fill) -> Draft:
        raise Refused(f"{fill.identity.size} bytes for {fill.model!r} at {fill.priority.name}")

    filler = shop.filler(reserve=refuse)
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
