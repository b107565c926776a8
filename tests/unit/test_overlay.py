"""What the overlay's calls mean, over a real directory that also changes beneath it. No kernel."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.conftest import Bench, Gate, end_bench, make_bench
from tests.unit.kernel import CALLER
from tierd.node import files as files_module
from tierd.node.inodes import ROOT_ID
from tierd.node.journal import Closed, Event, Opened
from tierd.node.reach import YOUNG_SECONDS, Caller
from tierd.node.sources import Changes

TIMEOUT_SECONDS = 20.0


async def number_of(call: Awaitable[object]) -> str:
    """The errno that a call ends with, by name; `ok` if it does not fail."""
    try:
        await call
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def events(bench: Bench) -> list[Event]:
    """What the journal holds; it is empty afterwards."""
    return bench.journal.take(10_000)


# --- the ledger: every reply with an entry is one lookup ---


async def test_each_reply_with_an_entry_counts_one_lookup(bench: Bench) -> None:
    kernel, overlay = bench.kernel, bench.overlay
    made = kernel.counted(await overlay.mkdir(ROOT_ID, b"dir", 0o755, CALLER))
    opened = await kernel.create(b"dir/file")
    await overlay.release(opened.fh)
    kernel.counted(await overlay.mknod(made.node_id, b"fifo", stat.S_IFIFO | 0o600, 0, CALLER))
    kernel.counted(await overlay.symlink(made.node_id, b"sym", b"file", CALLER))
    file = await kernel.node(b"dir/file")
    linked = kernel.counted(await overlay.link(file, ROOT_ID, b"hard"))
    assert linked.node_id == file
    assert linked.attributes.st_nlink == 2
    assert sorted(await kernel.list_directory(made.node_id)) == [b"fifo", b"file", b"sym"]
    assert await overlay.readlink(await kernel.node(b"dir/sym")) == b"file"
    for node_id, count in kernel.lookups.items():
        assert overlay.inodes.get(node_id).lookups == count
    assert len(overlay.inodes) == 1 + len(kernel.lookups)


async def test_a_failed_call_counts_nothing(bench: Bench) -> None:
    overlay = bench.overlay
    (bench.beneath / "file").touch()
    assert await number_of(overlay.lookup(ROOT_ID, b"missing")) == "ENOENT"
    assert await number_of(overlay.mkdir(ROOT_ID, b"file", 0o755, CALLER)) == "EEXIST"
    assert await number_of(overlay.symlink(ROOT_ID, b"file", b"x", CALLER)) == "EEXIST"
    assert await number_of(overlay.mknod(ROOT_ID, b"file", stat.S_IFREG, 0, CALLER)) == "EEXIST"
    assert await number_of(overlay.lookup(ROOT_ID, b"x" * 256)) == "ENAMETOOLONG"
    assert await number_of(overlay.rmdir(ROOT_ID, b"file")) == "ENOTDIR"
    assert await number_of(overlay.unlink(ROOT_ID, b"missing")) == "ENOENT"
    assert len(overlay.inodes) == 1


@pytest.mark.parametrize("call", ["lookup", "getattr", "open", "opendir", "setattr", "readlink", "mkdir", "listxattr"])
async def test_a_forgotten_node_is_stale(bench: Bench, call: str) -> None:
    (bench.beneath / "dir").mkdir()
    node_id = await bench.kernel.node(b"dir")
    bench.kernel.forget_all()
    arguments: dict[str, tuple[object, ...]] = {
        "lookup": (b"x",),
        "open": (os.O_RDONLY, CALLER),
        "setattr": (Changes(mode=0o700), None),
        "mkdir": (b"x", 0o755, CALLER),
    }
    assert await number_of(getattr(bench.overlay, call)(node_id, *arguments.get(call, ()))) == "ESTALE"


async def test_unknown_handles_are_bad(bench: Bench) -> None:
    for call in (
        bench.overlay.read(99, 0, 1),
        bench.overlay.write(99, 0, b"x"),
        bench.overlay.flush(99),
        bench.overlay.fsync(99, False),
        bench.overlay.fsyncdir(99),
        bench.overlay.readdir(99, 0, lambda *_: True),
    ):
        assert await number_of(call) == "EBADF"


def test_forget_never_raises(bench: Bench) -> None:
    bench.overlay.forget(12345, 1)
    bench.overlay.forget(ROOT_ID, 99)
    bench.overlay.forget(0, 0)


# --- what changes beneath ---


async def test_a_file_renamed_beneath_is_found_by_its_new_name(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").rename(bench.beneath / "b")
    assert await number_of(bench.overlay.getattr(node_id)) == "ESTALE", "no name is known any more"
    assert await number_of(bench.overlay.lookup(ROOT_ID, b"a")) == "ENOENT"
    assert await bench.kernel.read_file(b"b") == b"content"


async def test_an_open_file_renamed_beneath_keeps_its_node(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    opened = await bench.kernel.open(b"a")
    node_id = await bench.kernel.node(b"a")
    (bench.beneath / "a").rename(bench.beneath / "b")
    assert await bench.kernel.node(b"b") == node_id
    assert (await bench.overlay.getattr(node_id)).attributes.st_size == 7
    await bench.overlay.release(opened.fh)


async def test_a_file_with_two_names_is_found_by_the_one_that_is_left(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"content")
    (bench.beneath / "b").hardlink_to(bench.beneath / "a")
    node_id = await bench.kernel.node(b"a")
    assert await bench.kernel.node(b"b") == node_id
    (bench.beneath / "b").unlink()
    assert (await bench.overlay.getattr(node_id)).attributes.st_nlink == 1
    (bench.beneath / "a").unlink()
    assert await number_of(bench.overlay.getattr(node_id)) == "ESTALE"


async def test_a_name_in_a_directory_that_is_gone_gives_way_to_another(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    (bench.beneath / "d" / "x").write_bytes(b"content")
    (bench.beneath / "y").hardlink_to(bench.beneath / "d" / "x")
    node_id = await bench.kernel.node(b"y")
    assert await bench.kernel.node(b"d/x") == node_id
    (bench.beneath / "d" / "x").unlink()
    await bench.overlay.rmdir(ROOT_ID, b"d")
    bench.overlay.dirs.close()
    assert (await bench.overlay.getattr(node_id)).attributes.st_nlink == 1
    assert await bench.kernel.read_file(b"y") == b"content"


async def test_a_file_replaced_beneath_gets_a_new_node(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"old")
    old = await bench.kernel.node(b"a")
    (bench.beneath / "new").write_bytes(b"newer")
    (bench.beneath / "new").rename(bench.beneath / "a")
    assert await number_of(bench.overlay.open(old, os.O_RDONLY, CALLER)) == "ESTALE"
    assert await bench.kernel.node(b"a") != old
    assert await bench.kernel.read_file(b"a") == b"newer"


async def test_a_file_that_became_a_link_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"outside")
    (bench.beneath / "a").write_bytes(b"inside")
    node_id = await bench.kernel.node(b"a")
    (tmp_path / "kept").hardlink_to(bench.beneath / "a")  # so that its inode number is not used again
    (bench.beneath / "a").unlink()
    (bench.beneath / "a").symlink_to(secret)
    for call in (
        bench.overlay.open(node_id, os.O_RDONLY, CALLER),
        bench.overlay.setattr(node_id, Changes(mode=0o777, size=0), None),
        bench.overlay.getattr(node_id),
    ):
        assert await number_of(call) == "ESTALE"
    assert secret.read_bytes() == b"outside"


async def test_a_directory_that_became_a_link_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"outside")
    (bench.beneath / "d").mkdir()
    node_id = await bench.kernel.node(b"d")
    (bench.beneath / "d").rename(tmp_path / "kept")  # so that its inode number is not used again
    (bench.beneath / "d").symlink_to(outside)
    for call in (
        bench.overlay.lookup(node_id, b"f"),
        bench.overlay.mkdir(node_id, b"x", 0o755, CALLER),
        bench.overlay.opendir(node_id),
        bench.overlay.unlink(node_id, b"f"),
    ):
        assert await number_of(call) in ("ESTALE", "ENOENT")
    assert os.listdir(outside) == ["f"]


async def test_a_directory_renamed_beneath_is_found_once_looked_up(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    (bench.beneath / "d" / "f").write_bytes(b"1")
    file = await bench.kernel.node(b"d/f")
    (bench.beneath / "d").rename(bench.beneath / "e")
    assert (await bench.overlay.getattr(file)).attributes.st_size == 1, "its descriptor still leads there"
    bench.overlay.dirs.close()
    assert await number_of(bench.overlay.getattr(file)) == "ESTALE"
    assert await bench.kernel.node(b"e/f") == file
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(file)) == b"e/f"


async def test_directories_that_changed_places_beneath(bench: Bench) -> None:
    """a/b becomes b/a, and then the names that were seen last go: what is left must not run in a ring."""
    (bench.beneath / "a" / "b").mkdir(parents=True)
    a, b = await bench.kernel.node(b"a"), await bench.kernel.node(b"a/b")
    (bench.beneath / "a" / "b").rename(bench.beneath / "b")
    (bench.beneath / "a").rename(bench.beneath / "b" / "a")
    assert await bench.kernel.node(b"b/a") == a
    (bench.beneath / "b" / "a").rename(bench.beneath / "elsewhere")
    await bench.overlay.rmdir(ROOT_ID, b"b")
    bench.overlay.dirs.close()
    assert await number_of(bench.overlay.getattr(b)) in ("ESTALE", "ENOENT")
    assert await number_of(bench.overlay.lookup(b, b"x")) in ("ESTALE", "ENOENT")
    assert await number_of(bench.overlay.getattr(a)) == "ESTALE"
    assert await bench.kernel.node(b"elsewhere") == a


DEPTH = 1500


@pytest.fixture
def deepest(bench: Bench) -> Iterator[int]:
    """A directory DEPTH levels down, open; what pytest uses to clean up recurses, and could not remove it."""
    fd = os.open(bench.beneath, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=fd)
        fd = step(fd, "d")
    yield os.dup(fd)
    for _ in range(DEPTH):
        fd = step(fd, "..")
        os.rmdir("d", dir_fd=fd)
    os.close(fd)


def step(fd: int, name: str) -> int:
    """One directory on; gives the descriptor of the last one back."""
    below = os.open(name, os.O_RDONLY, dir_fd=fd)
    os.close(fd)
    return below


async def test_a_deep_directory_is_reached_without_its_descriptors(bench: Bench, deepest: int) -> None:
    """1,500 levels fit into PATH_MAX; the cache of directory descriptors holds fewer."""
    wanted = os.fstat(deepest).st_ino
    os.close(deepest)
    node_id = ROOT_ID
    for _ in range(DEPTH):
        node_id = bench.kernel.counted(await bench.overlay.lookup(node_id, b"d")).node_id
    bench.overlay.dirs.close()
    assert (await bench.overlay.getattr(node_id)).attributes.st_ino == wanted


# --- a node ID is one content version ---


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
    assert bench.reads.changed == [young]
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
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


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
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


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


# --- creation ---


@pytest.mark.parametrize(("flags", "answer"), [(os.O_WRONLY, "ESTALE"), (os.O_WRONLY | os.O_EXCL, "EEXIST")])
async def test_somebody_else_created_it_first(bench: Bench, flags: int, answer: str) -> None:
    """Without O_EXCL the kernel shall look the name up and open it, with its own permission check."""
    (bench.beneath / "a").write_bytes(b"theirs")
    created = bench.overlay.create(ROOT_ID, b"a", flags | os.O_CREAT | os.O_TRUNC, 0o644, CALLER)
    assert await number_of(created) == answer
    assert (bench.beneath / "a").read_bytes() == b"theirs"
    assert len(bench.overlay.inodes) == 1


async def test_create_over_a_dangling_link(bench: Bench, tmp_path: Path) -> None:
    (bench.beneath / "a").symlink_to(tmp_path / "outside")
    created = bench.overlay.create(ROOT_ID, b"a", os.O_WRONLY | os.O_CREAT, 0o644, CALLER)
    assert await number_of(created) == "ESTALE"
    assert not (tmp_path / "outside").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create for others")
async def test_new_things_belong_to_the_caller(bench: Bench) -> None:
    bench.beneath.chmod(0o777)
    caller = Caller(1234, 4321, 0)
    opened, entry = await bench.overlay.create(ROOT_ID, b"file", os.O_RDWR, 0o600, caller)
    bench.kernel.counted(entry)
    await bench.overlay.release(opened.fh)
    bench.kernel.counted(await bench.overlay.mkdir(ROOT_ID, b"dir", 0o700, caller))
    bench.kernel.counted(await bench.overlay.mknod(ROOT_ID, b"node", stat.S_IFREG | 0o600, 0, caller))
    bench.kernel.counted(await bench.overlay.symlink(ROOT_ID, b"sym", b"x", caller))
    for name in ("file", "dir", "node", "sym"):
        found = (bench.beneath / name).lstat()
        assert (found.st_uid, found.st_gid) == (1234, 4321), name


async def test_create_keeps_cache_and_is_its_own_version(bench: Bench) -> None:
    opened = await bench.kernel.create(b"a")
    assert opened.keep_cache
    await bench.overlay.write(opened.fh, 0, b"x" * 1000)
    await bench.overlay.release(opened.fh)
    opened = await bench.kernel.open(b"a")
    assert opened.keep_cache
    await bench.overlay.release(opened.fh)
    assert bench.overlay.retired == 0


# --- renames and links ---


async def test_rename_moves_the_node(bench: Bench) -> None:
    for name in ("d", "e"):
        (bench.beneath / name).mkdir()
    (bench.beneath / "d" / "f").write_bytes(b"1")
    node_id, d, e = await bench.kernel.node(b"d/f"), await bench.kernel.node(b"d"), await bench.kernel.node(b"e")
    await bench.overlay.rename(d, b"f", e, b"g", 0)
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(node_id)) == b"e/g"
    assert await bench.kernel.node(b"e/g") == node_id
    await bench.overlay.rename(ROOT_ID, b"e", d, b"inside", 0)
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(node_id)) == b"d/inside/g"
    assert (await bench.overlay.getattr(node_id)).attributes.st_size == 1


async def test_exchange_gives_each_the_name_of_the_other(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"1")
    (bench.beneath / "b").write_bytes(b"22")
    a, b = await bench.kernel.node(b"a"), await bench.kernel.node(b"b")
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 2)
    assert (await bench.kernel.node(b"a"), await bench.kernel.node(b"b")) == (b, a)
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(a)) == b"b"
    assert bench.overlay.inodes.path(bench.overlay.inodes.get(b)) == b"a"


async def test_rename_without_replacing(bench: Bench) -> None:
    (bench.beneath / "a").touch()
    (bench.beneath / "b").touch()
    assert await number_of(bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 1)) == "EEXIST"
    assert await number_of(bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 4)) == "EINVAL"
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"c", 1)
    assert sorted(os.listdir(bench.beneath)) == ["b", "c"]


async def test_rename_of_one_link_over_another_of_the_same_file_is_nothing(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"1")
    (bench.beneath / "b").hardlink_to(bench.beneath / "a")
    node_id = await bench.kernel.node(b"a")
    await bench.kernel.node(b"b")
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 0)
    assert sorted(os.listdir(bench.beneath)) == ["a", "b"]
    assert {name for _, name in bench.overlay.inodes.get(node_id).names()} == {b"a", b"b"}


async def test_the_name_that_a_rename_replaced_no_longer_means_the_old_file(bench: Bench) -> None:
    (bench.beneath / "a").write_bytes(b"1")
    (bench.beneath / "b").write_bytes(b"22")
    replaced = await bench.kernel.node(b"b")
    await bench.overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 0)
    assert await number_of(bench.overlay.getattr(replaced)) == "ESTALE"


async def test_a_link_can_be_linked(bench: Bench, tmp_path: Path) -> None:
    """The symbolic link itself gets a second name, never its target."""
    (tmp_path / "target").touch()
    (bench.beneath / "sym").symlink_to(tmp_path / "target")
    sym = await bench.kernel.node(b"sym")
    linked = bench.kernel.counted(await bench.overlay.link(sym, ROOT_ID, b"again"))
    assert linked.node_id == sym
    assert stat.S_ISLNK(linked.attributes.st_mode)
    assert (tmp_path / "target").stat().st_nlink == 1


# --- directories ---


@pytest.mark.parametrize("per_reply", [1, 3, 23, 24, 25, 100, 10_000])
async def test_each_name_is_listed_once(bench: Bench, per_reply: int) -> None:
    names = [f"n{number:04}".encode() for number in range(250)]
    for name in names:
        (bench.beneath / name.decode()).touch()
    assert sorted(await bench.kernel.list_directory(ROOT_ID, per_reply)) == names
    assert len(bench.overlay.inodes) == 251, "what did not fit is no node"


async def test_listings_ask_for_about_as_many_attributes_as_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        (bench.beneath / str(number)).touch()
    asked = 0
    lstat_many = bench.source.lstat_many

    def count(dir_fd: int, names: list[bytes]) -> list[os.stat_result | None]:
        nonlocal asked
        asked += len(names)
        return lstat_many(dir_fd, names)

    monkeypatch.setattr(bench.source, "lstat_many", count)
    for per_reply in (20, 100, 400):
        asked = 0
        assert len(await bench.kernel.list_directory(ROOT_ID, per_reply)) == 1000
        assert asked <= 1250, f"with {per_reply} entries a reply"


async def test_names_that_go_while_they_are_listed(bench: Bench) -> None:
    for number in range(100):
        (bench.beneath / f"{number:02}").touch()
    fh = await bench.overlay.opendir(ROOT_ID)
    names: list[bytes] = []
    position = await bench.kernel.list_some(fh, 0, 12, names)
    for file in bench.beneath.iterdir():
        if file.name.encode() not in names:
            file.unlink()
    (bench.beneath / "new").touch()
    assert await bench.kernel.list_some(fh, position, 1000, names) == position
    assert len(names) == 10
    await bench.kernel.list_some(fh, 0, 1000, again := [])
    assert sorted(again) == sorted([*names, b"new"]), "rewinddir(3) lists anew"
    await bench.overlay.releasedir(fh)


async def test_two_listings_do_not_disturb_each_other(bench: Bench) -> None:
    for number in range(30):
        (bench.beneath / str(number)).touch()
    one, two = await bench.overlay.opendir(ROOT_ID), await bench.overlay.opendir(ROOT_ID)
    first: list[bytes] = []
    second: list[bytes] = []
    position = {one: 0, two: 0}
    for _ in range(10):
        position[one] = await bench.kernel.list_some(one, position[one], 4, first)
        position[two] = await bench.kernel.list_some(two, position[two], 7, second)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 30
    for fh in (one, two):
        await bench.overlay.fsyncdir(fh)
        await bench.overlay.releasedir(fh)


async def test_dots_lead_to_the_directory_and_its_parent(bench: Bench) -> None:
    (bench.beneath / "d").mkdir()
    node_id = await bench.kernel.node(b"d")
    seen: dict[bytes, int] = {}

    def reply(name: bytes, st: os.stat_result, node: int, position: int) -> bool:
        seen[name] = node
        return True

    fh = await bench.overlay.opendir(node_id)
    await bench.overlay.readdir(fh, 0, reply)
    await bench.overlay.releasedir(fh)
    assert seen == {b".": node_id, b"..": ROOT_ID}


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


# --- extended attributes ---


async def test_extended_attributes(bench: Bench) -> None:
    if not bench.source.xattrs:
        pytest.fail("this file system keeps no extended attributes; run the tests on one that does")
    (bench.beneath / "a").touch()
    node_id = await bench.kernel.node(b"a")
    await bench.overlay.setxattr(node_id, b"user.one", b"\0\xff")
    assert await bench.overlay.getxattr(node_id, b"user.one") == b"\0\xff"
    assert await bench.overlay.listxattr(node_id) == [b"user.one"]
    assert os.getxattr(bench.beneath / "a", "user.one") == b"\0\xff"
    await bench.overlay.removexattr(node_id, b"user.one")
    assert await number_of(bench.overlay.getxattr(node_id, b"user.one")) == "ENODATA"
    assert await number_of(bench.overlay.removexattr(node_id, b"user.one")) == "ENODATA"


async def test_attributes_of_a_link_are_not_those_of_its_target(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    target.chmod(0o644)
    before = target.stat()
    (bench.beneath / "sym").symlink_to(target)
    sym = await bench.kernel.node(b"sym")
    changed = await bench.overlay.setattr(sym, Changes(mtime_ns=5, atime_ns=7), None)
    assert (changed.attributes.st_mtime_ns, changed.attributes.st_atime_ns) == (5, 7)
    await number_of(bench.overlay.setattr(sym, Changes(mode=0o777), None))
    await number_of(bench.overlay.setxattr(sym, b"user.one", b"1"))
    assert target.stat() == before
    if bench.source.xattrs:
        assert os.listxattr(target) == []
