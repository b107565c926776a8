"""A source some of whose files are cold: what each name means where a directory has stubs beside its files.

Hot wins: where both `NAME` and its stub are, the file counts. So a file that is found costs nothing, and a name that is
not found costs one more look. Calls on an inode reach a stub as they reach a file; what needs bytes raises `Cold`, and
whoever called brings them. Nothing is called `.tierd`.

Blocking, as `sources.py`. docs/decisions, 10.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tierd.node.sources import (
    About,
    Change,
    Changes,
    Creator,
    Moved,
    PosixSource,
    Ref,
    Root,
    Version,
)
from tierd.node.stub_layer import Layer, Layers, Stub
from tierd.stub_files import is_cold, locked, remove_layer, warm
from tierd.stubs import COLD_MARK, RESERVED, Origin
from tierd.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, forced_stat, renameat2


class Cold(Exception):
    """The bytes that a call needs are not in the source. `stub` is what is; `ref` is where."""

    def __init__(self, ref: Ref, stub: Stub) -> None:
        super().__init__()
        self.ref = ref
        self.stub = stub


class ColdSource(PosixSource):
    """See the module."""

    def __init__(self, path: Path, root: Root | None = None) -> None:
        super().__init__(path, root)
        self.layers = Layers(self.key)

    # --- where an inode is ---

    @contextmanager
    def _beside(self, ref: Ref) -> Iterator[tuple[Layer, Stub]]:
        """The stub that a ref means, with its layer. Raises Moved if it means none, or one that a file hides."""
        if ref.name is None:
            raise Moved
        with self.layers.of(ref.fd) as layer:
            stub = layer.find(ref.name) if layer is not None else None
            if layer is None or stub is None or self.key(stub.attributes) != ref.key or self._is_hot(ref.fd, ref.name):
                raise Moved
            yield layer, stub

    def _stub_of(self, ref: Ref) -> Stub | None:
        try:
            with self._beside(ref) as (_, stub):
                return stub
        except Moved:
            return None

    def _is_hot(self, dir_fd: int, name: bytes) -> bool:
        try:
            super().lstat(dir_fd, name)
        except FileNotFoundError:
            return False
        return True

    def _stub_at(self, dir_fd: int, name: bytes) -> Stub | None:
        """The stub of a name, hidden or not."""
        with self.layers.of(dir_fd) as layer:
            return layer.find(name) if layer is not None else None

    @contextmanager
    def path_of(self, ref: Ref) -> Iterator[str]:
        with ExitStack() as stack:
            try:
                path = stack.enter_context(super().path_of(ref))
            except Moved:
                layer, _ = stack.enter_context(self._beside(ref))
                path = stack.enter_context(super().path_of(ref._replace(fd=layer.fd)))
            yield path

    def open_path(self, path: bytes, flags: int = os.O_RDONLY) -> int:
        """As that of any source; of a cold file, a descriptor of its stub, which `stub_of` tells."""
        try:
            return super().open_path(path, flags)
        except FileNotFoundError:
            directory, _, name = path.rpartition(b"/")
            fd = super().open_path(directory or b".", os.O_PATH)
        try:
            with self.layers.of(fd) as layer:
                if layer is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer.fd)
        finally:
            os.close(fd)

    def origin_of(self, path: bytes, inode: int) -> Origin | None:
        """What the stub with this number stands for, by the directory of `path`. Raises OSError."""
        fd = super().open_path(path.rpartition(b"/")[0] or b".", os.O_PATH)
        try:
            with self.layers.of(fd) as layer:
                return self.layers.origins(layer.base).get(inode) if layer is not None else None
        finally:
            os.close(fd)

    def cold_names(self, dir_fd: int) -> list[tuple[bytes, os.stat_result]]:
        """The cold files of a directory that no file hides, with their attributes."""
        with self.layers.of(dir_fd) as layer:
            names = layer.names() if layer is not None else []
            found = [(name, layer.find(name)) for name in names] if layer is not None else []
        return [(name, stub.attributes) for name, stub in found if stub is not None and not self._is_hot(dir_fd, name)]

    def _told(self, ref: Ref, change: Change) -> Change:
        """What a call on an inode changed, as it looks."""
        stub = self._stub_of(ref)
        return change if stub is None else Change(*(stub.of(st) for st in change))

    # --- inodes that are already known ---

    def forced_stat(self, ref: Ref) -> os.stat_result:
        try:
            return super().forced_stat(ref)
        except Moved:
            with self._beside(ref) as (layer, _):
                assert ref.name is not None
                return layer.of(forced_stat(layer.fd, ref.name)).attributes

    def open(self, ref: Ref, flags: int) -> tuple[int, Version]:
        """As that of any source. Raises Cold for a cold file, unless it is truncated: then its bytes are not needed."""
        try:
            return super().open(ref, flags)
        except Moved:
            with self._beside(ref) as (layer, stub):
                if stub.cold and not flags & os.O_TRUNC:
                    raise Cold(ref, stub) from None
                if not stub.cold:
                    return super().open(ref._replace(fd=layer.fd), flags)
        self._empty(ref)
        return self.open(ref, flags)

    def _empty(self, ref: Ref) -> None:
        """Make a cold file one of its own, without bytes."""
        with self.path_of(ref) as path, locked(path) as fd:
            if is_cold(os.fstat(fd)):
                warm(fd)
                os.utime(fd)
        self.settle(ref)

    def settle(self, ref: Ref) -> None:
        """A stub that has its own bytes again goes back to where its file was: the same inode, by another way. If it
        cannot, it does as well where it is."""
        with suppress(OSError), self._beside(ref) as (layer, stub):
            if not stub.cold and ref.name is not None:
                renameat2(layer.fd, ref.name, ref.fd, ref.name, RENAME_NOREPLACE)

    def setattr(self, ref: Ref, changes: Changes, fd: int | None) -> Change:
        """As that of any source. Raises Cold if a cold file shall get another size than none."""
        stub = self._stub_of(ref) if fd is None else None
        if stub is None or not stub.cold:
            return super().setattr(ref, changes, fd)
        if changes.size:
            raise Cold(ref, stub)
        if changes.size == 0:
            self._empty(ref)
            return Change(stub.attributes, super().setattr(ref, changes, fd).after)
        if changes.mode is not None:
            changes = replace(changes, mode=changes.mode | COLD_MARK)
        if changes.mtime_ns is not None or changes.atime_ns is not None:
            changes = replace(changes, atime_ns=changes.mtime_ns)  # see `mtime_of`: bytes may be on their way
        return Change(*(stub.of(st) for st in super().setattr(ref, changes, fd)))

    def setxattr(self, ref: Ref, name: bytes, value: bytes) -> Change:
        return self._told(ref, super().setxattr(ref, name, value))

    def removexattr(self, ref: Ref, name: bytes) -> Change:
        return self._told(ref, super().removexattr(ref, name))

    def link(self, ref: Ref, dir_fd: int, name: bytes) -> Change:
        self._refuse(dir_fd, name)
        try:
            with self._beside(ref) as (layer, stub):
                if self._is_hot(dir_fd, name):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                with self.layers.made(dir_fd) as target:
                    _follow(target, stub)
                    os.link(ref.name or b"", name, src_dir_fd=layer.fd, dst_dir_fd=target.fd, follow_symlinks=False)
                return Change(stub.attributes, self.lstat(dir_fd, name))
        except Moved:
            return super().link(ref, dir_fd, name)

    # --- names in a directory ---

    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result:
        if name == RESERVED:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            return super().lstat(dir_fd, name)
        except FileNotFoundError:
            with self.layers.of(dir_fd) as layer:
                if layer is None:
                    raise
                stub = layer.find(name)
        # A file that was cold at the first look and hot at the second is seen by the third.
        return stub.attributes if stub is not None else super().lstat(dir_fd, name)

    def list_names(self, dir_fd: int) -> list[bytes]:
        names = super().list_names(dir_fd)
        if RESERVED not in names:
            return names
        with self.layers.of(dir_fd) as layer:
            cold = layer.names() if layer is not None else []
        # As `lstat`.
        found = dict.fromkeys([*names, *cold, *super().list_names(dir_fd)])
        return [name for name in found if name != RESERVED]

    def _refuse(self, dir_fd: int, name: bytes) -> None:
        """A name that is to be made must be free, and not ours."""
        if name == RESERVED:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if self._stub_at(dir_fd, name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def create(
        self, dir_fd: int, name: bytes, flags: int, mode: int, owner: Creator
    ) -> tuple[int, os.stat_result, Version]:
        self._refuse(dir_fd, name)
        return super().create(dir_fd, name, flags, mode, owner)

    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int, owner: Creator) -> os.stat_result:
        self._refuse(dir_fd, name)
        return super().mknod(dir_fd, name, mode, rdev, owner)

    def mkdir(self, dir_fd: int, name: bytes, mode: int, owner: Creator) -> os.stat_result:
        self._refuse(dir_fd, name)
        return super().mkdir(dir_fd, name, mode, owner)

    def symlink(self, dir_fd: int, name: bytes, target: bytes, owner: Creator) -> os.stat_result:
        self._refuse(dir_fd, name)
        return super().symlink(dir_fd, name, target, owner)

    def unlink(
        self,
        dir_fd: int,
        name: bytes,
        about: About = lambda st: None,
        ended: Callable[[Origin], None] = lambda origin: None,
    ) -> Change:
        """As that of any source. `ended` is told what a cold file stood for that has no name any more."""
        with self.layers.of(dir_fd) as layer:
            stub = layer.find(name) if layer is not None else None
            if layer is None or stub is None:
                return super().unlink(dir_fd, name, about)
            if self._is_hot(dir_fd, name):  # else it would turn up again
                os.unlink(name, dir_fd=layer.fd)
                return super().unlink(dir_fd, name, about)

            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer.fd)
            try:
                held = os.fstat(fd).st_ino
                change = super().unlink(layer.fd, name, lambda st: about(stub.of(st)))
                if stub.cold and stub.origin is not None and held == change.before.st_ino and _is_gone(fd):
                    ended(stub.origin)
            finally:
                os.close(fd)
            return Change(*(stub.of(st) for st in change))

    def rmdir(self, dir_fd: int, name: bytes, about: About = lambda st: None) -> Change:
        if self._cold_at(dir_fd, name) is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        try:
            return super().rmdir(dir_fd, name, about)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        self._clear(dir_fd, name)
        return super().rmdir(dir_fd, name, lambda st: None)

    def _clear(self, dir_fd: int, name: bytes) -> None:
        """Make a directory that looks empty one that is. Raises OSError (ENOTEMPTY)."""
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            if super().list_names(fd) == [RESERVED]:
                remove_layer(fd)
        finally:
            os.close(fd)

    def rename(
        self,
        old_fd: int,
        old: bytes,
        new_fd: int,
        new: bytes,
        flags: int,
        about: Callable[[os.stat_result, os.stat_result | None], None] = lambda moved, replaced: None,
    ) -> tuple[Change, Change | None]:
        """As that of any source. A cold and a hot name cannot be exchanged (EINVAL)."""
        if RESERVED in (old, new):
            number = errno.EPERM if new == RESERVED else errno.ENOENT
            raise OSError(number, os.strerror(number))
        cold, stub = self._cold_at(old_fd, old), self._stub_at(new_fd, new)
        if cold is None and stub is None:
            return self._rename_hot(old_fd, old, new_fd, new, flags, about)
        replaced = None if self._is_hot(new_fd, new) else stub
        if cold is None:
            super().lstat(old_fd, old)  # it must be there, before all else
        if flags == RENAME_EXCHANGE:
            if cold is None or replaced is None:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._exchange_cold(old_fd, old, new_fd, new, cold, replaced, about)
        if flags == RENAME_NOREPLACE and (replaced is not None or self._is_hot(new_fd, new)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if cold is not None:
            return self._rename_cold(old_fd, old, new_fd, new, cold, about)
        return self._rename_over_cold(old_fd, old, new_fd, new, about)

    def _cold_at(self, dir_fd: int, name: bytes) -> Stub | None:
        """The stub of a name that no file hides."""
        stub = self._stub_at(dir_fd, name)
        return None if stub is None or self._is_hot(dir_fd, name) else stub

    def _rename_hot(self, old_fd: int, old: bytes, new_fd: int, new: bytes, *rest: Any) -> tuple[Change, Change | None]:
        try:
            done = super().rename(old_fd, old, new_fd, new, *rest)
            if rest[0] != RENAME_EXCHANGE:
                self._drop_stub(old_fd, old)  # one that the file hid: its name would turn up again
            return done
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or rest[0] != 0:
                raise
        self._clear(new_fd, new)  # a directory may take the place of one that looks empty
        return super().rename(old_fd, old, new_fd, new, *rest)

    def _rename_over_cold(
        self, old_fd: int, old: bytes, new_fd: int, new: bytes, about: Callable[..., None]
    ) -> tuple[Change, Change | None]:
        """The file hides the stub as soon as it is there; then that goes."""
        replaced = self._cold_at(new_fd, new)
        if replaced is not None and stat.S_ISDIR(super().lstat(old_fd, old).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        stood = replaced.attributes if replaced is not None else None
        moved, hidden = super().rename(
            old_fd, old, new_fd, new, 0, lambda found, beneath: about(found, stood if beneath is None else beneath)
        )
        self._drop_stub(new_fd, new)
        return moved, Change(stood, stood) if stood is not None and hidden is None else hidden

    def _rename_cold(
        self, old_fd: int, old: bytes, new_fd: int, new: bytes, cold: Stub, about: Callable[..., None]
    ) -> tuple[Change, Change | None]:
        """The stub goes to its new place, where a file hides it until that goes."""
        stood = self.lstat_many(new_fd, [new])[0]
        if stood is not None and stat.S_ISDIR(stood.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        about(cold.attributes, stood)
        with self.layers.of(old_fd) as here, self.layers.made(new_fd) as there:
            if here is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            _follow(there, cold)
            os.rename(old, new, src_dir_fd=here.fd, dst_dir_fd=there.fd)
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=new_fd)
        after = self._stub_at(new_fd, new)
        moved = Change(cold.attributes, after.attributes if after is not None else cold.attributes)
        return moved, Change(stood, stood) if stood is not None else None

    def _exchange_cold(
        self, old_fd: int, old: bytes, new_fd: int, new: bytes, one: Stub, other: Stub, about: Callable[..., None]
    ) -> tuple[Change, Change | None]:
        about(one.attributes, other.attributes)
        with self.layers.made(old_fd) as here, self.layers.made(new_fd) as there:
            _follow(there, one)
            _follow(here, other)
            renameat2(here.fd, old, there.fd, new, RENAME_EXCHANGE)
        after, beside = self.lstat(new_fd, new), self.lstat(old_fd, old)
        return Change(one.attributes, after), Change(other.attributes, beside)

    def _drop_stub(self, dir_fd: int, name: bytes) -> None:
        with self.layers.of(dir_fd) as layer, suppress(FileNotFoundError):
            if layer is not None:
                os.unlink(name, dir_fd=layer.fd)


def _is_gone(fd: int) -> bool:
    """It had its last name; in doubt it had not. The source itself is asked: another node may have made a link."""
    try:
        return forced_stat(fd).st_nlink == 0
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ESTALE)


def _follow(layer: Layer, stub: Stub) -> None:
    """What a stub stands for is known where it goes. Raises OSError (EIO) if nobody knows."""
    if not stub.cold:
        return
    if stub.origin is None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    layer.adopt(stub.attributes.st_ino, stub.origin)
