"""Answers LOOKUP, OPEN and RELEASE of hot files on the thread that read them from the device; see `hot.py`.

Such an answer may wait for the source. So one of those threads always stays free, and a request that takes too long is
taken away from its thread and goes the long way, which has a deadline and other answers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from tierd.node.messages import (
    FOPEN_NOFLUSH,
    FOPEN_PASSTHROUGH,
    ID,
    IN_HEADER,
    LOOKUP,
    OPEN,
    OPEN_IN_FLAGS,
    OPEN_OUT,
    RELEASE,
)

SHORT: Final = frozenset({LOOKUP, OPEN, RELEASE})
LATE_SECONDS: Final = 0.5
"""How long a thread may be at a request before that goes the long way."""


class ShortWay(Protocol):
    """Answers requests for hot files where they are read; None or False for the long way. See `hot.py`.

    `claim` says, at the last moment, whether the answer is still wanted: one that took too long goes the long way.
    """

    def lookup(self, parent_id: int, name: bytes, claim: Callable[[], bool]) -> bytes | None:
        """The body of the answer to LOOKUP."""

    def open(self, node_id: int, uid: int, pid: int, claim: Callable[[], bool]) -> tuple[int, int] | None:
        """Handle and backing ID for an OPEN that reads."""

    def release(self, fh: int) -> bool:
        """True if the handle was one of these."""


class ShortAnswers:
    """See the module. `at_once` is how many threads may be at such requests."""

    def __init__(self, way: ShortWay, at_once: int) -> None:
        self._way = way
        self._at_once = at_once
        self._now = 0
        self._lock = threading.Lock()
        self._begun: dict[int, tuple[float, bytes]] = {}
        """Requests that threads are at, by unique: since when, and the message."""

    def answer(self, message: memoryview) -> bytes | None:
        """The body of the answer, or None for the long way. Raises TookTooLong if it went there meanwhile."""
        _, opcode, unique, node_id, uid, _, pid, _, _ = IN_HEADER.unpack_from(message)
        body = message[IN_HEADER.size :]
        if opcode == RELEASE:
            return b"" if self._way.release(*ID.unpack_from(body)) else None
        if not self._enter():
            return None
        self._begun[unique] = (time.monotonic(), bytes(message))
        claimed = False

        def claim() -> bool:
            nonlocal claimed
            claimed = self._begun.pop(unique, None) is not None
            return claimed

        try:
            if opcode == LOOKUP:
                answer = self._way.lookup(node_id, bytes(body[:-1]), claim)
            else:
                answer = self._open(node_id, uid, pid, body, claim)
            if not claimed and not claim():
                raise TookTooLong
        finally:
            self._leave()
        return answer

    def take_late(self) -> list[bytes]:
        """Requests that have taken too long: the caller's from now on."""
        late = time.monotonic() - LATE_SECONDS
        overdue = [unique for unique, (since, _) in list(self._begun.items()) if since < late]
        return [found[1] for unique in overdue if (found := self._begun.pop(unique, None)) is not None]

    def _open(self, node_id: int, uid: int, pid: int, body: memoryview, claim: Callable[[], bool]) -> bytes | None:
        (flags,) = OPEN_IN_FLAGS.unpack_from(body)
        reading = flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY
        opened = self._way.open(node_id, uid, pid, claim) if reading else None
        return OPEN_OUT.pack(opened[0], FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, opened[1]) if opened else None

    def _enter(self) -> bool:
        with self._lock:
            if self._now >= self._at_once:
                return False
            self._now += 1
        return True

    def _leave(self) -> None:
        with self._lock:
            self._now -= 1


class TookTooLong(Exception):
    """The request was taken away, and is answered elsewhere."""
