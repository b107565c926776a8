"""Open files: how long they live, who reads them, what is recorded, and that nobody waits for another. No kernel."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.conftest import Bench, Gate, end_bench, make_bench
from tests.unit.kernel import CALLER, number_of
from tierd.node import files as files_module
from tierd.node.journal import Closed, Event, Opened
from tierd.node.ledger import ROOT_ID
from tierd.node.reach import YOUNG_SECONDS
from tierd.node.sources import Changes

TIMEOUT_SECONDS = 20.0


def events(bench: Bench) -> list[Event]:
    """What the journal holds; it is empty afterwards."""
    return bench.journal.take(10_000)


async def closed(fd: int) -> None:
    """Wait until a descriptor is."""
    with trio.fail_after(TIMEOUT_SECONDS), suppress(OSError):
        while os.fstat(fd):
            await trio.lowlevel.checkpoint()


# --- handles ---


async def test_an_unlinked_open_file_lives_on(bench: Bench) -> None:
    overlay = bench.overlay
    opened = await bench.kernel.create(b"a")
    node_id = await bench.kernel.node(b"a")
    await overlay.write(opened.fh, 0, b"content")
    await overlay.unlink(ROOT_ID, b"a")
    assert (await overlay.getattr(node_id)).attributes.st_nlink == 0
    assert await overlay.read(opened.fh, 0, 100) == b"content"
    await overlay.setattr(node_id, Changes(mode=0o640), None)
    await overlay.setattr(node_id, Changes(size=3), opened.fh)
    assert (await overlay.getattr(node_id)).attributes.st_size == 3
    assert stat.S_IMODE((await overlay.getattr(node_id)).attributes.st_mode) == 0o640
    await overlay.fsync(opened.fh, datasync=True)
    assert await number_of(overlay.link(node_id, ROOT_ID, b"back")) == "ENOENT"
    await overlay.release(opened.fh)
    assert await number_of(overlay.getattr(node_id)) == "ESTALE"


async def test_a_file_unlinked_beneath_lives_on_while_it_is_open(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    opened = await bench.kernel.open(b"a")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").unlink()
    assert (await bench.overlay.getattr(node_id)).attributes.st_nlink == 0
    assert await bench.overlay.read(opened.fh, 0, 100) == b"content"
    await bench.overlay.release(opened.fh)
    assert await number_of(bench.overlay.getattr(node_id)) == "ESTALE"


async def test_release_waits_for_nobody_and_closes_last(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A getattr uses the handle's descriptor in its thread: release must leave it open, the getattr closes it."""
    opened = await bench.kernel.create(b"a")
    node_id = await bench.kernel.node(b"a")
    fd = bench.overlay.files[opened.fh].fd
    monkeypatch.setattr(bench.source, "stat", gate.hold(bench.source.stat))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.overlay.getattr, node_id)
        await gate.wait_for(1)
        await bench.overlay.release(opened.fh)
        assert stat.S_ISREG(os.fstat(fd).st_mode), "still open"
        assert not bench.overlay.files
        gate.open()
    await closed(fd)


async def test_two_users_of_a_released_handle(bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await bench.kernel.create(b"a")
    node_id = await bench.kernel.node(b"a")
    fd = bench.overlay.files[opened.fh].fd
    monkeypatch.setattr(bench.source, "stat", gate.hold(bench.source.stat))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.overlay.getattr, node_id)
        nursery.start_soon(bench.overlay.getattr, node_id)
        await gate.wait_for(2)
        await bench.overlay.release(opened.fh)
        gate.open()
    await closed(fd)


async def test_the_last_user_closes_in_a_thread_of_its_own(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a source that hangs that close stopped the event loop, and a hit after a kill took 22 s."""
    opened = await bench.kernel.create(b"a")
    node_id = await bench.kernel.node(b"a")
    fd, close, closers = bench.overlay.files[opened.fh].fd, os.close, list[int]()

    def watched_close(number: int) -> None:
        if number == fd:
            closers.append(threading.get_ident())
        close(number)

    monkeypatch.setattr(bench.source, "stat", gate.hold(bench.source.stat))
    monkeypatch.setattr(os, "close", watched_close)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.overlay.getattr, node_id)
        await gate.wait_for(1)
        await bench.overlay.release(opened.fh)
        gate.open()
    await closed(fd)
    assert len(closers) == 1
    assert threading.get_ident() not in closers


async def test_write_returns_what_reached_the_source(bench: Bench) -> None:
    opened = await bench.kernel.create(b"a")
    assert await bench.overlay.write(opened.fh, 3, b"abc") == 3
    assert await bench.overlay.read(opened.fh, 0, 100) == b"\0\0\0abc"
    assert await bench.overlay.read(opened.fh, 100, 10) == b""
    await bench.overlay.release(opened.fh)


async def test_append_and_direct_flags_do_not_reach_the_source(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"12345")
    opened = await bench.kernel.open(b"a", os.O_WRONLY | os.O_APPEND | os.O_DIRECT)
    await bench.overlay.write(opened.fh, 1, b"X")
    await bench.overlay.write(opened.fh, 1, b"X")
    await bench.overlay.release(opened.fh)
    assert (bench.beneath / "a").read_bytes() == b"1X345"


# --- passthrough: one node, one mode ---


async def test_readers_share_a_backing(bench: Bench) -> None:
    bench.reads.offers = True
    (bench.beneath / "a").write_bytes(b"1")
    handles = [(await bench.kernel.open(b"a")).fh for _ in range(3)]
    node_id = await bench.kernel.node(b"a")
    assert bench.reads.backed == {node_id: 3}
    assert bench.reads.passed_through == dict.fromkeys(handles, 1000 + node_id)
    for fh in handles:
        await bench.overlay.release(fh)
    assert not +bench.reads.backed


async def test_a_writer_beside_passthrough_gets_a_node_of_its_own(bench: Bench) -> None:
    """Cached and passed-through opens of one inode are EIO in the kernel, so the node ID changes, not the mode."""
    bench.reads.offers = True
    (bench.beneath / "a").write_bytes(b"1")
    reader = await bench.kernel.open(b"a")
    old = await bench.kernel.node(b"a")
    assert await number_of(bench.overlay.open(old, os.O_RDWR, CALLER)) == "ESTALE"
    new = await bench.kernel.node(b"a")
    assert new != old
    writer = await bench.overlay.open(new, os.O_RDWR, CALLER)
    beside = await bench.overlay.open(new, os.O_RDONLY, CALLER)
    assert set(bench.reads.passed_through) == {reader.fh}
    for opened in (reader, writer, beside):
        await bench.overlay.release(opened.fh)


async def test_a_young_node_stays_free_for_the_writer_it_was_made_for(bench: Bench, mock_clock: MockClock) -> None:
    bench.reads.offers = True
    (bench.beneath / "a").write_bytes(b"1")
    reader = await bench.kernel.open(b"a")
    assert await number_of(bench.overlay.open(await bench.kernel.node(b"a"), os.O_WRONLY, CALLER)) == "ESTALE"
    young = await bench.kernel.node(b"a")
    faster = await bench.overlay.open(young, os.O_RDONLY, CALLER)
    writer = await bench.overlay.open(young, os.O_WRONLY, CALLER)
    for opened in (reader, faster, writer):
        await bench.overlay.release(opened.fh)
    mock_clock.jump(YOUNG_SECONDS + 1)
    later = await bench.overlay.open(young, os.O_RDONLY, CALLER)
    assert later.fh in bench.reads.passed_through
    await bench.overlay.release(later.fh)


async def test_readers_beside_a_writer_are_not_passed_through(bench: Bench) -> None:
    bench.reads.offers = True
    writer = await bench.kernel.create(b"a")
    reader = await bench.kernel.open(b"a")
    await bench.overlay.release(writer.fh)
    again = await bench.kernel.open(b"a")
    assert bench.reads.passed_through == {}, "the first reader is served by the daemon, so are all beside it"
    for opened in (reader, again):
        await bench.overlay.release(opened.fh)


@pytest.mark.parametrize("successor", [False, True])
async def test_a_writer_at_a_node_that_is_passed_through_and_retired(bench: Bench, successor: bool) -> None:
    """A process may reach it by /proc/self/fd/N of its old descriptor; its successor must not suffer."""
    bench.reads.offers = True
    file = bench.beneath / "a"
    file.write_bytes(b"1")
    reader = await bench.kernel.open(b"a")
    old = await bench.kernel.node(b"a")
    file.write_bytes(b"22")
    assert await number_of(bench.overlay.open(old, os.O_RDONLY, CALLER)) == "ESTALE"
    if successor:
        new = await bench.kernel.node(b"a")
    assert await number_of(bench.overlay.open(old, os.O_WRONLY, CALLER)) == "ESTALE"
    bench.overlay.check()
    if successor:
        assert await bench.kernel.node(b"a") == new
    await bench.overlay.release(reader.fh)


async def test_a_refused_backing_is_served_by_the_daemon(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"123")
    opened = await bench.kernel.open(b"a")
    assert bench.reads.passed_through == {}
    assert await bench.overlay.read(opened.fh, 0, 10) == b"123"
    await bench.overlay.release(opened.fh)


# --- recording ---


async def test_opens_and_closes_are_recorded(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    (bench.beneath / "d" / "f").write_bytes(b"12345")
    opened = await bench.kernel.open(b"d/f")
    await bench.overlay.read(opened.fh, 0, 3)
    await bench.overlay.read(opened.fh, 3, 100)
    await bench.overlay.rename(ROOT_ID, b"d", ROOT_ID, b"e", 0)
    await bench.overlay.release(opened.fh)
    assert events(bench) == [
        Opened(opened.fh, b"d/f", 42, CALLER.uid, None),
        Closed(opened.fh, b"d/f", 42, 5),
    ]


async def test_only_opens_for_reading_are_recorded(bench: Bench) -> None:
    writer = await bench.kernel.create(b"a", os.O_WRONLY)
    both = await bench.kernel.open(b"a", os.O_RDWR)
    await bench.overlay.release(writer.fh)
    await bench.overlay.release(both.fh)
    assert [(type(event), event.fh) for event in events(bench)] == [(Opened, both.fh), (Closed, both.fh)]


async def test_an_open_that_did_not_fit_has_no_close(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, journal_capacity=2)
    (tmp_path / "a").write_bytes(b"1")
    handles = [(await bench.kernel.open(b"a")).fh for _ in range(3)]
    assert bench.events_dropped == bench.journal.dropped == 1
    for fh in handles:
        await bench.overlay.release(fh)
    recorded = events(bench)
    assert [event.fh for event in recorded if isinstance(event, Opened)] == handles[:2]
    assert [event.fh for event in recorded if isinstance(event, Closed)] == handles[:2], "closes always fit"
    end_bench(bench)


async def test_failed_opens_are_not_recorded(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"1")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").write_bytes(b"22")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"
    assert events(bench) == []


# --- threads ---


async def test_metadata_goes_on_while_every_read_hangs(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """99 slow reads do not freeze `stat`: metadata has threads of its own."""
    overlay = bench.overlay
    (bench.beneath / "a").write_bytes(b"content")
    (bench.beneath / "d").mkdir()
    opened = await bench.kernel.open(b"a")
    monkeypatch.setattr(files_module, "read_at", gate.hold(files_module.read_at))
    readers = int(overlay.data_limit.total_tokens) + 20
    async with trio.open_nursery() as nursery:
        for _ in range(readers):
            nursery.start_soon(overlay.read, opened.fh, 0, 7)
        await gate.wait_for(int(overlay.data_limit.total_tokens))
        with trio.fail_after(TIMEOUT_SECONDS):
            node_id = await bench.kernel.node(b"a")
            await overlay.getattr(node_id)
            await overlay.setattr(node_id, Changes(mode=0o600), None)
            assert sorted(await bench.kernel.list_directory(ROOT_ID)) == [b"a", b"d"]
            bench.kernel.counted(await overlay.mkdir(ROOT_ID, b"e", 0o755, CALLER))
            await overlay.rename(ROOT_ID, b"e", ROOT_ID, b"f", 0)
            await overlay.rmdir(ROOT_ID, b"f")
            await overlay.statfs()
            second = await overlay.open(node_id, os.O_RDONLY, CALLER)
        assert gate.entered == overlay.data_limit.total_tokens, "no more threads than the limit says"
        gate.open()
    await overlay.release(opened.fh)
    await overlay.release(second.fh)


async def test_metadata_goes_on_while_every_open_hangs(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by stalling a source: 16 opens that it did not answer froze `stat` of everything else."""
    overlay = bench.overlay
    (bench.beneath / "a").write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    monkeypatch.setattr(bench.source, "open", gate.hold(bench.source.open))
    handles = []

    async def open_it() -> None:
        handles.append((await overlay.open(node_id, os.O_RDONLY, CALLER)).fh)

    async with trio.open_nursery() as nursery:
        for _ in range(99):
            nursery.start_soon(open_it)
        await gate.wait_for(int(overlay.open_limit.total_tokens))
        with trio.fail_after(TIMEOUT_SECONDS):
            await overlay.getattr(await bench.kernel.node(b"a"))
            assert await bench.kernel.list_directory(ROOT_ID) == [b"a"]
        assert gate.entered == overlay.open_limit.total_tokens, "no more threads than the limit says"
        gate.open()
    for fh in handles:
        await overlay.release(fh)


async def test_reads_go_on_while_every_metadata_call_hangs(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = bench.overlay
    (bench.beneath / "a").write_bytes(b"content")
    opened = await bench.kernel.open(b"a")
    node_id = await bench.kernel.node(b"a")
    monkeypatch.setattr(bench.source, "stat", gate.hold(bench.source.stat))
    async with trio.open_nursery() as nursery:
        for _ in range(int(overlay.metadata_limit.total_tokens) + 20):
            nursery.start_soon(overlay.getattr, node_id)
        await gate.wait_for(int(overlay.metadata_limit.total_tokens))
        with trio.fail_after(TIMEOUT_SECONDS):
            assert await overlay.read(opened.fh, 0, 100) == b"content"
        gate.open()
    await overlay.release(opened.fh)


async def test_directory_descriptors_are_bounded(bench: Bench) -> None:
    for number in range(600):
        (bench.beneath / str(number)).mkdir()
        (bench.beneath / str(number) / "f").touch()
        await bench.kernel.node(b"%d/f" % number)
    assert len(bench.overlay.dirs) == 512
    assert await bench.kernel.node(b"0/f")
    assert len(bench.overlay.dirs) == 512
