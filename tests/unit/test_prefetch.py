"""Prefetch: what it queues, and how seldom it walks the source for models that lack nothing."""

from __future__ import annotations

import os
import threading

import pytest

from tests.unit.copies import WAIT_SECONDS
from tests.unit.node import SIZE, Node, count_walks
from tierd.node import listings as listings_module
from tierd.node.catalog import SourceFile
from tierd.node.copies import Identity
from tierd.node.listings import Listings


def files(model: bytes, count: int = 1) -> list[SourceFile]:
    return [SourceFile(b"%s/%d" % (model, number), Identity(number, 1, 1, 1)) for number in range(count)]


def make_hot(node: Node, *models: bytes) -> None:
    for model in models:
        node.parts.usage.note(model, 5, node.parts.usage.now_ns())


def test_a_model_that_lacks_nothing_is_walked_once_in_a_while(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(node.parts.tier.listings, "_clock", lambda: now)
    node.fill("here/x.bin")
    node.write("missing/x.bin")
    make_hot(node, b"models/here", b"models/missing")
    walks = count_walks(node, monkeypatch)
    prefetcher = node.parts.prefetcher
    prefetcher._look()
    assert walks == {b"models/here": 1, b"models/missing": 2}, "what is queued is what the source has now"
    node.await_complete("models/missing")
    walks.clear()
    for _ in range(5):
        now += 30.0
        prefetcher._look()
    assert walks == {}
    node.write("here/new.bin")
    now += 300.0
    prefetcher._look()
    assert walks[b"models/here"] == 2
    node.await_complete("models/here")


def test_what_was_evicted_comes_back_without_a_walk_to_find_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = node.fill("m/x.bin")
    make_hot(node, b"models/m")
    prefetcher = node.parts.prefetcher
    prefetcher._look()
    walks = count_walks(node, monkeypatch)
    node.parts.store.remove(copy)
    prefetcher._look()
    assert walks == {b"models/m": 1}, "to queue it"
    node.await_complete("models/m")


def test_a_plan_for_people_is_of_this_moment(node: Node) -> None:
    node.fill("m/x.bin")
    make_hot(node, b"models/m")
    node.parts.prefetcher._look()
    node.write("m/new.bin")
    (choice,) = node.parts.prefetcher.plan()
    assert choice.need_bytes == SIZE
    os.unlink(node.source / "models/m/new.bin")
    (choice,) = node.parts.prefetcher.plan()
    assert choice.need_bytes == 0


def test_listings_are_remembered_for_as_long_as_asked() -> None:
    now = 0.0
    walked: list[bytes] = []

    def walk(model: bytes) -> list[SourceFile]:
        walked.append(model)
        return files(model, len(walked))

    listings = Listings(walk, clock=lambda: now)
    assert len(listings.recent(b"a", 10.0)) == 1
    now = 9.0
    assert len(listings.recent(b"a", 10.0)) == 1
    assert len(listings.recent(b"a", 5.0)) == 2
    assert len(listings.recent(b"a", 0.0)) == 3
    assert len(listings.walk(b"a")) == 4
    now = 18.0
    assert len(listings.recent(b"a", 10.0)) == 4, "what others walked counts"


def test_listings_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings_module, "_FILES_MAX", 10)
    walked: list[bytes] = []

    def walk(model: bytes) -> list[SourceFile]:
        walked.append(model)
        return files(model, int(model))

    listings = Listings(walk, clock=lambda: 0.0)
    for model in (b"4", b"0", b"3", b"4"):
        listings.recent(model, 1.0)
    assert walked == [b"4", b"0", b"3"]
    listings.recent(b"1", 1.0)
    listings.recent(b"100", 1.0)
    walked.clear()
    for model in (b"100", b"4"):
        listings.recent(model, 1.0)
    assert walked == [b"100", b"4"], "too large to be remembered, and forgotten for others"


def test_a_walk_that_fails_is_not_remembered() -> None:
    answers = [OSError(5, "Input/output error"), files(b"m")]

    def walk(model: bytes) -> list[SourceFile]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    listings = Listings(walk, clock=lambda: 0.0)
    with pytest.raises(OSError, match="Input"):
        listings.recent(b"m", 10.0)
    assert listings.recent(b"m", 10.0) == files(b"m")
    assert answers == []


def test_a_slow_walk_holds_up_nobody_who_remembers() -> None:
    go_on, walking = threading.Event(), threading.Event()

    def walk(model: bytes) -> list[SourceFile]:
        if model == b"slow":
            walking.set()
            assert go_on.wait(WAIT_SECONDS)
        return files(model)

    listings = Listings(walk)
    thread = threading.Thread(target=listings.walk, args=(b"slow",))
    thread.start()
    assert walking.wait(WAIT_SECONDS)
    assert listings.recent(b"fast", 10.0)
    go_on.set()
    thread.join(WAIT_SECONDS)
