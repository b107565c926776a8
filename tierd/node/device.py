"""The FUSE device of a mount: made, resent to, and taken away. Standard library only."""

from __future__ import annotations

import array
import ctypes
import os
import socket
import stat
import struct
import subprocess

RESEND = struct.pack("=IiQ", 16, 7, 0)
"""FUSE_NOTIFY_RESEND: the kernel sends every request again that was read and not answered (Linux 6.9)."""

_libc = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2


class MountError(OSError):
    """It could not be mounted; `hint` says what may help."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def open_device(mountpoint: str, *, allow_other: bool) -> int:
    """Mount and return the FUSE device: by mount(2) as root, else through fusermount3(1). Raises MountError."""
    return _mount_as_root(mountpoint, allow_other) if os.geteuid() == 0 else _fusermount(mountpoint, allow_other)


def _mount_as_root(mountpoint: str, allow_other: bool) -> int:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mode = stat.S_IFMT(os.stat(mountpoint).st_mode)
    options = f"fd={device},rootmode={mode:o},user_id=0,group_id=0,default_permissions"
    options += ",allow_other" if allow_other else ""
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"tierd", os.fsencode(mountpoint), b"fuse.tierd", flags, options.encode()) != 0:
        reason = os.strerror(ctypes.get_errno())
        os.close(device)
        raise MountError(f"cannot mount {mountpoint}: {reason}", "mounting needs CAP_SYS_ADMIN")
    return device


def _fusermount(mountpoint: str, allow_other: bool) -> int:
    """fusermount3 hands the device over the socket named by _FUSE_COMMFD (libfuse, lib/mount.c)."""
    options = "default_permissions,fsname=tierd,subtype=tierd" + (",allow_other" if allow_other else "")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", options, "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MountError(f"cannot mount {mountpoint}: {' '.join(done.stderr.split())}", "is fuse3 installed?")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    device = array.array("i", ancillary[0][2])[0]
    os.set_inheritable(device, False)
    return device


def unmount(mountpoint: str) -> None:
    """Take the mount away, lazily if it is busy. What is not there, or not ours, stays as it is."""
    if not _is_ours(mountpoint):
        return
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH)
    else:
        subprocess.run(["fusermount3", "-u", "-z", mountpoint], capture_output=True, check=False)


def _is_ours(mountpoint: str) -> bool:
    """The topmost mount there is of our type, proc(5)."""
    name = os.fsencode(mountpoint).replace(b"\\", b"\\134")
    for character in b" \t\n":
        name = name.replace(bytes([character]), b"\\%03o" % character)
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [line.split(b" ") for line in file if line.split(b" ", 5)[4] == name]
    return bool(lines) and lines[-1][lines[-1].index(b"-", 6) + 1] == b"fuse.tierd"
