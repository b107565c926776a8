"""Makes the directories and stubs of a model whose objects are there already, so that the overlay shows its files.

The tree only: blocking, any thread. A stub is made beside, complete; what it stands for is known in its directory
before it is there; then it is renamed to its name, over nothing. Each call is harmless to repeat.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from tierd.controller.source import cold_tree
from tierd.controller.source.file_calls import draft_name, opened_directory
from tierd.controller.source.hot_tree import HotTree, joined, split, stat_of
from tierd.controller.source.stubbing import DRAFTS
from tierd.objects.keys import shown
from tierd.stub_files import make_layer, write_origins
from tierd.stubs import COLD_MARK, ORIGINS, RESERVED, STUBS, Origin
from tierd.syscalls import RENAME_NOREPLACE, renameat2

_DIRECTORY_MODE: Final = 0o755
_FILE_MODE: Final = 0o644
_NO_DIRECTORY: Final = (errno.ENOTDIR, errno.ELOOP)


class Making(NamedTuple):
    """A file to be: by its path in the model, what it stands for, its time in nanoseconds."""

    path: bytes
    origin: Origin
    mtime_ns: int


class ImportTree:
    """The model at `base`, by move number `move`. `at` is told of each effect before and after it."""

    def __init__(self, tree: HotTree, base: bytes, move: int, at: Callable[[str], None]) -> None:
        self._tree = tree
        self._base = base
        self._at = at
        self.drafts = DRAFTS + b"/%d" % move

    def make(self, files: Sequence[Making]) -> dict[bytes, str]:
        """Make these; why one was not, by its path: another file has its name. Raises OSError."""
        by_directory: defaultdict[bytes, list[Making]] = defaultdict(list)
        for file in files:
            by_directory[split(file.path)[0]].append(file)
        left: dict[bytes, str] = {}
        for directory, some in sorted(by_directory.items()):
            left |= self._make_in(directory, some)
        return left

    def _make_in(self, directory: bytes, files: Sequence[Making]) -> dict[bytes, str]:
        path = joined(self._base, directory)
        try:
            self._make_directory(path)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            return {file.path: f"{shown(path)} is no directory" for file in files}
        known = {stub.name: stub for stub in cold_tree.all_stubs(self._tree, path)}
        todo, left = [], {}
        with self._tree.directory(path) as fd:
            for file in files:
                name = split(file.path)[1]
                stub = known.get(name)
                if stat_of(fd, name) is not None:
                    left[file.path] = "a hot file has its name"
                elif stub is None:
                    todo.append(file)
                elif stub.origin != file.origin:
                    left[file.path] = "another cold file has its name"
            if todo:
                left |= self._place(fd, path, todo)
        return left

    def _place(self, fd: int, path: bytes, files: Sequence[Making]) -> dict[bytes, str]:
        left: dict[bytes, str] = {}
        with self._tree.directory(self.drafts, make=True) as drafts:
            self._at("make stubs")
            inodes = {self._draft(fd, drafts, file): file.origin for file in files}
            self._at("announce")
            make_layer(fd)
            with self._tree.directory(joined(path, RESERVED)) as base, opened_directory(base, ORIGINS) as known:
                write_origins(base, inodes)
                for touched in (known, base, fd):  # no stub of which nobody knows anything after a power cut
                    os.fsync(touched)
            with self._tree.directory(joined(path, RESERVED + b"/" + STUBS)) as layer:
                for file in files:
                    self._at("place")
                    try:
                        renameat2(drafts, draft_name(file.path), layer, split(file.path)[1], RENAME_NOREPLACE)
                    except FileExistsError:  # this moment, by a user
                        left[file.path] = "another cold file has its name"
                os.fsync(layer)
            self._at("placed")
        return left

    def _draft(self, directory: int, drafts: int, file: Making) -> int:
        """Owned by whom the directory belongs to."""
        name = draft_name(file.path)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=drafts)
        owner = os.fstat(directory)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=drafts)
        try:
            os.fchown(fd, owner.st_uid, owner.st_gid)
            mark = COLD_MARK if file.origin.size else 0
            os.fchmod(fd, _FILE_MODE | mark)
            os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
            os.fsync(fd)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    def _make_directory(self, path: bytes) -> None:
        """With those above it, which belong to whom the one above belongs to. Raises OSError."""
        above, name = split(path)
        if not path:
            return
        with self._tree.directory_if_there(path) as fd:
            if fd is not None:
                return
        self._make_directory(above)
        with self._tree.directory(above) as parent:
            found = stat_of(parent, name)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._at("make directory")
            try:
                os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
            except FileExistsError:  # this moment, by a user, who may have it as he likes
                return
            with self._tree.directory(path) as made:
                st = os.fstat(parent)
                os.fchown(made, st.st_uid, st.st_gid)
                os.fchmod(made, _DIRECTORY_MODE)
            os.fsync(parent)
            self._at("made directory")

    def clear(self) -> None:
        """Remove drafts that nobody needs."""
        with self._tree.directory_if_there(self.drafts) as fd:
            for name in os.listdir(fd) if fd is not None else []:
                os.unlink(name, dir_fd=fd)
        self._tree.remove_empty(self.drafts)
