"""What the deletion of an output does in the source: its file, its stub, its copy in the trash go. Decides nothing.

Only what was there when the deletion was planned goes: a file is that one by inode, size and time of modification (its
own, or its stub's, whichever a move put there since), a stub by what it stands for. A name is first moved aside and
looked at there, where nobody reaches it by name; what is another file by now goes back. Blocking, any thread; each call
is harmless to repeat, and callers see to it that one process at a time deletes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller.outputs.books import FileVersion
from tierd.controller.outputs.files import version_of
from tierd.controller.source import cold_tree
from tierd.controller.source.announcing import At
from tierd.controller.source.cold_tree import opened_layer
from tierd.controller.source.hot_tree import HotTree, stat_of
from tierd.controller.source.stubbing import TRASH
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
    """An output that is deleted, and what there was of it. `keep`: versions whose objects stay; `thorough`: none does,
    wherever users may have taken a stub."""

    output_id: UUID
    user: str
    filename: str
    version: int
    keep: Sequence[int]
    inode: int | None
    size: int | None
    mtime_ns: int | None
    stub: int | None
    gone: bool
    thorough: bool

    @property
    def name(self) -> bytes:
        """In the directory of its day."""
        return self.filename.rpartition("/")[2].encode()

    @property
    def path(self) -> bytes:
        """Below the outputs root."""
        return f"{self.user}/{self.filename}".encode()


class ErasureFiles:
    """Some outputs of one erasure, which lie in one `directory`, relative to the source. To be made anew for others."""

    def __init__(self, tree: HotTree, directory: bytes, number: int, at: At) -> None:
        self._tree = tree
        self._directory = directory
        self._aside = _ASIDE % number
        self._at = at

    def look(self, names: Sequence[bytes]) -> list[Standing]:
        """What names mean. Raises OSError."""
        with self._tree.directory_if_there(self._directory) as fd:
            found = [stat_of(fd, name) if fd is not None else None for name in names]
        with opened_layer(self._tree, self._directory) as layer:
            stubs = [stat_of(layer.stubs, name) if layer is not None else None for name in names]
        return [
            Standing(
                version_of(st) if st is not None and stat.S_ISREG(st.st_mode) else None,
                stub.st_ino if stub is not None and stub.st_ino in self._origins.get(name, ()) else None,
            )
            for name, st, stub in zip(names, found, stubs, strict=True)
        ]

    @cached_property
    def _origins(self) -> dict[bytes, dict[int, int]]:
        """What stubs stand for, by the name that the file had: versions by inode. Read once: what comes later is of
        later outputs."""
        found: dict[bytes, dict[int, int]] = {}
        for inode, origin in cold_tree.origins_of(self._tree, self._directory).items():
            if origin.model_id.encode() == self._directory:
                found.setdefault(origin.path, {})[inode] = origin.version
        return found

    def hide(self, dead: Tombstone, move: int | None) -> None:
        """Its name means nothing any more; the trash of the demotion `move`, which has it, has it no more. Raises
        OSError."""
        with self._tree.directory_if_there(self._directory) as fd:
            if fd is not None:
                self._remove(fd, dead.name, b"hot", lambda st: _is_file_of(st, dead))
        with opened_layer(self._tree, self._directory) as layer:
            if layer is not None:
                stubs = self._stubs_of(dead)
                self._remove(layer.stubs, dead.name, b"cold", lambda st: _is_stub_of(st, dead, stubs))
        if move is not None:
            self._empty_trash(dead, move)

    def _stubs_of(self, dead: Tombstone) -> set[int]:
        """Inodes of stubs for its objects; one that was written later has later ones."""
        return {inode for inode, version in self._origins.get(dead.name, {}).items() if version <= dead.version}

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

    def _empty_trash(self, dead: Tombstone, move: int) -> None:
        with self._tree.directory_if_there(TRASH + b"/%d" % move) as trash:
            if trash is None or stat_of(trash, dead.name) is None:
                return
            self._at("delete from trash")
            os.unlink(dead.name, dir_fd=trash)
            self._at("deleted from trash")

    def tidy(self, dead: Sequence[Tombstone]) -> None:
        """Forget what stubs stood for whose objects all go, and have it last. Raises OSError.

        Of those that were removed on a node nothing is forgotten while there are stubs: one of them may be theirs.
        """
        self._at("forget origins")
        stubs = set().union(*(self._stubs_of(one) for one in dead if one.thorough))
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


def _is_stub_of(st: os.stat_result, dead: Tombstone, stubs: set[int]) -> bool:
    """One of its stubs, cold, or with its bytes again and nobody has put it to its place yet."""
    return st.st_ino in stubs and (is_cold(st) or _is_file_of(st, dead))


def _is_file_of(st: os.stat_result, dead: Tombstone) -> bool:
    """The file that was there, or its stub that got its bytes back meanwhile."""
    return st.st_ino in (dead.inode, dead.stub) and (st.st_size, st.st_mtime_ns) == (dead.size, dead.mtime_ns)
