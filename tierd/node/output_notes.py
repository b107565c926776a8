"""Which changes of files the controller must hear of: those of outputs. Keeps nothing; the journal does.

What does not fit into the journal is counted as dropped; the controller's scan of the outputs root finds it.

Contract: trio thread; never awaits, never raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tierd.node.journal import Changed, Journal
from tierd.outputs import Output, below, parse
from tierd.stubs import Origin


class OutputNotes:
    """See the module. `root` is the outputs root, relative to the source; without one nothing is noted."""

    def __init__(self, journal: Journal, root: bytes | None, dropped: Callable[[], None] = lambda: None) -> None:
        self._journal = journal
        self._root = root
        self._dropped = dropped

    def written(self, path: bytes, at_ns: int) -> None:
        """The file at `path` was closed after something was written to it, or was renamed to there."""
        self._note(path, at_ns, removed=False)

    def removed(self, path: bytes, at_ns: int, ended: Origin | None = None) -> None:
        """The name `path` was removed; `ended` is what a cold file stood for that had its last name there."""
        self._note(path, at_ns, removed=True, ended=ended)

    def _note(self, path: bytes, at_ns: int, *, removed: bool, ended: Origin | None = None) -> None:
        within = below(path, self._root) if self._root is not None else None
        if within is None or not isinstance(parse(within), Output):
            return
        version = ended.version if ended is not None and _name_of(ended) == path else 0
        if not self._journal.opened(Changed(within, at_ns, removed, version)):
            self._dropped()


def _name_of(origin: Origin) -> bytes:
    """Where the file was of which the object was made; a cold file may have been renamed since."""
    return os.fsencode(origin.model_id) + b"/" + origin.path
