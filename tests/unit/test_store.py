"""The node tier on disk: what is committed comes back whole, what was torn or changed by hand is never served."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from tests.unit.conftest import open_descriptors
from tests.unit.copies import (
    MODEL,
    PATH,
    add_copy,
    content,
    flip,
    forge_meta,
    forge_seal,
    own_store,
    read_copy,
    write_draft,
)
from tierd.node import store as store_module
from tierd.node.store import CHUNK_BYTES, Copy, Damaged, Identity, Store, chunk_count


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(directory: Path) -> Iterator[Store]:
    with own_store(directory) as made:
        yield made


def recovered(directory: Path) -> tuple[dict[int, bytes | None], dict[str, int]]:
    """What a new daemon would find: contents by inode, and what it counted."""
    with own_store(directory) as store:
        ours = {entry for copy in store.copies() for entry in (copy.name, copy.name + ".meta")}
        assert set(os.listdir(directory)) == ours
        return {copy.identity.inode: read_copy(store, copy) for copy in store.copies()}, store.recovered


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


def test_relabel_of_what_was_removed_brings_nothing_back(store: Store, directory: Path) -> None:
    copy = add_copy(store, 7, b"abc")
    real = store._read_meta

    def removed_meanwhile(name: str) -> Any:
        found = real(name)
        store.remove(copy)
        return found

    store._read_meta = removed_meanwhile  # type: ignore[method-assign]
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


def fail_with(number: int) -> Callable[..., Any]:
    """A system call that fails."""

    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


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


# --- crashes ---


class Crash(BaseException):
    """The process is gone."""


class Crasher:
    """Ends the process before the Nth system call that changes the directory."""

    CALLS = ("open", "rename", "unlink", "fsync", "fdatasync", "posix_fallocate", "pwrite")

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        for name in self.CALLS:
            patch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            if self.left == 0:
                raise Crash
            self.left -= 1
            return call(*arguments, **more)

        return wrapped


def close_descriptors_into(directory: Path) -> None:
    """What the kernel does for a process that is gone."""
    for line in open_descriptors():
        fd, _, target = line.partition(" ")
        if target.startswith(f"{directory}/"):
            os.close(int(fd))


def crash_everywhere(
    directory: Path,
    prepare: Callable[[Store], Any],
    act: Callable[[Store, Any], Any],
    judge: Callable[[dict[int, bytes | None], bool], None],
) -> int:
    """Crash before each step of `act`, restart, and judge what is there; how many steps there are."""
    for step in range(100):
        directory.mkdir()
        store = Store(directory)
        prepared = prepare(store)
        crashed = False
        with pytest.MonkeyPatch.context() as patch:
            Crasher(patch, step)
            try:
                act(store, prepared)
            except Crash:
                crashed = True
        store.close()
        close_descriptors_into(directory)
        judge(recovered(directory)[0], crashed)
        shutil.rmtree(directory)
        if not crashed:
            return step
    raise AssertionError("it never ends")


def begin_and_commit(store: Store, data: bytes) -> None:
    """As a fill does, with the descriptor closed by the crash."""
    draft = store.begin(Identity(7, len(data), 2, 2), PATH, MODEL)
    try:
        write_draft(draft, data)
        store.commit(draft)
    finally:
        draft.close()


def test_a_crash_at_any_step_of_a_first_fill(directory: Path) -> None:
    def judge(found: dict[int, bytes | None], crashed: bool) -> None:
        assert found in ({}, {7: b"new bytes"})
        assert crashed or found

    steps = crash_everywhere(directory, lambda _: None, lambda store, _: begin_and_commit(store, b"new bytes"), judge)
    assert steps >= 8


def test_a_crash_at_any_step_of_a_second_version(directory: Path) -> None:
    def judge(found: dict[int, bytes | None], crashed: bool) -> None:
        assert found in ({7: b"old"}, {7: b"new bytes"}), "at least one whole version is there at any moment"
        assert crashed or found == {7: b"new bytes"}

    def prepare(store: Store) -> None:
        add_copy(store, 7, b"old")

    assert crash_everywhere(directory, prepare, lambda store, _: begin_and_commit(store, b"new bytes"), judge) >= 10


def test_a_crash_at_any_step_of_a_removal(directory: Path) -> None:
    def judge(found: dict[int, bytes | None], crashed: bool) -> None:
        assert found in ({}, {7: b"old"})
        assert crashed or not found

    assert crash_everywhere(directory, lambda s: add_copy(s, 7, b"old"), lambda s, c: s.remove(c), judge) >= 2


def test_a_crash_at_any_step_of_a_relabel(directory: Path) -> None:
    def judge(found: dict[int, bytes | None], crashed: bool) -> None:
        assert found == {7: b"old"}

    def act(store: Store, copy: Copy) -> None:
        store.relabel(copy, Identity(7, 3, 1, 9), b"b", b"b")

    assert crash_everywhere(directory, lambda s: add_copy(s, 7, b"old"), act, judge) >= 3


def test_a_crash_at_any_step_of_recovery(directory: Path) -> None:
    def prepare(store: Store) -> None:
        add_copy(store, 7, b"whole")
        add_copy(store, 8, b"torn")
        torn = store.find(8)
        assert torn is not None
        os.truncate(directory / torn.name, 2)
        (directory / "9-1-1.fill").write_bytes(b"left")

    def judge(found: dict[int, bytes | None], crashed: bool) -> None:
        assert found == {7: b"whole"}

    assert crash_everywhere(directory, prepare, lambda *_: Store(directory).close(), judge) >= 4


def test_what_a_power_cut_may_lose_is_synced_in_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here can cut the power: that the seal is durable only after what it seals is asserted on the calls."""
    calls: list[str] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def call(what: Any, *rest: Any, **more: Any) -> Any:
            link = what if isinstance(what, str) else os.readlink(f"/proc/self/fd/{what}")
            kind = "".join(each for each in (".meta", ".fill") if each in link)
            calls.append(f"{name} {kind or Path(link).name[:5]}")
            return real(what, *rest, **more)

        monkeypatch.setattr(os, name, call)

    draft = store.begin(Identity(7, 3, 1, 1), PATH, MODEL)
    write_draft(draft, b"abc")
    for name in ("fdatasync", "fsync", "rename", "unlink"):
        note(name)
    copy = store.commit(draft)
    store.remove(copy)
    monkeypatch.undo()
    draft.close()
    assert calls == [
        "fdatasync .fill",
        "rename .fill",
        "fsync .meta.fill",
        "rename .meta.fill",
        "fsync cache",
        "unlink .meta",
        f"unlink {copy.name[:5]}",
    ]


def meta_only(data: Path, meta: Path) -> None:
    data.unlink()


def data_only(data: Path, meta: Path) -> None:
    meta.unlink()


def uncommitted(data: Path, meta: Path) -> None:
    meta.unlink()
    data.rename(f"{data}.fill")


def half_a_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, meta.stat().st_size // 2)
    meta.rename(f"{meta}.fill")


def torn_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, meta.stat().st_size - 1)


def longer_meta(data: Path, meta: Path) -> None:
    meta.write_bytes(meta.read_bytes() + b"\0")


def empty_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, 0)


def zeroed_meta(data: Path, meta: Path) -> None:
    meta.write_bytes(bytes(meta.stat().st_size))


def flipped_path(data: Path, meta: Path) -> None:
    flip(meta, meta.read_bytes().index(b"llama"))


def flipped_sum(data: Path, meta: Path) -> None:
    flip(meta, meta.stat().st_size - 20)


def wrong_magic(data: Path, meta: Path) -> None:
    meta.write_bytes(b"Xierd" + meta.read_bytes()[5:])


def newer_format(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "format": 2})


def other_chunks(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "chunk_bytes": 4096})


def header_is_a_list(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: [1])


def header_lacks_a_field(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: header.pop("seal") and None)


def header_has_other_types(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "path": 1})


def identity_too_long(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "identity": [*header["identity"], 1]})


def identity_of_another_size(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "identity": [7, 1, 1, 1]})


def sums_missing(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: header, lambda sums: sums[:-16])


def data_shorter(data: Path, meta: Path) -> None:
    os.truncate(data, 1)


def data_as_long_again(data: Path, meta: Path) -> None:
    size = data.stat().st_size
    os.truncate(data, 1)
    os.truncate(data, size)


def data_is_a_link(data: Path, meta: Path) -> None:
    data.rename(f"{data}.fill")
    data.symlink_to(f"{data.name}.fill")


def data_is_a_pipe(data: Path, meta: Path) -> None:
    data.unlink()
    os.mkfifo(data)


def meta_is_a_pipe(data: Path, meta: Path) -> None:
    meta.unlink()
    os.mkfifo(meta)


def meta_is_a_link(data: Path, meta: Path) -> None:
    meta.rename(f"{meta}.fill")
    meta.symlink_to(f"{meta.name}.fill")


TORN = [
    meta_only, data_only, uncommitted, half_a_meta, torn_meta, longer_meta, empty_meta, zeroed_meta, flipped_path,
    flipped_sum, wrong_magic, newer_format, other_chunks, header_is_a_list, header_lacks_a_field,
    header_has_other_types, identity_too_long, identity_of_another_size, sums_missing, data_shorter,
    data_as_long_again, data_is_a_pipe, meta_is_a_pipe, meta_is_a_link, data_is_a_link,
]  # fmt: skip


@pytest.mark.parametrize("tear", TORN, ids=lambda tear: tear.__name__)
def test_what_is_not_whole_is_removed_at_the_start(directory: Path, tear: Callable[[Path, Path], None]) -> None:
    with own_store(directory) as store:
        torn, whole = add_copy(store, 7, b"torn one"), add_copy(store, 8, b"whole")
    tear(directory / torn.name, directory / f"{torn.name}.meta")
    with own_store(directory) as store:
        kept = store.find(8)
        assert kept is not None
        assert (store.find(7), read_copy(store, kept), store.held_bytes) == (None, b"whole", 5)
        assert sorted(os.listdir(directory)) == [whole.name, f"{whole.name}.meta"]
        assert store.recovered["copies"] == 1
        assert store.recovered["leftovers"] >= 1


def test_files_that_are_not_ours_stay(directory: Path) -> None:
    """Somebody names a directory that is in use: what lies in it was never ours to remove."""
    names = ["notes.txt", "id_rsa", ".bashrc", "lock", "backup.meta", "x.fill", "1-2", "1-2-3-4", "A-B-C"]
    directory.mkdir()
    for name in names:
        (directory / name).write_text("precious")
    (directory / "sub").mkdir()
    for ours in ("1-2-4", "1-2-4.meta", "ab-c-d.fill", "ab-c-e.meta.fill"):
        (directory / ours).write_text("left")
    with own_store(directory) as store:
        assert store.recovered == {"copies": 0, "leftovers": 4, "damaged": 1}
        assert store.remove_leftovers() == 0
    assert sorted(os.listdir(directory)) == sorted([*names, "sub"])


# --- damages by hand while the daemon runs ---


def swap(store: Store, copy: Copy) -> None:
    other = next(each for each in store.copies() if each is not copy)
    for old, new in ((copy.name, "tmp"), (other.name, copy.name), ("tmp", other.name)):
        os.rename(store.directory / old, store.directory / new)


def zero(store: Store, copy: Copy) -> None:
    path = store.directory / copy.name
    st = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(st.st_size))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def replace(store: Store, copy: Copy) -> None:
    """The same bytes and times in another file."""
    path = store.directory / copy.name
    shutil.copy2(path, path.with_name("tmp"))
    path.with_name("tmp").rename(path)


def make_fifo(store: Store, copy: Copy) -> None:
    (store.directory / copy.name).unlink()
    os.mkfifo(store.directory / copy.name)


def make_socket(store: Store, copy: Copy) -> None:
    (store.directory / copy.name).unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{store._dir_fd}/{copy.name}")


DAMAGES: dict[str, Callable[[Store, Copy], None]] = {
    "truncated": lambda store, copy: os.truncate(store.directory / copy.name, copy.identity.size - 1),
    "emptied": lambda store, copy: os.truncate(store.directory / copy.name, 0),
    "extended": lambda store, copy: os.truncate(store.directory / copy.name, copy.identity.size + 1),
    "flipped": lambda store, copy: flip(store.directory / copy.name, 1),
    "touched": lambda store, copy: os.utime(store.directory / copy.name),
    "deleted": lambda store, copy: os.unlink(store.directory / copy.name),
    "made a pipe": make_fifo,
    "made a socket": make_socket,
    "swapped": swap,
    "zeroed": zero,
    "replaced": replace,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_copy_is_refused_and_dropped(directory: Path, how: str) -> None:
    with own_store(directory) as store:
        copy, other = add_copy(store, 7, b"seven!"), add_copy(store, 8, b"eight!")
        DAMAGES[how](store, copy)
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


@pytest.mark.parametrize("how", DAMAGES)
def test_a_check_finds_it(store: Store, how: str) -> None:
    copy = add_copy(store, 7, b"seven!")
    add_copy(store, 8, b"eight!")
    DAMAGES[how](store, copy)
    assert store.verify(copy, deep=False)
    assert store.find(7) is None
    for each in store.copies():
        store.verify(each, deep=False)
    assert len(store) == (0 if how == "swapped" else 1)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_flip_below_the_file_system_is_found_by_reading(
    store: Store, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 4096)
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
    for inode, tear in enumerate((meta_is_a_pipe, torn_meta, newer_format, data_only), start=1):
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


# --- the books ---


class Books(RuleBasedStateMachine):
    """Random commits, removals, labels, damages and restarts, against a dictionary."""

    directory: Path
    inodes = st.integers(1, 5)
    models = st.sampled_from([b"a", b"b", b"\xff"])
    data = st.binary(min_size=1, max_size=50)

    def __init__(self) -> None:
        super().__init__()
        self.directory.mkdir()
        self.store = Store(self.directory)
        self.expected: dict[int, tuple[bytes, bytes]] = {}
        self.drafts: list[tuple[Any, bytes]] = []
        self.versions = 0

    def teardown(self) -> None:
        for draft, _ in self.drafts:
            self.store.abandon(draft)
            draft.close()
        assert self.store.reserved_bytes == 0
        self.store.close()
        shutil.rmtree(self.directory)

    @rule(inode=inodes, data=data, model=models)
    def begin(self, inode: int, data: bytes, model: bytes) -> None:
        self.versions += 1
        draft = self.store.begin(Identity(inode, len(data), self.versions, 1), b"p", model)
        write_draft(draft, data)
        self.drafts.append((draft, data))

    @precondition(lambda self: self.drafts)
    @rule(number=st.integers(0, 10), twice=st.booleans())
    def commit(self, number: int, twice: bool) -> None:
        draft, data = self.drafts.pop(number % len(self.drafts))
        self.store.commit(draft)
        if twice:
            self.store.abandon(draft)
        draft.close()
        self.expected[draft.identity.inode] = (data, draft.model)

    @precondition(lambda self: self.drafts)
    @rule(number=st.integers(0, 10))
    def abandon(self, number: int) -> None:
        draft, _ = self.drafts.pop(number % len(self.drafts))
        self.store.abandon(draft)
        draft.close()

    @rule(inode=inodes, twice=st.booleans())
    def remove(self, inode: int, twice: bool) -> None:
        copy = self.store.find(inode)
        if copy is None:
            assert inode not in self.expected
            return
        assert self.store.remove(copy) == len(self.expected.pop(inode)[0])
        if twice:
            assert self.store.remove(copy) == 0

    @rule(inode=inodes, model=models)
    def relabel(self, inode: int, model: bytes) -> None:
        copy = self.store.find(inode)
        if copy is not None:
            self.store.relabel(copy, copy.identity._replace(ctime_ns=self.versions), b"q", model)
            self.expected[inode] = (self.expected[inode][0], model)

    @rule(inode=inodes, how=st.sampled_from(["truncated", "flipped", "deleted", "zeroed", "replaced"]))
    def damage(self, inode: int, how: str) -> None:
        copy = self.store.find(inode)
        if copy is not None and (how != "flipped" or copy.identity.size > 1):
            DAMAGES[how](self.store, copy)
            assert read_copy(self.store, copy) is None
            del self.expected[inode]

    @rule()
    def restart(self) -> None:
        for draft, _ in self.drafts:
            draft.close()
        self.drafts.clear()
        self.store.close()
        self.store = Store(self.directory)
        assert self.store.recovered["damaged"] == 0

    @invariant()
    def they_balance(self) -> None:
        self.store.check()
        assert self.store.leftovers() == []
        assert self.store.reserved_bytes == sum(draft.identity.size for draft, _ in self.drafts)
        found = {copy.identity.inode: (read_copy(self.store, copy), copy.model) for copy in self.store.copies()}
        assert found == self.expected
        sizes: dict[bytes, int] = {}
        for data, model in self.expected.values():
            sizes[model] = sizes.get(model, 0) + len(data)
        assert self.store.held_by_model() == sizes
        assert {model: {c.identity.inode for c in self.store.copies_of(model)} for model in sizes} == {
            model: {inode for inode, (_, other) in self.expected.items() if other == model} for model in sizes
        }


def test_the_books_balance(tmp_path: Path) -> None:
    class Here(Books):
        directory = tmp_path / "books"

    run_state_machine_as_test(Here)
