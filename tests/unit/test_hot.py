"""The short way: what is answered without the event loop, until when, and that all of it is told."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.conftest import open_descriptors
from tests.unit.copies import WAIT_SECONDS, add_copy, flip, own_store
from tierd.node import hot as hot_module
from tierd.node.hot import FIRST_FH, HotFile, HotFiles
from tierd.node.inodes import Node, pack
from tierd.node.sources import version_of
from tierd.node.store import Copy, Store
from tierd.syscalls import forced_stat

ENTRY_OUT = struct.Struct("=QQQQIIQQQqqqIIIIIIIIII")
UID, PID = 1000, os.getpid()


def yes() -> bool:
    return True


def no() -> bool:
    return False


class Hot:
    """A source directory, a store, and files of both that are published."""

    def __init__(self, base: Path, store: Store) -> None:
        self.source = base / "source"
        self.source.mkdir()
        self.store = store
        self.woken = 0
        self.files = HotFiles(lambda st: st.st_ino, self._wake, attr_timeout_s=1.5, entry_timeout_s=0.25)
        self.dir_fd = os.open(self.source, os.O_RDONLY | os.O_DIRECTORY)
        self.root = Node(1, os.fstat(self.dir_fd).st_ino, None, b"")
        self.nodes: dict[str, Node] = {}
        self.copies: dict[str, Copy] = {}
        self._next = 2

    def _wake(self) -> None:
        self.woken += 1

    def write(self, name: str, data: bytes = b"weights") -> Node:
        """A file and its node, as after its first open."""
        (self.source / name).write_bytes(data)
        st = forced_stat(self.dir_fd, os.fsencode(name))
        node = Node(self._next, st.st_ino, self.root, os.fsencode(name))
        self._next += 1
        node.version = pack(version_of(st))
        self.nodes[name] = node
        self.copies[name] = add_copy(self.store, st.st_ino, data)
        return node

    def publish(self, name: str) -> list[int]:
        """As `Files` does."""
        published = self.files.publish_name(self.nodes[name], self.root, self.dir_fd, directory=False)
        copy = self.copies[name]
        return self.files.publish(published, copy, self.store.open(copy), 1000 + self.nodes[name].id)

    def file(self, name: str) -> Node:
        node = self.write(name)
        self.publish(name)
        return node

    def looks_up(self, name: str, claim: Callable[[], bool] = yes) -> bool:
        return self.files.lookup(1, os.fsencode(name), claim) is not None

    def opens(self, node: Node, claim: Callable[[], bool] = yes) -> int | None:
        """The handle."""
        answer = self.files.open(node.id, UID, PID, claim)
        assert answer is None or answer[1] == 1000 + node.id
        return answer[0] if answer else None

    def told(self) -> list[tuple[str, int, int]]:
        return [(event.what, event.node.id, event.fh) for event in self.files.take_events()]


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[Hot]:
    before = open_descriptors()
    with own_store(tmp_path / "cache") as store:
        made = Hot(tmp_path, store)
        yield made
        made.files.close()
        os.close(made.dir_fd)
        assert len(made.files) == 0
    assert sorted(open_descriptors() - before) == []


# --- the answers ---


def test_a_lookup_is_answered_as_the_kernel_wants_it(hot: Hot) -> None:
    node = hot.file("x")
    os.chmod(hot.source / "x", 0o640)
    node.version = pack(version_of(forced_stat(hot.dir_fd, b"x")))
    hot.files.withdraw(node.id)
    hot.publish("x")
    body = hot.files.lookup(1, b"x", yes)
    assert body is not None
    (
        node_id, generation, entry_s, attr_s, entry_ns, attr_ns, ino, size, blocks, *times, mode, nlink, uid, gid, rdev,
        _, _,
    ) = ENTRY_OUT.unpack(body)  # fmt: skip
    st = os.stat(hot.source / "x")
    assert (node_id, ino, generation, size, blocks) == (node.id, node.id, 0, 7, st.st_blocks)
    assert (entry_s, entry_ns, attr_s, attr_ns) == (0, 250_000_000, 1, 500_000_000)
    assert [s * 10**9 + ns for s, ns in zip(times[:3], times[3:], strict=True)][1:] == [st.st_mtime_ns, st.st_ctime_ns]
    assert (mode, nlink, uid, gid, rdev) == (st.st_mode, 1, st.st_uid, st.st_gid, 0)
    assert hot.told() == [("lookup", node.id, 0)]


@pytest.mark.parametrize("mtime_s", [-1, -(10**9), 1 << 33])
def test_times_before_1970_are_an_answer_and_no_end_of_the_mount(hot: Hot, mtime_s: int) -> None:
    node = hot.write("x")
    os.utime(hot.source / "x", ns=(mtime_s * 10**9 + 5, mtime_s * 10**9 + 7))
    node.version = pack(version_of(forced_stat(hot.dir_fd, b"x")))
    hot.publish("x")
    body = hot.files.lookup(1, b"x", yes)
    assert body is not None
    fields = ENTRY_OUT.unpack(body)
    assert (fields[10], fields[13]) == (mtime_s, 7)
    assert hot.opens(node) is not None


def test_an_open_and_its_release(hot: Hot) -> None:
    node = hot.file("x")
    first, second = hot.opens(node), hot.opens(node)
    assert first is not None
    assert second is not None
    assert FIRST_FH < first < second
    events = hot.files.take_events()
    assert [(event.what, event.node, event.fh, event.uid, event.pod) for event in events] == [
        ("open", node, first, UID, None),
        ("open", node, second, UID, None),
    ]
    assert events[0].attributes is not None
    assert events[0].attributes.st_size == 7
    assert hot.files.release(second)
    assert hot.files.release(first)
    assert not hot.files.release(first), "once"
    assert not hot.files.release(5), "the overlay's own"
    assert hot.told() == [("release", node.id, second), ("release", node.id, first)]
    assert (hot.files.opens, hot.files.lookups) == (2, 0)


def test_a_thread_that_the_event_loop_waits_for_is_not_answered(hot: Hot) -> None:
    node = hot.file("x")
    hot.files.long_way.add(PID)
    assert hot.opens(node) is None
    hot.files.long_way.discard(PID)
    assert hot.opens(node) is not None


def test_what_is_not_published_is_not_answered(hot: Hot) -> None:
    node = hot.write("x")
    assert not hot.looks_up("x")
    assert hot.opens(node) is None
    hot.publish("x")
    assert not hot.looks_up("y")
    assert hot.files.lookup(2, b"x", yes) is None, "of another directory"
    assert hot.opens(hot.root) is None
    assert hot.told() == []


def test_a_name_alone_is_looked_up_but_not_opened(hot: Hot) -> None:
    node = hot.write("x")
    hot.files.publish_name(node, hot.root, hot.dir_fd, directory=False)
    assert hot.looks_up("x")
    assert hot.opens(node) is None


def test_a_directory_is_answered_whatever_is_made_in_it(hot: Hot) -> None:
    (hot.source / "dir").mkdir()
    node = Node(50, os.stat(hot.source / "dir").st_ino, hot.root, b"dir")
    hot.files.publish_name(node, hot.root, hot.dir_fd, directory=True)
    assert hot.looks_up("dir")
    (hot.source / "dir" / "new").touch()
    assert hot.looks_up("dir")
    (hot.source / "dir").rename(hot.source / "old")
    (hot.source / "dir").mkdir()
    assert not hot.looks_up("dir"), "another one"


# --- what changes beneath ---


def replace(path: Path) -> None:
    other = path.with_name("other")
    st = path.stat()
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(st.st_atime_ns, st.st_mtime_ns))
    other.rename(path)


def rewrite(path: Path) -> None:
    path.write_bytes(b"WEIGHTS")


def rewrite_and_set_back(path: Path) -> None:
    st = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


CHANGES: list[Callable[[Path], object]] = [
    replace,
    rewrite,
    rewrite_and_set_back,
    link,
    lambda path: path.unlink(),
    lambda path: path.rename(path.with_name("elsewhere")),
    lambda path: path.chmod(0o600),
    lambda path: os.truncate(path, 3),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_beneath_goes_the_long_way(hot: Hot, change: Callable[[Path], object]) -> None:
    node = hot.file("x")
    assert hot.looks_up("x")
    assert hot.opens(node) is not None
    hot.told()
    _tick(hot.source / "x")
    change(hot.source / "x")
    assert not hot.looks_up("x")
    assert hot.opens(node) is None
    assert hot.told() == []


def _tick(path: Path) -> None:
    """Until the clock of the file system has gone on."""
    probe = path.with_name("probe")
    while not probe.exists() or probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        probe.touch()
        os.utime(probe)
    probe.unlink()


def test_a_copy_that_was_removed_or_tampered_with_is_not_opened(hot: Hot) -> None:
    removed, tampered = hot.file("removed"), hot.file("tampered")
    hot.store.remove(hot.copies["removed"])
    _tick(hot.store.directory / hot.copies["tampered"].name)
    flip(hot.store.directory / hot.copies["tampered"].name)
    assert hot.opens(removed) is None
    assert hot.opens(tampered) is None
    assert hot.looks_up("removed"), "the name is none the worse"
    hot.store.remove(hot.copies["tampered"])


def test_a_relabelled_copy_is_not_opened_as_what_it_was(hot: Hot) -> None:
    """Its file is the same, and its seal whole."""
    node, copy = hot.file("x"), hot.copies["x"]
    hot.store.relabel(copy, copy.identity._replace(ctime_ns=9), copy.path, copy.model)
    assert hot.opens(node) is None


def test_another_inode_of_the_same_version_is_another_file(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with coarse times may have two of them."""
    node = hot.file("x")

    def another(fd: int, name: bytes = b"") -> os.stat_result:
        st = forced_stat(fd, name)
        times = {each: getattr(st, each) for each in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
        return os.stat_result((st[0], st[1] + 1, *st[2:10]), times)

    monkeypatch.setattr(hot_module, "forced_stat", another)
    assert hot.opens(node) is None
    assert not hot.told()


def test_a_renamed_directory_above_is_no_matter_of_the_name(hot: Hot, tmp_path: Path) -> None:
    """Names are found by the directory's descriptor: its own name is looked up by whoever walks to it."""
    node = hot.file("x")
    hot.source.rename(tmp_path / "moved")
    assert hot.looks_up("x")
    assert hot.opens(node) is not None


# --- claims ---


def test_an_answer_that_nobody_wants_any_more_counts_nothing(hot: Hot) -> None:
    node = hot.file("x")
    assert not hot.looks_up("x", no)
    assert hot.opens(node, no) is None
    assert (hot.told(), hot.files.opens, hot.files.lookups, hot.woken) == ([], 0, 0, 0)
    assert not hot.files._opens


def test_no_claim_is_made_for_what_is_not_answered(hot: Hot) -> None:
    """The pump claims for itself what goes the long way."""
    node = hot.file("x")
    (hot.source / "x").unlink()

    def never() -> bool:
        raise AssertionError

    assert not hot.looks_up("x", never)
    assert not hot.looks_up("y", never)
    assert hot.opens(node, never) is None


# --- withdrawal ---


def during(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """`action` happens while a pump asks the source."""
    module = os if name == "stat" else hot_module
    real = getattr(module, name)

    def called(*args: object, **keys: object) -> object:
        st = real(*args, **keys)
        monkeypatch.setattr(module, name, real)
        action()
        return st

    monkeypatch.setattr(module, name, called)


def test_nothing_is_answered_after_a_withdrawal_in_the_middle(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    node = hot.file("x")
    during(monkeypatch, "stat", lambda: hot.files.withdraw(node.id))
    assert not hot.looks_up("x")
    hot.publish("x")
    during(monkeypatch, "forced_stat", lambda: hot.files.withdraw(node.id))
    assert hot.opens(node) is None
    assert hot.told() == []


def test_a_withdrawal_and_a_new_publication_in_the_middle_is_another_file(
    hot: Hot, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = hot.file("x")

    def again() -> None:
        hot.files.withdraw(node.id)
        hot.publish("x")

    during(monkeypatch, "forced_stat", again)
    assert hot.opens(node) is None
    during(monkeypatch, "stat", again)
    assert not hot.looks_up("x")
    assert hot.told() == []


def test_a_file_whose_name_went_is_not_opened_by_its_closed_descriptor(
    hot: Hot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptor numbers are used again: whatever the number leads to now, it is not asked for this file."""
    node = hot.file("x")
    during(monkeypatch, "forced_stat", lambda: hot.files.withdraw_name(node.id))
    assert hot.opens(node) is None
    assert hot.told() == []


def test_withdraw_says_whether_there_was_a_file_and_gives_descriptors_back(hot: Hot) -> None:
    before = open_descriptors()
    node = hot.file("x")
    assert len(open_descriptors() - before) == 2
    fh = hot.opens(node)
    assert fh is not None
    assert hot.files.is_published(node.id)
    assert hot.files.nodes_of(hot.copies["x"]) == [node.id]
    assert hot.files.withdraw(node.id)
    assert not hot.files.withdraw(node.id)
    assert not hot.files.is_published(node.id)
    assert hot.files.nodes_of(hot.copies["x"]) == []
    assert open_descriptors() == before
    assert hot.told() == [("open", node.id, fh)], "what was answered before is told"
    assert hot.files.release(fh), "and its release is answered still"
    assert hot.told() == [("release", node.id, fh)]


def test_a_new_name_takes_the_place_of_the_old_one(hot: Hot) -> None:
    node = hot.write("x")
    first = hot.files.publish_name(node, hot.root, hot.dir_fd, directory=False)
    assert hot.files.publish_name(node, hot.root, hot.dir_fd, directory=False) is first
    (hot.source / "x").rename(hot.source / "y")
    node.name = b"y"
    node.version = pack(version_of(forced_stat(hot.dir_fd, b"y")))
    hot.files.publish_name(node, hot.root, hot.dir_fd, directory=False)
    assert hot.looks_up("y")
    (hot.source / "y").rename(hot.source / "x")
    assert not hot.looks_up("x")


def test_a_name_that_another_node_has_by_now_is_kept_for_it(hot: Hot) -> None:
    old = hot.file("x")
    hot.copies.pop("x")
    (hot.source / "x").rename(hot.source / "gone")
    new = hot.file("x")
    hot.files.withdraw(old.id)
    assert hot.looks_up("x")
    assert hot.told() == [("lookup", new.id, 0)]


# --- bounds and events ---


def test_files_are_bounded_and_the_least_recently_used_goes_first(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_module, "HOT_MAX", 3)
    nodes = [hot.write(f"{number}") for number in range(5)]
    assert [hot.publish(f"{number}") for number in range(3)] == [[], [], []]
    assert hot.opens(nodes[0]) is not None
    for number, surplus in ((3, 1), (4, 2)):
        assert hot.publish(f"{number}") == [nodes[surplus].id]
        hot.files.withdraw(nodes[surplus].id)
    assert len(hot.files) == 3
    assert [hot.opens(node) is not None for node in nodes] == [True, False, False, True, True]


def test_names_are_bounded(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_module, "_NAMES_MAX", 3)
    for number in range(5):
        hot.files.publish_name(hot.write(f"{number}"), hot.root, hot.dir_fd, directory=False)
    assert [hot.looks_up(f"{number}") for number in range(5)] == [False, False, True, True, True]


def test_events_are_in_order_and_wake_once(hot: Hot) -> None:
    node = hot.file("x")
    expected = []
    for _ in range(3):
        assert hot.looks_up("x")
        fh = hot.opens(node)
        assert fh is not None
        hot.files.release(fh)
        expected += [("lookup", node.id, 0), ("open", node.id, fh), ("release", node.id, fh)]
    assert hot.woken == 1
    assert hot.told() == expected
    assert hot.told() == []
    assert hot.looks_up("x")
    assert hot.woken == 2, "again after they were taken"


def test_pods_are_asked_for_once_a_second_and_bounded(hot: Hot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    now = 100.0

    def pod_of(pid: int) -> str:
        asked.append(pid)
        return f"pod-{pid}-{len(asked)}"

    monkeypatch.setattr(hot_module, "pod_of", pod_of)
    monkeypatch.setattr(hot_module, "_PODS_MAX", 4)
    monkeypatch.setattr(hot_module.time, "monotonic", lambda: now)
    node = hot.file("x")
    for pid in (1, 1, 2, 1):
        hot.files.open(node.id, UID, pid, yes)
    assert asked == [1, 2]
    assert [event.pod for event in hot.files.take_events()] == ["pod-1-1", "pod-1-1", "pod-2-2", "pod-1-1"]
    now += 1.5
    hot.files.open(node.id, UID, 1, yes)
    assert asked == [1, 2, 1]
    for pid in range(3, 20):
        hot.files.open(node.id, UID, pid, yes)
    assert len(hot.files._pods) <= 4


# --- pumps beside the event loop ---


@pytest.mark.parametrize("seed", range(3))
def test_pumps_beside_publications_and_withdrawals(hot: Hot, seed: int) -> None:  # noqa: C901, PLR0915
    """Whatever comes between: each answer is told exactly once, none after its withdrawal, and nothing leaks."""
    before = open_descriptors()
    nodes = [hot.write(f"{number}") for number in range(6)]
    stop = threading.Event()
    answered: list[Counter[tuple[str, int]]] = [Counter() for _ in range(3)]
    failed: list[BaseException] = []

    def pump(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        mine: list[tuple[Node, int]] = []
        try:
            while not stop.is_set() or mine:
                node = dice.choice(nodes)
                what = dice.randrange(3) if not stop.is_set() else 2
                claim = yes if dice.random() < 0.8 else no
                if what == 0:
                    if hot.looks_up(os.fsdecode(node.name), claim):
                        answered[number]["lookup", node.id] += 1
                elif what == 1:
                    fh = hot.opens(node, claim)
                    if fh is not None:
                        mine.append((node, fh))
                        answered[number]["open", node.id] += 1
                elif mine:
                    node, fh = mine.pop(dice.randrange(len(mine)))
                    assert hot.files.release(fh)
                    answered[number]["release", node.id] += 1
        except BaseException as error:
            failed.append(error)
            raise

    told: Counter[tuple[str, int]] = Counter()
    live: dict[int, int] = {}

    def take() -> None:
        for event in hot.files.take_events():
            told[event.what, event.node.id] += 1
            if event.what == "open":
                assert event.fh not in live
                live[event.fh] = event.node.id
            elif event.what == "release":
                assert live.pop(event.fh) == event.node.id, "released before it was opened"

    threads = [threading.Thread(target=pump, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    dice = random.Random(seed)
    for _ in range(1500):
        node = dice.choice(nodes)
        if hot.files.is_published(node.id):
            assert hot.files.withdraw(node.id)
            take()
            before_that = told["open", node.id], told["lookup", node.id]
            take()
            assert before_that == (told["open", node.id], told["lookup", node.id]), "answered after its withdrawal"
        else:
            hot.publish(os.fsdecode(node.name))
        take()
    stop.set()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    assert failed == []
    take()
    assert told == sum(answered, Counter())
    assert told.total() > 300
    assert live == {}
    assert not hot.files._opens
    hot.files.close()
    assert open_descriptors() == before


def test_close_withdraws_everything(hot: Hot) -> None:
    nodes = [hot.file(f"{number}") for number in range(3)]
    (hot.source / "dir").mkdir()
    directory = Node(50, os.stat(hot.source / "dir").st_ino, hot.root, b"dir")
    hot.files.publish_name(directory, hot.root, hot.dir_fd, directory=True)
    hot.files.close()
    assert not hot.looks_up("dir")
    assert [hot.opens(node) for node in nodes] == [None] * 3
    assert not hot.files._name_of_node
    assert not hot.files._names


def test_hot_files_are_small() -> None:
    assert not hasattr(HotFile.__new__(HotFile), "__dict__")
