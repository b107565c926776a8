"""Answers the kernel while no daemon can be kept alive: with an error, so that nobody waits for ever. Stdlib only.

What the kernel says once and never repeats (it forgot a node, it closed a file, it never got an answer) goes into the
ledger, as a daemon would have written it: the next one finds it there, and if that dies, too, so does the one after it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from contextlib import suppress

from tierd.node.device import RESEND
from tierd.node.ledger import RESENT, Ledger
from tierd.node.messages import BATCH_FORGET, FORGET, ID, IN_HEADER, INTERRUPT, OUT_HEADER, RELEASE, forgotten

_RELEASEDIR = 29
_REQUEST_BYTES_MAX = (1 << 20) + 4096
_UNMOUNTED_SECONDS = 0.05
_CLONE = (2 << 30) | (4 << 16) | (229 << 8) | 0
"""FUSE_DEV_IOC_CLONE, include/uapi/linux/fuse.h."""


class StandIn:
    """Reads requests of a device. `fileno` is to be polled, and `answer` called if there is something to read."""

    def __init__(self, device: int, ledger: Ledger) -> None:
        self._ledger = ledger
        self._device = _clone(device)
        with suppress(OSError):
            os.write(self._device, RESEND)

    def fileno(self) -> int:
        """What it reads."""
        return self._device

    def close(self) -> None:
        """Somebody else answers from now on."""
        os.close(self._device)
        self._ledger.close()

    def answer(self) -> None:
        """Read one request and answer it."""
        try:
            message = memoryview(os.read(self._device, _REQUEST_BYTES_MAX))
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted; the next daemon sees so, too
                time.sleep(_UNMOUNTED_SECONDS)
            return None
        _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
        if unique & RESENT:
            self._ledger.unsaid(unique)
        number = -errno.EIO
        if opcode in (FORGET, BATCH_FORGET):
            return self._ledger.forgot(forgotten(opcode, message))
        if opcode == INTERRUPT:
            return None
        if opcode in (RELEASE, _RELEASEDIR):
            self._ledger.closed(ID.unpack_from(message, IN_HEADER.size)[0])
            number = 0
        with suppress(FileNotFoundError):  # interrupted: nobody waits any longer
            os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size, number, unique))
        return None


def _clone(device: int) -> int:
    """A descriptor of the same connection that does not block: a request may be gone between poll(2) and read(2), and
    the keeper waits for nothing. One that blocks if there is no other."""
    try:
        own = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return os.dup(device)
    try:
        fcntl.ioctl(own, _CLONE, struct.pack("=I", device))
    except OSError:
        os.close(own)
        return os.dup(device)
    return own
