"""The node tier on disk: what is committed comes back whole, what fails or is abandoned leaves nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.copies import (
    MODEL,
    PATH,
    add_copy,
    content,
    fail_with,
    flip,
    own_store,
    read_copy,
    recovered,
    write_draft,
)
from tierd.node import store as store_module
from tierd.node.copies import CHUNK_BYTES, Copy, Damaged, Identity, chunk_count, read_meta
from tierd.node.store import Store

# --- commit and recover ---


@pytest.mark.parametrize(
    "size", [1, 4095, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 12345]
)
def test_a_copy_is_whole_now_and_after_a_restart(directory: Path, size: int) -> None:
    data = content("copy", size)
    with own_store(directory) as store:
        copy = add_copy(store, 7, data, mtime_ns=10**18 + 1, ctime_ns=-5)
        assert (read_copy(store, copy), store.held_bytes, len(store)) == (data, size, 1)
        assert store.verify(copy, deep=True) is None
        assert len(list(store.sums(copy))) == chunk_count(size)
    with own_store(directory) as store:
        again = store.find(7)
        assert again is not None
        assert (again.identity, again.path, again.model) == (copy.identity, PATH, MODEL)
        assert again.identity == Identity(7, size, 10**18 + 1, -5)
        assert (read_copy(store, again), store.held_by_model()) == (data, {MODEL: size})
        assert store.recovered == {"copies": 1, "leftovers": 0, "damaged": 0}
        assert store.verify(again, deep=True) is None


@pytest.mark.parametrize(
    "path",
    [b"models/\xff\xfe/\x80.bin", b"m/new\nline", b'm/quote"back\\', b"m/" + b"x" * 4094, "m/모델/ü".encode()],
    ids=["not UTF-8", "new line", "quotes", "4096 bytes", "Korean"],
)
def test_any_name_comes_back(directory: Path, path: bytes) -> None:
    with own_store(directory) as store:
        add_copy(store, 1, b"abc", path=path, model=path[:-1])
    with own_store(directory) as store:
        copy = store.find(1)
        assert copy is not None
        assert (copy.path, copy.model, store.held_by_model()) == (path, path[:-1], {path[:-1]: 3})
        assert read_copy(store, copy) == b"abc"


def test_a_new_version_replaces_the_old_one(directory: Path) -> None:
    with own_store(directory) as store:
        old = add_copy(store, 7, b"old!", model=b"a")
        fd = store.open(old)
        new = add_copy(store, 7, b"newer", model=b"b", mtime_ns=2)
        assert old.removed
        assert not new.removed
        assert (store.find(7), store.held_by_model(), len(store)) == (new, {b"b": 5}, 1)
        assert os.pread(fd, 100, 0) == b"old!", "who has it open keeps it"
        os.close(fd)
        assert store.remove(old) == 0
        assert read_copy(store, new) == b"newer"
    assert recovered(directory) == ({7: b"newer"}, {"copies": 1, "leftovers": 0, "damaged": 0})


def test_of_versions_that_a_crash_left_the_latest_is_kept(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are numbered in hexadecimal: `10` comes after `f`, though not in the alphabet."""
    for versions in (2, 10, 17):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_unlink", lambda *_: None)
            directory.mkdir(exist_ok=True)
            store = Store(directory)
            for version in range(versions):
                add_copy(store, 7, b"%d" % version, mtime_ns=version)
            store.close()
        found, counts = recovered(directory)
        assert found == {7: b"%d" % (versions - 1)}
        assert counts["leftovers"] >= 2 * (versions - 1)


def test_remove(store: Store, directory: Path) -> None:
    copy = add_copy(store, 7, b"abc")
    fd = store.open(copy)
    assert store.remove(copy) == 3
    assert store.remove(copy) == 0
    assert (store.find(7), store.held_bytes, store.held_by_model(), os.listdir(directory)) == (None, 0, {}, [])
    assert os.pread(fd, 10, 0) == b"abc"
    os.close(fd)
    with pytest.raises(Damaged):
        store.open(copy)
    assert store.damaged == 0, "that it was removed is no damage"


def test_relabel(directory: Path) -> None:
    with own_store(directory) as store:
        old = add_copy(store, 7, b"abc")
        new = store.relabel(old, Identity(7, 3, 1, 99), b"models/b/x", b"models/b")
        assert (old.removed, new.removed, store.find(7)) == (True, False, new)
        assert (store.held_bytes, store.held_by_model()) == (3, {b"models/b": 3})
        assert read_copy(store, new) == b"abc"
        assert store.verify(new, deep=True) is None
    with own_store(directory) as store:
        copy = store.find(7)
        assert copy is not None
        assert (copy.identity.ctime_ns, copy.path, copy.model) == (99, b"models/b/x", b"models/b")


def test_relabel_of_what_was_removed_brings_nothing_back(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add_copy(store, 7, b"abc")

    def removed_meanwhile(dir_fd: int, name: str) -> Any:
        found = read_meta(dir_fd, name)
        store.remove(copy)
        return found

    monkeypatch.setattr(store_module, "read_meta", removed_meanwhile)
    assert store.relabel(copy, copy.identity, b"b", b"b") is copy
    assert (store.find(7), os.listdir(directory)) == (None, [])
    with pytest.raises(FileNotFoundError):
        store.relabel(copy, copy.identity, b"b", b"b")


def test_relabel_without_space_leaves_everything_as_it_was(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = add_copy(store, 7, b"abc")
    before = sorted(os.listdir(directory))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_with(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            store.relabel(copy, Identity(7, 3, 1, 2), b"b", b"b")
    assert sorted(os.listdir(directory)) == before
    assert (store.find(7), copy.removed, read_copy(store, copy)) == (copy, False, b"abc")


def test_abandoned_drafts_leave_nothing(store: Store, directory: Path) -> None:
    draft = store.begin(Identity(7, 10_000, 1, 1), PATH, MODEL)
    assert (store.reserved_bytes, os.stat(draft.fd).st_blocks * 512 >= 10_000) == (10_000, True)
    assert store.leftovers() == [], "a draft is no leftover"
    store.abandon(draft)
    store.abandon(draft)
    assert (store.reserved_bytes, os.listdir(directory), len(store)) == (0, [], 0)
    draft.close()


def test_a_committed_draft_cannot_be_abandoned(store: Store) -> None:
    """A daemon that stops while a commit runs abandons what it finds."""
    draft = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
    write_draft(draft, b"abc")
    copy = store.commit(draft)
    store.abandon(draft)
    draft.close()
    assert (store.reserved_bytes, read_copy(store, copy)) == (0, b"abc")


def test_an_abandoned_draft_cannot_be_committed(directory: Path) -> None:
    with own_store(directory) as store:
        draft = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
        write_draft(draft, b"abc")
        store.abandon(draft)
        with pytest.raises(OSError, match="abandoned"):
            store.commit(draft)
        draft.close()
        assert (store.reserved_bytes, len(store)) == (0, 0)


def test_two_drafts_of_one_inode(store: Store) -> None:
    first = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
    second = store.begin(Identity(7, 4, 2, 2), PATH, MODEL)
    assert store.reserved_bytes == 7
    write_draft(first, b"abc")
    write_draft(second, b"defg")
    store.commit(second)
    store.commit(first)
    first.close()
    second.close()
    copy = store.find(7)
    assert copy is not None
    assert (read_copy(store, copy), store.held_bytes, len(store)) == (b"abc", 3, 1)


def test_each_copy_that_leaves_is_told_once(directory: Path) -> None:
    """Removed, replaced, relabelled or damaged; when it is told, it is out of the books and marked."""
    directory.mkdir()
    told: list[Copy] = []

    def removed(copy: Copy) -> None:
        assert copy.removed
        assert store.find(copy.identity.inode) is not copy
        told.append(copy)

    store = Store(directory, removed=removed)
    first = add_copy(store, 1, b"abc")
    assert told == []
    second = add_copy(store, 1, b"abcd")
    assert told == [first], "replaced"
    third = store.relabel(second, second.identity._replace(ctime_ns=9), second.path, second.model)
    assert told == [first, second], "relabelled"
    store.remove(third)
    store.remove(third)
    store.remove(second)
    assert told == [first, second, third]
    damaged = add_copy(store, 2, b"xyz")
    flip(directory / damaged.name)
    assert read_copy(store, damaged) is None
    assert told == [first, second, third, damaged]
    store.close()


# --- no space ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP])
def test_no_space_for_a_draft_leaves_no_trace(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail_with(number))
    with pytest.raises(OSError, match=r"\[Errno") as raised:
        store.begin(Identity(7, 1 << 40, 1, 1), PATH, MODEL)
    assert raised.value.errno == number
    assert (os.listdir(directory), store.reserved_bytes) == ([], 0)


def test_no_space_though_a_check_removed_the_draft_meanwhile(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(fd: int, offset: int, size: int) -> None:
        for name in os.listdir(directory):
            os.unlink(directory / name)
        fail_with(errno.ENOSPC)()

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match="No space"):
        store.begin(Identity(7, 1 << 40, 1, 1), PATH, MODEL)


@pytest.mark.parametrize("call", ["fdatasync", "rename", "fsync"])
def test_a_commit_that_fails_can_be_abandoned(
    store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    draft = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
    write_draft(draft, b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            store.commit(draft)
    store.abandon(draft)
    draft.close()
    assert (os.listdir(directory), store.reserved_bytes, len(store)) == ([], 0, 0)


def test_a_draft_of_another_length_is_no_copy(store: Store, directory: Path) -> None:
    draft = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
    write_draft(draft, b"abc")
    os.ftruncate(draft.fd, 2)
    with pytest.raises(OSError, match="not as long"):
        store.commit(draft)
    store.abandon(draft)
    draft.close()
    assert (os.listdir(directory), len(store)) == ([], 0)
