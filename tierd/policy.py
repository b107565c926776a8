"""Pure decisions: opens grouped into loads. No clock, no files; `at` and `now` are arguments.

All times are nanoseconds since the epoch.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass

NS = 1_000_000_000


@dataclass(slots=True)
class _Run:
    """The load that a model is in, or was last in."""

    active: int
    last_ns: int


class LoadGrouper:
    """Groups the opens of each model into loads: first open to last close, plus an idle gap.

    Invariant: a run with `active > 0` is never forgotten; idle runs are, at most `capacity` are kept
    (the least recently used go first; forgetting one can only count a later open as a new load).
    """

    def __init__(self, idle_gap_s: float, capacity: int = 10_000) -> None:
        self._gap_ns = int(idle_gap_s * NS)
        self._capacity = capacity
        self._runs: OrderedDict[bytes, _Run] = OrderedDict()

    def opened(self, model: bytes, at_ns: int) -> bool:
        """Note an open; True if it begins a new load."""
        run = self._runs.get(model)
        begins = run is None or (run.active == 0 and at_ns - run.last_ns > self._gap_ns)
        if run is None or begins:
            run = self._runs[model] = _Run(0, at_ns)
        run.active += 1
        run.last_ns = max(run.last_ns, at_ns)
        self._runs.move_to_end(model)
        self._shrink()
        return begins

    def closed(self, model: bytes, at_ns: int) -> None:
        """Note the close of a descriptor whose open was noted."""
        run = self._runs.get(model)
        if run is None:
            return
        run.active = max(0, run.active - 1)
        run.last_ns = max(run.last_ns, at_ns)
        self._runs.move_to_end(model)
        self._shrink()

    def active(self, model: bytes) -> int:
        """How many descriptors of the model are open now."""
        run = self._runs.get(model)
        return run.active if run else 0

    def __len__(self) -> int:
        return len(self._runs)

    def _shrink(self) -> None:
        surplus = len(self._runs) - self._capacity
        if surplus <= 0:
            return
        idle = (model for model, run in self._runs.items() if run.active == 0)
        for model in list(itertools.islice(idle, surplus)):
            del self._runs[model]
