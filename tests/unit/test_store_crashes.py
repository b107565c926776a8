"""The store after a crash at any step: what is whole comes back, what is torn or is not ours is told apart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit import tears
from tests.unit.copies import (
    MODEL,
    PATH,
    add_copy,
    own_store,
    read_copy,
    recovered,
    write_draft,
)
from tests.unit.descriptors import open_descriptors
from tierd.node.copies import Copy, Identity
from tierd.node.store import Store


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


@pytest.mark.parametrize("tear", tears.TORN, ids=lambda tear: tear.__name__)
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
