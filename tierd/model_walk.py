"""The walk that finds the files of models below the models roots of a source, cold ones too. Knows no sizes.

Blocking, for worker threads; shared by node and controller. The tree may change under it: what comes or goes
meanwhile is found or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import structlog

from tierd.stubs import RESERVED
from tierd.units import looks_like_model, model_of, root_of

log = structlog.get_logger(__name__)

FILES_MAX = 2_000_000
"""Where a walk gives up."""
_Cold = TypeVar("_Cold")


class Found(NamedTuple, Generic[_Cold]):
    """A file, or whatever else has a name, of `model`, at the absolute `path`; what is known of it if it is cold."""

    model: bytes
    path: bytes
    cold: _Cold | None


class ModelWalk(Generic[_Cold]):
    """See the module. `cold_in(directory)` tells of the cold files there that no file hides.

    `complete` is False after a walk that met `files_max` names or a directory that it could not read.
    """

    def __init__(
        self,
        base: bytes,
        roots: Sequence[bytes],
        cold_in: Callable[[bytes], Mapping[bytes, _Cold]],
        files_max: int = FILES_MAX,
    ) -> None:
        self._base = base
        self._roots = roots
        self._cold_in = cold_in
        self._files_max = files_max
        self.complete = True
        self.files = 0

    def __iter__(self) -> Iterator[Found[_Cold]]:
        for root in dict.fromkeys(self._roots):
            if root_of(root, [other for other in self._roots if other != root]) is None:
                yield from self._below(root)

    def _below(self, root: bytes) -> Iterator[Found[_Cold]]:
        marked: set[bytes] = set()
        for directory, below, names in os.walk(os.path.join(self._base, root), onerror=self._unreadable):
            cold = self._cold_in(directory) if RESERVED in below else {}
            below[:] = [name for name in below if name != RESERVED]
            relative = os.path.relpath(directory, self._base)
            if looks_like_model([*names, *cold]):
                marked.add(relative)
            for name in (*names, *cold):
                if self.files >= self._files_max:
                    self.complete = False
                    return
                self.files += 1
                path = os.path.join(relative, name) if relative != b"." else name
                model = model_of(path, self._roots, marked.__contains__)
                if model is not None:
                    yield Found(model, os.path.join(directory, name), cold.get(name))

    def _unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            log.warning("catalog_unreadable", reason=str(error))
            self.complete = False
