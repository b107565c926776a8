"""Runs tierd commands in forks of a process that has imported what they import: a tenth of a second each, not one.

Started by `House` with pipes for standard input and output: one request as JSON per line, one answer. A command
gets its own process, arguments, environment, working directory and files for its output, and runs
`tierd.cli.main.main`, which it imports itself; all that differs from `python -m tierd` is when the rest was imported.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

import typer.rich_utils

import tierd.background
import tierd.client
import tierd.config
import tierd.log
import tierd.node.daemon

PRELOADED = (typer.rich_utils, tierd.background, tierd.client, tierd.config, tierd.log, tierd.node.daemon)


def run(request: dict[str, Any], out: int, err: int) -> None:
    """The command, in the child; does not return."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv[1:] = request["arguments"]
    code: Any = 1
    try:
        from tierd.cli.main import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child (minus the signal that ended it); None, and it is killed, if it takes too long."""
    pidfd = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([pidfd], [], [], seconds)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code if ended else None
    finally:
        os.close(pidfd)


def read_all(fd: int) -> str:
    """What was written, byte for byte: as Latin-1."""
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("latin-1")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command to its end."""
    out, err = os.memfd_create("out"), os.memfd_create("err")
    try:
        pid = os.fork()
        if pid == 0:
            run(request, out, err)
        code = wait(pid, request["seconds"])
        return {"code": code, "out": read_all(out), "err": read_all(err)}
    finally:
        os.close(out)
        os.close(err)


def serve() -> None:
    """Until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for line in requests:
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
