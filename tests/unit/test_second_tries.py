"""An open that was sent back once is not sent back again, whatever happens to the name. No kernel."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import MockClock

from tests.unit.conftest import Bench
from tests.unit.descriptors import open_descriptors
from tests.unit.kernel import CALLER, number_of
from tierd.node.ledger import ROOT_ID
from tierd.node.opens import PASSTHROUGH_BYTES_MIN
from tierd.node.reach import YOUNG_SECONDS, Caller
from tierd.node.retries import KEPT_SECONDS, TRIES_MAX, TRY_SECONDS, SecondTries

PID = 4242
READER = Caller(CALLER.uid, CALLER.gid, PID)


def replace(bench: Bench, data: bytes) -> None:
    """Another file at `a`."""
    (bench.beneath / "new").write_bytes(data)
    (bench.beneath / "new").rename(bench.beneath / "a")


async def sent_back(bench: Bench) -> None:
    """READER knows the file as it was, opens it, and is told to look again."""
    (bench.beneath / "a").write_bytes(b"first")
    node_id = await bench.kernel.node(b"a")
    replace(bench, b"second")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, READER)) == "ESTALE"


async def looked_up(bench: Bench, name: bytes = b"a", pid: int = PID) -> int:
    """What a lookup by a thread finds."""
    return bench.kernel.counted(await bench.overlay.lookup(ROOT_ID, name, pid)).node_id


async def closed(bench: Bench, *, kept: int) -> None:
    """No more than that many descriptors of the source's files are open."""
    with trio.fail_after(5):
        while len([line for line in open_descriptors() if f"{bench.beneath}/" in line]) > kept:
            await trio.lowlevel.checkpoint()


async def test_replaced_between_the_lookup_and_the_second_try(bench: Bench) -> None:
    await sent_back(bench)
    node_id = await looked_up(bench)
    replace(bench, b"third")
    opened = await bench.overlay.open(node_id, os.O_RDONLY, READER)
    assert await bench.overlay.read(opened.fh, 0, 10) == b"second", "the name meant it during the open"
    await bench.overlay.release(opened.fh)
    await closed(bench, kept=0)
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, READER)) == "ESTALE", "that was for one open"


async def test_beside_others_who_have_it_open(bench: Bench) -> None:
    """Not only in place of ESTALE: for everybody else the file is over, and for this open it is not."""
    await sent_back(bench)
    other = await bench.kernel.open(b"a")
    node_id = await looked_up(bench)
    replace(bench, b"third")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"
    opened = await bench.overlay.open(node_id, os.O_RDONLY, READER)
    assert await bench.overlay.read(opened.fh, 0, 10) == b"second"
    for fh in (opened.fh, other.fh):
        await bench.overlay.release(fh)


async def test_removed_between_the_lookup_and_the_second_try(bench: Bench) -> None:
    await sent_back(bench)
    node_id = await looked_up(bench)
    (bench.beneath / "a").unlink()
    opened = await bench.overlay.open(node_id, os.O_RDONLY, READER)
    assert await bench.overlay.read(opened.fh, 0, 10) == b"second"
    await bench.overlay.release(opened.fh)


async def test_what_another_thread_looks_up_is_not_kept(bench: Bench) -> None:
    await sent_back(bench)
    await looked_up(bench, pid=PID + 1)
    node_id = await looked_up(bench, pid=0)
    await closed(bench, kept=0)
    replace(bench, b"third")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, READER)) == "ESTALE"


async def test_directories_and_links_on_the_way_are_not_kept(bench: Bench) -> None:
    await sent_back(bench)
    (bench.beneath / "dir").mkdir()
    (bench.beneath / "link").symlink_to("a")
    os.mkfifo(bench.beneath / "pipe")
    for name in (b"dir", b"link", b"pipe"):
        await looked_up(bench, name)
    with pytest.raises(FileNotFoundError):
        await bench.overlay.lookup(ROOT_ID, b"absent", PID)
    node_id = await looked_up(bench)
    replace(bench, b"third")
    opened = await bench.overlay.open(node_id, os.O_RDONLY, READER)
    await bench.overlay.release(opened.fh)


async def test_only_the_last_lookup_is_kept(bench: Bench) -> None:
    await sent_back(bench)
    (bench.beneath / "b").write_bytes(b"other")
    for name in (b"b", b"a", b"b"):
        await looked_up(bench, name)
    await closed(bench, kept=1)
    node_id = await looked_up(bench)
    opened = await bench.overlay.open(node_id, os.O_RDONLY, READER)
    await bench.overlay.release(opened.fh)
    await closed(bench, kept=0)


async def test_an_open_of_another_file_ends_it(bench: Bench) -> None:
    await sent_back(bench)
    (bench.beneath / "b").write_bytes(b"other")
    await looked_up(bench)
    opened = await bench.overlay.open(await looked_up(bench, b"b", 0), os.O_RDONLY, READER)
    await bench.overlay.release(opened.fh)
    await closed(bench, kept=0)
    assert len(bench.overlay.second_tries) == 0


async def test_a_second_try_that_never_comes_is_let_go(bench: Bench, mock_clock: MockClock) -> None:
    await sent_back(bench)
    await looked_up(bench)
    mock_clock.jump(TRY_SECONDS)
    (bench.beneath / "b").write_bytes(b"other")
    opened = await bench.kernel.open(b"b")
    await bench.overlay.release(opened.fh)
    await closed(bench, kept=0)
    assert len(bench.overlay.second_tries) == 0


async def test_the_number_of_files_kept_is_bounded(bench: Bench) -> None:
    (bench.beneath / "b").write_bytes(b"other")
    for pid in range(1, 2 * TRIES_MAX):
        bench.overlay.second_tries.sent_back(pid)
        await looked_up(bench, b"b", pid)
    assert len(bench.overlay.second_tries) == TRIES_MAX
    await closed(bench, kept=TRIES_MAX)
    for pid in range(1, 2 * TRIES_MAX):
        bench.overlay.second_tries.take(pid, 0)
    await closed(bench, kept=0)


async def test_as_many_readers_as_a_node_has_are_sent_back_at_once(bench: Bench) -> None:
    """The long run had 256, and 64 second tries: the others' opens failed when a file left the node tier."""
    for pid in range(1, 257):
        bench.overlay.second_tries.sent_back(pid)
    assert all(bench.overlay.second_tries.awaits(pid) for pid in range(1, 257))


async def test_a_thread_without_a_number_has_no_second_try(bench: Bench) -> None:
    bench.overlay.second_tries.sent_back(0)
    assert not bench.overlay.second_tries.awaits(0)


async def test_a_file_that_may_not_be_opened_is_found_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sent_back(bench)

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(bench.source, "_open_checked", refuse)
    assert (await bench.overlay.lookup(ROOT_ID, b"a", PID)).attributes.st_size == len(b"second")
    bench.kernel.lookups[await bench.kernel.node(b"a")] += 1


async def test_the_node_stays_free_for_a_writer_that_is_slow(bench: Bench, autojump_clock: MockClock) -> None:
    """Between being sent back, its lookup and its open there may be a moment on a busy machine, each time."""
    bench.reads.offers = True
    (bench.beneath / "a").write_bytes(bytes(PASSTHROUGH_BYTES_MIN))
    node_id = await bench.kernel.node(b"a")
    reading = await bench.overlay.open(node_id, os.O_RDONLY, CALLER)
    assert await number_of(bench.overlay.open(node_id, os.O_RDWR, READER)) == "ESTALE", "a reader has it"
    await trio.sleep(YOUNG_SECONDS * 0.8)
    node_id = await looked_up(bench)
    await trio.sleep(YOUNG_SECONDS * 0.8)
    beside = await bench.overlay.open(node_id, os.O_RDONLY, CALLER)
    writing = await bench.overlay.open(node_id, os.O_RDWR, READER)
    for opened in (reading, beside, writing):
        await bench.overlay.release(opened.fh)


async def test_what_was_found_is_for_the_open_that_follows_at_once(bench: Bench, mock_clock: MockClock) -> None:
    """A later open of the thread got what an earlier one had found, and which was replaced before it began."""
    await sent_back(bench)
    node_id = await looked_up(bench)
    replace(bench, b"third")
    mock_clock.jump(KEPT_SECONDS + 0.1)
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, READER)) == "ESTALE"


async def test_an_open_that_was_sent_back_goes_the_long_way(bench: Bench) -> None:
    """The short one would have left what was kept for it to a later open."""
    threads: set[int] = set()
    bench.overlay.second_tries = SecondTries(threads)
    await sent_back(bench)
    assert threads == {PID}
    opened = await bench.overlay.open(await looked_up(bench), os.O_RDONLY, READER)
    assert threads == set()
    await bench.overlay.release(opened.fh)
    for pid in range(1, TRIES_MAX + 10):
        bench.overlay.second_tries.sent_back(pid)
    assert len(threads) == TRIES_MAX
