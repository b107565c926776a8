"""How much one user may bring from the object store: models at a time, and bytes an hour. Brings nothing itself.

Who is beyond it still reads: a range at a time, as it asks. Only who writes to a cold file needs all of its bytes: it
waits for its turn, and has EDQUOT once its bytes of the hour are used up: open(2) and write(2) name that errno for a
user's own limit, while EAGAIN of a plain file is taken for a defect, or tried again at once and for ever.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

HOUR_S: Final = 3600.0
USERS_MAX: Final = 4096
"""Users that are remembered; beyond them the longest idle is forgotten, whose budget is full again by then."""
UNKNOWN_USER: Final = -1
"""Whoever had a file open when the daemon before this one ended."""
_BEGIN_S: Final = 10.0
"""Within this time a model that may be brought is on its way, or will never be."""


class _User:
    """What is left of a budget that refills evenly, as of `at`; models under way."""

    __slots__ = ("at", "left", "models", "turns")

    def __init__(self, left: float, at: float, turns: int) -> None:
        self.left = left
        self.at = at
        self.models: dict[bytes, float] = {}
        self.turns = trio.CapacityLimiter(turns)


class RecallBounds:
    """See the module. `is_coming` tells of a model whether any of it is still on its way; `refused` hears which bound
    was hit (`at_once`, `bytes`). A bound of 0 is none.

    Contract: any thread; `turn` in the trio thread. `is_coming` is called without the lock.
    """

    def __init__(
        self,
        models_at_once: int,
        bytes_an_hour: int,
        *,
        is_coming: Callable[[bytes], bool] = lambda model: False,
        refused: Callable[[str], None] = lambda bound: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models_at_once = models_at_once
        self._bytes_an_hour = bytes_an_hour
        self._is_coming = is_coming
        self._refused = refused
        self._clock = clock
        self._lock = threading.Lock()
        self._users: dict[int, _User] = {}

    def may_load(self, uid: int, model: bytes, size: Callable[[], int]) -> bool:
        """Whether a user may bring a model; `size` tells how many bytes that are. What is on its way may go on."""
        with self._lock:
            known = dict(self._user(uid).models)
        ended = {each for each, at in known.items() if self._clock() - at >= _BEGIN_S and not self._is_coming(each)}
        if known.keys() - ended >= {model}:
            return True
        wanted = size()
        with self._lock:
            user = self._user(uid)
            for each in ended:
                user.models.pop(each, None)
            bound = self._bound_of(user, model, wanted)
        if bound:
            self._refused(bound)
        return not bound

    def _bound_of(self, user: _User, model: bytes, size: int) -> str:
        """What keeps a model from being brought; empty if nothing does, and then it counts."""
        if model in user.models:  # by another of its files, this moment
            return ""
        if self._models_at_once and len(user.models) >= self._models_at_once:
            return "at_once"
        if not self._spend(user, size):
            return "bytes"
        user.models[model] = self._clock()
        return ""

    @asynccontextmanager
    async def turn(self, uid: int, size: int) -> AsyncIterator[None]:
        """Bring a file of that size into the source. Waits for the user's turn. Raises OSError (EDQUOT)."""
        with self._lock:
            user = self._user(uid)
            enough = self._spend(user, size)
        if not enough:
            self._refused("bytes")
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        async with user.turns:
            yield

    def _spend(self, user: _User, size: int) -> bool:
        """What is larger than a whole budget may come when all of that is left, else it never could."""
        if not self._bytes_an_hour:
            return True
        if user.left < min(size, self._bytes_an_hour):
            return False
        user.left -= size
        return True

    def _user(self, uid: int) -> _User:
        now = self._clock()
        user = self._users.pop(uid, None) or _User(self._bytes_an_hour, now, self._models_at_once or USERS_MAX)
        user.left = min(user.left + (now - user.at) * self._bytes_an_hour / HOUR_S, self._bytes_an_hour)
        user.at = now
        self._users[uid] = user  # the longest idle come first
        if len(self._users) > USERS_MAX:
            self._users.pop(next(iter(self._users)))
        return user
