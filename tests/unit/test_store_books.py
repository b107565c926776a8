"""The store's books under any order of calls, against a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.unit import tears
from tests.unit.copies import (
    read_copy,
    write_draft,
)
from tierd.node.copies import Identity
from tierd.node.store import Store


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
            tears.DAMAGES[how](self.store, copy)
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
