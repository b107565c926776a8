"""OPENs that libfuse is at, and what becomes of those whose caller gave up: Ctrl-C works on a file that does not open.

The kernel waits for the answer of a request that it has sent, whatever signal came, but says so by INTERRUPT, which
pyfuse3 does not handle. So an OPEN that has waited for a while is answered EINTR here, and when libfuse opens the file
after all, it is told to release it.

Not at once: a signal need not mean that somebody gave up (timers, Go's runtime), and no program expects EINTR from an
open that takes a moment.

Contract: any thread; one lock. Whoever takes a request out (`answered`, `take_given_up`) answers it.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import Final

from tierd.node.messages import IN_HEADER, RELEASE

GRACE_SECONDS: Final = 1.0

_RELEASE_IN = struct.Struct("=QIIQ")
"""struct fuse_release_in of include/uapi/linux/fuse.h: fh, flags, release_flags, lock_owner."""


class WaitingOpens:
    """See the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[float, int]] = {}
        """By unique: since when, and the node."""
        self._interrupted: set[int] = set()
        self._given_up: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._given_up)

    def sent(self, unique: int, node_id: int) -> None:
        """An OPEN goes to libfuse."""
        with self._lock:
            self._waiting[unique] = (time.monotonic(), node_id)

    def interrupted(self, unique: int) -> None:
        """Its caller got a signal."""
        with self._lock:
            if unique in self._waiting:
                self._interrupted.add(unique)

    def take_given_up(self) -> list[int]:
        """OPENs to answer EINTR now."""
        if not self._interrupted:
            return []
        late = time.monotonic() - GRACE_SECONDS
        with self._lock:
            taken = [unique for unique in self._interrupted if self._waiting[unique][0] < late]
            for unique in taken:
                self._given_up[unique] = self._waiting.pop(unique)[1]
                self._interrupted.discard(unique)
        return taken

    def answered(self, unique: int) -> int | None:
        """libfuse answered: None if the kernel shall hear of it, else the node, for `release_message`."""
        with self._lock:
            self._interrupted.discard(unique)
            if self._waiting.pop(unique, None) is not None:
                return None
            return self._given_up.pop(unique, None)


def release_message(unique: int, node_id: int, fh: int) -> bytes:
    """A RELEASE as the kernel sends it; the kernel has forgotten `unique`, and ignores the answer."""
    body = _RELEASE_IN.pack(fh, 0, 0, 0)
    return IN_HEADER.pack(IN_HEADER.size + len(body), RELEASE, unique, node_id, 0, 0, 0, 0, 0) + body
