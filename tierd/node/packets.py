"""What keeper and daemon say to each other: packets of one letter and an argument, descriptors beside them.

| from | to | message |
|---|---|---|
| daemon | keeper | `P` pid · `h` key (hold this descriptor) · `d` key (drop it) · `L` (a new ledger) · `b` (alive) |
| daemon | keeper | `r` 1 or 0 (ready; whether the kernel can send requests again) · `l` (I leave) · `q` exit code |
| keeper | daemon | `J` JSON · `H` keys (their descriptors come along) · `.` (that was all) · `k` pid (a new keeper) |
| keeper | daemon | `l` (leave: another one takes over) · `s` (stop: the mount ends) |
| command | keeper | `U` JSON (upgrade; answered with JSON) · `K` (hand all to me, a keeper) · `.` (I have it) |
| anybody | keeper | `?` (do you live? answered with `.`) |

Runs on the standard library alone.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final

DEVICE: Final = 1
LEDGER: Final = 2
METRICS_LISTENER: Final = 4
ADMIN_LISTENER: Final = 5
SOURCE_ROOT: Final = 6
LOCKS: Final = range(16, 32)
FIRST_HANDLE: Final = 1000
"""Keys of descriptors: what each is. Locks stay with the keeper; from FIRST_HANDLE on they are those of open files."""

_MESSAGE_BYTES_MAX = 1 << 18
_FDS_MAX = 200
"""SCM_MAX_FD is 253."""


_ANSWER_SECONDS = 3.0
_BUFFER_BYTES = 4 << 20
_SO_SNDBUFFORCE = 32


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets of packets, with room for many: a daemon opens files faster than its keeper listens."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        widen(sock)
    return ours, theirs


def widen(sock: socket.socket) -> None:
    """Make room for what is not read at once: past the system's limit as root, up to it else."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it; an empty packet at the end. Raises OSError."""
    room = socket.CMSG_SPACE(_FDS_MAX * 4)
    data, ancillary, _, _ = sock.recvmsg(_MESSAGE_BYTES_MAX, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, body in ancillary:
        fds.frombytes(body[: len(body) // fds.itemsize * fds.itemsize])
    return data, list(fds)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """One packet, with descriptors. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, flags | socket.MSG_NOSIGNAL)


def lives(path: str) -> bool:
    """Whether a keeper answers at `path`. (One that is being killed closes its sockets and locks one by one.)"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(path)
            sock.settimeout(_ANSWER_SECONDS)
            send(sock, b"?")
            return receive(sock)[0] == b"."
        except OSError:
            return False


def send_held(sock: socket.socket, held: Mapping[int, int]) -> None:
    """Descriptors with their keys."""
    keys = list(held)
    for part in (keys[at : at + _FDS_MAX] for at in range(0, len(keys), _FDS_MAX)):
        send(sock, b"H" + struct.pack(f"={len(part)}Q", *part), [held[key] for key in part])
    send(sock, b".")


def receive_held(sock: socket.socket) -> dict[int, int]:
    """What `send_held` sent. Raises OSError, EOFError."""
    held: dict[int, int] = {}
    while (message := receive(sock))[0] != b".":
        data, fds = message
        if not data:
            raise EOFError("the other side is gone")
        held.update(zip(struct.unpack(f"={len(data) // 8}Q", data[1:]), fds, strict=True))
    return held


def is_ours(sock: socket.socket) -> bool:
    """The other side is a process of our own user."""
    return _credentials(sock)[1] == os.geteuid()


def pid_of(sock: socket.socket) -> int:
    """The process that connected, as this one sees it; 0 if it does not (another PID namespace)."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user that connected, SO_PEERCRED of unix(7)."""
    pid, uid, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
