"""Which changes of files the controller must hear of: those of outputs. Keeps nothing; the journal does.

What does not fit into the journal is counted as dropped; the controller's scan of the outputs root finds it.

Contract: trio thread; never awaits, never raises.
"""

from __future__ import annotations

from collections.abc import Callable

from tierd.node.journal import Changed, Journal
from tierd.outputs import Output, below, parse


class OutputNotes:
    """See the module. `root` is the outputs root, relative to the source; without one nothing is noted."""

    def __init__(self, journal: Journal, root: bytes | None, dropped: Callable[[], None] = lambda: None) -> None:
        self._journal = journal
        self._root = root
        self._dropped = dropped

    def written(self, path: bytes, at_ns: int) -> None:
        """The file at `path` was closed after something was written to it, or was renamed to there."""
        self._note(path, at_ns, removed=False)

    def removed(self, path: bytes, at_ns: int) -> None:
        """The name `path` was removed."""
        self._note(path, at_ns, removed=True)

    def _note(self, path: bytes, at_ns: int, *, removed: bool) -> None:
        within = below(path, self._root) if self._root is not None else None
        if within is None or not isinstance(parse(within), Output):
            return
        if not self._journal.opened(Changed(within, at_ns, removed)):
            self._dropped()
