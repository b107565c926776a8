"""Who is wanted how much: heat, last access, leases and pins of models, in memory, for decisions that cannot wait.

The index keeps heat, accesses and pins across restarts; this is its working copy.

Contract: any thread; one lock, never held while waiting.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tierd.policy import heat_now

_MODELS_MAX = 100_000
"""Models remembered; the least recently accessed is forgotten first (the index still knows it)."""


class _Known(NamedTuple):
    heat: float
    heat_at_ns: int
    last_access_ns: int


class Leases:
    """How many files of each model are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[bytes, int] = {}

    def take(self, model: bytes) -> None:
        """A file of the model was opened."""
        with self._lock:
            self._held[model] = self._held.get(model, 0) + 1

    def give_back(self, model: bytes) -> None:
        """It was closed."""
        with self._lock:
            left = self._held[model] - 1
            if left:
                self._held[model] = left
            else:
                del self._held[model]

    def holds(self, model: bytes) -> bool:
        """True if a file of the model is open."""
        return model in self._held

    def __len__(self) -> int:
        return len(self._held)


class Usage:
    """See the module. `rows` are (model, heat, heat_at_ns, last_access_ns) and `pins` models, as the index has them."""

    def __init__(
        self,
        rows: Iterable[tuple[bytes, float, int, int]] = (),
        pins: Iterable[bytes] = (),
        *,
        half_life_s: float,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.half_life_s = half_life_s
        self.leases = Leases()
        self.now_ns = now_ns
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._pins = set(pins)
        for model, heat, heat_at_ns, last_access_ns in sorted(rows, key=lambda row: row[3]):
            self._known[model] = _Known(heat, heat_at_ns, last_access_ns)
        self._shrink()

    def note(self, model: bytes, loads: int, at_ns: int) -> None:
        """A model was accessed, and that many loads of it began."""
        with self._lock:
            known = self._known.get(model, _Known(0.0, at_ns, 0))
            if loads:
                heat = heat_now(known.heat, known.heat_at_ns, at_ns, self.half_life_s) + loads
                known = _Known(heat, max(at_ns, known.heat_at_ns), known.last_access_ns)
            self._known[model] = known._replace(last_access_ns=max(at_ns, known.last_access_ns))
            self._known.move_to_end(model)
            self._shrink()

    def arrived(self, model: bytes) -> None:
        """Bytes of a model came to the node: what was just fetched is not what to evict first."""
        self.note(model, 0, self.now_ns())

    def heat(self, model: bytes) -> float:
        """Loads of the model, decayed to now."""
        known = self._known.get(model)
        return heat_now(known.heat, known.heat_at_ns, self.now_ns(), self.half_life_s) if known else 0.0

    def last_access_ns(self, model: bytes) -> int:
        """When the model was accessed last, 0 if never."""
        known = self._known.get(model)
        return known.last_access_ns if known else 0

    def hottest(self, count: int) -> list[bytes]:
        """The models with the most heat, and all that are pinned."""
        with self._lock:
            known = list(self._known.items())
            pins = set(self._pins)
        now = self.now_ns()
        known.sort(key=lambda item: -heat_now(item[1].heat, item[1].heat_at_ns, now, self.half_life_s))
        return sorted(pins) + [model for model, _ in known[:count] if model not in pins]

    def pin(self, model: bytes, pinned: bool) -> None:
        """Set or take away a pin; the caller tells the index."""
        with self._lock:
            (self._pins.add if pinned else self._pins.discard)(model)

    def pinned(self, model: bytes) -> bool:
        """True if somebody wants the model kept."""
        return model in self._pins

    def pins(self) -> set[bytes]:
        """All pinned models."""
        with self._lock:
            return set(self._pins)

    def _shrink(self) -> None:
        while len(self._known) > _MODELS_MAX:
            self._known.popitem(last=False)
