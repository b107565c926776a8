"""A file that is moved, as it was planned and as far as it is, and why a move may not be. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from tierd.controller.moves.steps import FileState
from tierd.errors import TierdError


class MoveRefused(TierdError):
    """A move that must not begin, or not go on; the message says why."""


class SourceGone(TierdError):
    """What is mounted where the source was is not the source that a move began in: nothing may be concluded from it."""


class NotCold(MoveRefused):
    """Of a model that nothing is to be brought of: there is none, or it is hot."""


class ChangedMeanwhile(Exception):
    """A file is not, or is no longer, the one that was copied; `str()` says which and how."""


class LeasesUnknown(MoveRefused):
    """What nodes hold open is not known just now."""


@dataclass(frozen=True, slots=True)
class HotFile:
    """A file with bytes: by `path`, relative to the model, and by its other names there."""

    path: bytes
    links: tuple[bytes, ...]
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    mode: int

    def names(self) -> tuple[bytes, ...]:
        """All of them."""
        return (self.path, *self.links)


@dataclass(frozen=True, slots=True)
class MoveFile:
    """A row of `move_files`."""

    file: HotFile
    state: FileState
    sha256: str | None
    stub: int | None
    trash_ctime_ns: int | None
    version: int | None = None
    """Of its object, if that is not of the move's own version."""
