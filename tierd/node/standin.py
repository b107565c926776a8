"""Answers the kernel while no daemon can be kept alive: with an error, so that nobody waits for ever. Stdlib only.

What the kernel says once and never repeats (it forgot a node, it closed a file) is kept for the next daemon.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from contextlib import suppress
from typing import Final

from tierd.node.device import RESEND

_IN_HEADER = struct.Struct("=IIQ")
_FORGET, _BATCH_FORGET, _INTERRUPT, _RELEASE, _RELEASEDIR = 2, 42, 36, 18, 29
_TOLD_ONCE = frozenset({_FORGET, _BATCH_FORGET, _RELEASE, _RELEASEDIR})
_UNANSWERED = frozenset({_FORGET, _BATCH_FORGET, _INTERRUPT})
_REQUEST_BYTES_MAX = (1 << 20) + 4096
_UNMOUNTED_SECONDS = 0.05
MISSED_BYTES_MAX: Final = 1 << 26


class StandIn:
    """Reads requests of a device. `missed` is a memfd with those that the next daemon must see, one after the other."""

    def __init__(self, device: int) -> None:
        self._device = device
        self.missed = os.memfd_create("tierd-missed", os.MFD_CLOEXEC)
        self._size = 0
        with suppress(OSError):
            os.write(device, RESEND)

    def answer(self) -> None:
        """Read one request and answer it."""
        try:
            message = os.read(self._device, _REQUEST_BYTES_MAX)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted; the next daemon sees so, too
                time.sleep(_UNMOUNTED_SECONDS)
            return
        _, opcode, unique = _IN_HEADER.unpack_from(message)
        if opcode in _TOLD_ONCE and self._size < MISSED_BYTES_MAX:
            self._size += os.write(self.missed, message)
        if opcode not in _UNANSWERED:
            number = 0 if opcode in _TOLD_ONCE else -errno.EIO
            with suppress(FileNotFoundError):  # interrupted: nobody waits any longer
                os.write(self._device, struct.pack("=IiQ", 16, number, unique))


def missed(fd: int) -> list[bytes]:
    """The requests that a stand-in kept."""
    data, found = os.pread(fd, MISSED_BYTES_MAX + _REQUEST_BYTES_MAX, 0), []
    while data:
        size = _IN_HEADER.unpack_from(data)[0]
        found.append(data[:size])
        data = data[size:]
    return found
