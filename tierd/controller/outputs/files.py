"""Generated outputs in the source: where each is, which bytes it has, and what else lies below the outputs root.

Blocking, any thread; reads only. Memory is bounded by the names of one directory level and a batch, whatever the number
of outputs. Nothing is followed that is a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tierd.controller.outputs.books import FileVersion
from tierd.controller.source.hot_tree import HotTree, joined, split, stat_of
from tierd.outputs import Fault, Output, day_of, parse, user_of
from tierd.stubs import COLD_MARK, RESERVED, STUBS
from tierd.syscalls import forced_stat

BATCH_FILES: Final = 1000
FAULTS_NAMED_MAX: Final = 100
"""Of one directory; the others are counted."""
_LEVELS: Final = 4
"""USER/YYYY/MM/DD."""
_FOREIGN: Final = "no plain file"


class Whereabouts(NamedTuple):
    """What the source has of an output: the file (None if it is not there), and whether a stub stands for it."""

    hot: FileVersion | None
    stub: bool


class Day(NamedTuple):
    """A directory USER/YYYY/MM/DD, as it was when it was met."""

    directory: bytes
    inode: int
    mtime_ns: int


@dataclass(slots=True)
class Faults:
    """What is left alone in a directory: some by path, with the reason, and how many there are."""

    directory: bytes
    named: dict[bytes, str] = field(default_factory=dict)
    total: int = 0

    def add(self, name: bytes, reason: str) -> None:
        """One more."""
        self.total += 1
        if len(self.named) < FAULTS_NAMED_MAX:
            self.named[joined(self.directory, name)] = reason


class OutputFiles:
    """See the module. `root` is the outputs root, relative to the source; paths are relative to it."""

    def __init__(self, tree: HotTree, root: bytes) -> None:
        self.tree = tree
        self.root = root

    def find(self, path: bytes) -> Whereabouts:
        """Where an output is. Raises OSError if the source does not say."""
        above, name = split(joined(self.root, path))
        with self.tree.directory_if_there(above) as fd:
            st = stat_of(fd, name) if fd is not None else None
        if st is not None:
            return Whereabouts(version_of(st) if stat.S_ISREG(st.st_mode) else None, False)
        with self.tree.directory_if_there(joined(above, RESERVED + b"/" + STUBS)) as layer:
            return Whereabouts(None, layer is not None and stat_of(layer, name) is not None)

    def open(self, path: bytes) -> int:
        """A descriptor of its file. Raises OSError."""
        above, name = split(joined(self.root, path))
        with self.tree.directory(above) as fd:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)

    def is_there(self) -> bool:
        """Whether there is an outputs root at all."""
        with self.tree.directory_if_there(self.root) as fd:
            return fd is not None

    def may_leave(self, day: bytes, names: Sequence[bytes]) -> list[bytes]:
        """Those files of a day that a move can take: plain ones, of one name each. Raises OSError."""
        with self.tree.directory_if_there(joined(self.root, day)) as fd:
            return [name for name in names if fd is not None and _may_leave(stat_of(fd, name))]

    # --- all of them ---

    def days(self, faults: list[Faults]) -> Iterator[Day]:
        """Every directory of a day, in the order of their names. What is foreign above them is added to `faults`,
        which the caller empties. Raises OSError for what cannot be read; what goes meanwhile is passed over."""
        yield from self._below(b"", 0, faults)

    def days_of(self, user: str, faults: list[Faults]) -> Iterator[Day]:
        """The same of one user."""
        return self._below(user.encode(), 1, faults)

    def _below(self, directory: bytes, level: int, faults: list[Faults]) -> Iterator[Day]:
        foreign = Faults(directory)
        for name in self._directories(directory, level, foreign):
            path = joined(directory, name)
            if level < _LEVELS - 1:
                yield from self._below(path, level + 1, faults)
                continue
            found = self._day(path, foreign)
            if found is not None:
                yield found
        faults.append(foreign)

    def _directories(self, directory: bytes, level: int, foreign: Faults) -> list[bytes]:
        """The names below which outputs may lie, in order; what else is there is foreign."""
        names = []
        with self.tree.directory_if_there(joined(self.root, directory)) as fd:
            if fd is None:
                return []
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name == RESERVED:
                        continue
                    if not entry.is_dir(follow_symlinks=False):
                        foreign.add(name, Fault.PLACE)
                    elif level == 0 and user_of(name) is None:
                        foreign.add(name, Fault.USER)
                    else:
                        names.append(name)
        return sorted(names)

    def _day(self, path: bytes, foreign: Faults) -> Day | None:
        fault = day_of(path)
        if isinstance(fault, Fault):
            foreign.add(split(path)[1], Fault.DATE if fault is Fault.PLACE else fault)
            return None
        with self.tree.directory_if_there(joined(self.root, path)) as fd:
            if fd is None:
                return None
            st = forced_stat(fd)
            return Day(path, st.st_ino, st.st_mtime_ns)

    def outputs(self, day: bytes, faults: Faults) -> Iterator[list[tuple[Output, FileVersion]]]:
        """The outputs of a day in batches; what is none of them goes to `faults`. Raises OSError."""
        batch: list[tuple[Output, FileVersion]] = []
        with self.tree.directory_if_there(joined(self.root, day)) as fd:
            if fd is None:
                return
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    found = self._output(fd, day, name, faults) if name != RESERVED else None
                    if found is not None:
                        batch.append(found)
                    if len(batch) >= BATCH_FILES:
                        yield batch
                        batch = []
        if batch:
            yield batch

    def _output(self, fd: int, day: bytes, name: bytes, faults: Faults) -> tuple[Output, FileVersion] | None:
        one = parse(joined(day, name))
        if isinstance(one, Fault):
            faults.add(name, one)
            return None
        st = stat_of(fd, name)
        if st is None:
            return None
        if not stat.S_ISREG(st.st_mode):
            faults.add(name, _FOREIGN)
            return None
        return one, version_of(st)

    def missing(self, day: bytes, names: Sequence[bytes]) -> list[bytes]:
        """Those names of a day that no file has."""
        with self.tree.directory_if_there(joined(self.root, day)) as fd:
            return [name for name in names if fd is None or not _is_file(stat_of(fd, name))]


def _is_file(st: os.stat_result | None) -> bool:
    return st is not None and stat.S_ISREG(st.st_mode)


def _may_leave(st: os.stat_result | None) -> bool:
    return st is not None and _is_file(st) and st.st_nlink == 1 and not st.st_mode & COLD_MARK


def version_of(st: os.stat_result) -> FileVersion:
    """Which bytes a file with these attributes has."""
    return FileVersion(st.st_size, st.st_ino, st.st_mtime_ns, st.st_ctime_ns)
