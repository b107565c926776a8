"""Space in the node tier: who comes in, who leaves for it, and who never does."""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import WAIT_SECONDS
from tests.unit.tiered import MIB, Tiered
from tierd.node import tier as tier_module
from tierd.node.fill import Outcome
from tierd.node.store import Copy, Identity, Store
from tierd.node.wanted import Priority
from tierd.policy import NS, Watermarks


def four_models(tiered: Tiered) -> dict[str, Copy]:
    """The first is the least recently used; each has some heat."""
    found = {}
    for name in "abcd":
        found[name] = tiered.fill(f"{name}/x.bin", MIB)
        tiered.usage.note(b"models/" + name.encode(), 1, tiered.now_ns)
    return found


def test_what_is_hotter_pushes_out_the_least_recently_used(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(tiered)
    tiered.write("new/x.bin", MIB + 1)
    tiered.now_ns += NS
    tiered.start()
    tiered.open("new/x.bin")
    assert tiered.counts.wait_for_fills(1) == [("complete", MIB + 1)]
    assert tiered.models() == {b"models/c", b"models/d", b"models/new"}
    assert tiered.counts.evictions == Counter({"room": 2})
    assert tiered.store.held_bytes <= 4 * MIB
    tiered.close()


def test_what_is_colder_is_refused_with_a_reason(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(tiered)
    for name in "abcd":
        tiered.usage.note(b"models/" + name.encode(), 5, tiered.now_ns)
    tiered.write("new/x.bin", 1)
    tiered.start()
    assert tiered.open("new/x.bin") == (b"models/new", None)
    assert tiered.tier.reason(b"models/new") == "would have to push out models as hot or hotter"
    tiered.write("huge/x.bin", 4 * MIB + 1)
    assert tiered.open("huge/x.bin") == (b"models/huge", None)
    assert "more than the node tier may ever hold" in tiered.tier.reason(b"models/huge")
    assert tiered.counts.refusals == 2
    assert len(tiered.models()) == 4
    tiered.close()


def test_no_two_fills_count_on_the_same_room(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging room and reserving it is one step, however many workers start fills."""
    tiered = Tiered(tmp_path, store, limit_bytes=30_000)
    names = [f"{number}/x.bin" for number in range(4)]
    for name in names:
        tiered.write(name, 20_000)
        assert tiered.open(name)[1] is not None
        tiered.usage.leases.take(b"models/" + name[:1].encode())  # none leaves for another
    together = threading.Barrier(2)
    real = store.begin

    def begin(*arguments: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            together.wait(0.2)  # one that was judged at the same time would come along
        together.reset()
        return real(*arguments)

    monkeypatch.setattr(store, "begin", begin)
    tiered.start()
    assert [outcome for outcome, _ in tiered.counts.wait_for_fills(4)] == ["complete", "refused", "refused", "refused"]
    assert (store.held_bytes, store.reserved_bytes) == (20_000, 0)
    tiered.close()


def test_neither_leased_nor_pinned_leave_for_anything(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(tiered)
    for name in (b"models/a", b"models/b"):
        tiered.usage.leases.take(name)
    tiered.usage.pin(b"models/c", True)
    tiered.write("hot/x.bin", 2 * MIB)
    tiered.usage.note(b"models/hot", 1000, tiered.now_ns)
    tiered.start()
    assert tiered.open("hot/x.bin") == (b"models/hot", None)
    assert "only" in tiered.tier.reason(b"models/hot")
    assert "leased nor pinned" in tiered.tier.reason(b"models/hot")
    tiered.write("warm/x.bin", MIB)
    tiered.now_ns += NS
    tiered.open("warm/x.bin")
    assert tiered.counts.wait_for_fills(1) == [("complete", MIB)]
    assert tiered.models() == {b"models/a", b"models/b", b"models/c", b"models/warm"}
    tiered.close()


def test_a_pinned_model_that_is_prefetched_pushes_out_the_hottest(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(tiered)
    tiered.usage.note(b"models/a", 1000, tiered.now_ns)
    for name in "abcd":
        tiered.usage.note(b"models/" + name.encode(), 10, tiered.now_ns)
    tiered.write("pin/x.bin", 4 * MIB)
    tiered.usage.pin(b"models/pin", True)
    tiered.start()
    tiered.tier.want_model(b"models/pin", Priority.PREFETCH)
    assert tiered.counts.wait_for_fills(1) == [("complete", 4 * MIB)]
    assert tiered.models() == {b"models/pin"}
    tiered.close()


def test_prefetch_counts_no_load_that_nobody_made(tmp_path: Path, store: Store) -> None:
    """As hot as its victims is not hotter; the same file asked for by name counts the load to come."""
    tiered = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(tiered)
    tiered.write("new/x.bin", MIB)
    tiered.usage.note(b"models/new", 1, tiered.now_ns - 4 * NS)
    tiered.start()
    tiered.tier.want_model(b"models/new", Priority.PREFETCH)
    assert tiered.counts.wait_for_fills(1) == [("refused", 0)]
    assert len(tiered.models()) == 4
    tiered.tier.filler._cooling.clear()
    tiered.tier.want_model(b"models/new", Priority.ASKED)
    assert tiered.counts.wait_for_fills(2) == [("complete", MIB), ("refused", 0)]
    tiered.close()


def test_no_space_asks_for_eviction(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    tiered.write("m/x.bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        tiered.start()
        tiered.open("m/x.bin")
        assert tiered.counts.wait_for_fills(1) == [("no_space", 0)]
    assert tiered.space_needed.wait(WAIT_SECONDS)
    assert tiered.tier.reason(b"models/m") == "No space left on device"


def test_reasons_are_bounded(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_REASONS_MAX", 3)
    for number in range(10):
        tiered.tier._note_reason(b"%d" % number, "why")
    assert [tiered.tier.reason(b"%d" % n) for n in (6, 7, 8, 9)] == ["", "why", "why", "why"]


def test_a_model_that_is_open_is_not_evicted_by_hand(tiered: Tiered) -> None:
    tiered.fill("m/x.bin")
    tiered.usage.leases.take(b"models/m")
    assert tiered.tier.evict(b"models/m", "asked for", "asked") == 0
    tiered.usage.leases.give_back(b"models/m")
    assert tiered.tier.evict(b"models/m", "asked for", "asked") == 10_000
    assert tiered.tier.evict(b"models/m", "asked for", "asked") == 0
    assert (len(tiered.store), tiered.counts.evictions) == (0, Counter({"asked": 1}))


class Disk:
    """A file system of 100 MiB: what the store holds, and what others do."""

    def __init__(self, tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others = 0
        self.freed_elsewhere = 0
        self.looks = 0

        def usage(path: str) -> SimpleNamespace:
            self.looks += 1
            if self.looks > 2:
                self.others -= self.freed_elsewhere
            used = self.others + tiered.store.held_bytes + tiered.store.reserved_bytes
            return SimpleNamespace(used=used, free=100 * MIB - used)

        monkeypatch.setattr(tier_module.psutil, "disk_usage", usage)


def test_surplus_leaves_least_recently_used_first_and_up_to_the_mark(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered = Tiered(tmp_path, store, marks=Watermarks(0.10, 0.12))
    disk = Disk(tiered, monkeypatch)
    four_models(tiered)
    disk.others = 86 * MIB
    assert tiered.tier.evict_surplus() == 0, "10 % free is not below the mark"
    disk.others = 86 * MIB + 1
    assert tiered.tier.evict_surplus() == 3 * MIB, "12 % and not a byte less"
    assert tiered.models() == {b"models/d"}
    assert tiered.counts.evictions == Counter({"watermark": 3})
    tiered.close()


def test_surplus_is_judged_anew_after_each_model(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tiered = Tiered(tmp_path, store, marks=Watermarks(0.10, 0.12))
    disk = Disk(tiered, monkeypatch)
    four_models(tiered)
    disk.others = 87 * MIB
    disk.freed_elsewhere = 50 * MIB
    assert tiered.tier.evict_surplus() == 2 * MIB
    assert tiered.models() == {b"models/c", b"models/d"}
    tiered.close()


def test_surplus_over_the_limit(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=2 * MIB)
    four_models(tiered)
    tiered.usage.note(b"models/a", 1, tiered.now_ns + NS)
    tiered.usage.leases.take(b"models/b")
    assert tiered.tier.evict_surplus() == 2 * MIB
    assert tiered.models() == {b"models/a", b"models/b"}
    tiered.close()


def test_nothing_to_evict_ends(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=1)
    four_models(tiered)
    for name in "abc":
        tiered.usage.leases.take(b"models/" + name.encode())
    tiered.usage.pin(b"models/d", True)
    with capture_logs() as logs:
        assert tiered.tier.evict_surplus() == 0
    assert [line["event"] for line in logs] == ["nothing_to_evict"]
    assert len(tiered.models()) == 4
    tiered.close()


def test_many_fills_at_once_never_exceed_the_limit(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, limit_bytes=5 * MIB)
    most: list[int] = []
    real = store.begin

    def begin(identity: Identity, path: bytes, model: bytes) -> object:
        draft = real(identity, path, model)
        most.append(store.held_bytes + store.reserved_bytes)
        return draft

    store.begin = begin  # type: ignore[method-assign, assignment]
    names = [f"{number}/x.bin" for number in range(12)]
    for name in names:
        tiered.write(name, 2 * MIB)
    tiered.start()
    fills = [tiered.open(name)[1] for name in names]
    tiered.counts.wait_for_fills(sum(fill is not None for fill in fills))
    assert max(most) <= 5 * MIB
    assert store.held_bytes <= 5 * MIB
    assert any(fill is not None and fill.outcome is Outcome.COMPLETE for fill in fills)
    tiered.close()
