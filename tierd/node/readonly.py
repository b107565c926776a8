"""A read-only view of a directory: a detached bind mount, which has no name and goes with its descriptor.

A passthrough backing that was opened through it cannot be written by a pod, whatever flags the pod's open has:
the kernel opens the backing file anew with them, and the mount refuses (FUSE-NOTES, "Rules of the kernel").
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442
"""System call numbers, the same on all architectures: open_tree(2) since Linux 5.2, mount_setattr(2) since 5.12."""
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOUNT_ATTR = struct.Struct("=QQQQ")
"""attr_set, attr_clr, propagation, userns_fd"""
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4


def open_view(directory: Path) -> tuple[int, bool]:
    """A descriptor to open files of `directory` by, and whether it is read-only; needs root to be so."""
    try:
        return _detached(directory), True
    except OSError as error:
        if os.geteuid() == 0:
            log.warning("read_only_view_refused", directory=str(directory), reason=error.strerror)
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), False


def _detached(directory: Path) -> int:
    path = os.fsencode(directory)
    fd = _call(_SYS_OPEN_TREE, _AT_FDCWD, path, _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    wanted = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0)
    try:
        _call(_SYS_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, wanted, len(wanted))
    except OSError:
        os.close(fd)
        raise
    return fd


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
