"""Backing files of FUSE passthrough: which node's bytes the kernel reads by itself, and from where.

The kernel allows one backing per inode at a time, and the ID is the identity (FUSE-NOTES, "Rules of the kernel"):
so a node's backing is shared by all its passthrough opens and closed after the last one.

Contract: used from the trio thread only.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Mapping
from contextlib import suppress

import structlog

from tierd.node.ledger import Ledger

log = structlog.get_logger(__name__)

_BACKING_OPEN = (1 << 30) | (16 << 16) | (229 << 8) | 1
_BACKING_CLOSE = (1 << 30) | (4 << 16) | (229 << 8) | 2
"""FUSE_DEV_IOC_BACKING_OPEN and _CLOSE, include/uapi/linux/fuse.h since Linux 6.9."""
_BACKING_MAP = struct.Struct("=iIQ")

_UNKNOWN_MAX = 4

BACKINGS_MAX = 16_384
"""Backings at once; each pins an open file in the kernel. More opens are served through the daemon."""


class Backings:
    """Backing IDs by node ID, with the number of opens that use each.

    Invariant: an ID is closed only after the reply to the RELEASE of its last user could be sent.
    """

    def __init__(self, device: int, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger
        self._held: dict[int, tuple[int, int]] = {}
        self.refused = 0
        """Opens that had to go through the daemon because the kernel refused a backing, or there were too many."""

    def __len__(self) -> int:
        return len(self._held)

    def acquire(self, node_id: int, fd: int) -> int | None:
        """The backing ID for one more open of the node, made from `fd` if it has none; None if refused."""
        held = self._held.get(node_id)
        if held is None:
            backing_id = self._open(fd)
            if backing_id is None:
                self.refused += 1
                return None
            self._ledger.backing(node_id, backing_id)
            held = (backing_id, 0)
        self._held[node_id] = (held[0], held[1] + 1)
        return held[0]

    def release(self, node_id: int) -> None:
        """One open fewer."""
        backing_id, users = self._held[node_id]
        if users > 1:
            self._held[node_id] = (backing_id, users - 1)
            return
        del self._held[node_id]
        try:
            self._close(backing_id)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENOTCONN, errno.EBADF, errno.EPERM, errno.ENOENT):
                log.warning("backing_not_closed", node_id=node_id, reason=error.strerror)
        self._ledger.backing(node_id, 0)

    def _close(self, backing_id: int) -> None:
        fcntl.ioctl(self._device, _BACKING_CLOSE, struct.pack("=I", backing_id))

    def inherit(self, left: Mapping[int, int], users: Mapping[int, int], last_id: int) -> None:
        """Take over the backings of the daemon before this one, by node; close those that no open uses any longer.

        One more may have been opened and not written down, or closed: the kernel gives IDs out in order.
        """
        for node_id, backing_id in left.items():
            self._held[node_id] = (backing_id, users.get(node_id, 0))
        for node_id in [node_id for node_id in left if not users.get(node_id)]:
            self._held[node_id] = (left[node_id], 1)
            self.release(node_id)
        for backing_id in range(last_id + 1, last_id + 1 + _UNKNOWN_MAX):
            with suppress(OSError):
                self._close(backing_id)
                self._ledger.backing(0, backing_id)

    def _open(self, fd: int) -> int | None:
        if len(self._held) >= BACKINGS_MAX:
            return None
        request = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        try:
            return int(fcntl.ioctl(self._device, _BACKING_OPEN, request, True))
        except OSError as error:
            if not self.refused:
                log.warning("backing_refused", reason=error.strerror, cost="such files are read through the daemon")
            return None
