"""One stub of the source: what it stands for is read, and changed, while nobody brings bytes to it. Decides nothing.

Blocking, any thread. A stub with a second name is left alone: what that stands for is written down elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tierd.controller.cold_tree import Layer, opened_layer
from tierd.controller.file_calls import opened_directory
from tierd.controller.hot_tree import HotTree, is_inode, split, stat_of
from tierd.stub_files import is_cold, locked, read_origins, write_origins
from tierd.stubs import ORIGINS, Origin
from tierd.syscalls import forced_stat


class NoPlainStub(Exception):
    """What stands at a name is no cold file of this one name only; `str()` says what it is."""


class _Held(NamedTuple):
    """A stub that nobody else changes."""

    layer: Layer
    inode: int
    origin: Origin | None


def stands_for(tree: HotTree, path: bytes, origin: Origin) -> bool:
    """Whether the cold file at a path, relative to the source, stands for that. Raises NoPlainStub, OSError."""
    with _held(tree, path) as held:
        return held.origin == origin


def restate(tree: HotTree, path: bytes, old: Origin, new: Origin, at: Callable[[str], None]) -> None:
    """From now on the cold file at a path stands for `new`, not for `old`. Raises NoPlainStub, OSError."""
    with _held(tree, path) as held:
        if held.origin == new:
            return
        if held.origin != old:
            raise NoPlainStub("it stands for something else")
        at("write origin")
        write_origins(held.layer.base, {held.inode: new})
        with opened_directory(held.layer.base, ORIGINS) as known:
            os.fsync(known)
            if read_origins(known).get(held.inode) != new:
                raise NoPlainStub("it has origins from the future: is the clock right?")
        at("wrote origin")


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
                    yield _Held(layer, st.st_ino, read_origins(known).get(st.st_ino))
        except BlockingIOError:
            raise NoPlainStub("its bytes are coming back") from None
        finally:
            os.close(fd)
