"""The inode table: names, lookup counts, retirement, paths; no file system."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tierd.node.inodes import InodeTable, Node, pack, same_content, unpack
from tierd.node.ledger import ROOT_ID
from tierd.node.sources import Moved, Version

ROOT_KEY = 100
OTHER_NAMES_MAX = 64


@pytest.fixture
def table() -> InodeTable:
    return InodeTable(ROOT_KEY)


@contextmanager
def soon() -> Iterator[None]:
    """Turn an endless loop in plain Python into a failure, by the processor time it takes."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it loops for ever")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_new_table_knows_the_root_alone(table: InodeTable) -> None:
    assert len(table) == 1
    assert table.get(ROOT_ID) is table.root is table.by_key(ROOT_KEY)
    assert table.path(table.root) == b""
    table.check()


def test_seen_counts_one_lookup_each_and_keeps_the_node(table: InodeTable) -> None:
    first = table.seen(table.root, b"a", 1)
    again = table.seen(table.root, b"a", 1)
    assert first is again
    assert first.lookups == 2
    assert table.get(first.id) is first is table.by_key(1)
    assert table.path(first) == b"a"
    table.check()


def test_unknown_id_is_stale(table: InodeTable) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        table.get(42)


def test_keys_of_two_devices_do_not_clash(table: InodeTable) -> None:
    assert table.seen(table.root, b"a", 1) is not table.seen(table.root, b"b", (7, 1))
    table.check()


def test_forget_is_total(table: InodeTable) -> None:
    node = table.seen(table.root, b"a", 1)
    table.seen(table.root, b"a", 1)
    assert table.forget(999, 1) is None
    assert table.forget(ROOT_ID, 10) is None
    assert table.forget(node.id, 1) is None
    assert table.forget(node.id, 1) is node
    assert table.forget(node.id, 1) is None
    assert table.by_key(1) is None
    assert len(table) == 1
    table.check()


def test_forgetting_more_than_was_counted_is_forgetting_all(table: InodeTable) -> None:
    node = table.seen(table.root, b"a", 1)
    assert table.forget(node.id, 1000) is node
    table.check()


def test_ids_are_never_used_twice(table: InodeTable) -> None:
    ids = set()
    for _ in range(10):
        node = table.seen(table.root, b"a", 1)
        ids.add(node.id)
        table.forget(node.id, 1)
    assert len(ids) == 10
    assert ROOT_ID not in ids


def test_hard_links_the_latest_name_first(table: InodeTable) -> None:
    directory = table.seen(table.root, b"d", 2)
    node = table.seen(table.root, b"a", 1)
    table.seen(directory, b"b", 1)
    table.seen(table.root, b"c", 1)
    assert list(node.names()) == [(table.root, b"c"), (directory, b"b"), (table.root, b"a")]
    assert table.path(node) == b"c"
    table.seen(table.root, b"a", 1)
    assert list(node.names()) == [(table.root, b"a"), (table.root, b"c"), (directory, b"b")]
    table.check()


def test_a_dropped_name_gives_way_to_the_one_before(table: InodeTable) -> None:
    node = table.seen(table.root, b"a", 1)
    table.seen(table.root, b"b", 1)
    table.seen(table.root, b"c", 1)
    table.drop_name(node, table.root, b"b")
    assert list(node.names()) == [(table.root, b"c"), (table.root, b"a")]
    table.drop_name(node, table.root, b"c")
    assert table.path(node) == b"a"
    table.drop_name(node, table.root, b"unknown")
    table.drop_name(node, table.root, b"a")
    assert list(node.names()) == []
    with pytest.raises(Moved):
        table.path(node)
    table.add_name(node, table.root, b"back")
    assert table.path(node) == b"back"
    table.check()


def test_same_name_in_two_directories_is_two_names(table: InodeTable) -> None:
    one, two = table.seen(table.root, b"1", 11), table.seen(table.root, b"2", 12)
    node = table.seen(one, b"x", 1)
    table.seen(two, b"x", 1)
    table.drop_name(node, two, b"x")
    assert table.path(node) == b"1/x"
    table.check()


def test_names_remembered_are_bounded(table: InodeTable) -> None:
    node = table.seen(table.root, b"0", 1)
    for number in range(1, 1000):
        table.seen(table.root, b"%d" % number, 1)
    names = [name for _, name in node.names()]
    assert names[:3] == [b"999", b"998", b"997"]
    assert len(names) == 1 + OTHER_NAMES_MAX, "the latest name, and as many others as the limit says"
    table.check()


def test_the_root_takes_no_names(table: InodeTable) -> None:
    table.add_name(table.root, table.root, b"loop")
    table.seen(table.root, b"loop", ROOT_KEY)
    assert list(table.root.names()) == []
    assert table.path(table.root) == b""


def test_paths_follow_a_renamed_directory(table: InodeTable) -> None:
    a = table.seen(table.root, b"a", 1)
    b = table.seen(a, b"b", 2)
    file = table.seen(b, b"f", 3)
    table.drop_name(b, a, b"b")
    table.add_name(b, table.root, b"moved")
    assert table.path(file) == b"moved/f"
    table.drop_name(a, table.root, b"a")
    table.add_name(a, b, b"inside")
    assert table.path(a) == b"moved/inside"
    table.check()


def test_path_of_a_name_whose_directory_is_gone(table: InodeTable) -> None:
    a = table.seen(table.root, b"a", 1)
    file = table.seen(a, b"f", 2)
    table.drop_name(a, table.root, b"a")
    with pytest.raises(Moved):
        table.path(file)


def test_a_directory_below_itself_is_no_endless_path(table: InodeTable) -> None:
    """A bind mount may show a directory in itself; the kernel refuses such a lookup, the table must survive it."""
    a = table.seen(table.root, b"a", 1)
    with soon():
        assert table.seen(a, b"b", 1) is a
        file = table.seen(a, b"f", 2)
        table.seen(file, b"c", 3)
        for node in (a, file):
            try:
                table.path(node)
            except Moved:
                continue
        table.check()


def test_path_ends_where_directories_changed_places_beneath(table: InodeTable) -> None:
    """a/b became b/a beneath the mount, and only the old names of each are left: their parents form a ring."""
    a = table.seen(table.root, b"a", 1)
    b = table.seen(a, b"b", 2)
    table.seen(table.root, b"b", 2)
    table.seen(b, b"a", 1)
    assert table.path(a) == b"b/a"
    with soon():
        table.drop_name(b, table.root, b"b")
        with pytest.raises(Moved):
            table.path(a)


def test_retired_node_gives_way_to_a_young_one(table: InodeTable) -> None:
    old = table.seen(table.root, b"a", 1)
    table.retire(old, 5.0)
    assert table.by_key(1) is None
    assert table.get(old.id) is old, "the kernel still knows it"
    new = table.seen(table.root, b"a", 1)
    assert new is not old
    assert new.young_until == 5.0
    assert old.young_until == 0.0
    assert len(table) == 3
    table.check()
    table.forget(old.id, 1)
    assert table.by_key(1) is new
    table.check()


def test_retired_nodes_may_be_many(table: InodeTable) -> None:
    generations = []
    for number in range(10):
        node = table.seen(table.root, b"a", 1)
        generations.append(node)
        table.retire(node, float(number + 1))
        table.check()
    assert [node.young_until for node in generations] == [float(number) for number in range(10)]
    for node in generations:
        assert table.forget(node.id, 1) is node
    assert len(table) == 1
    table.check()


def test_youth_lasts_its_time_however_often_the_kernel_forgets(table: InodeTable) -> None:
    """A listing whose reply is full forgets what it just looked up; that must not use the youth up."""
    table.retire(table.seen(table.root, b"a", 1), 5.0)
    node = table.seen(table.root, b"a", 1)
    table.forget(node.id, 1)
    assert table.seen(table.root, b"a", 1).young_until == 5.0


def test_youth_of_nodes_never_looked_up_is_bounded(table: InodeTable) -> None:
    for key in range(3000):
        node = table.seen(table.root, b"%d" % key, key + 1000)
        table.retire(node, 9.0)
        table.forget(node.id, 1)
    young = sum(table.seen(table.root, b"%d" % key, key + 1000).young_until > 0 for key in range(3000))
    assert young == 1024
    assert table.by_key(3999) is not None
    table.check()


def test_pack_tells_versions_apart() -> None:
    base = Version(5, 7, 9)
    others = [
        Version(6, 7, 9),
        Version(5, 8, 9),
        Version(5, 7, 10),
        Version(5, -7, 9),
        Version(5, 9, 7),
        Version(0, 0, 0),
    ]
    packed = [pack(version) for version in (base, *others)]
    assert len(set(packed)) == len(packed)
    assert pack(Version(5, 7, 9)) == pack(base)
    assert pack(Version(2**63 - 1, 2**63 - 1, 2**63 - 1)) != pack(Version(2**63 - 2, 2**63 - 1, 2**63 - 1))


class Machine(RuleBasedStateMachine):
    """Any sequence of what the overlay does to the table, against lists of names and counts.

    Names may come that make a directory lie below itself: directories change places beneath the mount, bind mounts
    show one in another. The table then forgets a name; it never forgets to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = InodeTable(ROOT_KEY)
        self.names: dict[Node, list[tuple[Node, bytes]]] = {self.table.root: []}
        self.lookups: dict[Node, int] = {}
        self.retired: set[Node] = set()
        self.young: dict[int, float] = {}
        self.now = 0.0

    def pick(self, data: st.DataObject, *, root: bool = True) -> Node:
        nodes = [*([self.table.root] if root else []), *self.lookups]
        return data.draw(st.sampled_from(nodes))

    name = st.sampled_from([b"a", b"b", b"c"])

    def latest(self, node: Node, parent: Node, name: bytes) -> None:
        if node is not self.table.root:
            names = self.names[node]
            if (parent, name) in names:
                names.remove((parent, name))
            names.insert(0, (parent, name))

    @rule(data=st.data(), name=name, key=st.sampled_from([1, 2, 3, 4, (9, 1), ROOT_KEY]))
    def seen(self, data: st.DataObject, name: bytes, key: int) -> None:
        parent = self.pick(data)
        known = self.table.by_key(key)
        with soon():
            node = self.table.seen(parent, name, key)
        if node is self.table.root:
            return
        if known is None:
            assert node not in self.names
            assert node.young_until == self.young.get(key, 0.0)
            self.names[node] = []
        else:
            assert node is known
        self.lookups[node] = self.lookups.get(node, 0) + 1
        self.latest(node, parent, name)

    @precondition(lambda self: self.lookups)
    @rule(data=st.data(), share=st.sampled_from([1, 2, 1000]))
    def forget(self, data: st.DataObject, share: int) -> None:
        node = self.pick(data, root=False)
        gone = self.lookups[node] <= share
        assert self.table.forget(node.id, share) is (node if gone else None)
        self.lookups[node] -= share
        if gone:
            del self.lookups[node]
            self.retired.discard(node)

    @precondition(lambda self: self.lookups.keys() - self.retired)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from([node for node in self.lookups if node not in self.retired]))
        self.now += 1
        self.table.retire(node, self.now)
        self.retired.add(node)
        self.young[node.key] = self.now  # type: ignore[index]

    @rule(data=st.data(), name=name)
    def add_name(self, data: st.DataObject, name: bytes) -> None:
        node, parent = self.pick(data), self.pick(data)
        with soon():
            self.table.add_name(node, parent, name)
        self.latest(node, parent, name)

    @rule(data=st.data(), name=name)
    def drop_name(self, data: st.DataObject, name: bytes) -> None:
        node, parent = self.pick(data), self.pick(data)
        with soon():
            self.table.drop_name(node, parent, name)
        if (parent, name) in self.names[node]:
            self.names[node].remove((parent, name))

    def check_path(self, node: Node) -> None:
        parts: list[bytes] = []
        visited, start = set(), node
        while node.parent is not None:
            assert node not in visited, "a ring"
            visited.add(node)
            parts.insert(0, node.name)
            node = node.parent
        if node is self.table.root:
            assert self.table.path(start) == b"/".join(parts)
        else:
            with pytest.raises(Moved):
                self.table.path(start)

    @invariant()
    def agrees(self) -> None:
        with soon():
            self.table.check()
        assert len(self.table) == 1 + len(self.lookups)
        for node, count in self.lookups.items():
            assert self.table.get(node.id) is node
            assert node.lookups == count
            assert node.retired == (node in self.retired)
            known = list(node.names())
            assert known == [name for name in self.names[node] if name in known], "in order, and none made up"
            self.check_path(node)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=40)


@given(st.integers(0, 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_versions_come_out_as_they_went_in(size: int, mtime_ns: int, ctime_ns: int) -> None:
    version = Version(size, mtime_ns, ctime_ns)
    assert unpack(pack(version)) == version
    assert same_content(pack(version), pack(version._replace(ctime_ns=0)))
    assert not same_content(pack(version), pack(version._replace(mtime_ns=mtime_ns ^ 1)))
    assert not same_content(pack(version), pack(version._replace(size=size ^ 1)))
