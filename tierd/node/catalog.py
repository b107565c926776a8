"""Which models lie in the source and how large they are: a walk over the models roots, for people who ask.

Blocking, for worker threads; not on any read path. Sizes count regular files once (a Hugging Face
tree's bytes are its `blobs`; its `snapshots` are links to them).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tierd import model_walk
from tierd.model_walk import ModelWalk
from tierd.node.cold_source import ColdSource
from tierd.node.copies import Identity
from tierd.stubs import RESERVED

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
FILES_MAX = model_walk.FILES_MAX
"""Where a walk gives up; the result then says that it is incomplete."""


@dataclass(slots=True)
class Catalog:
    """Bytes per model. `complete` is False if the walk met FILES_MAX or a directory it could not read."""

    size_bytes: dict[bytes, int] = field(default_factory=dict)
    complete: bool = True
    files: int = 0


def walk(source: ColdSource, roots: Sequence[bytes]) -> Catalog:
    """Find the models below the roots."""
    catalog = Catalog()
    counted: set[tuple[int, int]] = set()
    found = ModelWalk(os.fsencode(source.path), roots, lambda directory: _cold_names(source, directory), FILES_MAX)
    for model, path, cold in found:
        size = _size_once(path, counted, cold)
        catalog.size_bytes[model] = catalog.size_bytes.get(model, 0) + size
    catalog.complete, catalog.files = found.complete, found.files
    return catalog


class SourceFile(NamedTuple):
    """A regular file of a model, `path` relative to the source, by its attributes as listed."""

    path: bytes
    identity: Identity


def files_of(
    source: ColdSource, model: bytes, model_of_path: Callable[[bytes], bytes | None], limit: int = FILES_MAX
) -> list[SourceFile]:
    """The regular, not empty files of a model, cold ones too, in load order (by name; a hard link once)."""
    base = os.fsencode(source.path)
    if os.path.realpath(os.path.join(base, model)) != os.path.join(os.path.realpath(base), model):
        return []  # a link may lead out of the source
    found: list[SourceFile] = []
    seen: set[int] = set()
    device = os.stat(source.path).st_dev
    for path, st in _entries_of(source, base, model):
        wanted = stat.S_ISREG(st.st_mode) and st.st_size and st.st_dev == device and st.st_ino not in seen
        if wanted and model_of_path(path) == model and len(found) < limit:
            seen.add(st.st_ino)
            found.append(SourceFile(path, Identity(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)))
    return found


def _entries_of(source: ColdSource, base: bytes, model: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    top = os.path.join(base, model)
    if os.path.islink(top) or not os.path.isdir(top):  # a link may lead out of the source
        yield from _entries_in(source, os.path.dirname(top), base, [os.path.basename(top)])
        return
    for directory, below, _ in os.walk(top):
        below[:] = sorted(name for name in below if name != RESERVED)
        yield from _entries_in(source, directory, base)


def _entries_in(
    source: ColdSource, directory: bytes, base: bytes, names: list[bytes] | None = None
) -> Iterator[tuple[bytes, os.stat_result]]:
    """What lies in a directory, or those names of it, with attributes; paths relative to the source."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wanted = sorted(source.list_names(fd)) if names is None else names
            found = source.lstat_many(fd, wanted)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return
        raise
    for name, st in zip(wanted, found, strict=True):
        if st is not None:
            yield os.path.relpath(os.path.join(directory, name), base), st


def _cold_names(source: ColdSource, directory: bytes) -> dict[bytes, os.stat_result]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        return dict(source.cold_names(fd))
    finally:
        os.close(fd)


def _size_once(path: bytes, counted: set[tuple[int, int]], cold: os.stat_result | None) -> int:
    """Bytes of a regular file, 0 for anything else and for further hard links."""
    try:
        st = cold or os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(st.st_mode) or (st.st_nlink > 1 and (st.st_dev, st.st_ino) in counted):
        return 0
    if st.st_nlink > 1:
        counted.add((st.st_dev, st.st_ino))
    return st.st_size
