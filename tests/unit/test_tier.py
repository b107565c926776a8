"""The node tier: what is current, what an open brings, names that move, what is wanted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.unit.copies import MODEL, read_copy
from tests.unit.tiered import Tiered
from tierd.node import tier as tier_module
from tierd.node.catalog import SourceFile, files_of
from tierd.node.cold_source import ColdSource
from tierd.node.store import Identity, Store
from tierd.node.wanted import Priority

# --- what is current ---


def test_a_copy_is_current_until_anything_of_its_file_changes(tiered: Tiered) -> None:
    copy = tiered.fill("m/x.bin")
    identity = copy.identity
    tier = tiered.tier
    assert tier.is_current(copy, identity)
    for other in (
        identity._replace(inode=identity.inode + 1),
        identity._replace(size=identity.size + 1),
        identity._replace(mtime_ns=identity.mtime_ns + 1),
        identity._replace(ctime_ns=identity.ctime_ns + 1),
    ):
        assert not tier.is_current(copy, other)
    tiered.store.remove(copy)
    assert not tier.is_current(copy, identity)


def test_inodes_of_other_devices_have_no_copies(tiered: Tiered) -> None:
    copy = tiered.fill("m/x.bin")
    assert tiered.tier.find(copy.identity.inode) is copy
    assert tiered.tier.find((5, copy.identity.inode)) is None


@pytest.mark.parametrize("allowed", [True, False])
def test_a_source_that_does_not_answer(tmp_path: Path, store: Store, allowed: bool) -> None:
    tiered = Tiered(tmp_path, store, stale_if_unreachable=allowed)
    copy = tiered.fill("m/x.bin")
    assert tiered.tier.serve_stale(copy) is allowed
    store.remove(copy)
    assert tiered.tier.serve_stale(copy) is False
    assert tiered.counts.stale == int(allowed)
    tiered.close()


# --- opens ---


def test_an_opened_file_is_filled_and_its_siblings_come_after_it(tiered: Tiered) -> None:
    data = {name: tiered.write(f"m/{name}") for name in ("1.safetensors", "2.safetensors", "config.json")}
    tiered.write("other/1.safetensors")
    tiered.start()
    model, fill = tiered.open("m/2.safetensors")
    assert (model, fill is not None) == (b"models/m", True)
    assert tiered.counts.wait_for_fills(3) == [("complete", 10_000)] * 3
    for name, expected in data.items():
        copy = tiered.current(f"m/{name}")
        assert copy is not None
        assert read_copy(tiered.store, copy) == expected
    assert tiered.models() == {b"models/m"}
    assert tiered.usage.last_access_ns(b"models/m") == tiered.now_ns, "what just came is not what leaves first"
    assert tiered.tier.reason(b"models/m") == ""


def test_a_small_file_brings_nothing_not_even_itself(tiered: Tiered) -> None:
    tiered.write("m/1.safetensors")
    tiered.write("m/config.json", 100)
    tiered.start()
    assert tiered.open("m/config.json") == (b"models/m", None)
    tiered.settle()
    assert (tiered.tier.filler.queued(), tiered.tier.filler.active(), len(tiered.store)) == ([], [], 0)


def test_a_large_file_of_any_name_does(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_WEIGHTY_BYTES", 5_000)
    tiered.write("models--a--b/blobs/0a1b", 5_000)
    tiered.write("models--a--b/blobs/0a1c", 10)
    tiered.start()
    tiered.open("models--a--b/blobs/0a1b")
    tiered.counts.wait_for_fills(2)
    assert len(tiered.store) == 2


def test_what_belongs_to_no_model_is_left_alone(tiered: Tiered) -> None:
    tiered.write("notes.txt")
    tiered.write(".hidden/x.bin")
    tiered.start()
    assert tiered.open("notes.txt") == (None, None)
    assert tiered.open(".hidden/x.bin") == (None, None)
    assert tiered.tier.filler.active() == []


def test_empty_files_have_no_copies(tiered: Tiered) -> None:
    tiered.write("m/empty.bin", 0)
    tiered.start()
    assert tiered.open("m/empty.bin") == (None, None)
    assert tiered.tier.want_model(b"models/m", Priority.ASKED) == 0


def test_a_copy_of_an_older_version_is_removed_and_the_new_one_comes(tiered: Tiered) -> None:
    old = tiered.fill("m/x.bin")
    data = tiered.write("m/x.bin", 10_001, seed="new")
    tiered.start()
    assert tiered.current("m/x.bin") is None
    assert tiered.open("m/x.bin")[1] is not None
    assert (old.removed, tiered.counts.evictions["stale"]) == (True, 1)
    tiered.counts.wait_for_fills(1)
    copy = tiered.current("m/x.bin")
    assert copy is not None
    assert read_copy(tiered.store, copy) == data


def test_an_open_beside_a_current_copy_reads_nothing_again(tiered: Tiered) -> None:
    """It was sent to the source because somebody has the file open for writing; nothing changed."""
    tiered.fill("m/x.bin")
    assert tiered.open("m/x.bin") == (b"models/m", None)
    assert len(tiered.tier.chores) == 0


# --- names that move ---


def test_a_renamed_model_is_filed_under_its_new_name(tiered: Tiered) -> None:
    copy = tiered.fill("old/x.bin")
    tiered.path("old").rename(tiered.path("new"))
    tiered.start()
    tiered.tier.moved(copy, b"models/new/x.bin")
    tiered.settle()
    assert tiered.store.held_by_model() == {b"models/new": 10_000}
    found = tiered.store.find(copy.identity.inode)
    assert found is not None
    assert found.path == b"models/new/x.bin"


def test_a_second_name_of_a_file_changes_nothing(tiered: Tiered) -> None:
    copy = tiered.fill("a/x.bin")
    tiered.path("b").mkdir()
    os.link(tiered.path("a/x.bin"), tiered.path("b/x.bin"))
    tiered.start()
    tiered.tier.moved(copy, b"models/b/x.bin")
    tiered.tier.moved(copy, b"elsewhere/x.bin")
    tiered.settle()
    assert tiered.store.find(copy.identity.inode) is copy


# --- what is wanted ---


def test_want_model_takes_what_is_missing_in_load_order(tiered: Tiered) -> None:
    for name in ("3.bin", "1.bin", "2.bin", "sub/0.bin"):
        tiered.write(f"m/{name}", 100)
    tiered.fill("m/2.bin", 100)
    (tiered.path("m") / "link.bin").symlink_to("1.bin")
    os.link(tiered.path("m/1.bin"), tiered.path("m/9.bin"))
    assert tiered.tier.want_model(b"models/m", Priority.PREFETCH) == 300
    assert tiered.tier.want_model(b"models/m", Priority.PREFETCH) == 0
    assert [one.path for one in tiered.tier.filler.queued()] == [
        b"models/m/1.bin",
        b"models/m/3.bin",
        b"models/m/sub/0.bin",
    ]
    assert tiered.tier.want_model(b"models/m", Priority.ASKED) == 300, "more urgent"
    tiered.start()
    tiered.counts.wait_for_fills(3)
    assert tiered.store.held_by_model() == {b"models/m": 400}


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
def test_models_that_are_not_there_have_no_files(tiered: Tiered, tmp_path: Path, model: bytes) -> None:
    """One of them must not keep the prefetcher from all others, nor may a link lead out of the source."""
    tiered.write("m/x.bin")
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("x.bin", "sub/x.bin"):
        (outside / name).write_bytes(b"secret")
    tiered.path("link").symlink_to(outside)
    tiered.path("out.bin").symlink_to(outside / "x.bin")
    assert tiered.tier.listings.walk(model) == []
    assert tiered.tier.want_model(model, Priority.ASKED) == 0


def test_a_source_below_a_link_has_its_models(tmp_path: Path) -> None:
    (tmp_path / "real/models/m").mkdir(parents=True)
    (tmp_path / "real/models/m/x.bin").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    source = ColdSource(tmp_path / "link")
    found = files_of(source, b"models/m", lambda _: b"models/m")
    source.close()
    assert [file.path for file in found] == [b"models/m/x.bin"]


def test_no_link_is_followed_to_what_is_wanted(tiered: Tiered, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"secret")
    tiered.write("m/x.bin")
    (tiered.path("m") / "y.bin").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(tiered.path("m/z.bin"))
    tiered.start()
    with capture_logs() as logs:
        for name in (b"y.bin", b"z.bin", b"../../../secret.bin", b""):
            identity = Identity(1, 6, 1, 1)
            tiered.tier.want_file(SourceFile(b"models/m/" + name, identity), MODEL)
        tiered.tier.want_model(b"models/m", Priority.ASKED)
        tiered.counts.wait_for_fills(1)
        tiered.tier.stop()
    assert [line["event"] for line in logs] == ["filled"]
    assert tiered.store.held_by_model() == {b"models/m": 10_000}
