"""Opens files below a directory by the parts of a key, and never anywhere else. Knows nothing of objects.

Each part is opened by itself, relative to the one before, and a symbolic link is not followed (openat(2), O_NOFOLLOW):
whatever the parts are called and whatever somebody puts there meanwhile, it is below that directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""What lies there may be anything: a pipe is not waited for."""


@contextmanager
def directory(root: Path, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of the directory `parts` lead to; `make` makes those that are missing, durably. Raises OSError."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            below = _step(fd, part, make)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _step(fd: int, part: str, make: bool) -> int:
    _refuse_climbing(part)
    try:
        return os.open(part, _DIRECTORY, dir_fd=fd)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):
        os.mkdir(part, 0o755, dir_fd=fd)
        os.fsync(fd)
    return os.open(part, _DIRECTORY, dir_fd=fd)


def _refuse_climbing(part: str) -> None:
    """Keys are checked before (`keys.check_key`); a defect there must not reach the file system."""
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        raise PermissionError(f"{part!r} is no name")


def open_file(fd: int, name: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """A descriptor of the file called so in that directory. Raises OSError, also if it is a link."""
    _refuse_climbing(name)
    return os.open(name, flags | _FILE, mode, dir_fd=fd)


def prune(root: Path, parts: Sequence[str], keep: int) -> None:
    """Remove the directories that `parts` lead to, from the last one up, while they are empty; `keep` of them stay."""
    for count in range(len(parts), keep, -1):
        try:
            with directory(root, parts[: count - 1]) as above:
                os.rmdir(parts[count - 1], dir_fd=above)
        except OSError:  # in use, or gone already
            return
