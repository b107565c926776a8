"""Backing files of FUSE passthrough: which node's bytes the kernel reads by itself, and from where.

The kernel allows one backing per inode at a time, and the ID is the identity (FUSE-NOTES, "Rules of the kernel"):
so a node's backing is shared by all its passthrough opens and closed after the last one.

Contract: used from the trio thread only.
"""

from __future__ import annotations

import errno
import fcntl
import struct

import structlog

log = structlog.get_logger(__name__)

_BACKING_OPEN = (1 << 30) | (16 << 16) | (229 << 8) | 1
_BACKING_CLOSE = (1 << 30) | (4 << 16) | (229 << 8) | 2
"""FUSE_DEV_IOC_BACKING_OPEN and _CLOSE, include/uapi/linux/fuse.h since Linux 6.9."""
_BACKING_MAP = struct.Struct("=iIQ")

BACKINGS_MAX = 16_384
"""Backings at once; each pins an open file in the kernel. More opens are served through the daemon."""


class Backings:
    """Backing IDs by node ID, with the number of opens that use each.

    Invariant: an ID is closed only after the reply to the RELEASE of its last user could be sent.
    """

    def __init__(self, device: int) -> None:
        self._device = device
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
            fcntl.ioctl(self._device, _BACKING_CLOSE, struct.pack("=I", backing_id))
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENOTCONN, errno.EBADF, errno.EPERM):
                log.warning("backing_not_closed", node_id=node_id, reason=error.strerror)

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
