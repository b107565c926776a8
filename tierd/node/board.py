"""The sockets of a keeper: who connects, and whom what can be read concerns. Standard library only.

Nothing here waits for what somebody says: whoever connects and is silent costs a descriptor, and there are few of them.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from tierd.node.packets import is_ours, receive, send

STRANGERS_MAX: Final = 16
"""Connections that have said nothing yet; with one more the oldest is closed."""


class _File(Protocol):
    def fileno(self) -> int:
        """Its descriptor."""


class Board:
    """What to call when a descriptor can be read."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def watch(self, file: _File, handler: Callable[[], None]) -> None:
        """Call `handler` each time."""
        self._handlers[file.fileno()] = handler
        self._poll.register(file.fileno(), select.POLLIN)

    def listen(self, sock: socket.socket, heed: Callable[[bytes, list[int]], None]) -> None:
        """Call `heed` with each packet of a socket and the descriptors beside it; an empty one is the end. Descriptors
        that it leaves in the list are closed."""
        self.watch(sock, lambda: _hear(sock, heed))

    def unwatch(self, file: _File) -> None:
        """No longer; before it is closed."""
        if self._handlers.pop(file.fileno(), None) is not None:
            self._poll.unregister(file.fileno())

    def turn(self, timeout_ms: int) -> None:
        """Wait for something to read, and call. A handler may be called for what an earlier one of this turn closed and
        opened anew: it must not wait."""
        for fd, _ in self._poll.poll(timeout_ms):
            self._handlers.get(fd, int)()


def _hear(sock: socket.socket, heed: Callable[[bytes, list[int]], None]) -> None:
    data, fds = b"", list[int]()
    try:
        data, fds = receive(sock, socket.MSG_DONTWAIT)
    except BlockingIOError:  # what poll(2) saw was another socket with this number
        return
    except OSError:
        pass
    heed(data, fds)
    for fd in fds:
        os.close(fd)


class Door:
    """Lets in who connects to `listener`, as our own user; `meet` is called with the first packet of each. Who asks
    whether we live is told."""

    def __init__(
        self, board: Board, listener: socket.socket, meet: Callable[[socket.socket, bytes, list[int]], None]
    ) -> None:
        self.listener = listener
        self._board = board
        self._meet = meet
        self._strangers: list[socket.socket] = []
        board.watch(listener, self._accept)

    def _accept(self) -> None:
        with suppress(OSError):  # no descriptor is left
            sock = self.listener.accept()[0]
            if not is_ours(sock):
                return sock.close()
            self._strangers.append(sock)
            self._board.listen(sock, lambda data, fds: self._hear(sock, data, fds))
        for stranger in self._strangers[:-STRANGERS_MAX]:
            self._lose(stranger)
            stranger.close()
        return None

    def _lose(self, sock: socket.socket) -> None:
        self._strangers.remove(sock)
        self._board.unwatch(sock)

    def _hear(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        self._lose(sock)
        if data == b"?":
            with suppress(OSError):
                send(sock, b".", (), socket.MSG_DONTWAIT)
        self._meet(sock, data, fds)
