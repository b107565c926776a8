"""A node ID is one content version: changes from beneath make a new one, our own do not. No kernel."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Awaitable, Callable

import pytest
from trio.testing import MockClock

from tests.unit.conftest import Bench
from tests.unit.kernel import CALLER, number_of
from tierd.node.ledger import ROOT_ID
from tierd.node.reach import YOUNG_SECONDS
from tierd.node.sources import Changes


async def test_changed_content_is_a_new_node_that_then_settles(bench: Bench, mock_clock: MockClock) -> None:
    """ESTALE once; its successor adopts changes for a while, then it is retired in turn."""
    kernel, overlay, file = bench.kernel, bench.overlay, bench.beneath / "a"
    file.write_bytes(b"1")
    first = await kernel.open(b"a")
    assert first.keep_cache
    await overlay.release(first.fh)

    old = await kernel.node(b"a")
    file.write_bytes(b"22")
    assert await number_of(overlay.open(old, os.O_RDONLY, CALLER)) == "ESTALE"
    assert overlay.retired == 1
    young = await kernel.node(b"a")
    assert young != old
    opened = await overlay.open(young, os.O_RDONLY, CALLER)
    assert opened.keep_cache, "a new node has no pages that could be old"
    await overlay.release(opened.fh)

    mock_clock.jump(YOUNG_SECONDS - 0.01)
    file.write_bytes(b"333")
    opened = await overlay.open(young, os.O_RDONLY, CALLER)
    assert not opened.keep_cache, "old pages must go"
    assert (bench.reads.asked_again, bench.reads.changed) == ([old], [young])
    await overlay.release(opened.fh)
    opened = await overlay.open(young, os.O_RDONLY, CALLER)
    assert opened.keep_cache, "nothing changed since"
    await overlay.release(opened.fh)
    assert overlay.retired == 1

    mock_clock.jump(0.02)
    file.write_bytes(b"4444")
    assert await number_of(overlay.open(young, os.O_RDONLY, CALLER)) == "ESTALE"
    assert overlay.retired == 2
    assert await kernel.node(b"a") not in (old, young)
    overlay.check()


async def test_open2_never_fails_twice_on_a_file_that_changes_all_the_time(bench: Bench, mock_clock: MockClock) -> None:
    """The kernel retries open(2) once; whatever the pace of the changes, the second try must succeed."""
    for number in range(40):
        (bench.beneath / "a").write_bytes(b"x" * number)
        opened = await bench.kernel.retried(lambda: bench.kernel.open(b"a"))
        await bench.overlay.release(opened.fh)
        mock_clock.jump(YOUNG_SECONDS / 3)


async def test_change_between_the_two_tries_of_one_open(bench: Bench, mock_clock: MockClock) -> None:
    file = bench.beneath / "a"
    file.write_bytes(b"1")
    node_id = await bench.kernel.node(b"a")
    file.write_bytes(b"22")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"
    young = await bench.kernel.node(b"a")
    file.write_bytes(b"333")
    opened = await bench.overlay.open(young, os.O_RDONLY, CALLER)
    assert not opened.keep_cache
    await bench.overlay.release(opened.fh)


async def test_another_file_with_a_replaced_ones_number_is_another_node(bench: Bench) -> None:
    """The kernel may still know the replaced one by its old name, and open it without a lookup."""
    (bench.beneath / "a").write_bytes(b"1")
    known_as_a = await bench.kernel.node(b"a")
    (bench.beneath / "a").rename(bench.beneath / "b")  # as if the number had come again
    (bench.beneath / "b").write_bytes(b"of another file")
    (bench.beneath / "a").write_bytes(b"22")
    assert await bench.kernel.node(b"b") != known_as_a
    assert await number_of(bench.overlay.open(known_as_a, os.O_RDONLY, CALLER)) == "ESTALE"
    opened = await bench.kernel.open(b"a")
    assert await bench.overlay.read(opened.fh, 0, 100) == b"22"
    await bench.overlay.release(opened.fh)


async def test_a_listing_that_is_full_does_not_use_up_youth(bench: Bench, mock_clock: MockClock) -> None:
    """The entry that did not fit was no lookup: the real one, right after, still gets the young node."""
    file = bench.beneath / "a"
    file.write_bytes(b"1")
    node_id = await bench.kernel.node(b"a")
    file.write_bytes(b"22")
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"
    fh = await bench.overlay.opendir(ROOT_ID)
    await bench.kernel.list_some(fh, 0, 2, [])
    await bench.overlay.releasedir(fh)
    young = await bench.kernel.node(b"a")
    file.write_bytes(b"333")
    assert await number_of(bench.overlay.open(young, os.O_RDONLY, CALLER)) == "ok"
    await bench.overlay.release(next(iter(bench.overlay.files)))


async def test_same_size_and_time_but_other_content_is_noticed(bench: Bench) -> None:
    """`cp -p` and `rsync -t` set the old times again; the change time tells."""
    file = bench.beneath / "a"
    file.write_bytes(b"old")
    node_id = await bench.kernel.node(b"a")
    before = file.stat()
    file.write_bytes(b"new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"


async def test_a_retired_node_serves_those_who_have_it_open(bench: Bench) -> None:
    file = bench.beneath / "a"
    file.write_bytes(b"1")
    held = await bench.kernel.open(b"a")
    old = await bench.kernel.node(b"a")
    file.write_bytes(b"22")
    assert await number_of(bench.overlay.open(old, os.O_RDONLY, CALLER)) == "ESTALE"
    assert (await bench.overlay.getattr(old)).attributes.st_size == 2
    assert await bench.overlay.read(held.fh, 0, 10) == b"22"
    await bench.overlay.release(held.fh)
    bench.overlay.check()


async def test_truncating_open_needs_no_current_content(bench: Bench) -> None:
    file = bench.beneath / "a"
    file.write_bytes(b"1")
    node_id = await bench.kernel.node(b"a")
    file.write_bytes(b"22")
    opened = await bench.overlay.open(node_id, os.O_WRONLY | os.O_TRUNC, CALLER)
    assert file.read_bytes() == b""
    await bench.overlay.release(opened.fh)
    assert bench.overlay.retired == 0


async def test_read_only_open_with_truncate_does_what_the_source_does(bench: Bench) -> None:
    """Linux truncates on O_RDONLY | O_TRUNC (open(2): unspecified); the kernel believes that the overlay did, too."""
    model, file = bench.beneath / "model", bench.beneath / "a"
    for path in (model, file):
        path.write_bytes(b"content")
    os.close(os.open(model, os.O_RDONLY | os.O_TRUNC))
    opened = await bench.kernel.open(b"a", os.O_RDONLY | os.O_TRUNC)
    await bench.overlay.release(opened.fh)
    assert file.read_bytes() == model.read_bytes()


Own = Callable[[Bench, int], Awaitable[object]]


async def own_chmod(bench: Bench, node_id: int) -> None:
    await bench.overlay.setattr(node_id, Changes(mode=0o600), None)


async def own_utime(bench: Bench, node_id: int) -> None:
    await bench.overlay.setattr(node_id, Changes(mtime_ns=1_000_000_007, atime_ns=5), None)


async def own_truncate(bench: Bench, node_id: int) -> None:
    await bench.overlay.setattr(node_id, Changes(size=2), None)


async def own_truncate_of_a_handle(bench: Bench, node_id: int) -> None:
    opened = await bench.overlay.open(node_id, os.O_RDWR, CALLER)
    await bench.overlay.setattr(node_id, Changes(size=2), opened.fh)
    await bench.overlay.release(opened.fh)


async def own_write(bench: Bench, node_id: int) -> None:
    opened = await bench.overlay.open(node_id, os.O_WRONLY, CALLER)
    await bench.overlay.write(opened.fh, 1, b"XY")
    await bench.overlay.flush(opened.fh)
    await bench.overlay.release(opened.fh)


async def own_rename(bench: Bench, node_id: int) -> None:
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 0)


async def own_rename_over(bench: Bench, node_id: int) -> None:
    (bench.beneath / "b").write_bytes(b"other")
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 0)


async def own_exchange(bench: Bench, node_id: int) -> None:
    (bench.beneath / "b").write_bytes(b"other")
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 2)


async def own_exchange_from_the_other_side(bench: Bench, node_id: int) -> None:
    (bench.beneath / "b").write_bytes(b"other")
    await bench.overlay.rename(ROOT_ID, b"b", ROOT_ID, b"a", 2)


async def own_link(bench: Bench, node_id: int) -> None:
    bench.kernel.counted(await bench.overlay.link(node_id, ROOT_ID, b"b"))


async def own_unlink_of_another_name(bench: Bench, node_id: int) -> None:
    bench.kernel.counted(await bench.overlay.link(node_id, ROOT_ID, b"b"))
    await bench.overlay.unlink(ROOT_ID, b"b")


async def own_rename_over_another_name(bench: Bench, node_id: int) -> None:
    bench.kernel.counted(await bench.overlay.link(node_id, ROOT_ID, b"b"))
    (bench.beneath / "c").write_bytes(b"other")
    await bench.overlay.rename(ROOT_ID, b"c", ROOT_ID, b"b", 0)


async def own_setxattr(bench: Bench, node_id: int) -> None:
    await bench.overlay.setxattr(node_id, b"user.note", b"1")


async def own_removexattr(bench: Bench, node_id: int) -> None:
    await bench.overlay.setxattr(node_id, b"user.note", b"1")
    await bench.overlay.removexattr(node_id, b"user.note")


@pytest.mark.parametrize(
    "change",
    [
        own_chmod,
        own_utime,
        own_truncate,
        own_truncate_of_a_handle,
        own_write,
        own_rename,
        own_rename_over,
        own_exchange,
        own_exchange_from_the_other_side,
        own_link,
        own_unlink_of_another_name,
        own_rename_over_another_name,
        own_setxattr,
        own_removexattr,
    ],
)
async def test_our_own_change_retires_nothing(bench: Bench, change: Own) -> None:
    """And is no licence either: a change beneath that came before it is still noticed."""
    if "xattr" in change.__name__ and not bench.source.xattrs:
        pytest.fail("this file system keeps no extended attributes; run the tests on one that does")
    file = bench.beneath / "a"
    file.write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    await change(bench, node_id)
    opened = await bench.overlay.open(node_id, os.O_RDONLY, CALLER)
    assert opened.keep_cache
    await bench.overlay.release(opened.fh)
    assert bench.overlay.retired == 0


@pytest.mark.parametrize("change", [own_chmod, own_utime, own_rename, own_link, own_truncate])
async def test_our_own_change_does_not_hide_one_from_beneath(bench: Bench, change: Own) -> None:
    file = bench.beneath / "a"
    file.write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    file.write_bytes(b"changed")
    await change(bench, node_id)
    assert not await serves_old_pages(bench, node_id)


async def serves_old_pages(bench: Bench, node_id: int) -> bool:
    """Whether an open would leave the kernel its cached pages: not with ESTALE, and not without `keep_cache`."""
    try:
        opened = await bench.overlay.open(node_id, os.O_RDONLY, CALLER)
    except OSError as error:
        assert error.errno == errno.ESTALE  # noqa: PT017 (the other right answer)
        return False
    await bench.overlay.release(opened.fh)
    return opened.keep_cache


async def test_a_writer_that_wrote_nothing_does_not_hide_a_change_from_beneath(bench: Bench) -> None:
    """A lock file or log held open for hours must not vouch for what another mount wrote meanwhile."""
    file = bench.beneath / "a"
    file.write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    writer = await bench.overlay.open(node_id, os.O_RDWR, CALLER)
    file.write_bytes(b"changed")
    await bench.overlay.release(writer.fh)
    assert not await serves_old_pages(bench, node_id)


async def test_an_attribute_cache_that_is_behind_is_no_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """JuiceFS may answer a plain lstat(2) from its cache: older than what a forced one said is not a new version."""
    opened = await bench.kernel.create(b"a")
    behind = bench.source.lstat(bench.source.root_fd, b"a")
    await bench.overlay.write(opened.fh, 0, b"content")
    await bench.overlay.release(opened.fh)
    node_id = next(iter(bench.kernel.lookups))
    monkeypatch.setattr(bench.source, "lstat", lambda dir_fd, name: behind)
    assert await bench.kernel.node(b"a") == node_id
    monkeypatch.undo()
    assert (await bench.overlay.open(node_id, os.O_RDONLY, CALLER)).keep_cache
    await bench.overlay.release(next(iter(bench.overlay.files)))
    assert bench.overlay.retired == 0


async def test_readers_beside_a_writer_keep_their_node(bench: Bench) -> None:
    writer = await bench.kernel.create(b"a")
    await bench.overlay.write(writer.fh, 0, b"12345")
    reader = await bench.kernel.open(b"a")
    assert await bench.overlay.read(reader.fh, 0, 100) == b"12345"
    await bench.overlay.write(writer.fh, 5, b"6")
    again = await bench.kernel.open(b"a")
    assert await bench.overlay.read(again.fh, 3, 100) == b"456"
    for opened in (reader, writer, again):
        await bench.overlay.release(opened.fh)
    assert bench.overlay.retired == 0


async def test_a_replaced_file_is_not_opened_by_those_who_have_it(bench: Bench, mock_clock: MockClock) -> None:
    """Found by overwriting: the first open saw that the name means another file, the next one got the old file."""
    (bench.beneath / "a").write_bytes(b"old")
    opened = await bench.kernel.open(b"a")
    node = bench.overlay.files[opened.fh].node
    node_id, node.young_until = node.id, math.inf
    (bench.beneath / "new").write_bytes(b"new")
    (bench.beneath / "new").rename(bench.beneath / "a")
    for _ in range(3):
        assert await number_of(bench.overlay.open(node_id, os.O_RDONLY, CALLER)) == "ESTALE"
    assert await bench.kernel.read_file(b"a") == b"new"
    mock_clock.jump(YOUNG_SECONDS)
    again = await bench.overlay.open(node_id, os.O_RDONLY, CALLER)  # as through /proc/self/fd, some time later
    assert await bench.overlay.read(again.fh, 0, 10) == b"old"
    for fh in (opened.fh, again.fh):
        await bench.overlay.release(fh)
