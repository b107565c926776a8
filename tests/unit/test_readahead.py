"""Read-ahead: which files' pages are asked for, in which order, and when it stops."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.copies import WAIT_SECONDS, add_copy, content, flip, own_store
from tierd.node import readahead as readahead_module
from tierd.node.readahead import ReadAhead, available_bytes, resident_bytes
from tierd.node.store import Copy, Store

SIZE = 3 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with own_store(tmp_path / "cache") as made:
        yield made


def add(store: Store, inode: int, name: str, size: int = SIZE, model: bytes = b"models/m") -> Copy:
    return add_copy(store, inode, content(inode, size), path=f"models/m/{name}".encode(), model=model)


def drop_pages(store: Store, *copies: Copy) -> None:
    for copy in copies:
        fd = os.open(store.directory / copy.name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def resident(store: Store, copy: Copy) -> int:
    fd = os.open(store.directory / copy.name, os.O_RDONLY)
    try:
        return resident_bytes(fd, copy.identity.size)
    finally:
        os.close(fd)


def settled(ahead: ReadAhead) -> None:
    """Everything that was asked for was done."""
    done = threading.Event()
    ahead._chores.add(object(), done.set)
    assert done.wait(WAIT_SECONDS)


@pytest.fixture
def make(store: Store) -> Iterator[Callable[..., ReadAhead]]:
    made: list[ReadAhead] = []

    def build(share: float = 0.5, available: Callable[[], int] = lambda: 1 << 40) -> ReadAhead:
        made.append(ReadAhead(store, share, available=available))
        made[-1].start()
        return made[-1]

    yield build
    for each in made:
        each.stop()


def test_pages_that_are_resident_are_counted(store: Store) -> None:
    copy = add(store, 1, "a")
    fd = store.open(copy)
    try:
        os.pread(fd, SIZE, 0)
        assert resident_bytes(fd, SIZE) == SIZE
        assert readahead_module._resident_by_mincore(fd, SIZE) == SIZE
        drop_pages(store, copy)
        assert resident_bytes(fd, SIZE) < SIZE
        assert resident_bytes(fd, 0) == 0
    finally:
        os.close(fd)


def test_both_ways_of_counting_agree(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = add(store, 1, "a", SIZE + 100)
    drop_pages(store, copy)
    fd = store.open(copy)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, 1 << 20, 1 << 20)
        counted = resident_bytes(fd, SIZE + 100)
        assert counted >= 1 << 20
        monkeypatch.setattr(readahead_module, "_SYS_CACHESTAT", 100_000)
        assert resident_bytes(fd, SIZE + 100) == counted
    finally:
        os.close(fd)


def test_what_is_resident_is_not_asked_for(store: Store, make: Callable[..., ReadAhead]) -> None:
    copy = add(store, 1, "a")
    assert resident(store, copy) == SIZE
    ahead = make()
    ahead(copy)
    settled(ahead)
    assert (ahead.requested_bytes, ahead.skipped) == (0, 0)


def test_the_files_that_follow_in_load_order_come_too(store: Store, make: Callable[..., ReadAhead]) -> None:
    copies = [add(store, number, f"{number}") for number in range(1, 5)]
    other = add(store, 9, "9", model=b"models/other")
    drop_pages(store, *copies, other)
    ahead = make()
    ahead(copies[1])
    settled(ahead)
    assert ahead.requested_bytes == 3 * SIZE, "2, 3 and 4: neither what lies before nor another model"
    assert resident(store, copies[0]) < SIZE
    assert resident(store, other) < SIZE


def test_it_stops_where_memory_ends(store: Store, make: Callable[..., ReadAhead]) -> None:
    copies = [add(store, number, f"{number}") for number in range(1, 4)]
    drop_pages(store, *copies)
    budget = iter([2 * SIZE, 2 * SIZE - 1])
    ahead = make(0.5, lambda: next(budget))
    ahead(copies[0])
    settled(ahead)
    assert (ahead.requested_bytes, ahead.skipped) == (SIZE, 1)


def test_a_budget_that_shrinks_ends_a_large_file(
    store: Store, make: Callable[..., ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead_module, "_STEP_BYTES", 4096)
    monkeypatch.setattr(readahead_module, "_BUDGET_STEPS", 2)
    copy = add(store, 1, "a", 100 * 4096)
    drop_pages(store, copy)
    budget = iter([1 << 30, 4096, 4096, 4095])
    ahead = make(1.0, lambda: next(budget))
    ahead(copy)
    settled(ahead)
    assert ahead.requested_bytes == 5 * 4096


def test_switched_off(store: Store, make: Callable[..., ReadAhead]) -> None:
    copy = add(store, 1, "a")
    drop_pages(store, copy)
    ahead = make(0.0)
    ahead(copy)
    settled(ahead)
    assert ahead.requested_bytes == 0


@pytest.mark.parametrize("what", ["removed", "removed meanwhile", "damaged"])
def test_a_copy_that_is_gone_disturbs_nothing(store: Store, make: Callable[..., ReadAhead], what: str) -> None:
    first, second = add(store, 1, "1"), add(store, 2, "2")
    drop_pages(store, first, second)
    ahead = make()
    if what == "removed meanwhile":
        hold, going = threading.Event(), threading.Event()

        def wait() -> None:
            going.set()
            hold.wait(WAIT_SECONDS)

        ahead._chores.add("hold", wait)
        assert going.wait(WAIT_SECONDS)
        ahead(first)
        store.remove(first)
        hold.set()
    elif what == "removed":
        store.remove(first)
        ahead(first)
    else:
        flip(store.directory / first.name)
        ahead(first)
    settled(ahead)
    assert ahead.requested_bytes == (0 if what == "removed" else SIZE), "the next one comes nevertheless"
    assert store.damaged == (1 if what == "damaged" else 0)


def test_memory_that_is_available(tmp_path: Path) -> None:
    assert 0 < available_bytes() < 1 << 50
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.high").write_text("max\n")
    assert readahead_module._cgroup_room(tmp_path) == 1300
    (tmp_path / "memory.high").write_text("500\n")
    assert readahead_module._cgroup_room(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.high").write_text("max\n")
    assert readahead_module._cgroup_room(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("rubbish\n")
    assert readahead_module._cgroup_room(tmp_path) > 1 << 60
    assert readahead_module._cgroup_room(tmp_path / "missing") > 1 << 60
