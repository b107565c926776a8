"""The cold files of a model in the source: found through descriptors, and put back to their names once they are hot.

Blocking, any thread. Nothing here follows a link or leads out of the model, whatever is put there meanwhile. Where the
bytes come from is not known here. What stubs are: docs/decisions, 10.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, NamedTuple

from tierd.controller.source.hot_tree import HotTree, split
from tierd.stub_files import drop_origins, is_cold, read_origins, remove_layer
from tierd.stubs import ORIGINS, RESERVED, STUBS, Origin
from tierd.syscalls import RENAME_NOREPLACE, forced_stat, renameat2

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ELSEWHERE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NO_FLAGS: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class StubName(NamedTuple):
    """A name of a stub: its directory, relative to the source, and what stands there. `origin` is None of one that has
    its bytes again, and of one that nobody knows the bytes of."""

    directory: bytes
    name: bytes
    inode: int
    cold: bool
    origin: Origin | None


class Layer(NamedTuple):
    """Descriptors of a directory and of `.tierd` and `.tierd/cold` in it."""

    directory: int
    base: int
    stubs: int


@contextmanager
def opened_layer(tree: HotTree, path: bytes) -> Iterator[Layer | None]:
    """The layer of a directory; None if it has none, or is not there."""
    with ExitStack() as opened:
        try:
            fds = [opened.enter_context(tree.directory(path))]
            for name in (RESERVED, STUBS):
                fds.append(os.open(name, _DIRECTORY, dir_fd=fds[-1]))
                opened.callback(os.close, fds[-1])
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
            yield None
            return
        yield Layer(*fds)


def is_directory(tree: HotTree, path: bytes) -> bool:
    """True if there is one."""
    with tree.directory_if_there(path) as fd:
        return fd is not None


def stub_names(tree: HotTree, model: bytes) -> Iterator[StubName]:
    """All names of stubs in a model, a directory or a single file, but for those that a hot file hides."""
    if not is_directory(tree, model):
        above, only = split(model)
        yield from (stub for stub in _stubs_in(tree, above) if stub.name == only)
        return
    for directory in directories(tree, model):
        yield from _stubs_in(tree, directory)


def directories(tree: HotTree, top: bytes) -> Iterator[bytes]:
    """The directory `top` and all below it, but for those that are tierd's own."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        try:
            with tree.directory(path) as fd, os.scandir(fd) as entries:
                names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:  # it went meanwhile
            if error.errno not in _ELSEWHERE:
                raise
            continue
        yield path
        waiting.extend(path + b"/" + name if path else name for name in names if name != RESERVED)


def all_stubs(tree: HotTree, directory: bytes) -> list[StubName]:
    """Those of one directory, hidden or not."""
    return _stubs_in(tree, directory, hidden=True)


def _stubs_in(tree: HotTree, directory: bytes, *, hidden: bool = False) -> list[StubName]:
    with opened_layer(tree, directory) as layer:
        if layer is None:
            return []
        origins = _origins(layer)
        found = []
        for name in map(os.fsencode, os.listdir(layer.stubs)):
            with suppress(FileNotFoundError):
                st = forced_stat(layer.stubs, name)
                hot = _inode_of(layer.directory, name)
                if stat.S_ISREG(st.st_mode) and (hidden or hot in (None, st.st_ino)):
                    cold = is_cold(st)
                    found.append(StubName(directory, name, st.st_ino, cold, origins.get(st.st_ino) if cold else None))
        return found


def origins_of(tree: HotTree, directory: bytes) -> dict[int, Origin]:
    """What is known of stubs of a directory, by inode number, also of those that are gone."""
    with opened_layer(tree, directory) as layer:
        return _origins(layer) if layer is not None else {}


def _origins(layer: Layer) -> dict[int, Origin]:
    try:
        fd = os.open(ORIGINS, _DIRECTORY, dir_fd=layer.base)
    except FileNotFoundError:
        return {}
    try:
        return read_origins(fd)
    finally:
        os.close(fd)


def _inode_of(fd: int, name: bytes) -> int | None:
    try:
        return forced_stat(fd, name).st_ino
    except FileNotFoundError:
        return None


def place(tree: HotTree, stub: StubName) -> bool:
    """Put a stub that has its bytes again where its file was; False if a hot file stands there, which then stays.

    Also if it is there already, and only the stub's name is left, or if both are gone. Raises OSError.
    """
    with opened_layer(tree, stub.directory) as layer:
        if layer is None:
            return True
        try:
            st = forced_stat(layer.stubs, stub.name)
        except FileNotFoundError:
            return True
        if is_cold(st):
            return False
        with suppress(FileNotFoundError):
            if forced_stat(layer.directory, stub.name).st_ino != st.st_ino:
                return False
            os.unlink(stub.name, dir_fd=layer.stubs)
            return True
        return _move(layer, stub.name)


def _move(layer: Layer, name: bytes) -> bool:
    try:
        renameat2(layer.stubs, name, layer.directory, name, RENAME_NOREPLACE)
    except FileExistsError:
        return False
    except FileNotFoundError:  # a node was faster
        return True
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
        return _link(layer, name)
    return True


def _link(layer: Layer, name: bytes) -> bool:
    """For sources that cannot rename without replacing: both names for a moment, of one inode."""
    try:
        os.link(name, name, src_dir_fd=layer.stubs, dst_dir_fd=layer.directory, follow_symlinks=False)
    except FileExistsError:
        return False
    os.unlink(name, dir_fd=layer.stubs)
    return True


def forget(tree: HotTree, directory: bytes, inodes: Collection[int]) -> None:
    """Forget what files stood for that are hot again; and that the directory had stubs, if it has none.

    Only origins of those are dropped: one of a stub that is about to come here is not. Raises OSError.
    """
    with opened_layer(tree, directory) as layer:
        if layer is not None and inodes:
            os.fsync(layer.directory)  # the names are there before what is known of the stubs goes
            with suppress(FileNotFoundError):
                drop_origins(layer.base, inodes)
    with suppress(FileNotFoundError), tree.directory(directory) as fd:
        if _inode_of(fd, RESERVED) is None:
            return
        try:
            remove_layer(fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # stubs that stay cold, or are hidden
                raise


def open_stub(tree: HotTree, stub: StubName) -> int | None:
    """A descriptor (O_PATH) of a stub; None if its name means something else by now, or nothing."""
    with opened_layer(tree, stub.directory) as layer:
        if layer is None:
            return None
        try:
            fd = os.open(stub.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer.stubs)
        except FileNotFoundError:
            return None
    if os.fstat(fd).st_ino == stub.inode:
        return fd
    os.close(fd)
    return None
