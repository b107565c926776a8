"""One stub of the source: what it stands for is read, and another one takes its place. Decides nothing.

A stub is replaced, not changed: whoever has the cold file open goes on with the bytes that he opened, as he would after
a rename over it. Nobody brings bytes to it meanwhile, and one with a second name is left alone: what that stands for is
written down elsewhere. Blocking, any thread; one process at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from tierd.controller.source import cold_tree
from tierd.controller.source.cold_tree import Layer, opened_layer
from tierd.controller.source.file_calls import copy_attributes, opened_directory
from tierd.controller.source.hot_tree import HotTree, is_inode, split, stat_of
from tierd.controller.source.stubbing import DRAFTS
from tierd.stub_files import is_cold, locked, read_origins, write_origins
from tierd.stubs import COLD_MARK, ORIGINS, Origin
from tierd.syscalls import RENAME_EXCHANGE, forced_stat, renameat2

_DRAFTS: Final = DRAFTS + b"/stubs"


class NoPlainStub(Exception):
    """What stands at a name is no cold file of this one name only; `str()` says what it is."""


class _Held(NamedTuple):
    """A stub that nobody else changes, and a descriptor of it."""

    layer: Layer
    fd: int
    inode: int
    origins: dict[int, Origin]

    @property
    def origin(self) -> Origin | None:
        """What it stands for."""
        return self.origins.get(self.inode)


class Swap(NamedTuple):
    """A stub at `path`, relative to the source, that shall stand for `new`, and not for `old`; `draft` is a name of its
    own for the stub in the making."""

    tree: HotTree
    path: bytes
    old: Origin
    new: Origin
    draft: bytes
    at: Callable[[str], None]

    def announce(self) -> None:
        """Make the other stub beside, and say in the directory what it will stand for. Raises NoPlainStub, OSError."""
        with _held(self.tree, self.path) as held:
            if self._is_done(held):
                return
            self.discard()
            with self.tree.directory(_DRAFTS, make=True) as drafts:
                self.at("make stub")
                stub = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=drafts)
                try:
                    copy_attributes(held.fd, stub, COLD_MARK)
                    os.fsync(stub)
                    inode = os.fstat(stub).st_ino
                finally:
                    os.close(stub)
                os.fsync(drafts)
            self.at("write origin")
            write_origins(held.layer.base, {inode: self.new})
            with opened_directory(held.layer.base, ORIGINS) as known:
                os.fsync(known)
            self.at("wrote origin")

    def exchange(self) -> tuple[int, int | None]:
        """Put it in its place; its inode, and that of the stub that was there (None if it had gone before).

        Raises NoPlainStub, OSError.
        """
        with _held(self.tree, self.path) as held:
            if self._is_done(held):
                self.discard()
                return held.inode, None
            with self.tree.directory(_DRAFTS) as drafts:
                return self._exchange(held, drafts), held.inode

    def _exchange(self, held: _Held, drafts: int) -> int:
        name = split(self.path)[1]
        stub = os.open(self.draft, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=drafts)
        try:
            inode = os.fstat(stub).st_ino
            if held.origins.get(inode) != self.new:
                raise NoPlainStub("its directory has origins from the future: is the clock right?")
            copy_attributes(held.fd, stub, COLD_MARK)
        finally:
            os.close(stub)
        self.at("exchange")
        renameat2(drafts, self.draft, held.layer.stubs, name, RENAME_EXCHANGE)
        st = stat_of(drafts, self.draft)
        if st is None or st.st_ino != held.inode or st.st_nlink != 1:
            renameat2(drafts, self.draft, held.layer.stubs, name, RENAME_EXCHANGE)
            raise NoPlainStub("it was renamed or linked this moment")
        os.fsync(held.layer.stubs)
        self.at("exchanged")
        os.unlink(self.draft, dir_fd=drafts)
        return inode

    def _is_done(self, held: _Held) -> bool:
        if held.origin not in (self.old, self.new):
            raise NoPlainStub("it stands for something else")
        return held.origin == self.new

    def discard(self) -> None:
        """Remove what lies among the drafts."""
        with self.tree.directory_if_there(_DRAFTS) as drafts, suppress(FileNotFoundError):
            if drafts is not None:
                os.unlink(self.draft, dir_fd=drafts)


def stands_for(tree: HotTree, path: bytes, origin: Origin) -> bool:
    """Whether the cold file at a path, relative to the source, stands for that. Raises NoPlainStub, OSError."""
    with _held(tree, path) as held:
        return held.origin == origin


def forget(tree: HotTree, directory: bytes, inode: int) -> None:
    """What a stub stood for that is gone, unless another one has its number by now. Raises OSError."""
    if all(stub.inode != inode for stub in cold_tree.all_stubs(tree, directory)):
        with suppress(FileNotFoundError):
            cold_tree.forget(tree, directory, {inode})


@contextmanager
def _held(tree: HotTree, path: bytes) -> Iterator[_Held]:
    above, name = split(path)
    with opened_layer(tree, above) as layer:
        if layer is None or stat_of(layer.stubs, name) is None:
            raise NoPlainStub("it is not cold, or gone")
        if stat_of(layer.directory, name) is not None:
            raise NoPlainStub("it is hot")
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer.stubs)
        try:
            with locked(f"/proc/self/fd/{fd}", wait=False) as stub:
                st = forced_stat(stub)
                if not is_cold(st) or st.st_size:
                    raise NoPlainStub("its bytes are coming back")
                if st.st_nlink != 1 or not is_inode(stat_of(layer.stubs, name), st.st_ino):
                    raise NoPlainStub("it has another name")
                with opened_directory(layer.base, ORIGINS) as known:
                    yield _Held(layer, stub, st.st_ino, read_origins(known))
        except BlockingIOError:
            raise NoPlainStub("its bytes are coming back") from None
        finally:
            os.close(fd)
