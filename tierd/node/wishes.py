"""Cold models that are being loaded here, until the controller has been asked to make them hot. Sends nothing itself.

Best effort, and bounded: a model that is forgotten is asked for by its next load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Final

from tierd.promote_wishes import MODELS_MAX
from tierd.statistics import model_id_of

WAITING_MAX: Final = 256


class Wishes:
    """See the module. `model_of` tells the model of a path, and may block.

    Contract: any thread. A model waits once, however many of its files are loaded.
    """

    def __init__(self, model_of: Callable[[bytes], bytes | None] = lambda path: None) -> None:
        self._model_of = model_of
        self._lock = threading.Lock()
        self._waiting: dict[str, None] = {}
        self.sent_count = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def loaded(self, path: bytes) -> None:
        """Somebody loads the cold file at `path`. Blocking."""
        model = self._model_of(path)
        name = model_id_of(model) if model is not None else None
        if name is None:
            return  # no catalogue can name it
        with self._lock:
            if name in self._waiting:
                return
            if len(self._waiting) >= WAITING_MAX:
                self.dropped += 1
                return
            self._waiting[name] = None

    def due(self) -> tuple[str, ...]:
        """Those that are asked for next. They wait until they were `sent`."""
        with self._lock:
            return tuple(self._waiting)[:MODELS_MAX]

    def sent(self, models: Collection[str]) -> None:
        """The controller can read it now."""
        with self._lock:
            for model in models:
                self._waiting.pop(model, None)
            self.sent_count += len(models)
