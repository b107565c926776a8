"""What the overlay's calls mean, over a real directory: lookups counted, names, listings, attributes. No kernel."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.unit.conftest import Bench
from tests.unit.kernel import CALLER, number_of
from tierd.node.ledger import ROOT_ID
from tierd.node.reach import Caller
from tierd.node.sources import Changes

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
