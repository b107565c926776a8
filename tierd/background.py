"""Starts the daemon in the background and returns once its mount answers."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tierd.errors import DaemonError

READY_FD_OPTION = "--ready-fd"
_READY = b"ready"
_START_SECONDS = 60.0
_TICK_SECONDS = 0.1


def start(arguments: Sequence[str], log_file: Path, waiting: Callable[[float], None]) -> int:
    """Run `tierd ARGUMENTS` detached; its process ID once it is ready.

    Its standard error stays ours until then, so its one-line complaint is seen. `waiting` is called
    with the seconds passed. Raises DaemonError with the child's exit code if it ends early.
    """
    command, *rest = arguments
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "tierd", command, READY_FD_OPTION, str(writer), "--log-file", str(log_file), *rest],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(writer,),
            start_new_session=True,
        )
    finally:
        os.close(writer)
    try:
        _wait(child, reader, log_file, waiting)
    except BaseException:
        child.terminate()
        raise
    finally:
        os.close(reader)
    return child.pid


def _wait(child: subprocess.Popen[bytes], reader: int, log_file: Path, waiting: Callable[[float], None]) -> None:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < _START_SECONDS:
        waiting(passed)
        readable, _, _ = select.select([reader], [], [], _TICK_SECONDS)
        if not readable:
            continue
        if os.read(reader, len(_READY)) == _READY:
            return
        raise StartFailed(child.wait())
    raise DaemonError(f"the mount did not answer within {_START_SECONDS:.0f} s", hint=f"see {log_file}")


class StartFailed(DaemonError):
    """The daemon ended before it was ready and has said why itself."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the daemon ended with exit code {code} before its mount answered")
        self.code = code


def tell_ready(fd: int) -> None:
    """The child's side: the mount answers. Standard error goes to /dev/null from now on; the log has its file."""
    os.write(fd, _READY)
    os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
