"""A file that is put back from its object: made beside, compared, and given its name. Decides nothing.

Blocking, any thread. Its owner is that of its directory, because nobody else is known; one that takes the place of a
damaged file gets all attributes of that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tierd.controller.moves.cold_copy import sha256_of
from tierd.controller.outputs.books import FileVersion
from tierd.controller.source.file_calls import copy_attributes, opened
from tierd.controller.source.hot_tree import HotTree, joined, split, stat_of
from tierd.controller.source.promote import RESERVE_SHARE
from tierd.controller.source.stubbing import DRAFTS
from tierd.errors import TierdError
from tierd.objects.keys import shown
from tierd.objects.store import FileRange, ObjectStore, Stored
from tierd.stubs import RESERVED, STUBS
from tierd.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, forced_stat, renameat2

_DRAFTS: Final = DRAFTS + b"/restores"
_MODE: Final = 0o644
_DIRECTORY_MODE_BITS: Final = 0o7777


class RestoreError(TierdError):
    """An output cannot be put back."""


class Draft:
    """A file in the making. `path` is below `root`; `name` is its own among drafts."""

    def __init__(self, tree: HotTree, root: bytes, path: bytes, name: bytes, at: Callable[[str], None]) -> None:
        self._tree = tree
        self._root = root
        self._above, self._leaf = split(joined(root, path))
        self._name = name
        self._at = at

    def fetch(self, store: ObjectStore, bucket: str, key: str, stored: Stored, mtime_ns: int | None) -> None:
        """Bring the bytes, and compare them. Raises RestoreError, ObjectError, OSError."""
        self._require_room(stored.size)
        self.discard()
        with self._tree.directory(_DRAFTS, make=True) as drafts:
            self._at("make draft")
            fd = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=drafts)
            try:
                if stored.size:
                    store.get_range(bucket, key, stored, 0, FileRange(fd, 0, stored.size))
                if not has_bytes(fd, stored):
                    raise RestoreError(
                        f"its object {shown(key)} has other bytes than were stored", hint="it is damaged"
                    )
                os.fchmod(fd, _MODE)
                if mtime_ns is not None:
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
                os.fsync(fd)
            finally:
                os.close(fd)
            self._at("made draft")

    def _require_room(self, size: int) -> None:
        with self._tree.directory(b"") as top:
            found = os.fstatvfs(top)
        if found.f_bavail * found.f_frsize - size < found.f_blocks * found.f_frsize * RESERVE_SHARE:
            raise RestoreError(f"no room for {size} bytes in the source", hint="make room", errno=errno.ENOSPC)

    def place(self) -> bool:
        """Give it the name, if nothing has it. Raises OSError, RestoreError."""
        _make_like_parents(self._tree, self._root, self._above)
        with self._tree.directory(self._above) as hot, self._tree.directory(_DRAFTS) as drafts:
            if self._has_stub() or stat_of(hot, self._leaf) is not None:
                return False
            st = os.fstat(hot)
            os.chown(self._name, st.st_uid, st.st_gid, dir_fd=drafts, follow_symlinks=False)
            self._at("place")
            try:
                renameat2(drafts, self._name, hot, self._leaf, RENAME_NOREPLACE)
            except FileExistsError:
                return False
            os.fsync(hot)
            self._at("placed")
        return True

    def _has_stub(self) -> bool:
        with self._tree.directory_if_there(joined(self._above, RESERVED + b"/" + STUBS)) as layer:
            return layer is not None and stat_of(layer, self._leaf) is not None

    def replace(self, damaged: FileVersion) -> bool:
        """Take the place of a file of that inode and time, and remove it. Raises OSError."""
        with self._tree.directory(self._above) as hot, self._tree.directory(_DRAFTS) as drafts:
            if not _is(stat_of(hot, self._leaf), damaged):
                return False
            self._become_like(hot, drafts)
            self._at("exchange")
            renameat2(drafts, self._name, hot, self._leaf, RENAME_EXCHANGE)
            if not _is(stat_of(drafts, self._name), damaged):  # somebody put another one there this moment
                renameat2(drafts, self._name, hot, self._leaf, RENAME_EXCHANGE)
                return False
            os.fsync(hot)
            self._at("exchanged")
        return True

    def _become_like(self, hot: int, drafts: int) -> None:
        source, target = opened(hot, self._leaf), opened(drafts, self._name)
        try:
            copy_attributes(source, target, 0)
            os.fsync(target)
        finally:
            for fd in (source, target):
                if fd >= 0:
                    os.close(fd)

    def discard(self) -> None:
        """Remove what lies among the drafts."""
        with self._tree.directory_if_there(_DRAFTS) as drafts, suppress(FileNotFoundError):
            if drafts is not None:
                os.unlink(self._name, dir_fd=drafts)


def clear_drafts(tree: HotTree) -> None:
    """What a controller left that was killed."""
    with tree.directory_if_there(_DRAFTS) as drafts:
        for name in os.listdir(drafts) if drafts is not None else []:
            os.unlink(name, dir_fd=drafts)


def has_bytes(fd: int, stored: Stored) -> bool:
    """Whether a file is what was stored. Reads it if its size is."""
    return forced_stat(fd).st_size == stored.size and sha256_of(fd) == stored.sha256


def _is(st: os.stat_result | None, version: FileVersion) -> bool:
    return (
        st is not None
        and stat.S_ISREG(st.st_mode)
        and st.st_nlink == 1
        and (st.st_ino, st.st_mtime_ns) == (version.inode, version.mtime_ns)
    )


def _make_like_parents(tree: HotTree, root: bytes, path: bytes) -> None:
    """Make the directories of a path below the root, as far as they went; each gets owner and mode of the one above.

    Raises RestoreError if there is no root: then it is the source that is not there.
    """
    with tree.directory_if_there(root) as fd:
        if fd is None:
            raise RestoreError(f"{shown(root)} is not in the source", hint="is it mounted?")
    parts = path.removeprefix(root + b"/").split(b"/")
    for number in range(len(parts)):
        above = joined(root, b"/".join(parts[:number]))
        with tree.directory(above) as fd:
            try:
                os.mkdir(parts[number], 0o700, dir_fd=fd)
            except FileExistsError:
                continue
            st = os.fstat(fd)
            os.chown(parts[number], st.st_uid, st.st_gid, dir_fd=fd, follow_symlinks=False)
            os.chmod(parts[number], st.st_mode & _DIRECTORY_MODE_BITS, dir_fd=fd)
            os.fsync(fd)
