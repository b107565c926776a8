"""The node tier: what is current, what is rechecked, what comes in, what leaves for it, and what never does."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import MODEL, WAIT_SECONDS, Reader, add_copy, content, identity_of, own_store, read_copy
from tests.unit.descriptors import open_descriptors
from tierd.node import filler as filler_module
from tierd.node import tier as tier_module
from tierd.node.catalog import SourceFile, files_of
from tierd.node.fill import Fill, Outcome
from tierd.node.sources import PosixSource
from tierd.node.store import Copy, Identity, Store
from tierd.node.tier import NodeTier, TierSettings
from tierd.node.usage import Usage
from tierd.node.wanted import Priority
from tierd.policy import NS, Watermarks
from tierd.units import model_of

ROOTS = (b"models",)
MIB = 1 << 20


class Counts:
    """What the tier reported."""

    def __init__(self) -> None:
        self.fills: list[tuple[str, int]] = []
        self.evictions: Counter[str] = Counter()
        self.evicted_bytes = 0
        self.stale = 0
        self.refusals = 0
        self.change = threading.Condition()

    def fill_ended(self, outcome: str, seconds: float, size: int) -> None:
        assert seconds >= 0
        with self.change:
            self.fills.append((outcome, size))
            self.change.notify_all()

    def evicted(self, reason: str, size: int) -> None:
        with self.change:
            self.evictions[reason] += 1
            self.evicted_bytes += size
            self.change.notify_all()

    def stale_served(self) -> None:
        self.stale += 1

    def refused(self) -> None:
        self.refusals += 1

    def wait_for_fills(self, count: int) -> list[tuple[str, int]]:
        with self.change:
            assert self.change.wait_for(lambda: len(self.fills) >= count, WAIT_SECONDS), self.fills
            return sorted(self.fills)


class Tiered:
    """A source with models, and a tier over it whose clock the test moves."""

    def __init__(self, base: Path, store: Store, **settings: object) -> None:
        self.source = base / "source"
        self.source.mkdir(exist_ok=True)
        self.store = store
        self.now_ns = 1_000_000 * NS
        self.counts = Counts()
        self.opened: list[Copy] = []
        self.space_needed = threading.Event()
        self.usage = Usage(half_life_s=1000.0, now_ns=lambda: self.now_ns)
        self.posix = PosixSource(self.source)
        self.readers: list[Reader] = []
        arguments = {"limit_bytes": 1 << 40, "marks": Watermarks(0.0, 0.001), **settings}
        self.tier = NodeTier(
            store,
            self.posix,
            self.usage,
            TierSettings(**arguments),  # type: ignore[arg-type]
            self.counts,
            model_of=lambda path: model_of(path, ROOTS, lambda _: True),
            files_of=lambda model: files_of(self.source, model, lambda path: model_of(path, ROOTS, lambda _: True)),
            read_ahead=self.opened.append,
            space_needed=self.space_needed.set,
        )

    def start(self) -> NodeTier:
        self.tier.start()
        return self.tier

    def write(self, name: str, size: int = 10_000, seed: object = 0) -> bytes:
        path = self.source / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content((name, seed), size)
        path.write_bytes(data)
        return data

    def path(self, name: str) -> Path:
        return self.source / "models" / name

    def open(self, name: str) -> tuple[bytes | None, Fill | None]:
        """As a pod's open does that finds no current copy."""
        reader = Reader(self.path(name))
        self.readers.append(reader)
        found = self.tier.begin(identity_of(self.path(name)), b"models/" + os.fsencode(name), reader.source_fd)
        if found[1] is not None:
            reader.join(found[1])
        return found

    def fill(self, name: str, size: int = 10_000) -> Copy:
        """A file that is on the node."""
        data = self.write(name, size)
        path = b"models/" + os.fsencode(name)
        identity = identity_of(self.path(name))
        model = model_of(path, ROOTS, lambda _: True)
        assert model is not None
        copy = add_copy(
            self.store, identity.inode, data, path=path, model=model, mtime_ns=identity.mtime_ns,
            ctime_ns=identity.ctime_ns,
        )  # fmt: skip
        self.now_ns += NS
        self.usage.arrived(model)
        return copy

    def current(self, name: str) -> Copy | None:
        """The copy that an open would be served from."""
        identity = identity_of(self.path(name))
        copy = self.tier.find(identity.inode)
        return copy if copy is not None and self.tier.is_current(copy, identity) else None

    def models(self) -> set[bytes]:
        return set(self.store.held_by_model())

    def settle(self) -> None:
        """The chores that were asked for are done."""
        for chores in (self.tier.chores, self.tier.rechecks):
            with chores._change:
                assert chores._change.wait_for(lambda chores=chores: len(chores) == 0, WAIT_SECONDS)  # type: ignore[misc]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.tier.stop()
        self.posix.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with own_store(tmp_path / "cache") as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiered]:
    monkeypatch.setattr(filler_module, "_TICK_SECONDS", 0.0)
    before = open_descriptors()
    made = Tiered(tmp_path, store)
    yield made
    made.close()
    assert [line for line in open_descriptors() - before if str(tmp_path) in line] == []


# --- what is current ---


def test_a_copy_is_current_until_anything_of_its_file_changes(bench: Tiered) -> None:
    copy = bench.fill("m/x.bin")
    identity = copy.identity
    tier = bench.tier
    assert tier.is_current(copy, identity)
    for other in (
        identity._replace(inode=identity.inode + 1),
        identity._replace(size=identity.size + 1),
        identity._replace(mtime_ns=identity.mtime_ns + 1),
        identity._replace(ctime_ns=identity.ctime_ns + 1),
    ):
        assert not tier.is_current(copy, other)
    bench.store.remove(copy)
    assert not tier.is_current(copy, identity)


def test_inodes_of_other_devices_have_no_copies(bench: Tiered) -> None:
    copy = bench.fill("m/x.bin")
    assert bench.tier.find(copy.identity.inode) is copy
    assert bench.tier.find((5, copy.identity.inode)) is None


@pytest.mark.parametrize("allowed", [True, False])
def test_a_source_that_does_not_answer(tmp_path: Path, store: Store, allowed: bool) -> None:
    bench = Tiered(tmp_path, store, stale_if_unreachable=allowed)
    copy = bench.fill("m/x.bin")
    assert bench.tier.serve_stale(copy) is allowed
    store.remove(copy)
    assert bench.tier.serve_stale(copy) is False
    assert bench.counts.stale == int(allowed)
    bench.close()


# --- opens ---


def test_an_opened_file_is_filled_and_its_siblings_come_after_it(bench: Tiered) -> None:
    data = {name: bench.write(f"m/{name}") for name in ("1.safetensors", "2.safetensors", "config.json")}
    bench.write("other/1.safetensors")
    bench.start()
    model, fill = bench.open("m/2.safetensors")
    assert (model, fill is not None) == (b"models/m", True)
    assert bench.counts.wait_for_fills(3) == [("complete", 10_000)] * 3
    for name, expected in data.items():
        copy = bench.current(f"m/{name}")
        assert copy is not None
        assert read_copy(bench.store, copy) == expected
    assert bench.models() == {b"models/m"}
    assert bench.usage.last_access_ns(b"models/m") == bench.now_ns, "what just came is not what leaves first"
    assert bench.tier.reason(b"models/m") == ""


def test_a_small_file_brings_nothing_not_even_itself(bench: Tiered) -> None:
    bench.write("m/1.safetensors")
    bench.write("m/config.json", 100)
    bench.start()
    assert bench.open("m/config.json") == (b"models/m", None)
    bench.settle()
    assert (bench.tier.filler.queued(), bench.tier.filler.active(), len(bench.store)) == ([], [], 0)


def test_a_large_file_of_any_name_does(bench: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_WEIGHTY_BYTES", 5_000)
    bench.write("models--a--b/blobs/0a1b", 5_000)
    bench.write("models--a--b/blobs/0a1c", 10)
    bench.start()
    bench.open("models--a--b/blobs/0a1b")
    bench.counts.wait_for_fills(2)
    assert len(bench.store) == 2


def test_what_belongs_to_no_model_is_left_alone(bench: Tiered) -> None:
    bench.write("notes.txt")
    bench.write(".hidden/x.bin")
    bench.start()
    assert bench.open("notes.txt") == (None, None)
    assert bench.open(".hidden/x.bin") == (None, None)
    assert bench.tier.filler.active() == []


def test_empty_files_have_no_copies(bench: Tiered) -> None:
    bench.write("m/empty.bin", 0)
    bench.start()
    assert bench.open("m/empty.bin") == (None, None)
    assert bench.tier.want_model(b"models/m", Priority.ASKED) == 0


def test_a_copy_of_an_older_version_is_removed_and_the_new_one_comes(bench: Tiered) -> None:
    old = bench.fill("m/x.bin")
    data = bench.write("m/x.bin", 10_001, seed="new")
    bench.start()
    assert bench.current("m/x.bin") is None
    assert bench.open("m/x.bin")[1] is not None
    assert (old.removed, bench.counts.evictions["stale"]) == (True, 1)
    bench.counts.wait_for_fills(1)
    copy = bench.current("m/x.bin")
    assert copy is not None
    assert read_copy(bench.store, copy) == data


def test_an_open_beside_a_current_copy_reads_nothing_again(bench: Tiered) -> None:
    """It was sent to the source because somebody has the file open for writing; nothing changed."""
    bench.fill("m/x.bin")
    assert bench.open("m/x.bin") == (b"models/m", None)
    assert len(bench.tier.chores) == 0


# --- only ctime changed ---


def test_after_a_chmod_the_copy_is_compared_and_kept(bench: Tiered) -> None:
    old = bench.fill("m/x.bin", 2 * tier_module.CHUNK_BYTES + 5)
    bench.path("m/x.bin").chmod(0o600)
    assert bench.current("m/x.bin") is None
    bench.start()
    assert bench.open("m/x.bin") == (b"models/m", None), "this open reads the source"
    bench.settle()
    copy = bench.current("m/x.bin")
    assert copy is not None
    assert (copy.name, copy.identity) == (old.name, identity_of(bench.path("m/x.bin")))
    assert (bench.counts.evictions, bench.counts.fills) == (Counter(), [])


@pytest.mark.parametrize("offset", [0, 9_999])
def test_a_rewrite_with_its_times_set_back_is_found(bench: Tiered, offset: int) -> None:
    copy = bench.fill("m/x.bin")
    st = bench.path("m/x.bin").stat()
    with bench.path("m/x.bin").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0")
    os.utime(bench.path("m/x.bin"), ns=(st.st_atime_ns, st.st_mtime_ns))
    assert copy.identity.same_bytes_likely(identity_of(bench.path("m/x.bin")))
    bench.start()
    bench.open("m/x.bin")
    bench.settle()
    assert (copy.removed, bench.store.find(copy.identity.inode), bench.counts.evictions["stale"]) == (True, None, 1)


def test_a_change_during_the_comparison_is_no_renewal(bench: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = bench.fill("m/x.bin")
    bench.path("m/x.bin").chmod(0o600)
    real = bench.tier._same_bytes

    def changed_meanwhile(copy: Copy, fd: int) -> bool:
        same = real(copy, fd)
        bench.write("m/x.bin", seed="changed")
        return same

    monkeypatch.setattr(bench.tier, "_same_bytes", changed_meanwhile)
    bench.start()
    bench.open("m/x.bin")
    bench.settle()
    assert (copy.removed, len(bench.store)) == (True, 0)


def test_a_file_that_is_gone_before_it_was_compared(bench: Tiered) -> None:
    copy = bench.fill("m/x.bin")
    bench.path("m/x.bin").chmod(0o600)
    bench.open("m/x.bin")
    bench.path("m/x.bin").unlink()
    with capture_logs() as logs:
        bench.start()
        bench.settle()
    assert [(line["event"], line["log_level"]) for line in logs] == [("chore_failed", "warning")]
    assert not bench.tier.is_current(copy, copy.identity._replace(ctime_ns=1))


def test_a_chmod_of_a_whole_tree_fetches_nothing_anew(bench: Tiered) -> None:
    copies = [bench.fill(f"m/{number}.bin") for number in range(3)]
    for number in range(3):
        bench.path(f"m/{number}.bin").chmod(0o600)
    bench.write("m/9.bin")
    bench.start()
    assert bench.tier.want_model(b"models/m", Priority.PREFETCH) == 10_000
    bench.settle()
    assert bench.counts.wait_for_fills(1) == [("complete", 10_000)]
    assert {bench.current(f"m/{number}.bin").name for number in range(3)} == {c.name for c in copies}  # type: ignore[union-attr]


def test_a_comparison_keeps_to_the_bandwidth(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is read at once, the next in a year; nothing else waits for it, and a stop ends it."""
    bench = Tiered(tmp_path, store, bandwidth=1)
    big = bench.fill("m/x.bin", 2 * tier_module.CHUNK_BYTES)
    moved = bench.fill("old/x.bin")
    bench.path("m/x.bin").chmod(0o600)
    bench.path("old").rename(bench.path("new"))
    asked = threading.Semaphore(0)
    real = bench.tier.filler.await_turn

    def await_turn(size: int) -> None:
        asked.release()
        real(size)

    monkeypatch.setattr(bench.tier.filler, "await_turn", await_turn)
    bench.start()
    bench.open("m/x.bin")
    for _ in range(2):
        assert asked.acquire(timeout=WAIT_SECONDS)
    bench.tier.moved(moved, b"models/new/x.bin")
    with bench.tier.chores._change:
        assert bench.tier.chores._change.wait_for(lambda: moved.removed, WAIT_SECONDS)
    assert (len(bench.tier.rechecks), big.removed, bench.current("m/x.bin")) == (1, False, None)
    with capture_logs() as logs:
        bench.close()
    assert (big.removed, len(bench.tier.rechecks), logs) == (False, 0, [])


def test_a_comparison_and_fills_share_the_bandwidth(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, bandwidth=1)
    bench.fill("m/x.bin")
    bench.path("m/x.bin").chmod(0o600)
    bench.write("n/x.bin")
    bench.start()
    bench.open("m/x.bin")
    bench.settle()
    assert bench.current("m/x.bin") is not None, "one chunk is not held back"
    assert bench.tier.want_model(b"models/n", Priority.ASKED)
    filler = bench.tier.filler
    with filler._change:
        assert filler._choose(time.monotonic()) is None, "but what comes after it is"
        assert ([one.path for one in filler.queued()], filler.source_bytes) == ([b"models/n/x.bin"], 0)
    bench.close()


# --- names that move ---


def test_a_renamed_model_is_filed_under_its_new_name(bench: Tiered) -> None:
    copy = bench.fill("old/x.bin")
    bench.path("old").rename(bench.path("new"))
    bench.start()
    bench.tier.moved(copy, b"models/new/x.bin")
    bench.settle()
    assert bench.store.held_by_model() == {b"models/new": 10_000}
    found = bench.store.find(copy.identity.inode)
    assert found is not None
    assert found.path == b"models/new/x.bin"


def test_a_second_name_of_a_file_changes_nothing(bench: Tiered) -> None:
    copy = bench.fill("a/x.bin")
    bench.path("b").mkdir()
    os.link(bench.path("a/x.bin"), bench.path("b/x.bin"))
    bench.start()
    bench.tier.moved(copy, b"models/b/x.bin")
    bench.tier.moved(copy, b"elsewhere/x.bin")
    bench.settle()
    assert bench.store.find(copy.identity.inode) is copy


# --- what is wanted ---


def test_want_model_takes_what_is_missing_in_load_order(bench: Tiered) -> None:
    for name in ("3.bin", "1.bin", "2.bin", "sub/0.bin"):
        bench.write(f"m/{name}", 100)
    bench.fill("m/2.bin", 100)
    (bench.path("m") / "link.bin").symlink_to("1.bin")
    os.link(bench.path("m/1.bin"), bench.path("m/9.bin"))
    assert bench.tier.want_model(b"models/m", Priority.PREFETCH) == 300
    assert bench.tier.want_model(b"models/m", Priority.PREFETCH) == 0
    assert [one.path for one in bench.tier.filler.queued()] == [
        b"models/m/1.bin",
        b"models/m/3.bin",
        b"models/m/sub/0.bin",
    ]
    assert bench.tier.want_model(b"models/m", Priority.ASKED) == 300, "more urgent"
    bench.start()
    bench.counts.wait_for_fills(3)
    assert bench.store.held_by_model() == {b"models/m": 400}


@pytest.mark.parametrize(
    "model",
    [
        b"models/gone",
        b"models/m/x.bin/below",
        b"models/" + b"y" * 5000,
        b"models/link",
        b"models/link/sub",
        b"models/out.bin",
    ],
)
def test_models_that_are_not_there_have_no_files(bench: Tiered, tmp_path: Path, model: bytes) -> None:
    """One of them must not keep the prefetcher from all others, nor may a link lead out of the source."""
    bench.write("m/x.bin")
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("x.bin", "sub/x.bin"):
        (outside / name).write_bytes(b"secret")
    bench.path("link").symlink_to(outside)
    bench.path("out.bin").symlink_to(outside / "x.bin")
    assert bench.tier.listings.walk(model) == []
    assert bench.tier.want_model(model, Priority.ASKED) == 0


def test_a_source_below_a_link_has_its_models(tmp_path: Path) -> None:
    (tmp_path / "real/models/m").mkdir(parents=True)
    (tmp_path / "real/models/m/x.bin").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    found = files_of(tmp_path / "link", b"models/m", lambda _: b"models/m")
    assert [file.path for file in found] == [b"models/m/x.bin"]


def test_no_link_is_followed_to_what_is_wanted(bench: Tiered, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"secret")
    bench.write("m/x.bin")
    (bench.path("m") / "y.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(bench.path("m/z.bin"))
    bench.start()
    with capture_logs() as logs:
        for name in (b"y.bin", b"z.bin", b"../../../secret.bin", b""):
            identity = Identity(1, 6, 1, 1)
            bench.tier.want_file(SourceFile(b"models/m/" + name, identity), MODEL)
        bench.tier.want_model(b"models/m", Priority.ASKED)
        bench.counts.wait_for_fills(1)
        bench.tier.stop()
    assert [line["event"] for line in logs] == ["filled"]
    assert bench.store.held_by_model() == {b"models/m": 10_000}


# --- space ---


def four_models(bench: Tiered) -> dict[str, Copy]:
    """The first is the least recently used; each has some heat."""
    found = {}
    for name in "abcd":
        found[name] = bench.fill(f"{name}/x.bin", MIB)
        bench.usage.note(b"models/" + name.encode(), 1, bench.now_ns)
    return found


def test_what_is_hotter_pushes_out_the_least_recently_used(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(bench)
    bench.write("new/x.bin", MIB + 1)
    bench.now_ns += NS
    bench.start()
    bench.open("new/x.bin")
    assert bench.counts.wait_for_fills(1) == [("complete", MIB + 1)]
    assert bench.models() == {b"models/c", b"models/d", b"models/new"}
    assert bench.counts.evictions == Counter({"room": 2})
    assert bench.store.held_bytes <= 4 * MIB
    bench.close()


def test_what_is_colder_is_refused_with_a_reason(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(bench)
    for name in "abcd":
        bench.usage.note(b"models/" + name.encode(), 5, bench.now_ns)
    bench.write("new/x.bin", 1)
    bench.start()
    assert bench.open("new/x.bin") == (b"models/new", None)
    assert bench.tier.reason(b"models/new") == "would have to push out models as hot or hotter"
    bench.write("huge/x.bin", 4 * MIB + 1)
    assert bench.open("huge/x.bin") == (b"models/huge", None)
    assert "more than the node tier may ever hold" in bench.tier.reason(b"models/huge")
    assert bench.counts.refusals == 2
    assert len(bench.models()) == 4
    bench.close()


def test_no_two_fills_count_on_the_same_room(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging room and reserving it is one step, however many workers start fills."""
    bench = Tiered(tmp_path, store, limit_bytes=30_000)
    names = [f"{number}/x.bin" for number in range(4)]
    for name in names:
        bench.write(name, 20_000)
        assert bench.open(name)[1] is not None
        bench.usage.leases.take(b"models/" + name[:1].encode())  # none leaves for another
    together = threading.Barrier(2)
    real = store.begin

    def begin(*arguments: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            together.wait(0.2)  # one that was judged at the same time would come along
        together.reset()
        return real(*arguments)

    monkeypatch.setattr(store, "begin", begin)
    bench.start()
    assert [outcome for outcome, _ in bench.counts.wait_for_fills(4)] == ["complete", "refused", "refused", "refused"]
    assert (store.held_bytes, store.reserved_bytes) == (20_000, 0)
    bench.close()


def test_neither_leased_nor_pinned_leave_for_anything(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(bench)
    for name in (b"models/a", b"models/b"):
        bench.usage.leases.take(name)
    bench.usage.pin(b"models/c", True)
    bench.write("hot/x.bin", 2 * MIB)
    bench.usage.note(b"models/hot", 1000, bench.now_ns)
    bench.start()
    assert bench.open("hot/x.bin") == (b"models/hot", None)
    assert "only" in bench.tier.reason(b"models/hot")
    assert "leased nor pinned" in bench.tier.reason(b"models/hot")
    bench.write("warm/x.bin", MIB)
    bench.now_ns += NS
    bench.open("warm/x.bin")
    assert bench.counts.wait_for_fills(1) == [("complete", MIB)]
    assert bench.models() == {b"models/a", b"models/b", b"models/c", b"models/warm"}
    bench.close()


def test_a_pinned_model_that_is_prefetched_pushes_out_the_hottest(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(bench)
    bench.usage.note(b"models/a", 1000, bench.now_ns)
    for name in "abcd":
        bench.usage.note(b"models/" + name.encode(), 10, bench.now_ns)
    bench.write("pin/x.bin", 4 * MIB)
    bench.usage.pin(b"models/pin", True)
    bench.start()
    bench.tier.want_model(b"models/pin", Priority.PREFETCH)
    assert bench.counts.wait_for_fills(1) == [("complete", 4 * MIB)]
    assert bench.models() == {b"models/pin"}
    bench.close()


def test_prefetch_counts_no_load_that_nobody_made(tmp_path: Path, store: Store) -> None:
    """As hot as its victims is not hotter; the same file asked for by name counts the load to come."""
    bench = Tiered(tmp_path, store, limit_bytes=4 * MIB)
    four_models(bench)
    bench.write("new/x.bin", MIB)
    bench.usage.note(b"models/new", 1, bench.now_ns - 4 * NS)
    bench.start()
    bench.tier.want_model(b"models/new", Priority.PREFETCH)
    assert bench.counts.wait_for_fills(1) == [("refused", 0)]
    assert len(bench.models()) == 4
    bench.tier.filler._cooling.clear()
    bench.tier.want_model(b"models/new", Priority.ASKED)
    assert bench.counts.wait_for_fills(2) == [("complete", MIB), ("refused", 0)]
    bench.close()


def test_no_space_asks_for_eviction(bench: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    bench.write("m/x.bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        bench.start()
        bench.open("m/x.bin")
        assert bench.counts.wait_for_fills(1) == [("no_space", 0)]
    assert bench.space_needed.wait(WAIT_SECONDS)
    assert bench.tier.reason(b"models/m") == "No space left on device"


def test_reasons_are_bounded(bench: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_REASONS_MAX", 3)
    for number in range(10):
        bench.tier._note_reason(b"%d" % number, "why")
    assert [bench.tier.reason(b"%d" % n) for n in (6, 7, 8, 9)] == ["", "why", "why", "why"]


def test_a_model_that_is_open_is_not_evicted_by_hand(bench: Tiered) -> None:
    bench.fill("m/x.bin")
    bench.usage.leases.take(b"models/m")
    assert bench.tier.evict(b"models/m", "asked for", "asked") == 0
    bench.usage.leases.give_back(b"models/m")
    assert bench.tier.evict(b"models/m", "asked for", "asked") == 10_000
    assert bench.tier.evict(b"models/m", "asked for", "asked") == 0
    assert (len(bench.store), bench.counts.evictions) == (0, Counter({"asked": 1}))


class Disk:
    """A file system of 100 MiB: what the store holds, and what others do."""

    def __init__(self, bench: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others = 0
        self.freed_elsewhere = 0
        self.looks = 0

        def usage(path: str) -> SimpleNamespace:
            self.looks += 1
            if self.looks > 2:
                self.others -= self.freed_elsewhere
            used = self.others + bench.store.held_bytes + bench.store.reserved_bytes
            return SimpleNamespace(used=used, free=100 * MIB - used)

        monkeypatch.setattr(tier_module.psutil, "disk_usage", usage)


def test_surplus_leaves_least_recently_used_first_and_up_to_the_mark(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Tiered(tmp_path, store, marks=Watermarks(0.10, 0.12))
    disk = Disk(bench, monkeypatch)
    four_models(bench)
    disk.others = 86 * MIB
    assert bench.tier.evict_surplus() == 0, "10 % free is not below the mark"
    disk.others = 86 * MIB + 1
    assert bench.tier.evict_surplus() == 3 * MIB, "12 % and not a byte less"
    assert bench.models() == {b"models/d"}
    assert bench.counts.evictions == Counter({"watermark": 3})
    bench.close()


def test_surplus_is_judged_anew_after_each_model(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Tiered(tmp_path, store, marks=Watermarks(0.10, 0.12))
    disk = Disk(bench, monkeypatch)
    four_models(bench)
    disk.others = 87 * MIB
    disk.freed_elsewhere = 50 * MIB
    assert bench.tier.evict_surplus() == 2 * MIB
    assert bench.models() == {b"models/c", b"models/d"}
    bench.close()


def test_surplus_over_the_limit(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=2 * MIB)
    four_models(bench)
    bench.usage.note(b"models/a", 1, bench.now_ns + NS)
    bench.usage.leases.take(b"models/b")
    assert bench.tier.evict_surplus() == 2 * MIB
    assert bench.models() == {b"models/a", b"models/b"}
    bench.close()


def test_nothing_to_evict_ends(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=1)
    four_models(bench)
    for name in "abc":
        bench.usage.leases.take(b"models/" + name.encode())
    bench.usage.pin(b"models/d", True)
    with capture_logs() as logs:
        assert bench.tier.evict_surplus() == 0
    assert [line["event"] for line in logs] == ["nothing_to_evict"]
    assert len(bench.models()) == 4
    bench.close()


def test_many_fills_at_once_never_exceed_the_limit(tmp_path: Path, store: Store) -> None:
    bench = Tiered(tmp_path, store, limit_bytes=5 * MIB)
    most: list[int] = []
    real = store.begin

    def begin(identity: Identity, path: bytes, model: bytes) -> object:
        draft = real(identity, path, model)
        most.append(store.held_bytes + store.reserved_bytes)
        return draft

    store.begin = begin  # type: ignore[method-assign, assignment]
    names = [f"{number}/x.bin" for number in range(12)]
    for name in names:
        bench.write(name, 2 * MIB)
    bench.start()
    fills = [bench.open(name)[1] for name in names]
    bench.counts.wait_for_fills(sum(fill is not None for fill in fills))
    assert max(most) <= 5 * MIB
    assert store.held_bytes <= 5 * MIB
    assert any(fill is not None and fill.outcome is Outcome.COMPLETE for fill in fills)
    bench.close()
