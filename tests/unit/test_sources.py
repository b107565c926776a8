"""Blocking calls on the source: never out of the tree, never on another inode, whole reads and writes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tierd.errors import UsageError
from tierd.node import sources
from tierd.node.sources import (
    Changes,
    Creator,
    Moved,
    PosixSource,
    Ref,
    Version,
    flush,
    forced_version,
    read_at,
    version_of,
    write_at,
)

OWN = Creator(os.geteuid(), os.getegid())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source's root; `outside` lies beside it and must never change."""
    path = tmp_path / "source"
    path.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    return path


@pytest.fixture
def source(tree: Path) -> Iterator[PosixSource]:
    outside = tree.parent / "outside"
    before = listing(outside)
    made = PosixSource(tree)
    yield made
    made.close()
    assert listing(outside) == before, "something reached out of the tree"


def listing(directory: Path) -> dict[str, tuple[Any, ...]]:
    """What a directory holds, with content and everything chmod, chown and utime change."""
    return {
        path.name: (path.read_bytes(), st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, st.st_nlink)
        for path in directory.iterdir()
        for st in [path.stat()]
    }


def ref_of(source: PosixSource, name: bytes) -> Ref:
    """A reference as the overlay keeps it: the name, and the inode it meant."""
    return Ref(source.root_fd, name, source.key(source.lstat(source.root_fd, name)))


def test_source_that_is_missing_or_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(UsageError, match=f"source .*{name}: {reason}"):
            PosixSource(tmp_path / name)


def test_keys_tell_devices_apart(source: PosixSource, tree: Path) -> None:
    st = tree.stat()
    assert source.key(st) == st.st_ino
    other = os.stat("/proc/self")
    assert source.key(other) == (other.st_dev, other.st_ino)


# --- versions ---


def test_forced_version_is_what_stat_says(tree: Path) -> None:
    file = tree / "f"
    for data in (b"", b"x" * 123_457):
        file.write_bytes(data)
        for mtime_ns in (0, 1, 999_999_999, 1_700_000_000_123_456_789, -1_500_000_001, 2**33 * 10**9):
            os.utime(file, ns=(5, mtime_ns))
            with file.open("rb") as opened:
                assert forced_version(opened.fileno()) == version_of(os.fstat(opened.fileno()))
    assert version_of(file.stat()).size == 123_457


def test_forced_version_of_an_unlinked_file(tree: Path) -> None:
    with (tree / "f").open("w+b", buffering=0) as opened:
        opened.write(b"123")
        (tree / "f").unlink()
        assert forced_version(opened.fileno()) == version_of(os.fstat(opened.fileno()))


def test_forced_version_of_nothing_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        forced_version(-1)


# --- names that mean something else by now ---

Use = Callable[[PosixSource, Ref], Any]


def use_open(source: PosixSource, ref: Ref) -> Any:
    fd, _ = source.open(ref, os.O_RDONLY)
    os.close(fd)


def use_write(source: PosixSource, ref: Ref) -> Any:
    fd, _ = source.open(ref, os.O_RDWR | os.O_TRUNC)
    os.close(fd)


def use_link(source: PosixSource, ref: Ref) -> Any:
    return source.link(ref, source.root_fd, b"another")


def keep(tree: Path, name: str) -> None:
    """Keep an inode alive, so that its number is not given to what takes its place."""
    (tree.parent / f"kept-{name}").hardlink_to(tree / name)


USES: list[Use] = [
    use_open,
    use_write,
    use_link,
    lambda source, ref: source.stat(ref),
    lambda source, ref: source.setattr(ref, Changes(mode=0o777), None),
    lambda source, ref: source.setattr(ref, Changes(size=0), None),
    lambda source, ref: source.setattr(ref, Changes(uid=OWN.uid, gid=OWN.gid), None),
    lambda source, ref: source.setattr(ref, Changes(mtime_ns=1, atime_ns=1), None),
    lambda source, ref: source.setxattr(ref, b"user.x", b"1"),
    lambda source, ref: source.getxattr(ref, b"user.x"),
    lambda source, ref: source.listxattr(ref),
    lambda source, ref: source.removexattr(ref, b"user.x"),
]
use = pytest.mark.parametrize("use", USES, ids=[f"use{number}" for number in range(len(USES))])


@use
def test_a_name_that_is_gone(source: PosixSource, tree: Path, use: Use) -> None:
    (tree / "f").write_bytes(b"1")
    ref = ref_of(source, b"f")
    (tree / "f").rename(tree / "g")
    with pytest.raises(Moved):
        use(source, ref)
    assert os.listdir(tree) == ["g"]


@use
def test_a_name_that_was_swapped(source: PosixSource, tree: Path, use: Use) -> None:
    (tree / "f").write_bytes(b"1")
    ref = ref_of(source, b"f")
    (tree / "other").write_bytes(b"2")
    (tree / "other").chmod(0o600)
    os.utime(tree / "other", ns=(5, 5))
    before = listing(tree)["other"]
    (tree / "other").rename(tree / "f")
    with pytest.raises(Moved):
        use(source, ref)
    assert listing(tree)["f"] == before


@use
def test_a_name_that_became_a_link_out_of_the_tree(source: PosixSource, tree: Path, use: Use) -> None:
    (tree / "f").write_bytes(b"1")
    ref = ref_of(source, b"f")
    keep(tree, "f")
    (tree / "f").unlink()
    (tree / "f").symlink_to(tree.parent / "outside" / "secret")
    with pytest.raises(Moved):
        use(source, ref)


@use
def test_a_fifo_where_a_file_was_does_not_block(source: PosixSource, tree: Path, use: Use) -> None:
    (tree / "f").write_bytes(b"1")
    ref = ref_of(source, b"f")
    keep(tree, "f")
    (tree / "f").unlink()
    os.mkfifo(tree / "f")
    with pytest.raises(Moved):
        use(source, ref)


@pytest.mark.parametrize("target", ["outside", "outside/secret"])
def test_a_link_out_of_the_tree_is_no_directory(source: PosixSource, tree: Path, target: str) -> None:
    (tree / "l").symlink_to(tree.parent / target)
    ref = ref_of(source, b"l")
    for flags in (os.O_RDONLY, os.O_PATH):
        with pytest.raises(Moved):
            source.open_dir(ref, flags)
    with pytest.raises(Moved):
        use_open(source, ref)


def test_a_link_is_itself(source: PosixSource, tree: Path) -> None:
    target = tree.parent / "outside" / "secret"
    (tree / "l").symlink_to(target)
    ref = ref_of(source, b"l")
    assert source.readlink(ref) == os.fsencode(target)
    assert stat.S_ISLNK(source.stat(ref).st_mode)
    _, after = source.setattr(ref, Changes(mtime_ns=7, atime_ns=5), None)
    assert after.st_mtime_ns == (tree / "l").lstat().st_mtime_ns == 7
    _, after = source.link(ref, source.root_fd, b"again")
    assert stat.S_ISLNK(after.st_mode)
    assert after.st_nlink == 2
    source.rename(source.root_fd, b"again", source.root_fd, b"moved", 0)
    assert stat.S_ISLNK(source.unlink(source.root_fd, b"moved").before.st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_a_link_is_its_own(source: PosixSource, tree: Path) -> None:
    (tree / "l").symlink_to(tree.parent / "outside" / "secret")
    _, after = source.setattr(ref_of(source, b"l"), Changes(uid=1234, gid=4321), None)
    assert (after.st_uid, after.st_gid) == (1234, 4321)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_TRUNC])
def test_create_does_not_go_through_a_link(source: PosixSource, tree: Path, flags: int) -> None:
    for name, target in (("dangling", "new"), ("live", "secret")):
        (tree / name).symlink_to(tree.parent / "outside" / target)
        with pytest.raises(FileExistsError):
            source.create(source.root_fd, name.encode(), flags, 0o644, OWN)


def test_names_cannot_climb(source: PosixSource, tree: Path) -> None:
    """The kernel sends single names; were one to hold a slash, the inode check still stands."""
    ref = Ref(source.root_fd, b"../outside/secret", ref_of(source, b".").key)
    with pytest.raises(Moved):
        use_open(source, ref)


# --- reads and writes ---


@pytest.fixture
def fd(tree: Path) -> Iterator[int]:
    made = os.open(tree / "data", os.O_RDWR | os.O_CREAT)
    os.pwrite(made, bytes(range(100)), 0)
    yield made
    os.close(made)


@pytest.mark.parametrize(("size", "offset"), [(100, 0), (10, 5), (1, 99), (50, 90), (10, 100), (10, 5000), (0, 0)])
@pytest.mark.parametrize("portion", [1, 7, 1000])
def test_read_at_reads_on_after_a_short_read(
    fd: int, size: int, offset: int, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, portion), offset))
    assert read_at(fd, size, offset) == bytes(range(100))[offset : offset + size]


def test_read_at_does_not_hide_an_error_behind_a_short_read(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix would look like the end of the file."""
    pread = os.pread

    def fail(fd: int, size: int, offset: int) -> bytes:
        if offset >= 10:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, 10, offset)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_at(fd, 50, 0)


@pytest.mark.parametrize("portion", [1, 7, 1000])
def test_write_at_writes_on_after_a_short_write(fd: int, portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:portion], offset))
    assert write_at(fd, b"x" * 50, 25) == 50
    assert os.pread(fd, 1000, 0) == bytes(range(25)) + b"x" * 50 + bytes(range(75, 100))
    assert write_at(fd, b"", 0) == 0


def test_write_at_never_writes_more_at_once_than_the_kernel_takes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    pwrite = os.pwrite

    def note(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    monkeypatch.setattr(sources, "_IO_BYTES_MAX", 16)
    assert write_at(fd, bytes(40), 0) == 40
    assert sizes == [16, 16, 8]


@pytest.mark.parametrize(("room", "answer"), [(30, 30), (0, None)])
def test_write_at_tells_how_much_fitted(
    fd: int, room: int, answer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def fill(fd: int, data: memoryview, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[:10], offset)

    monkeypatch.setattr(os, "pwrite", fill)
    if answer is None:
        with pytest.raises(OSError, match="No space left"):
            write_at(fd, b"x" * 50, 0)
    else:
        assert write_at(fd, b"x" * 50, 0) == answer


def test_flush_leaves_the_descriptor_open(fd: int) -> None:
    flush(fd)
    assert os.fstat(fd).st_size == 100
    with pytest.raises(OSError, match="Bad file descriptor"):
        flush(-1)


# --- attributes ---


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("through_handle", [False, True])
def test_setattr_in_an_order_in_which_nothing_is_undone(source: PosixSource, tree: Path, through_handle: bool) -> None:
    """Truncation and chown clear set-user-ID, truncation and chmod change times: mode comes after, times last."""
    (tree / "f").write_bytes(b"12345")
    fd = os.open(tree / "f", os.O_RDWR)
    try:
        ref = Ref(fd, None, 0) if through_handle else ref_of(source, b"f")
        changes = Changes(mode=0o104755, uid=1234, gid=4321, size=3, atime_ns=5_000_000_001, mtime_ns=7_000_000_003)
        before, after = source.setattr(ref, changes, fd if through_handle else None)
    finally:
        os.close(fd)
    assert (before.st_size, before.st_uid) == (5, 0)
    found = (tree / "f").stat()
    assert stat.S_IMODE(found.st_mode) == 0o4755
    assert (found.st_uid, found.st_gid, found.st_size) == (1234, 4321, 3)
    assert (found.st_atime_ns, found.st_mtime_ns) == (5_000_000_001, 7_000_000_003)
    assert after == found


@pytest.mark.parametrize("which", ["atime_ns", "mtime_ns"])
def test_one_time_leaves_the_other(source: PosixSource, tree: Path, which: str) -> None:
    (tree / "f").touch()
    os.utime(tree / "f", ns=(11, 13))
    source.setattr(ref_of(source, b"f"), Changes(**{which: 17}), None)
    found = (tree / "f").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == ((17, 13) if which == "atime_ns" else (11, 17))


def test_nothing_to_change(source: PosixSource, tree: Path) -> None:
    (tree / "f").touch()
    before, after = source.setattr(ref_of(source, b"f"), Changes(), None)
    assert before == after == (tree / "f").stat()


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_attributes_of_what_is_no_file(source: PosixSource, tree: Path, kind: str) -> None:
    if kind == "directory":
        (tree / "f").mkdir()
    else:
        os.mkfifo(tree / "f")
    source.setattr(ref_of(source, b"f"), Changes(mode=0o711, mtime_ns=5), None)
    found = (tree / "f").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o711, 5)


# --- names ---


def test_open_gives_a_descriptor_of_what_it_says(source: PosixSource, tree: Path) -> None:
    (tree / "f").write_bytes(b"12345")
    fd, version = source.open(ref_of(source, b"f"), os.O_RDONLY)
    assert version == version_of((tree / "f").stat())
    again, _ = source.open(Ref(fd, None, 0), os.O_WRONLY | os.O_TRUNC)
    assert (tree / "f").stat().st_size == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(again, 1, 0)
    os.close(fd)
    os.close(again)


def test_flags_that_do_not_reach_the_source(source: PosixSource, tree: Path) -> None:
    import fcntl

    (tree / "f").touch()
    fd, _ = source.open(ref_of(source, b"f"), os.O_RDWR | os.O_APPEND | os.O_DIRECT | os.O_NOATIME)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    os.close(fd)
    assert not flags & (os.O_APPEND | os.O_DIRECT)


def test_create_makes_a_new_file_or_none(source: PosixSource, tree: Path) -> None:
    before = os.umask(0)
    try:
        fd, st, version = source.create(source.root_fd, b"f", os.O_WRONLY | os.O_APPEND, 0o640, OWN)
    finally:
        os.umask(before)
    os.close(fd)
    assert stat.S_IMODE(st.st_mode) == 0o640
    assert version == Version(0, st.st_mtime_ns, st.st_ctime_ns)
    with pytest.raises(FileExistsError):
        source.create(source.root_fd, b"f", os.O_WRONLY, 0o640, OWN)


def test_rename_tells_what_moved_and_what_it_replaced(source: PosixSource, tree: Path) -> None:
    (tree / "a").write_bytes(b"1")
    (tree / "b").write_bytes(b"22")
    moved, replaced = source.rename(source.root_fd, b"a", source.root_fd, b"b", 0)
    assert replaced is not None
    assert (moved.before.st_size, moved.after.st_size, replaced.before.st_size) == (1, 1, 2)
    assert replaced.after.st_nlink == 0
    assert moved.after.st_ino == moved.before.st_ino
    assert source.rename(source.root_fd, b"b", source.root_fd, b"c", 1)[1] is None
    (tree / "d").write_bytes(b"333")
    moved, replaced = source.rename(source.root_fd, b"c", source.root_fd, b"d", 2)
    assert replaced is not None
    assert (tree / "c").stat().st_ino == replaced.after.st_ino
    assert (tree / "d").stat().st_ino == moved.after.st_ino


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ((b"missing", b"x", 0), errno.ENOENT),
        ((b"a", b"b", 1), errno.EEXIST),
        ((b"a", b"missing", 2), errno.ENOENT),
        ((b"a", b"d", 0), errno.EISDIR),
        ((b"d", b"a", 0), errno.ENOTDIR),
        ((b"a", b"b", 3), errno.EINVAL),
        ((b"a", b"b", 4), errno.EINVAL),
    ],
)
def test_renames_that_fail(source: PosixSource, tree: Path, arguments: tuple[bytes, bytes, int], number: int) -> None:
    (tree / "a").touch()
    (tree / "b").touch()
    (tree / "d").mkdir()
    old, new, flags = arguments
    with pytest.raises(OSError, match=os.strerror(number)):
        source.rename(source.root_fd, old, source.root_fd, new, flags)
    assert sorted(os.listdir(tree)) == ["a", "b", "d"]


def test_names_need_not_be_utf8(source: PosixSource, tree: Path) -> None:
    name = b"\xff\xfe\n"
    fd, _, _ = source.create(source.root_fd, name, os.O_RDWR, 0o644, OWN)
    os.close(fd)
    assert source.list_names(source.root_fd) == [name]
    source.symlink(source.root_fd, b"l", name, OWN)
    assert source.readlink(ref_of(source, b"l")) == name


def test_attributes_of_many(source: PosixSource, tree: Path) -> None:
    (tree / "a").touch()
    found = source.lstat_many(source.root_fd, [b"a", b"missing", b".", b".."])
    assert [st is None for st in found] == [False, True, False, False]
    assert source.statvfs().f_blocks > 0
