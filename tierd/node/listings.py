"""Which files models have, as the source was walked last: whoever asks again and again does not walk it each time.

Contract: any thread; walks block, and are made without the lock.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tierd.node.catalog import SourceFile

_FILES_MAX: Final = 200_000
"""Files remembered; the listings walked longest ago are forgotten first."""


class _Walked(NamedTuple):
    files: Sequence[SourceFile]
    at: float


class Listings:
    """See the module. `files_of(model)` walks; what it raises is raised, and remembered by nobody."""

    def __init__(
        self, files_of: Callable[[bytes], Sequence[SourceFile]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._files_of = files_of
        self._clock = clock
        self._lock = threading.Lock()
        self._walked: OrderedDict[bytes, _Walked] = OrderedDict()
        self._files = 0

    def walk(self, model: bytes) -> Sequence[SourceFile]:
        """The files of a model now, in load order; empty if it is not there. Raises OSError."""
        at = self._clock()
        files = self._files_of(model)
        with self._lock:
            self._forget(model)
            self._walked[model] = _Walked(files, at)
            self._files += len(files) + 1
            while self._files > _FILES_MAX:
                self._forget(next(iter(self._walked)))
        return files

    def recent(self, model: bytes, age_s: float) -> Sequence[SourceFile]:
        """The same as it was at most `age_s` ago. Raises OSError."""
        known = self._walked.get(model)
        if known is not None and self._clock() - known.at < age_s:
            return known.files
        return self.walk(model)

    def _forget(self, model: bytes) -> None:
        known = self._walked.pop(model, None)
        if known is not None:
            self._files -= len(known.files) + 1
