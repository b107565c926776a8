"""Ends a process between any two effects of a move."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext


class Killed(BaseException):
    """As if the process had gone."""


class Fate:
    """Ends the process at the effect with a given number, 0 for none; `effects` are those it came by.

    `alone`: whoever comes by one waits until `before` has ended for all others.
    """

    def __init__(
        self,
        last: int = 0,
        before: Callable[[str], None] = lambda effect: None,
        *,
        really: bool = False,
        alone: bool = False,
    ) -> None:
        self._last = last
        self._before = before
        self._really = really
        self._lock = threading.Lock()
        self._alone = threading.Lock() if alone else nullcontext()
        self.effects: list[str] = []

    def __call__(self, effect: str) -> None:
        """Just before an effect, or just after it."""
        with self._alone:
            number = self._count(effect)
            self._before(effect)
        if number == self._last:
            if self._really:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed

    def _count(self, effect: str) -> int:
        with self._lock:
            if self._last and len(self.effects) >= self._last:
                raise Killed  # the other threads of a process end with it
            self.effects.append(effect)
            return len(self.effects)
