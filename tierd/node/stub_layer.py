"""The stubs of a source directory: found, kept in mind that there are none, made, and what they stand for.

Blocking, for worker threads, and safe in any of them. What a name of the overlay means where there are stubs is in
`cold_source.py`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tierd.node.attributes import changed
from tierd.node.sources import Key
from tierd.stub_files import is_cold, make_layer, mtime_of, read_origins, write_origins
from tierd.stubs import COLD_MARK, ORIGINS, RESERVED, STUBS, Origin

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NONE_SECONDS = 1.0
"""How long a directory that had no stubs is taken to have none: as long as the kernel takes a name for absent."""
_NONE_MAX = 8192
_KNOWN_ENTRIES_MAX = 200_000
"""Origins in memory; about 400 bytes each."""


class Stub(NamedTuple):
    """A stub as it looks: `cold` until it has its own bytes again, `origin` what it stands for until then (None if that
    is damaged or lost), `attributes` with that size and without the mark."""

    cold: bool
    origin: Origin | None
    attributes: os.stat_result

    def of(self, st: os.stat_result) -> os.stat_result:
        """Attributes of its inode, as they look."""
        if not self.cold:
            return st
        return looking(st, self.attributes.st_size)


class Layer:
    """The stubs of one directory. `fd` is of `.tierd/cold`, `base` of `.tierd`; both live as long as the layer."""

    def __init__(self, layers: Layers, base: int, fd: int) -> None:
        self._layers = layers
        self.base = base
        self.fd = fd

    def find(self, name: bytes) -> Stub | None:
        """The stub of a name."""
        try:
            st = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self.of(st)

    def of(self, st: os.stat_result) -> Stub:
        """The stub with these attributes."""
        if not is_cold(st):
            return Stub(False, None, st)
        origin = self._layers.origins(self.base).get(st.st_ino)
        return Stub(True, origin, looking(st, origin.size if origin is not None else 0))

    def names(self) -> list[bytes]:
        """All of them."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def adopt(self, inode: int, origin: Origin) -> None:
        """From now on a stub with this number stands for that, here too: before it comes here."""
        if self._layers.origins(self.base).get(inode) == origin:
            return
        write_origins(self.base, {inode: origin})


class Layers:
    """Finds the layers of directories. `key_of` is the identity of an inode by its attributes."""

    def __init__(self, key_of: Callable[[os.stat_result], Key], clock: Callable[[], float] = time.monotonic) -> None:
        self._key_of = key_of
        self._clock = clock
        self._lock = threading.Lock()
        self._none: OrderedDict[Key, float] = OrderedDict()
        self._known: OrderedDict[Key, tuple[tuple[int, int], dict[int, Origin]]] = OrderedDict()
        self._known_entries = 0

    @contextmanager
    def of(self, dir_fd: int) -> Iterator[Layer | None]:
        """The layer of a directory, None if it has none. That there is none may be news of a second ago."""
        key = self._key_of(os.fstat(dir_fd))
        if self._none.get(key, 0.0) > self._clock():
            yield None
            return
        with ExitStack() as opened:
            fds = [dir_fd]
            for name in (RESERVED, STUBS):
                try:
                    fds.append(os.open(name, _DIRECTORY, dir_fd=fds[-1]))
                except OSError as error:
                    if error.errno not in _NOT_THERE:
                        raise
                    self._remember_none(key)
                    yield None
                    return
                opened.callback(os.close, fds[-1])
            yield Layer(self, fds[1], fds[2])

    @contextmanager
    def made(self, dir_fd: int) -> Iterator[Layer]:
        """The layer of a directory, made if there is none."""
        make_layer(dir_fd)
        with self._lock:
            self._none.pop(self._key_of(os.fstat(dir_fd)), None)
        with self.of(dir_fd) as layer:
            if layer is None:  # removed this moment, with the directory
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            yield layer

    def _remember_none(self, key: Key) -> None:
        with self._lock:
            self._none[key] = self._clock() + _NONE_SECONDS
            self._none.move_to_end(key)
            if len(self._none) > _NONE_MAX:
                self._none.popitem(last=False)

    def origins(self, base: int) -> dict[int, Origin]:
        """What the stubs beside stand for, by inode number; read anew when the directory of origins has changed."""
        try:
            fd = os.open(ORIGINS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base)
        except FileNotFoundError:
            return {}
        try:
            st = os.fstat(fd)
            key, stamp = self._key_of(st), (st.st_mtime_ns, st.st_ctime_ns)
            with self._lock:
                known = self._known.get(key)
                if known is not None and known[0] == stamp:
                    self._known.move_to_end(key)
                    return known[1]
            found = read_origins(fd)
        finally:
            os.close(fd)
        if time.time_ns() - st.st_mtime_ns > _SETTLED_NS:
            self._keep(key, stamp, found)
        return found

    def _keep(self, key: Key, stamp: tuple[int, int], found: dict[int, Origin]) -> None:
        with self._lock:
            before = self._known.pop(key, None)
            self._known_entries += len(found) - (len(before[1]) if before else 0)
            self._known[key] = stamp, found
            while self._known_entries > _KNOWN_ENTRIES_MAX and len(self._known) > 1:
                self._known_entries -= len(self._known.popitem(last=False)[1][1])


_SETTLED_NS = 2_000_000_000
"""A directory that changed just now may change again within the same tick of its clock."""


def looking(st: os.stat_result, size: int) -> os.stat_result:
    """The attributes of a cold file, by those of its stub."""
    return changed(st, mode=st.st_mode & ~COLD_MARK, size=size, mtime_ns=mtime_of(st))
