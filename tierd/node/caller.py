"""Who is calling: acting with a pod's user and group, and naming the pod behind a process ID."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2

_POD = re.compile(rb"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
_CGROUP_BYTES_MAX = 8192


def keep_capabilities() -> None:
    """Let later setfsuid(2) calls of this process keep its capabilities (SECBIT_NO_SETUID_FIXUP, capabilities(7)).

    Call once as root, before any thread starts: permission was already checked by the kernel
    (`default_permissions`), so creating as the caller must not fail for a group that only the caller has.
    """
    if _libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl(PR_SET_SECUREBITS)")


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """What this thread creates belongs to `uid` and `gid`, atomically (setfsuid(2) is per thread).

    Without root it changes nothing: the daemon then can only create as itself.
    """
    if os.geteuid() != 0 or (uid == 0 and gid == 0):
        yield
        return
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


def pod_of(pid: int) -> str | None:
    """The UID of the Kubernetes pod that process `pid` runs in, from its cgroup path, or None where not visible.

    Matches the cgroupfs and systemd drivers of the kubelet (`kubepods/.../pod<UID>`,
    `kubepods-burstable-pod<UID with _>.slice`). Without hostPID the kernel reports 0 for foreign callers.
    """
    if pid <= 0:
        return None
    try:
        with Path(f"/proc/{pid}/cgroup").open("rb") as file:
            match = _POD.search(file.read(_CGROUP_BYTES_MAX))
    except OSError:
        return None
    return match.group(1).decode("ascii").replace("_", "-") if match else None
