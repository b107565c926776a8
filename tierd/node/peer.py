"""A daemon as its keeper sees it, and when to start the next one. Standard library only."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from contextlib import suppress
from typing import Final

from tierd.node.packets import send

BEAT_SECONDS: Final = 20.0
"""A daemon that serves and says nothing for so long hangs."""
SEND_SECONDS: Final = 2
"""How long a keeper waits for one that does not take what it is told."""
START_SECONDS: Final = 120.0
"""One that starts may read a large index, and wait for its source, before it says that it is alive."""
DYING_SECONDS: Final = 1.0
"""How long the threads of a killed daemon may take to end."""
QUICK_SECONDS: Final = 1.0
QUICK_DEATHS_MAX: Final = 6
_BACK_OFF_SECONDS = 0.2
_BACK_OFF_SECONDS_MAX = 30.0


class Peer:
    """A connected daemon. `leave_by` is when it must have left, `leaving` that it means to; `code` how it said it ends.
    `pid` is None until it has told, 0 if the process is not in sight. Times are monotonic."""

    def __init__(self, sock: socket.socket, pid: int | None = None, ready_at: float = 0.0) -> None:
        self.sock, self.pid, self.ready_at, self.heard = sock, pid, ready_at, time.monotonic()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_SECONDS, 0))
        self.leave_by: float | None = None
        self.leaving = False
        self.code: int | None = None

    def dead(self, now: float) -> bool:
        """It is as good as dead. (That it has ended its socket tells, once its last thread is gone.)

        A thread that waits for a source that hangs cannot even be killed. But one that was killed in the middle of a
        call ends that first, and its successor must not begin before: so it is given a moment.
        """
        if self.leave_by is None and self._killed():
            self.leave_by = now + DYING_SECONDS
        silence_max = BEAT_SECONDS if self.ready_at else START_SECONDS
        return now - self.heard > silence_max or (self.leave_by is not None and now > self.leave_by)

    def _killed(self) -> bool:
        """Its first thread has ended, or would if it did not hang in the kernel: SIGKILL waits for it, proc(5)."""
        with suppress(OSError), open(f"/proc/{self.pid}/status", "rb") as file:
            told = dict(line.split(b":", 1) for line in file)
            pending = int(told[b"SigPnd"], 16) | int(told[b"ShdPnd"], 16)
            return told[b"State"].split()[0] in (b"Z", b"X") or bool(pending >> (signal.SIGKILL - 1) & 1)
        return False  # not in sight

    def tell(self, message: bytes) -> None:
        """Send it something; that it is gone is seen elsewhere."""
        with suppress(OSError):
            send(self.sock, message)

    def kill(self) -> None:
        """Make sure that it does nothing any more, as far as that can be had."""
        if self.pid is not None and self.pid > 0:  # 0 and -1 are other words for many processes
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Succession:
    """How long to wait before the next start: not at all, longer and longer after quick deaths in a row."""

    def __init__(self) -> None:
        self.quick_deaths = 0

    def died(self, served_seconds: float) -> float:
        """Seconds to wait; `served_seconds` is how long the daemon had been ready, 0 if it never was."""
        self.quick_deaths = self.quick_deaths + 1 if served_seconds < QUICK_SECONDS else 0
        if self.quick_deaths < 2:
            return 0.0
        return min(_BACK_OFF_SECONDS_MAX, _BACK_OFF_SECONDS * 2.0 ** min(self.quick_deaths - 2, 60))

    @property
    def hopeless(self) -> bool:
        """They die so quickly that somebody else should answer meanwhile."""
        return self.quick_deaths >= QUICK_DEATHS_MAX
