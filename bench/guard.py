"""Runs the process behind a mount and takes process and mount away when its parent goes.

Started as a script by `start()`, so it imports the standard library only. The parent is watched
through a pidfd and not through PR_SET_PDEATHSIG alone, because that signal is sent when the *thread* that
started the child ends, and tests start mounts from worker threads.
"""

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
UNMOUNT_TIMEOUT_S = 5.0
CHILD_GRACE_S = 2.0


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo (proc(5)): where, what kind, and what is mounted."""

    mountpoint: str
    fstype: str
    source: str


def mounts() -> list[MountEntry]:
    """Everything mounted in this mount namespace, oldest first."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fstype, source = right.split(" ")[:2]
        entries.append(MountEntry(_unescape(left.split(" ")[4]), fstype, _unescape(source)))
    return entries


def mounts_under(path: str | os.PathLike[str]) -> list[MountEntry]:
    """What is mounted on `path` or below it, newest first: the order in which to unmount."""
    top = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    root = os.path.join(top, os.path.basename(os.path.abspath(path)))
    inside = [e for e in mounts() if e.mountpoint == root or e.mountpoint.startswith(root + "/")]
    return inside[::-1]


def unmount(mountpoint: str | os.PathLike[str], *, lazy: bool = False) -> str | None:
    """Unmounts; None when done, or the reason why not. Lazy detaches a busy or dead mount at once."""
    path = os.fspath(mountpoint)
    if os.geteuid() == 0:
        # No canonicalization: a stat of a mount whose server has died or hangs would not return.
        command = ["umount", "--no-canonicalize", *(["--lazy"] if lazy else []), path]
    else:
        tool = shutil.which("fusermount3") or "fusermount"
        command = [tool, "-u", *(["-z"] if lazy else []), path]
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=UNMOUNT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")


def die_with_parent(signum: int) -> Callable[[], None]:
    """A `preexec_fn` that asks the kernel for `signum` when the starting thread ends (prctl(2))."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signum)

    return ask


def start(
    command: Sequence[str], mountpoint: str | os.PathLike[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `command` under this guard, in a session of its own so that Ctrl-C reaches only us.

    `mountpoint` is what the guard unmounts at the end; for a process that mounts nothing, a directory of its own.
    `environment` is added to ours.
    """
    guarded = [sys.executable, "-I", "-S", __file__, str(os.getpid()), os.fspath(mountpoint), *command]
    with log.open("wb") as output:
        return subprocess.Popen(
            guarded,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _wait(parent: int, child: int, wake: int) -> None:
    """Returns when the parent or the child has ended, or a signal asks us to stop."""
    poll = select.poll()
    for fd in (parent, child, wake):
        poll.register(fd, select.POLLIN)
    poll.poll()


def _stop(child: subprocess.Popen[bytes], mountpoint: str) -> None:
    """Unmounts cleanly, or lazily when busy; then ends the process, by force where asking does not help."""
    asks: list[signal.Signals | None] = [None, signal.SIGTERM, signal.SIGKILL]
    if mounts_under(mountpoint) and unmount(mountpoint) is not None:
        unmount(mountpoint, lazy=True)
        asks.remove(None)  # it goes by itself only when the last file is closed
    for signum in asks:
        if signum is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(CHILD_GRACE_S)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if mounts_under(mountpoint):
        unmount(mountpoint, lazy=True)


def main(argv: Sequence[str]) -> int:
    """`guard.py PARENT_PID MOUNTPOINT COMMAND...`: the command's exit code when it ends by itself."""
    parent_pid, mountpoint, command = int(argv[0]), argv[1], list(argv[2:])
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        return 0
    if os.getppid() != parent_pid:  # it went before we looked, and the number is somebody else's now
        return 0
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 (safe here: there is one thread)
    )
    try:
        _wait(parent, os.pidfd_open(child.pid), wake_read)
    finally:
        _stop(child, mountpoint)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
