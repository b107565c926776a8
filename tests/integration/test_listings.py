"""Directories through the overlay: made, removed, listed, with names of every kind; over a directory and JuiceFS."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.conftest import Tree
from tests.mounts import raises

_libc = ctypes.CDLL(None, use_errno=True)


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
