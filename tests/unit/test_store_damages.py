"""Copies that are changed by hand while the daemon runs: never served, found by a check, and counted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.unit import tears
from tests.unit.copies import (
    MODEL,
    PATH,
    add_copy,
    content,
    fail_with,
    flip,
    forge_seal,
    own_store,
    read_copy,
    small_chunks,
    write_draft,
)
from tierd.node.copies import CHUNK_BYTES, Copy, Damaged, Identity
from tierd.node.readahead import resident_bytes
from tierd.node.store import Store, opened


@pytest.mark.parametrize("how", tears.DAMAGES)
def test_a_damaged_copy_is_refused_and_dropped(directory: Path, how: str) -> None:
    with own_store(directory) as store:
        copy, other = add_copy(store, 7, b"seven!"), add_copy(store, 8, b"eight!")
        tears.DAMAGES[how](store, copy)
        with pytest.raises(Damaged):
            store.open(copy)
        assert (store.find(7), copy.removed, store.damaged, store.held_bytes) == (None, True, 1, 6)
        store.check()
        with pytest.raises(Damaged):
            store.open(copy)
        assert store.damaged == 1, "counted once"
        if how == "swapped":
            assert read_copy(store, other) is None
            assert len(store) == 0
        else:
            assert read_copy(store, other) == b"eight!"


@pytest.mark.parametrize("how", tears.DAMAGES)
def test_a_check_finds_it(store: Store, how: str) -> None:
    copy = add_copy(store, 7, b"seven!")
    add_copy(store, 8, b"eight!")
    tears.DAMAGES[how](store, copy)
    assert store.verify(copy, deep=False)
    assert store.find(7) is None
    for each in store.copies():
        store.verify(each, deep=False)
    assert len(store) == (0 if how == "swapped" else 1)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_flip_below_the_file_system_is_found_by_reading(
    store: Store, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    small_chunks(monkeypatch, 4096)
    data = content("deep", 2 * 4096 + 10)
    copy, whole = add_copy(store, 7, data), add_copy(store, 8, data)
    flip(store.directory / copy.name, chunk * 4096 + 9)
    forge_seal(store, copy)
    assert read_copy(store, copy) not in (data, None), "the seal says nothing"
    assert store.verify(copy, deep=False) is None
    seen: list[int] = []
    problem = store.verify(copy, deep=True, progress=seen.append)
    assert problem == f"chunk {chunk} has the wrong checksum"
    assert sum(seen) == min((chunk + 1) * 4096, len(data))
    assert (store.find(7), read_copy(store, copy), store.damaged) == (None, None, 1)
    assert store.verify(whole, deep=True) is None


@pytest.mark.parametrize("cached", [False, True])
def test_a_deep_check_reads_the_disk_unless_the_copy_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """What is in memory may be right where the disk no longer is; what is in use must stay in memory."""
    size = CHUNK_BYTES // 2
    copy = add_copy(store, 7, content("pages", size))
    read_copy(store, copy)
    with opened(store, copy) as fd:
        if resident_bytes(fd, size) < size:
            pytest.skip("this file system keeps no pages")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_bytes(fd, size) > 0:
            pytest.skip("this file system cannot drop pages")
        os.pread(fd, size, 0)
        before: list[int] = []
        real = store.sums

        def sums(each: Copy) -> Iterator[bytes]:
            before.append(resident_bytes(fd, size))
            return real(each)

        monkeypatch.setattr(store, "sums", sums)
        assert store.verify(copy, deep=True, cached=cached) is None
        assert before == [size if cached else 0]
        assert resident_bytes(fd, size) == (size if cached else 0)


def test_damage_found_while_the_copy_is_relabelled_is_dropped_too(store: Store) -> None:
    """A check holds the copy as it was; a chmod of the source gave the same file a new label meanwhile."""
    copy = add_copy(store, 7, b"seven!")
    flip(store.directory / copy.name)
    forge_seal(store, copy)
    renewed = store.relabel(copy, Identity(7, 6, 1, 2), PATH, MODEL)
    assert store.verify(copy, deep=True) is not None
    assert (store.find(7), renewed.removed, store.damaged) == (None, True, 1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_too_few_descriptors_are_a_miss_and_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    copy = add_copy(store, 7, b"seven!")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail_with(number))
        with pytest.raises(Damaged):
            store.open(copy)
    assert (store.find(7), store.damaged, read_copy(store, copy)) == (copy, 0, b"seven!")


def test_checksums_that_cannot_be_read_are_a_problem(store: Store) -> None:
    for inode, tear in enumerate((tears.meta_is_a_pipe, tears.torn_meta, tears.newer_format, tears.data_only), start=1):
        copy = add_copy(store, inode, b"seven!")
        tear(store.directory / copy.name, store.directory / f"{copy.name}.meta")
        assert store.verify(copy, deep=False) is None
        assert store.verify(copy, deep=True)
        assert store.find(inode) is None


def test_a_copy_cannot_be_written_through_its_descriptor(store: Store) -> None:
    copy = add_copy(store, 7, b"seven!")
    fd = store.open(copy)
    try:
        with pytest.raises(OSError, match="Bad file"):
            os.write(fd, b"x")
        if store.read_only_view:
            with pytest.raises(OSError, match="Read-only"):
                os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    finally:
        os.close(fd)


def test_damage_is_logged_once_with_what_it_costs(store: Store) -> None:
    copy = add_copy(store, 7, b"seven!", path=b"models/\xff")
    flip(store.directory / copy.name)
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(Damaged):
                store.open(copy)
    assert [(line["event"], line["path"], line["cost"]) for line in logs] == [
        ("copy_damaged", "models/\udcff", "a miss")
    ]


def test_leftovers_while_it_runs(store: Store, directory: Path) -> None:
    copy = add_copy(store, 7, b"seven!")
    draft = store.begin(Identity(8, 5, 1, 1), PATH, MODEL)
    (directory / "1-2-3").write_bytes(b"x")
    (directory / "1-2-3.meta.fill").write_bytes(b"x")
    assert store.leftovers() == ["1-2-3", "1-2-3.meta.fill"]
    assert store.remove_leftovers() == 2
    write_draft(draft, b"eight")
    assert read_copy(store, store.commit(draft)) == b"eight"
    draft.close()
    assert read_copy(store, copy) == b"seven!"
