"""Names through the overlay: links, renames, listings, odd names, attributes. Over a directory and over JuiceFS.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tree
from tests.mounts import raises

_RENAME_NOREPLACE, _RENAME_EXCHANGE, _RENAME_WHITEOUT = 1, 2, 4
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def outcome(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a call returned, or the name of its errno."""
    try:
        return function(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


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


# --- directories and listings ---


def test_directories_made_and_removed(tree: Tree) -> None:
    path = tree.top / "dir"
    path.mkdir(0o750)
    assert stat.S_IMODE((tree.beneath / "dir").stat().st_mode) == 0o750
    with raises(errno.EEXIST):
        path.mkdir()
    (path / "file").touch()
    with raises(errno.ENOTEMPTY):
        path.rmdir()
    with raises(errno.ENOTDIR):
        (path / "file").rmdir()
    with raises(errno.EISDIR):
        path.unlink()
    with raises(errno.ENOTDIR):
        (path / "file/below").touch()
    (path / "file").unlink()
    path.rmdir()
    with raises(errno.ENOENT):
        path.rmdir()
    assert not (tree.beneath / "dir").exists()


def test_five_thousand_entries(tree: Tree) -> None:
    count = tree.scaled(5000)
    names = {f"entry-{number:05}" for number in range(count)}
    directory = os.open(tree.beneath, os.O_RDONLY)
    try:
        for name in names:
            os.mknod(name, 0o644, dir_fd=directory)
    finally:
        os.close(directory)
    with os.scandir(tree.top) as entries:
        found = {entry.name: (entry.inode(), entry.is_file()) for entry in entries}
    assert found.keys() == names
    assert all(is_file for _, is_file in found.values())
    assert len({inode for inode, _ in found.values()}) == count
    assert os.stat(tree.top / "entry-00042").st_ino == found["entry-00042"][0]


class Dirent(ctypes.Structure):
    """struct dirent of readdir(3) on 64-bit Linux."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8),
        ("d_name", ctypes.c_char * 256),
    )


class Listing:
    """opendir(3) and its friends, which Python hides behind scandir."""

    def __init__(self, path: Path) -> None:
        _libc.opendir.restype = ctypes.c_void_p
        _libc.readdir.restype = ctypes.POINTER(Dirent)
        _libc.telldir.restype = ctypes.c_long
        self._dir = ctypes.c_void_p(_libc.opendir(os.fsencode(path)))

    def next(self) -> bytes | None:
        """The next name, None at the end."""
        entry = _libc.readdir(self._dir)
        return bytes(entry.contents.d_name) if entry else None

    def rest(self) -> list[bytes]:
        """All names from here on."""
        return list(iter(self.next, None))

    def tell(self) -> int:
        """telldir(3)."""
        position: int = _libc.telldir(self._dir)
        return position

    def seek(self, position: int) -> None:
        """seekdir(3)."""
        _libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        """rewinddir(3)."""
        _libc.rewinddir(self._dir)

    def close(self) -> None:
        """closedir(3)."""
        _libc.closedir(self._dir)


def test_listings_can_be_rewound_and_resumed(tree: Tree) -> None:
    count = tree.scaled(800)
    for number in range(count):
        (tree.beneath / f"{number:03}").touch()
    listing = Listing(tree.top)
    try:
        first = [listing.next() for _ in range(60)]
        assert {b".", b".."} <= set(first)
        position = listing.tell()
        rest = listing.rest()
        assert len({*first, *rest}) == count + 2
        listing.seek(position)
        assert listing.rest() == rest
        (tree.top / "later").touch()
        listing.rewind()
        again = listing.rest()
        assert set(again) == {*first, *rest, b"later"}
        assert len(again) == count + 3
    finally:
        listing.close()


def test_deleting_while_listing_neither_skips_nor_repeats(tree: Tree) -> None:
    count = tree.scaled(800)
    for number in range(count):
        (tree.beneath / f"{number:03}").touch()
    seen = []
    listing = Listing(tree.top)
    try:
        while (name := listing.next()) is not None:
            if name not in (b".", b".."):
                seen.append(name)
                os.unlink(os.fsencode(tree.top) + b"/" + name)
    finally:
        listing.close()
    assert len(seen) == len(set(seen)) == count
    assert os.listdir(tree.beneath) == []


def test_dot_and_dot_dot(tree: Tree) -> None:
    (tree.top / "dir").mkdir()
    assert os.stat(tree.top / "dir/.").st_ino == os.stat(tree.top / "dir").st_ino
    assert os.stat(tree.top / "dir/..").st_ino == os.stat(tree.top).st_ino
    for path in (tree.top / "dir", tree.mount.mountpoint):
        listing = Listing(path)
        try:
            assert listing.rest()[:2] == [b".", b".."]
        finally:
            listing.close()


def test_link_counts_of_directories_are_the_source_s(tree: Tree) -> None:
    for name in ("a", "b", "b/c"):
        (tree.top / name).mkdir()
    assert tree.top.stat().st_nlink == tree.beneath.stat().st_nlink
    (tree.top / "a").rmdir()
    assert tree.top.stat().st_nlink == tree.beneath.stat().st_nlink


# --- odd names ---


@pytest.mark.parametrize(
    "name",
    [
        b"n" * 255, b"\xff\xfe not UTF-8", "한국어 모델".encode(), b"new\nline", b"quote\"'`$(id)", b" ", b"...",
        b"-rf", b"a\\b", b"\x01\x1b[31m", b"caf\xc3\xa9", b"cafe\xcc\x81",
    ],
)  # fmt: skip
def test_any_name_is_a_name(tree: Tree, name: bytes) -> None:
    top, beneath = os.fsencode(tree.top), os.fsencode(tree.beneath)
    path = os.path.join(top, name)
    os.mkdir(path)
    inside = os.path.join(path, name)
    with open(inside, "wb") as file:
        file.write(name)
    assert os.listdir(beneath) == os.listdir(top) == [name]
    assert os.listdir(path) == [name]
    with open(os.path.join(beneath, name, name), "rb") as file:
        assert file.read() == name
    os.rename(inside, os.path.join(top, name[:-1] + b"2"))
    os.rmdir(path)
    assert os.listdir(beneath) == [name[:-1] + b"2"]


def test_names_that_are_too_long(tree: Tree) -> None:
    for function in (os.stat, os.mkdir, os.unlink, lambda path: os.open(path, os.O_CREAT | os.O_WRONLY)):
        with raises(errno.ENAMETOOLONG):
            function(tree.top / ("n" * 256))
    (tree.top / "file").touch()
    with raises(errno.ENAMETOOLONG):
        (tree.top / "file").rename(tree.top / ("n" * 256))


def test_deep_trees(tree: Tree) -> None:
    path = tree.top
    for depth in range(60):
        path /= f"directory-number-{depth}"
    path.mkdir(parents=True)
    (path / "file").write_text("deep")
    assert (tree.beneath / path.relative_to(tree.top) / "file").read_text() == "deep"
    walked = [len(files) for _, _, files in os.walk(tree.top)]
    assert (len(walked), sum(walked)) == (61, 1)
