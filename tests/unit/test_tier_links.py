"""A file with names in two models: one fill, one copy, counted for one of them, and served by either name."""

from __future__ import annotations

import os
import threading

import pytest

from tests.unit.copies import WAIT_SECONDS, read_copy
from tests.unit.node import SIZE, Node
from tierd.node.chores import Chores
from tierd.node.copies import Copy
from tierd.node.fill import Fill
from tierd.node.wanted import Priority

A, B = b"models/a", b"models/b"
IN_A, IN_B = b"models/a/x.bin", b"models/b/x.bin"


@pytest.fixture(autouse=True)
def _linked(node: Node) -> None:
    node.write("a/x.bin")
    os.mkdir(node.source / "models/b")
    os.link(node.source / os.fsdecode(IN_A), node.source / os.fsdecode(IN_B))


def open_by(node: Node, path: bytes) -> tuple[bytes | None, Fill | None]:
    """As a pod's open does that finds no current copy."""
    fd = node.posix.open_path(path)
    try:
        return node.parts.tier.begin(node.parts.tier._identify(fd), path, fd)
    finally:
        os.close(fd)


def the_copy(node: Node, path: bytes) -> Copy:
    """What an open by this name is served from."""
    tier = node.parts.tier
    fd = node.posix.open_path(path)
    try:
        identity = tier._identify(fd)
    finally:
        os.close(fd)
    copy = tier.find(identity.inode)
    assert copy is not None
    assert tier.is_current(copy, identity)
    return copy


def settle(chores: Chores) -> None:
    with chores._change:
        assert chores._change.wait_for(lambda: len(chores) == 0, WAIT_SECONDS)


def test_two_models_that_are_wanted_together_share_one_fill(node: Node) -> None:
    node.control.warm(["a", "b"])
    node.await_complete("models/a")
    node.await_complete("models/b")
    store, filler = node.parts.store, node.parts.tier.filler
    assert (len(store), store.held_bytes, store.reserved_bytes, filler.source_bytes) == (1, SIZE, 0, SIZE)
    assert list(store.held_by_model().values()) == [SIZE], "for one of them"
    assert the_copy(node, IN_A) is the_copy(node, IN_B)
    assert node.parts.tier.want_model(A, Priority.ASKED) == node.parts.tier.want_model(B, Priority.ASKED) == 0
    assert sum(one.held_bytes for one in node.parts.tier.residents()) == SIZE


def test_two_readers_by_different_names_share_one_fill(node: Node) -> None:
    model, fill = open_by(node, IN_A)
    other, same = open_by(node, IN_B)
    assert (model, other) == (A, B), "each has a lease of its own"
    assert fill is same is not None
    node.await_complete("models/b")
    assert node.parts.store.held_by_model() == {A: SIZE}
    assert node.parts.tier.filler.source_bytes == SIZE


def test_one_that_is_pinned_gets_it_back_when_the_other_is_evicted(node: Node) -> None:
    """It is filed under the pinned one then, and stays."""
    node.control.warm(["a"])
    node.await_complete("models/a")
    node.control.pin(["b"], pinned=True)
    copy = the_copy(node, IN_B)
    fd = node.parts.store.open(copy)
    assert node.control.evict(["a"])["models"] == [{"model": "models/a", "bytes": SIZE, "kept": ""}]
    assert len(os.pread(fd, 2 * SIZE, 0)) == SIZE, "whoever has it open by the other name keeps it"
    os.close(fd)
    node.parts.prefetcher._look()
    node.await_complete("models/b")
    assert node.parts.store.held_by_model() == {B: SIZE}
    assert node.control.evict(["a"])["models"] == [{"model": "models/a", "bytes": 0, "kept": ""}]
    assert node.control.evict(["b"])["models"] == [{"model": "models/b", "bytes": 0, "kept": "pinned"}]


def test_the_name_that_is_left_takes_it_over(node: Node) -> None:
    """The unlink changes ctime: the copy is compared, and filed anew by the next open."""
    node.control.warm(["a"])
    node.await_complete("models/a")
    os.unlink(node.source / os.fsdecode(IN_A))
    assert open_by(node, IN_B) == (B, None)
    settle(node.parts.tier.rechecks)
    copy = the_copy(node, IN_B)
    node.parts.tier.moved(copy, IN_B)
    settle(node.parts.tier.chores)
    assert node.parts.store.held_by_model() == {B: SIZE}
    assert node.parts.tier.filler.source_bytes == SIZE, "nothing was fetched again"


def test_one_name_that_is_replaced_costs_the_other_a_miss_at_most(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.control.warm(["a"])
    node.await_complete("models/a")
    replaced = threading.Event()
    real = node.parts.tier._remove_replaced

    def remove_replaced(copy: Copy) -> None:
        real(copy)
        replaced.set()

    monkeypatch.setattr(node.parts.tier, "_remove_replaced", remove_replaced)
    node.write("new/x.bin", SIZE + 1)
    os.rename(node.source / "models/new/x.bin", node.source / os.fsdecode(IN_A))
    node.control.warm(["a"])
    assert replaced.wait(WAIT_SECONDS)
    node.control.warm(["b"])
    settle(node.parts.tier.rechecks)
    node.await_complete("models/b")
    assert node.parts.store.held_by_model() == {A: SIZE + 1, B: SIZE}
    for path in (IN_A, IN_B):
        assert read_copy(node.parts.store, the_copy(node, path)) == (node.source / os.fsdecode(path)).read_bytes()
