"""One request, made until it succeeds or is not worth another try. Which faults there are: see `faults.py`.

Contract: any thread; waiting ends when the store is closed. Only the request itself belongs into a try: errors of the
caller's own file would be taken for faults of the network.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tierd.objects.faults import FAULTS, explain
from tierd.objects.pace import Stopping
from tierd.objects.retries import Schedule
from tierd.objects.store import ObjectStoreUnavailable, Place

Answer = TypeVar("Answer")


class Attempts:
    """See the module. `stopping` is set when the store is closed."""

    def __init__(
        self,
        schedule: Schedule,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._schedule = schedule
        self._stopping = stopping
        self._clock = clock
        self._draw = draw
        self._lock = threading.Lock()
        self.repeated = 0
        """Tries after the first one, of all requests together."""

    def run(self, place: Place, request: Callable[[], Answer], position: Callable[[], int] = lambda: 0) -> Answer:
        """The answer. Raises ObjectError, or what is no fault of the store's.

        Tries and their time are counted anew whenever one has moved `position`: what came need not come again.
        """
        began, at, failures = self._clock(), position(), 0
        try:
            while True:
                if self._stopping.is_set():
                    raise Stopping
                try:
                    return request()
                except FAULTS as error:
                    fault = explain(error)
                if position() != at:
                    began, at, failures = self._clock(), position(), 0
                failures += 1
                elapsed_s = self._clock() - began
                delay_s = self._schedule.delay_s(failures, elapsed_s, self._draw()) if fault.again else None
                if delay_s is None:
                    raise fault.as_error(place, failures)
                with self._lock:
                    self.repeated += 1
                self._stopping.wait(delay_s)
        except Stopping:
            raise ObjectStoreUnavailable(place, "tierd stops using it", hint="start it again") from None
