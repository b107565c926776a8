"""The template of daemons: a process that has imported all they need and forks one when its keeper asks.

So a start takes milliseconds instead of the second that Python needs to import. What becomes of the daemons is the
keeper's to watch; the kernel reaps them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

from tierd.node import packets
from tierd.node.handing import hush


def serve(sock: socket.socket, daemon: Callable[[socket.socket], int]) -> int:
    """Fork a daemon for each request, until the keeper ends; `daemon` is run in the child and returns its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaped by the kernel, wait(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            message, fds = packets.receive(sock)
        except OSError:
            return 0
        if not message:
            return 0
        if message == b"q":
            hush()
        elif message == b"f":
            if os.fork() == 0:
                _become_daemon(sock, fds[0], daemon)
            os.close(fds[0])


def _become_daemon(template: socket.socket, fd: int, daemon: Callable[[socket.socket], int]) -> None:
    template.close()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    code = 1
    try:
        code = daemon(socket.socket(fileno=fd))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)
