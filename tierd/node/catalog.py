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
from pathlib import Path
from typing import NamedTuple

import structlog

from tierd.node.copies import Identity
from tierd.units import looks_like_model, model_of, root_of

log = structlog.get_logger(__name__)

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
FILES_MAX = 2_000_000
"""Where a walk gives up; the result then says that it is incomplete."""


@dataclass(slots=True)
class Catalog:
    """Bytes per model. `complete` is False if the walk met FILES_MAX or a directory it could not read."""

    size_bytes: dict[bytes, int] = field(default_factory=dict)
    complete: bool = True
    files: int = 0


def walk(source: Path, roots: Sequence[bytes]) -> Catalog:
    """Find the models below the roots."""
    catalog = Catalog()
    base = os.fsencode(source)
    for root in dict.fromkeys(roots):
        if root_of(root, [other for other in roots if other != root]) is None:
            _walk_root(catalog, base, root, roots)
    return catalog


class SourceFile(NamedTuple):
    """A regular file of a model, `path` relative to the source, by its attributes as listed."""

    path: bytes
    identity: Identity


def files_of(
    source: Path, model: bytes, model_of_path: Callable[[bytes], bytes | None], limit: int = FILES_MAX
) -> list[SourceFile]:
    """The regular, not empty files of a model in load order (by name; a hard link once)."""
    base = os.fsencode(source)
    if os.path.realpath(os.path.join(base, model)) != os.path.join(os.path.realpath(base), model):
        return []  # a link may lead out of the source
    found: list[SourceFile] = []
    seen: set[int] = set()
    device = os.stat(source).st_dev
    for path in _paths_of(base, model):
        try:
            st = os.lstat(os.path.join(base, path))
        except OSError as error:
            if error.errno in _NOT_THERE:
                continue
            raise
        wanted = stat.S_ISREG(st.st_mode) and st.st_size and st.st_dev == device and st.st_ino not in seen
        if wanted and model_of_path(path) == model and len(found) < limit:
            seen.add(st.st_ino)
            found.append(SourceFile(path, Identity(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)))
    return found


def _paths_of(base: bytes, model: bytes) -> Iterator[bytes]:
    top = os.path.join(base, model)
    if os.path.islink(top) or not os.path.isdir(top):  # a link may lead out of the source
        yield model
        return
    for directory, below, names in os.walk(top):
        below.sort()
        for name in sorted(names):
            yield os.path.relpath(os.path.join(directory, name), base)


def _walk_root(catalog: Catalog, base: bytes, root: bytes, roots: Sequence[bytes]) -> None:
    marked: set[bytes] = set()
    counted: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("catalog_unreadable", reason=str(error))
            catalog.complete = False

    for directory, _, names in os.walk(os.path.join(base, root), onerror=unreadable):
        relative = os.path.relpath(directory, base)
        if looks_like_model(names):
            marked.add(relative)
        for name in names:
            if catalog.files >= FILES_MAX:
                catalog.complete = False
                return
            catalog.files += 1
            path = os.path.join(relative, name) if relative != b"." else name
            model = model_of(path, roots, marked.__contains__)
            if model is not None:
                size = _size_once(os.path.join(directory, name), counted)
                catalog.size_bytes[model] = catalog.size_bytes.get(model, 0) + size


def _size_once(path: bytes, counted: set[tuple[int, int]]) -> int:
    """Bytes of a regular file, 0 for anything else and for further hard links."""
    try:
        st = os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(st.st_mode) or (st.st_nlink > 1 and (st.st_dev, st.st_ino) in counted):
        return 0
    if st.st_nlink > 1:
        counted.add((st.st_dev, st.st_ino))
    return st.st_size
