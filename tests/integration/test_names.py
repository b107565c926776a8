"""Names through the overlay: links, renames, attributes, extended attributes. Over a directory and over JuiceFS.

Where file systems may differ, the same call is made on the source directly, and both must agree.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import Tree
from tests.integration.calls import outcome, renameat2
from tests.mounts import raises

_RENAME_NOREPLACE, _RENAME_EXCHANGE, _RENAME_WHITEOUT = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


def snapshot(base: Path) -> dict[str, str | None]:
    """Every path below `base`, with the text of files."""
    return {str(path.relative_to(base)): path.read_text() if path.is_file() else None for path in base.rglob("*")}


# --- renames ---


def test_renames_replace_as_posix_says(tree: Tree) -> None:
    for name in ("file", "other"):
        (tree.top / name).write_text(name)
    for name in ("empty", "full/sub"):
        (tree.top / name).mkdir(parents=True)
    top = tree.top
    with raises(errno.EISDIR):
        (top / "file").rename(top / "empty")
    with raises(errno.ENOTDIR):
        (top / "empty").rename(top / "file")
    with raises(errno.ENOTEMPTY):
        (top / "empty").rename(top / "full")
    with raises(errno.EINVAL):
        (top / "full").rename(top / "full/sub/inside")
    with raises(errno.ENOENT):
        (top / "missing").rename(top / "anything")
    (top / "full").rename(top / "empty")
    (top / "file").rename(top / "other")
    (top / "other").rename(top / "other")
    assert sorted(os.listdir(top)) == ["empty", "other"]
    assert (top / "other").read_text() == "file"
    assert (tree.beneath / "empty/sub").is_dir()


def test_renaming_one_hard_link_over_another_does_nothing(tree: Tree) -> None:
    (tree.top / "a").write_text("x")
    (tree.top / "b").hardlink_to(tree.top / "a")
    (tree.top / "a").rename(tree.top / "b")
    assert sorted(os.listdir(tree.top)) == sorted(os.listdir(tree.beneath)) == ["a", "b"]
    (tree.top / "a").unlink()
    assert (tree.top / "b").read_text() == "x"


def test_rename_without_replacing(tree: Tree) -> None:
    for base in (tree.top, tree.beneath):
        (base / f"{base.name}-1").mkdir(exist_ok=True)
    (tree.top / "a").write_text("a")
    (tree.top / "b").write_text("b")
    with raises(errno.EEXIST):
        renameat2(tree.top / "a", tree.top / "b", _RENAME_NOREPLACE)
    (tree.beneath / "c").write_text("c")
    supported = outcome(renameat2, tree.beneath / "c", tree.beneath / "d", _RENAME_NOREPLACE)
    assert outcome(renameat2, tree.top / "a", tree.top / "new", _RENAME_NOREPLACE) == supported
    assert (tree.top / "new").exists() == (supported is None)


@pytest.mark.parametrize("kinds", [("file", "file"), ("dir", "dir"), ("dir", "file"), ("file", "missing")])
def test_exchanging_two_names(tree: Tree, kinds: tuple[str, str]) -> None:
    """JuiceFS 0.14 takes an exchange for a plain rename, and says nothing; newer ones exchange."""
    over, under = tree.top / "over", tree.beneath / "under"
    for base in (over, under):
        base.mkdir()
        for name, kind in zip("ab", kinds, strict=True):
            if kind == "dir":
                (base / name).mkdir()
                (base / name / f"inside-{name}").write_text(name)
            elif kind == "file":
                (base / name).write_text(name)
    expected = outcome(renameat2, under / "a", under / "b", _RENAME_EXCHANGE)
    assert outcome(renameat2, over / "a", over / "b", _RENAME_EXCHANGE) == expected
    for path in (over, under):
        for below in path.glob("*/"):
            (below / "later").write_text("later")
    assert snapshot(over) == snapshot(tree.beneath / "over") == snapshot(under)


@pytest.mark.sources("directory")
def test_open_files_are_exchanged(tree: Tree) -> None:
    top = tree.top
    (top / "dir").mkdir()
    (top / "dir/inside").write_text("inside")
    (top / "file").write_text("file")
    with (top / "dir/inside").open() as inside, (top / "file").open("r+") as file:
        renameat2(top / "dir", top / "file", _RENAME_EXCHANGE)
        assert (inside.read(), file.read()) == ("inside", "file")
        os.fchmod(file.fileno(), 0o611)
    assert snapshot(top) == {"dir": "file", "file": None, "file/inside": "inside"}
    assert stat.S_IMODE((tree.beneath / "dir").stat().st_mode) == 0o611


def test_rename_flags_that_fuse_does_not_know(tree: Tree) -> None:
    (tree.top / "a").touch()
    with raises(errno.EINVAL):
        renameat2(tree.top / "a", tree.top / "b", _RENAME_WHITEOUT)
    with raises(errno.EINVAL):
        renameat2(tree.top / "a", tree.top / "b", _RENAME_EXCHANGE | _RENAME_NOREPLACE)


# --- links ---


def test_hard_links_are_one_file(tree: Tree) -> None:
    (tree.top / "sub").mkdir()
    one, two = tree.top / "one", tree.top / "sub/two"
    one.write_text("first")
    two.hardlink_to(one)
    assert one.stat().st_ino == two.stat().st_ino
    assert one.stat().st_nlink == two.stat().st_nlink == 2
    two.write_text("through the other name")
    assert one.read_text() == "through the other name"
    with one.open() as file:
        one.unlink()
        assert os.fstat(file.fileno()).st_nlink == 1
        assert file.read() == "through the other name"
    assert two.stat().st_nlink == 1
    two.chmod(0o600)
    assert stat.S_IMODE((tree.beneath / "sub/two").stat().st_mode) == 0o600
    with raises(errno.EEXIST):
        os.link(two, two)
    with raises(errno.EPERM):
        os.link(tree.top / "sub", tree.top / "sub-again")


def test_hard_links_made_beneath_are_one_file(tree: Tree) -> None:
    (tree.beneath / "one").write_text("x")
    (tree.beneath / "two").hardlink_to(tree.beneath / "one")
    assert (tree.top / "one").stat().st_ino == (tree.top / "two").stat().st_ino
    (tree.top / "one").write_text("changed")
    assert (tree.top / "two").read_text() == "changed"


@pytest.mark.parametrize(
    "target", [b"file", b"sub/../file", b"nowhere", b"/absolute/nowhere", b"t" * 4095, b"caf\xe9\n", b"loop"]
)
def test_symbolic_links_keep_their_target(tree: Tree, target: bytes) -> None:
    (tree.top / "file").write_text("content")
    (tree.top / "sub").mkdir()
    name = os.fsencode(tree.top / ("loop" if target == b"loop" else "link"))
    expected = outcome(os.symlink, target, os.fsencode(tree.beneath / "as-the-source-does"))
    assert outcome(os.symlink, target, name) == expected
    if expected is None:
        assert os.readlink(name) == target
        assert os.readlink(tree.beneath.joinpath(os.fsdecode(os.path.basename(name)))) == os.fsdecode(target)
        assert os.lstat(name).st_size == len(target)
        expected_open = {b"file": None, b"sub/../file": None, b"loop": "ELOOP", b"t" * 4095: "ENAMETOOLONG"}
        assert outcome(lambda: Path(os.fsdecode(name)).read_text() and None) == expected_open.get(target, "ENOENT")


def test_attributes_of_a_link_itself(tree: Tree) -> None:
    link = tree.top / "link"
    link.symlink_to("nowhere")
    os.lchown(link, 12, 34)
    os.utime(link, ns=(1_000_000_000, 2_000_000_000), follow_symlinks=False)
    found = (tree.beneath / "link").lstat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (12, 34, 2_000_000_000)
    assert link.lstat().st_mtime_ns == 2_000_000_000


# --- attributes ---


def test_modes_owners_and_times(tree: Tree) -> None:
    path = tree.top / "file"
    path.touch()
    for mode in (0o000, 0o777, 0o4755, 0o2755, 0o1644, 0o640):
        path.chmod(mode)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tree.beneath / "file").stat().st_mode) == mode
    os.chown(path, 1234, 4321)
    os.chown(path, -1, 99)
    os.chown(path, 77, -1)
    assert (path.stat().st_uid, path.stat().st_gid) == (77, 99)
    before = time.time_ns()
    os.utime(path)
    assert before - 1_000_000_000 <= path.stat().st_mtime_ns <= time.time_ns() + 1_000_000_000


@pytest.mark.parametrize("at_ns", [1_700_000_000_123_456_789, 1, 0, 4_000_000_000_000_000_123])
def test_times_are_as_precise_as_the_source_s(tree: Tree, at_ns: int) -> None:
    for base in (tree.top, tree.beneath):
        (base / ("over" if base is tree.top else "under")).touch()
    os.utime(tree.beneath / "under", ns=(at_ns, at_ns + 5))
    os.utime(tree.top / "over", ns=(at_ns, at_ns + 5))
    found, expected = (tree.top / "over").stat(), (tree.beneath / "under").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (expected.st_atime_ns, expected.st_mtime_ns)
    assert (tree.beneath / "over").stat().st_mtime_ns == expected.st_mtime_ns


def test_all_attributes_are_the_source_s(tree: Tree) -> None:
    (tree.beneath / "file").write_bytes(b"x" * 10_000)
    (tree.beneath / "dir").mkdir()
    (tree.beneath / "link").symlink_to("file")
    os.mkfifo(tree.beneath / "fifo")
    for name in ("file", "dir", "link", "fifo"):
        found, expected = (tree.top / name).lstat(), (tree.beneath / name).lstat()
        for field in (
            "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize", "st_rdev",
            "st_mtime_ns", "st_ctime_ns",
        ):  # fmt: skip
            assert getattr(found, field) == getattr(expected, field), (name, field)


def test_fifos_and_sockets(tree: Tree) -> None:
    os.mkfifo(tree.top / "fifo", 0o640)
    assert stat.S_ISFIFO((tree.beneath / "fifo").lstat().st_mode)
    writer = threading.Thread(target=(tree.top / "fifo").write_bytes, args=(b"through the fifo",))
    writer.start()
    assert (tree.top / "fifo").read_bytes() == b"through the fifo"
    writer.join()
    directory = os.open(tree.top, os.O_PATH)
    try:
        address = f"/proc/self/fd/{directory}/socket"  # socket addresses are limited to 108 bytes
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(address)
            server.listen(1)
            client.connect(address)
    finally:
        os.close(directory)
    assert stat.S_ISSOCK((tree.beneath / "socket").lstat().st_mode)


def test_device_nodes_are_made_and_cannot_be_opened(tree: Tree) -> None:
    os.mknod(tree.top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert (tree.beneath / "null").lstat().st_rdev == os.makedev(1, 3)
    with raises(errno.EACCES):  # the mount is nodev
        (tree.top / "null").read_bytes()


# --- extended attributes ---


def test_extended_attributes(tree: Tree) -> None:
    path = tree.top / "file"
    path.touch()
    os.setxattr(path, b"user.one", b"1")
    os.setxattr(path, b"user.two", bytes(range(256)))
    os.setxattr(path, b"user.empty", b"")
    assert sorted(os.listxattr(path)) == ["user.empty", "user.one", "user.two"]
    assert os.getxattr(path, b"user.two") == os.getxattr(tree.beneath / "file", b"user.two") == bytes(range(256))
    assert os.getxattr(path, b"user.empty") == b""
    with raises(errno.EEXIST):
        os.setxattr(path, b"user.one", b"2", os.XATTR_CREATE)
    with raises(errno.ENODATA):
        os.setxattr(path, b"user.none", b"2", os.XATTR_REPLACE)
    os.setxattr(path, b"user.one", b"two", os.XATTR_REPLACE)
    assert os.getxattr(path, b"user.one") == b"two"
    os.removexattr(path, b"user.one")
    for function in (os.getxattr, os.removexattr):
        with raises(errno.ENODATA):
            function(path, b"user.one")
    os.setxattr(tree.top, b"user.on-a-directory", b"yes")
    assert os.getxattr(tree.beneath, b"user.on-a-directory") == b"yes"
    with path.open("rb") as file:
        path.unlink()
        os.setxattr(file.fileno(), b"user.unlinked", b"too")
        assert os.getxattr(file.fileno(), b"user.unlinked") == b"too"


def test_labels_and_capabilities_do_not_pass(tree: Tree) -> None:
    (tree.beneath / "file").touch()
    os.setxattr(tree.beneath / "file", "security.test", b"1")
    os.setxattr(tree.beneath / "file", "user.test", b"1")
    for name in ("security.test", "security.selinux"):
        with raises(errno.ENOTSUP):
            os.setxattr(tree.top / "file", name, b"1")
        with raises(errno.ENOTSUP):
            os.getxattr(tree.top / "file", name)
    assert os.listxattr(tree.top / "file") == ["user.test"]


def test_a_buffer_too_small_for_an_attribute_is_erange(tree: Tree) -> None:
    path = os.fsencode(tree.top / "file")
    (tree.top / "file").touch()
    os.setxattr(path, b"user.name", b"0123456789")
    buffer = ctypes.create_string_buffer(5)
    assert _libc.getxattr(path, b"user.name", buffer, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert _libc.listxattr(path, buffer, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert _libc.getxattr(path, b"user.name", None, 0) == 10
