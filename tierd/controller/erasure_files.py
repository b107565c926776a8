"""What the deletion of an output does in the source: its file, its stub, its copy in the trash go. Decides nothing.

Only what was there when the deletion was planned goes: a file is that one by inode, size and time of modification, a
stub by its inode and what it stands for. A name is first moved aside and looked at there, where nobody reaches it by
name; what is another file by now goes back. Blocking, any thread; each call is harmless to repeat, and callers see to
it that one process at a time deletes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller import cold_tree
from tierd.controller.cold_tree import opened_layer
from tierd.controller.hot_tree import HotTree, stat_of
from tierd.controller.output_books import FileVersion
from tierd.controller.output_files import version_of
from tierd.controller.stubbing import TRASH, At
from tierd.objects.keys import shown
from tierd.stub_files import is_cold
from tierd.syscalls import RENAME_NOREPLACE, renameat2

log = structlog.get_logger(__name__)

_ASIDE: Final = TRASH + b"/erasure-%d"
_IsIt = Callable[[os.stat_result], bool]


class Standing(NamedTuple):
    """What an output's name means now: the file, and the inode of its stub."""

    hot: FileVersion | None
    stub: int | None


class Tombstone(NamedTuple):
    """An output that is deleted, and what there was of it. `keep`: versions whose objects stay."""

    output_id: UUID
    user: str
    filename: str
    version: int
    keep: Sequence[int]
    inode: int | None
    size: int | None
    mtime_ns: int | None
    stub: int | None
    trash: int | None
    gone: bool

    @property
    def name(self) -> bytes:
        """In the directory of its day."""
        return self.filename.rpartition("/")[2].encode()

    @property
    def path(self) -> bytes:
        """Below the outputs root."""
        return f"{self.user}/{self.filename}".encode()


class ErasureFiles:
    """Of one erasure, whose outputs lie in one `directory`, relative to the source."""

    def __init__(self, tree: HotTree, directory: bytes, number: int, at: At) -> None:
        self._tree = tree
        self._directory = directory
        self._aside = _ASIDE % number
        self._at = at

    def look(self, names: Sequence[bytes]) -> list[Standing]:
        """What names mean. Raises OSError."""
        stubs = {found.name: found for found in cold_tree.all_stubs(self._tree, self._directory)}
        with self._tree.directory_if_there(self._directory) as fd:
            found = [stat_of(fd, name) if fd is not None else None for name in names]
        return [
            Standing(
                version_of(st) if st is not None and stat.S_ISREG(st.st_mode) else None,
                stubs[name].inode if name in stubs and self._is_of(stubs[name]) else None,
            )
            for name, st in zip(names, found, strict=True)
        ]

    def _is_of(self, found: cold_tree.StubName) -> bool:
        """A stub that stands for what had this name, not for what users renamed to here."""
        origin = found.origin
        return origin is not None and (origin.model_id.encode(), origin.path) == (self._directory, found.name)

    def hide(self, dead: Tombstone, move: int | None) -> bool:
        """Its name means nothing any more, nor does the trash of a demotion, `move`, have it: False if that has another
        file of its name, of an output that was written later. Raises OSError."""
        with self._tree.directory_if_there(self._directory) as fd:
            if fd is not None:
                self._remove(fd, dead.name, b"hot", lambda st: _is_file_of(st, dead))
        with opened_layer(self._tree, self._directory) as layer:
            if layer is not None and dead.stub is not None:
                self._remove(layer.stubs, dead.name, b"cold", lambda st: st.st_ino == dead.stub and is_cold(st))
        return move is not None and self._empty_trash(dead, move)

    def _remove(self, fd: int, name: bytes, kind: bytes, is_it: _IsIt) -> None:
        aside = name + b"." + kind
        with self._tree.directory(self._aside, make=True) as trash:
            self._settle(fd, name, trash, aside, is_it)
            st = stat_of(fd, name)
            if st is None or not stat.S_ISREG(st.st_mode) or not is_it(st):
                return
            self._at("hide output")
            with suppress(FileNotFoundError):
                renameat2(fd, name, trash, aside, RENAME_NOREPLACE)
            self._at("hid output")
            self._settle(fd, name, trash, aside, is_it)

    def _settle(self, fd: int, name: bytes, trash: int, aside: bytes, is_it: _IsIt) -> None:
        """What lies aside goes for good if it is what was to be deleted, else back."""
        st = stat_of(trash, aside)
        if st is None:
            return
        if is_it(st):
            self._at("delete output")
            os.unlink(aside, dir_fd=trash)
            self._at("deleted output")
            return
        try:
            renameat2(trash, aside, fd, name, RENAME_NOREPLACE)
        except FileExistsError:  # a third one has the name by now: it counts, and this one is kept
            log.error("output_left_aside", name=shown(name), trash=shown(self._aside), reason="another file is there")

    def _empty_trash(self, dead: Tombstone, move: int) -> bool:
        with self._tree.directory_if_there(TRASH + b"/%d" % move) as trash:
            st = stat_of(trash, dead.name) if trash is not None else None
            if trash is None or st is None:
                return True
            if st.st_ino != dead.trash:
                return False
            self._at("delete from trash")
            os.unlink(dead.name, dir_fd=trash)
            self._at("deleted from trash")
        return True

    def tidy(self, dead: Sequence[Tombstone]) -> None:
        """Forget what the stubs stood for, and have all of it last. Raises OSError."""
        self._at("forget origins")
        stubs = {one.stub for one in dead if one.stub is not None}
        cold_tree.forget(self._tree, self._directory, stubs)
        with self._tree.directory_if_there(self._directory) as fd:
            if fd is not None:
                os.fsync(fd)
        self._tree.remove_empty(self._aside)
        self._at("forgot origins")

    def remove_if_empty(self) -> None:
        """The directory, and those in it, as far as nothing else is in them. Raises OSError."""
        self._at("remove directories")
        self._tree.remove_empty(self._directory)
        self._at("removed directories")


def _is_file_of(st: os.stat_result, dead: Tombstone) -> bool:
    """The file that was there, or its stub that got its bytes back meanwhile, unchanged."""
    if st.st_mtime_ns == dead.mtime_ns and st.st_size == dead.size and st.st_ino == dead.inode:
        return True
    return dead.stub is not None and dead.inode is None and st.st_ino == dead.stub and not is_cold(st)
