"""Open files over a real node tier: fills, hits, opens that the pumps answered, and a source that does not answer."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.unit.conftest import Bench, Gate, Reads, end_bench, open_descriptors
from tests.unit.copies import MODEL, WAIT_SECONDS, own_store
from tests.unit.kernel import CALLER, FakeKernel
from tests.unit.test_tier import Tiered
from tierd.node import filler as filler_module
from tierd.node import hot as hot_module
from tierd.node.hot import FIRST_FH, HotFiles
from tierd.node.inodes import Node
from tierd.node.journal import Journal
from tierd.node.overlay import Overlay
from tierd.node.sources import Changes
from tierd.node.store import Copy, Store

NAME = "llama/x.safetensors"
PATH = b"models/llama/x.safetensors"


def yes() -> bool:
    return True


class Node1:
    """An overlay with a node tier and a short way, and no kernel. Removed copies are told at once, as the trio thread
    would be; `pump_*` are what the pumps do."""

    def __init__(self, base: Path, store: Store, **settings: object) -> None:
        self.tiered = Tiered(base, store, **settings)
        self.tier = self.tiered.tier
        self.reads = Reads()
        self.reads.offers = True
        self.hot = HotFiles(self.tiered.posix.key, lambda: None, attr_timeout_s=1.0, entry_timeout_s=1.0)
        self.overlay = Overlay(
            self.tiered.posix, Journal(1000), self.reads,
            event_dropped=lambda: None, now_ns=lambda: 42, tier=self.tier, hot=self.hot,
        )  # fmt: skip
        self.kernel = FakeKernel(self.overlay)
        self.tiered.start()

    async def first_open(self, name: str = NAME, path: bytes = PATH) -> bytes:
        """Bring a file to the node by an open, and close it."""
        data = self.tiered.write(name)
        await self.fill(path)
        return data

    async def fill(self, path: bytes = PATH) -> None:
        opened = await self.kernel.retried(lambda: self.kernel.open(path))
        count = len(self.tiered.counts.fills)
        if self.overlay.files[opened.fh].fill is not None:
            await trio.to_thread.run_sync(self.tiered.counts.wait_for_fills, max(1, count))
            with trio.fail_after(WAIT_SECONDS):
                while self.tiered.store.find(self.overlay.files[opened.fh].node.key) is None:  # type: ignore[arg-type]  # noqa: ASYNC110
                    await trio.sleep(0.001)
        await self.overlay.release(opened.fh)

    async def hot_node(self, path: bytes = PATH) -> Node:
        """Open and close it once more: it is published then."""
        opened = await self.kernel.open(path)
        handle = self.overlay.files[opened.fh]
        assert handle.copy is not None
        await self.overlay.release(opened.fh)
        assert self.hot.is_published(handle.node.id)
        return handle.node

    def pump_open(self, node: Node) -> int | None:
        answer = self.hot.open(node.id, CALLER.uid, CALLER.pid, yes)
        return answer[0] if answer else None

    def pump_lookup(self, node: Node) -> bool:
        assert node.parent is not None
        body = self.hot.lookup(node.parent.id, node.name, yes)
        if body is not None:
            self.kernel.lookups[node.id] += 1
        return body is not None

    def journal(self) -> list[tuple[str, int]]:
        return [(type(event).__name__, event.fh) for event in self.overlay.journal.take(1000)]

    def end(self) -> None:
        self.overlay.take_events()
        end_bench(Bench(self.tiered.source, self.overlay, self.kernel, self.reads))
        assert len(self.hot) == 0
        assert not self.hot._names
        assert len(self.tier.leases) == 0
        for reader in self.tiered.readers:
            reader.close()
        self.tier.stop()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node1]]:
    monkeypatch.setattr(filler_module, "_TICK_SECONDS", 0.0)
    before = open_descriptors()
    nodes: list[Node1] = []
    with own_store(tmp_path / "cache") as store:

        def make(**settings: object) -> Node1:
            nodes.append(Node1(tmp_path, store, **settings))
            return nodes[-1]

        yield make
        for node in nodes:
            node.end()
    assert [line for line in open_descriptors() - before if str(tmp_path) in line] == []


@pytest.fixture
def node(made: Callable[..., Node1]) -> Node1:
    return made()


# --- fills and hits ---


async def test_the_first_open_fills_and_the_second_is_a_hit(node: Node1) -> None:
    data = node.tiered.write(NAME)
    first = await node.kernel.open(PATH)
    handle = node.overlay.files[first.fh]
    assert handle.fill is not None
    assert (handle.backed, handle.copy, len(node.hot)) == (False, None, 0)
    assert await trio.to_thread.run_sync(node.tiered.counts.wait_for_fills, 1) == [("complete", len(data))]
    await node.overlay.release(first.fh)
    second = await node.kernel.open(PATH)
    handle = node.overlay.files[second.fh]
    assert handle.copy is node.tier.find(handle.node.key)
    assert (handle.backed, handle.fd, handle.fill) == (True, -1, None)
    assert os.pread(handle.target.fd, len(data) + 1, 0) == data
    assert node.reads.passed_through == {second.fh: 1000 + handle.node.id}
    assert node.hot.is_published(handle.node.id)
    assert node.reads.backed[handle.node.id] == 2, "the open's and the short way's"
    assert node.tier.leases.holds(MODEL)
    await node.overlay.release(second.fh)
    assert not node.tier.leases.holds(MODEL)
    assert node.reads.backed[handle.node.id] == 1


async def test_directories_on_the_way_are_answered_too(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    assert hot.parent is not None
    assert hot.parent.parent is not None
    for each in (hot.parent.parent, hot.parent, hot):
        before = each.lookups
        assert node.pump_lookup(each)
        node.overlay.take_events()
        assert each.lookups == before + 1


async def test_short_opens_are_opens(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    node.journal()
    fhs = [node.pump_open(hot) for _ in range(3)]
    assert all(fh is not None and fh > FIRST_FH for fh in fhs)
    assert not node.tier.leases.holds(MODEL), "not told yet"
    node.overlay.take_events()
    assert node.tier.leases.holds(MODEL)
    assert (hot.backed, node.reads.backed[hot.id]) == (3, 4)
    assert node.journal() == [("Opened", fh) for fh in fhs]
    node.overlay.check()
    for fh in fhs:
        assert node.hot.release(fh)  # type: ignore[arg-type]
    node.overlay.take_events()
    assert (hot.backed, hot.handles, node.reads.backed[hot.id]) == (0, None, 1)
    assert not node.tier.leases.holds(MODEL)
    assert node.journal() == [("Closed", fh) for fh in fhs]


async def test_a_lease_of_a_short_open_keeps_its_model(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    fh = node.pump_open(hot)
    node.overlay.take_events()
    assert node.tier.evict(MODEL, "test", "test") == 0
    assert node.hot.release(fh)  # type: ignore[arg-type]
    node.overlay.take_events()
    assert node.tier.evict(MODEL, "test", "test") > 0
    node.overlay.copy_removed(node_copy(hot))


def node_copy(node: Node) -> Copy:
    assert node.copy is not None
    return node.copy


async def test_fsync_of_what_reads_a_copy_has_nothing_to_do(node: Node1) -> None:
    await node.first_open()
    opened = await node.kernel.open(PATH)
    await node.overlay.fsync(opened.fh, False)
    await node.overlay.fsync(opened.fh, True)
    hot = node.overlay.files[opened.fh].node
    fh = node.pump_open(hot)
    assert fh is not None
    await node.overlay.fsync(fh, False)
    node.hot.release(fh)
    await node.overlay.release(opened.fh)


# --- no mix ---


@pytest.mark.parametrize("told", [True, False])
async def test_an_open_for_writing_is_sent_back_while_short_opens_live(node: Node1, told: bool) -> None:
    data = await node.first_open()
    hot = await node.hot_node()
    fh = node.pump_open(hot)
    if told:
        node.overlay.take_events()
    with pytest.raises(OSError, match="Stale") as error:
        await node.overlay.open(hot.id, os.O_WRONLY, CALLER)
    assert error.value.errno == errno.ESTALE
    assert hot.retired
    assert node.pump_open(hot) is None
    assert not node.pump_lookup(hot)
    opened = await node.kernel.open(PATH, os.O_WRONLY)
    writer = node.overlay.files[opened.fh]
    assert writer.node is not hot
    assert writer.node.backed == 0
    await node.overlay.write(opened.fh, 0, b"new")
    reading = await node.kernel.open(PATH)
    assert not node.overlay.files[reading.fh].backed
    assert await node.overlay.read(reading.fh, 0, 20) == (b"new" + data[3:])[:20]
    assert not node.hot.is_published(writer.node.id)
    await node.overlay.release(reading.fh)
    await node.overlay.release(opened.fh)
    assert node.hot.release(fh)  # type: ignore[arg-type]


@pytest.mark.parametrize("successor", ["looked up", "read", "published", "forgotten"])
async def test_a_writer_sent_back_from_a_node_of_long_ago_finds_its_successor_free(node: Node1, successor: str) -> None:
    """The kernel looks a name up again only once per open, so the second answer must not be ESTALE."""
    await node.first_open()
    old = await node.hot_node()
    opened = [await node.kernel.open(PATH)]
    with pytest.raises(OSError, match="Stale"):
        await node.overlay.open(old.id, os.O_WRONLY, CALLER)
    new = node.overlay.inodes.get(await node.kernel.node(PATH))
    assert new is not old
    new.young_until = 0.0  # time goes by
    node.overlay.inodes.expect(new.key, 0.0)
    if successor == "read":
        opened.append(await node.kernel.open(PATH))
        assert new.backed == 1
    elif successor == "published":
        assert await node.hot_node() is new
    elif successor == "forgotten":
        node.overlay.forget(new.id, node.kernel.lookups.pop(new.id))
    with pytest.raises(OSError, match="Stale"):
        await node.overlay.open(old.id, os.O_WRONLY, CALLER)
    if successor == "published":
        assert node.hot.open(new.id, CALLER.uid, CALLER.pid + 1, yes) is None, "as other threads would"
    elif successor != "read":
        opened.append(await node.kernel.open(PATH))  # somebody else's, in between
    opened.append(await node.kernel.open(PATH, os.O_WRONLY))
    for one in opened:
        await node.overlay.release(one.fh)


async def test_an_open_that_began_before_a_writer_was_sent_back_leaves_the_node_free(
    node: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have filled the node tier, and read what came of that."""
    node.tiered.write(NAME)
    hot = node.overlay.inodes.get(await node.kernel.node(PATH))
    opened = []
    monkeypatch.setattr(node.tiered.posix, "open", gate.hold(node.tiered.posix.open))

    async def read() -> None:
        opened.append(await node.overlay.open(hot.id, os.O_RDONLY, CALLER))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await gate.wait_for(1)
        hot.young_until = trio.current_time() + 60.0  # somebody was sent here to write
        gate.open()
    assert node.overlay.files[opened[0].fh].fill is None
    opened.append(await node.overlay.open(hot.id, os.O_WRONLY, CALLER))
    for one in opened:
        await node.overlay.release(one.fh)


async def test_a_reader_is_sent_back_once_only(node: Node1, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that were evicted and filled again all the time, one open in 250,000 was answered ESTALE twice."""
    data = await node.first_open()
    node_id = await node.kernel.node(PATH)
    monkeypatch.setattr(node.overlay, "_reads_otherwise", lambda *_: True)
    with pytest.raises(OSError, match="Stale"):
        await node.overlay.open(node_id, os.O_RDONLY, CALLER)
    opened = await node.overlay.open(await node.kernel.node(PATH), os.O_RDONLY, CALLER)
    assert os.pread(node.overlay.files[opened.fh].fd, len(data) + 1, 0) == data, (
        "of the source, whatever the others read"
    )
    await node.overlay.release(opened.fh)


async def test_a_short_open_while_an_open_for_writing_asks_the_source(
    node: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.first_open()
    hot = await node.hot_node()
    monkeypatch.setattr(node.tiered.posix, "open", gate.hold(node.tiered.posix.open))
    outcome: list[object] = []

    async def write() -> None:
        try:
            outcome.append(await node.overlay.open(hot.id, os.O_WRONLY, CALLER))
        except OSError as error:
            outcome.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await gate.wait_for(1)
        fh = node.pump_open(hot)
        assert fh is not None
        gate.open()
    assert outcome == [errno.ESTALE]
    node.hot.release(fh)


async def test_a_writer_ends_the_short_way(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    opened = await node.overlay.open(hot.id, os.O_WRONLY, CALLER)
    assert not node.hot.is_published(hot.id)
    assert node.pump_open(hot) is None
    assert node.reads.backed[hot.id] == 0
    await node.overlay.release(opened.fh)


async def test_a_rewrite_beneath_goes_the_long_way_to_the_new_bytes(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    fh = node.pump_open(hot)
    node.tiered.write(NAME, 20_000, seed="new")
    assert node.pump_open(hot) is None
    with pytest.raises(OSError, match="Stale"):
        await node.overlay.open(hot.id, os.O_RDONLY, CALLER)
    opened = await node.kernel.open(PATH)
    assert node.overlay.files[opened.fh].node is not hot
    node.hot.release(fh)  # type: ignore[arg-type]
    await node.overlay.release(opened.fh)


# --- withdrawal ---


async def forget(node: Node1, hot: Node) -> None:
    node.overlay.forget(hot.id, node.kernel.lookups.pop(hot.id))


async def unlink(node: Node1, hot: Node) -> None:
    assert hot.parent is not None
    await node.overlay.unlink(hot.parent.id, hot.name)


async def rename(node: Node1, hot: Node) -> None:
    assert hot.parent is not None
    await node.overlay.rename(hot.parent.id, hot.name, hot.parent.id, b"y", 0)


async def replace(node: Node1, hot: Node) -> None:
    assert hot.parent is not None
    (node.tiered.path(NAME).parent / "other").write_bytes(b"other")
    await node.overlay.rename(hot.parent.id, b"other", hot.parent.id, hot.name, 0)
    await node.kernel.node(PATH)  # and its node is known


async def remove(node: Node1, hot: Node) -> None:
    copy = node_copy(hot)
    node.tier.store.remove(copy)
    node.overlay.copy_removed(copy)


@pytest.mark.parametrize("leave", [forget, unlink, rename, remove])
async def test_what_leaves_is_withdrawn_and_its_backing_given_back(node: Node1, leave: Any) -> None:
    await node.first_open()
    hot = await node.hot_node()
    assert node.reads.backed[hot.id] == 1
    await leave(node, hot)
    assert not node.hot.is_published(hot.id)
    assert node.reads.backed[hot.id] == 0
    assert node.pump_open(hot) is None


async def test_a_replaced_file_is_withdrawn(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    await replace(node, hot)
    assert node.pump_open(hot) is None
    assert node.reads.backed[hot.id] == 0


async def test_a_removed_copy_that_is_open_keeps_its_backing_until_the_close(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    fh = node.pump_open(hot)
    await remove(node, hot)
    assert node.reads.backed[hot.id] == 1, "the open's"
    assert node.hot.release(fh)  # type: ignore[arg-type]
    node.overlay.take_events()
    assert node.reads.backed[hot.id] == 0


async def test_a_lookup_answered_while_a_node_is_forgotten_keeps_the_node(
    node: Node1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel was given this node ID again: it must mean something."""
    await node.first_open()
    hot = await node.hot_node()
    real = node.hot.withdraw

    def withdraw(node_id: int) -> bool:
        monkeypatch.setattr(node.hot, "withdraw", real)
        assert node.pump_lookup(hot)
        return real(node_id)

    monkeypatch.setattr(node.hot, "withdraw", withdraw)
    node.overlay.forget(hot.id, node.kernel.lookups.pop(hot.id))
    assert node.kernel.lookups[hot.id] == 1
    assert (await node.overlay.getattr(hot.id)).node_id == hot.id
    node.overlay.check()


async def test_a_node_without_lookups_is_told_of_a_short_open_first(node: Node1) -> None:
    await node.first_open()
    hot = await node.hot_node()
    fh = node.pump_open(hot)
    await unlink(node, hot)
    assert (await node.overlay.getattr(hot.id)).attributes.st_nlink == 0, "open, though no name leads to it"
    node.hot.release(fh)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [1, 2, 3])
async def test_no_descriptor_to_publish_is_no_error_of_the_open(
    node: Node1, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    await node.first_open()
    calls = 0
    real = os.dup

    def dup(fd: int) -> int:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", dup)
        opened = await node.kernel.open(PATH)
    hot = node.overlay.files[opened.fh].node
    assert node.overlay.files[opened.fh].backed
    await node.overlay.release(opened.fh)
    assert node.reads.backed[hot.id] == (1 if node.hot.is_published(hot.id) else 0)
    assert await node.hot_node() is hot, "the next open publishes it"


async def test_the_bound_withdraws_the_oldest(node: Node1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_module, "HOT_MAX", 2)
    found = []
    for name in "abc":
        await node.first_open(f"llama/{name}.safetensors", f"models/llama/{name}.safetensors".encode())
        found.append(await node.hot_node(f"models/llama/{name}.safetensors".encode()))
    assert [node.hot.is_published(each.id) for each in found] == [False, True, True]
    assert [node.reads.backed[each.id] for each in found] == [0, 1, 1]


# --- a source that does not answer ---


@pytest.fixture
def stuck(made: Callable[..., Node1]) -> Node1:
    return made(source_deadline_s=0.1)


def hang(node: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lstat", "stat", "forced_stat", "open", "open_dir"):
        monkeypatch.setattr(node.tiered.posix, name, gate.hold(getattr(node.tiered.posix, name)))


async def test_what_is_known_is_told_when_the_source_hangs(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = await stuck.first_open()
    hot = await stuck.hot_node()
    assert hot.parent is not None
    await stuck.overlay.getattr(hot.parent.id)
    hang(stuck, gate, monkeypatch)
    began = time.monotonic()
    with trio.fail_after(WAIT_SECONDS):
        found = stuck.kernel.counted(await stuck.overlay.lookup(hot.parent.id, hot.name))
        assert (found.node_id, found.attributes.st_size) == (hot.id, len(data))
        assert (await stuck.overlay.getattr(hot.id)).attributes.st_size == len(data)
        assert (await stuck.overlay.getattr(hot.parent.id)).node_id == hot.parent.id
        opened = await stuck.overlay.open(hot.id, os.O_RDONLY, CALLER)
    assert time.monotonic() - began < 2.0, "the deadline once, moments after it"
    assert stuck.tiered.counts.stale == 1
    handle = stuck.overlay.files[opened.fh]
    assert os.pread(handle.target.fd, len(data), 0) == data
    gate.open()
    await stuck.overlay.release(opened.fh)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT])
async def test_what_is_known_is_told_when_the_source_is_gone(
    stuck: Node1, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Its process died, or it has given up itself; what is not known is its error."""
    data = await stuck.first_open()
    hot = await stuck.hot_node()
    assert hot.parent is not None
    await stuck.overlay.getattr(hot.parent.id)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as gone:
        for name in ("lstat", "stat", "forced_stat", "open", "open_dir"):
            gone.setattr(stuck.tiered.posix, name, fail)
        found = stuck.kernel.counted(await stuck.overlay.lookup(hot.parent.id, hot.name))
        assert (found.node_id, found.attributes.st_size) == (hot.id, len(data))
        assert (await stuck.overlay.getattr(hot.id)).attributes.st_size == len(data)
        opened = await stuck.overlay.open(hot.id, os.O_RDONLY, CALLER)
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            await stuck.overlay.lookup(hot.parent.id, b"unknown")
        assert raised.value.errno == number
    assert stuck.tiered.counts.stale == 1
    assert os.pread(stuck.overlay.files[opened.fh].target.fd, len(data), 0) == data
    await stuck.overlay.release(opened.fh)


async def test_what_is_not_known_waits_for_the_source(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stuck.first_open()
    hot = await stuck.hot_node()
    (stuck.tiered.path(NAME).parent / "other").touch()
    hang(stuck, gate, monkeypatch)
    answers: list[object] = []

    async def look_up() -> None:
        assert hot.parent is not None
        answers.append(stuck.kernel.counted(await stuck.overlay.lookup(hot.parent.id, b"other")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_up)
        await gate.wait_for(2)  # the one that was given up, and the one that waits
        assert answers == []
        gate.open()
    assert len(answers) == 1


async def test_an_open_for_writing_waits_for_the_source(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stuck.first_open()
    hot = await stuck.hot_node()
    hang(stuck, gate, monkeypatch)
    answers: list[int] = []

    async def write() -> None:
        answers.append((await stuck.overlay.open(hot.id, os.O_WRONLY, CALLER)).fh)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await gate.wait_for(1)
        await trio.sleep(0.3)
        assert answers == []
        gate.open()
    await stuck.overlay.release(answers[0])


async def test_no_stale_bytes_if_the_settings_forbid_them(
    made: Callable[..., Node1], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = made(source_deadline_s=0.1, stale_if_unreachable=False)
    await node.first_open()
    hot = await node.hot_node()
    hang(node, gate, monkeypatch)
    with trio.move_on_after(0.5) as scope:
        await node.overlay.open(hot.id, os.O_RDONLY, CALLER)
    assert scope.cancelled_caught
    assert node.tiered.counts.stale == 0


async def test_a_directory_that_was_opened_too_late_is_closed(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was given up when the source hung; its thread gets a descriptor that nobody waits for any more."""
    await stuck.first_open()
    hot = await stuck.hot_node()
    assert hot.parent is not None
    stuck.overlay.dirs.close()
    opened = 0

    def open_dir(*args: Any) -> int:
        nonlocal opened
        fd = real(*args)
        opened += 1
        return fd

    real = stuck.tiered.posix.open_dir
    monkeypatch.setattr(stuck.tiered.posix, "open_dir", gate.hold(open_dir))
    before = open_descriptors()
    assert (await stuck.overlay.getattr(hot.id)).node_id == hot.id
    gate.open()
    with trio.fail_after(WAIT_SECONDS):
        while opened < 1 or stuck.overlay.metadata_limit.borrowed_tokens:  # noqa: ASYNC110
            await trio.sleep(0.001)
    assert open_descriptors() - before == set()


async def test_more_calls_than_threads_answer_while_the_source_hangs(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that were given up keep their threads: those who come after them have none, and must not wait for one."""
    await stuck.first_open()
    hot = await stuck.hot_node()
    hang(stuck, gate, monkeypatch)
    with trio.fail_after(WAIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(stuck.overlay.getattr, hot.id)
    gate.open()


async def test_the_source_is_asked_again_once_it_is_back(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stuck.first_open()
    hot = await stuck.hot_node()
    real = stuck.tiered.posix.stat
    monkeypatch.setattr(stuck.tiered.posix, "stat", gate.hold(real))
    await stuck.overlay.getattr(hot.id)
    gate.open()
    monkeypatch.setattr(stuck.tiered.posix, "stat", real)
    os.chmod(stuck.tiered.path(NAME), 0o600)
    with trio.fail_after(WAIT_SECONDS):
        while (await stuck.overlay.getattr(hot.id)).attributes.st_mode & 0o777 != 0o600:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_attributes_that_we_changed_are_what_is_told_when_the_source_hangs(
    stuck: Node1, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stuck.first_open()
    hot = await stuck.hot_node()
    await stuck.overlay.setattr(hot.id, Changes(mode=0o600), None)
    hang(stuck, gate, monkeypatch)
    assert (await stuck.overlay.getattr(hot.id)).attributes.st_mode & 0o777 == 0o600
    gate.open()
