"""Which models lie in the source and how large they are: a walk over the models roots, for people who ask.

Blocking, for worker threads; not on any read path. Sizes count regular files once (a Hugging Face
tree's bytes are its `blobs`; its `snapshots` are links to them).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from tierd.units import looks_like_model, model_of, root_of

log = structlog.get_logger(__name__)

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
