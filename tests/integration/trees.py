"""What the model-based test does to a tree, and how it looks at one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CONTENT_BYTES_MAX = 1 << 20


def write_file(path: Path, flags: int, offset: int, data: bytes) -> None:
    """Open, write, close. `offset` is ignored when appending."""
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """As careful programs write: to a temporary name, then renamed over."""
    temporary = path.with_name("temporary")
    temporary.write_bytes(data)
    try:
        temporary.rename(path)
    except OSError:
        temporary.unlink()
        raise


def hard_link(old: Path, new: Path) -> None:
    """A hard link of the entry itself, link or not."""
    os.link(old, new, follow_symlinks=False)


def soft_link(path: Path, text: str) -> None:
    """A symbolic link."""
    os.symlink(text, path)


def sorted_names(path: Path) -> list[str]:
    """A listing, in an order that both sides share."""
    return sorted(os.listdir(path))


def set_times(path: Path, at_ns: int) -> int:
    """Set both times; the modification time as it is then told."""
    os.utime(path, ns=(at_ns, at_ns))
    return path.stat().st_mtime_ns


def set_attribute(path: Path, value: bytes) -> tuple[list[str], bytes]:
    """Set an extended attribute; all names, and the value, as they are then told."""
    os.setxattr(path, "user.test", value)
    return os.listxattr(path), os.getxattr(path, "user.test")


def mode_links_size(fd: int) -> tuple[int, int, int]:
    """What fstat(2) must say alike."""
    found = os.fstat(fd)
    return found.st_mode, found.st_nlink, found.st_size


class Facts(NamedTuple):
    """What must be equal of an entry: on both sides, but for the times; through the mount and beneath it, times too."""

    mode: int
    links: int
    owner: tuple[int, int]
    size: int | None
    content: str | bytes | None
    times: tuple[int, int] = (0, 0)


class Tree(NamedTuple):
    """A whole tree: facts by path, and which names are hard links of one file."""

    facts: dict[str, Facts]
    inodes: set[frozenset[str]]

    def without_times(self) -> Tree:
        """The same, comparable with a tree that was made at other times."""
        return Tree({path: found._replace(times=(0, 0)) for path, found in self.facts.items()}, self.inodes)


def look(base: Path) -> Tree:
    """Everything below `base`, as its directories list it."""
    found: dict[str, Facts] = {}

    def enter(directory: int, path: str) -> None:
        for name in os.listdir(directory):
            seen = os.stat(name, dir_fd=directory, follow_symlinks=False)
            content: str | bytes | None = None
            if stat.S_ISLNK(seen.st_mode):
                content = os.readlink(name, dir_fd=directory)
            elif stat.S_ISREG(seen.st_mode):
                with opened(name, directory) as fd:
                    content = os.read(fd, CONTENT_BYTES_MAX)
            found[path + name] = Facts(
                seen.st_mode,
                seen.st_nlink,
                (seen.st_uid, seen.st_gid),
                None if stat.S_ISDIR(seen.st_mode) else seen.st_size,
                content,
                (seen.st_mtime_ns, seen.st_ctime_ns),
            )
            if stat.S_ISDIR(seen.st_mode):
                with opened(name, directory) as fd:
                    enter(fd, f"{path}{name}/")

    with opened(base) as fd:
        enter(fd, "")
    # After all opens: an open may find that a file was changed beneath the mount, and give it another number.
    names_by_inode: dict[int, set[str]] = {}
    for path, facts in found.items():
        if facts.links > 1 and not stat.S_ISDIR(facts.mode):
            names_by_inode.setdefault((base / path).lstat().st_ino, set()).add(path)
    return Tree(found, {frozenset(names) for names in names_by_inode.values()})


@contextmanager
def opened(path: str | Path, directory: int | None = None) -> Iterator[int]:
    """A descriptor of a directory or file, for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)
