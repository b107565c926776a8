"""A copy of whose file only ctime changed: compared, kept or dropped, within the bandwidth."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import WAIT_SECONDS, identity_of
from tests.unit.tiered import Tiered
from tierd.node import tier as tier_module
from tierd.node.store import Copy, Store
from tierd.node.wanted import Priority


def test_after_a_chmod_the_copy_is_compared_and_kept(tiered: Tiered) -> None:
    old = tiered.fill("m/x.bin", 2 * tier_module.CHUNK_BYTES + 5)
    tiered.path("m/x.bin").chmod(0o600)
    assert tiered.current("m/x.bin") is None
    tiered.start()
    assert tiered.open("m/x.bin") == (b"models/m", None), "this open reads the source"
    tiered.settle()
    copy = tiered.current("m/x.bin")
    assert copy is not None
    assert (copy.name, copy.identity) == (old.name, identity_of(tiered.path("m/x.bin")))
    assert (tiered.counts.evictions, tiered.counts.fills) == (Counter(), [])


@pytest.mark.parametrize("offset", [0, 9_999])
def test_a_rewrite_with_its_times_set_back_is_found(tiered: Tiered, offset: int) -> None:
    copy = tiered.fill("m/x.bin")
    st = tiered.path("m/x.bin").stat()
    with tiered.path("m/x.bin").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0")
    os.utime(tiered.path("m/x.bin"), ns=(st.st_atime_ns, st.st_mtime_ns))
    assert copy.identity.same_bytes_likely(identity_of(tiered.path("m/x.bin")))
    tiered.start()
    tiered.open("m/x.bin")
    tiered.settle()
    assert (copy.removed, tiered.store.find(copy.identity.inode), tiered.counts.evictions["stale"]) == (True, None, 1)


def test_a_change_during_the_comparison_is_no_renewal(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tiered.fill("m/x.bin")
    tiered.path("m/x.bin").chmod(0o600)
    real = tiered.tier._same_bytes

    def changed_meanwhile(copy: Copy, fd: int) -> bool:
        same = real(copy, fd)
        tiered.write("m/x.bin", seed="changed")
        return same

    monkeypatch.setattr(tiered.tier, "_same_bytes", changed_meanwhile)
    tiered.start()
    tiered.open("m/x.bin")
    tiered.settle()
    assert (copy.removed, len(tiered.store)) == (True, 0)


def test_a_file_that_is_gone_before_it_was_compared(tiered: Tiered) -> None:
    copy = tiered.fill("m/x.bin")
    tiered.path("m/x.bin").chmod(0o600)
    tiered.open("m/x.bin")
    tiered.path("m/x.bin").unlink()
    with capture_logs() as logs:
        tiered.start()
        tiered.settle()
    assert [(line["event"], line["log_level"]) for line in logs] == [("chore_failed", "warning")]
    assert not tiered.tier.is_current(copy, copy.identity._replace(ctime_ns=1))


def test_a_chmod_of_a_whole_tree_fetches_nothing_anew(tiered: Tiered) -> None:
    copies = [tiered.fill(f"m/{number}.bin") for number in range(3)]
    for number in range(3):
        tiered.path(f"m/{number}.bin").chmod(0o600)
    tiered.write("m/9.bin")
    tiered.start()
    assert tiered.tier.want_model(b"models/m", Priority.PREFETCH) == 10_000
    tiered.settle()
    assert tiered.counts.wait_for_fills(1) == [("complete", 10_000)]
    assert {tiered.current(f"m/{number}.bin").name for number in range(3)} == {c.name for c in copies}  # type: ignore[union-attr]


def test_a_comparison_keeps_to_the_bandwidth(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is read at once, the next in a year; nothing else waits for it, and a stop ends it."""
    tiered = Tiered(tmp_path, store, bandwidth=1)
    big = tiered.fill("m/x.bin", 2 * tier_module.CHUNK_BYTES)
    moved = tiered.fill("old/x.bin")
    tiered.path("m/x.bin").chmod(0o600)
    tiered.path("old").rename(tiered.path("new"))
    asked = threading.Semaphore(0)
    real = tiered.tier.filler.await_turn

    def await_turn(size: int) -> None:
        asked.release()
        real(size)

    monkeypatch.setattr(tiered.tier.filler, "await_turn", await_turn)
    tiered.start()
    tiered.open("m/x.bin")
    for _ in range(2):
        assert asked.acquire(timeout=WAIT_SECONDS)
    tiered.tier.moved(moved, b"models/new/x.bin")
    with tiered.tier.chores._change:
        assert tiered.tier.chores._change.wait_for(lambda: moved.removed, WAIT_SECONDS)
    assert (len(tiered.tier.rechecks), big.removed, tiered.current("m/x.bin")) == (1, False, None)
    with capture_logs() as logs:
        tiered.close()
    assert (big.removed, len(tiered.tier.rechecks), logs) == (False, 0, [])


def test_a_comparison_and_fills_share_the_bandwidth(tmp_path: Path, store: Store) -> None:
    tiered = Tiered(tmp_path, store, bandwidth=1)
    tiered.fill("m/x.bin")
    tiered.path("m/x.bin").chmod(0o600)
    tiered.write("n/x.bin")
    tiered.start()
    tiered.open("m/x.bin")
    tiered.settle()
    assert tiered.current("m/x.bin") is not None, "one chunk is not held back"
    assert tiered.tier.want_model(b"models/n", Priority.ASKED)
    filler = tiered.tier.filler
    with filler._change:
        assert filler._choose(time.monotonic()) is None, "but what comes after it is"
        assert ([one.path for one in filler.queued()], filler.source_bytes) == ([b"models/n/x.bin"], 0)
    tiered.close()
