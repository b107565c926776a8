"""A mount namespace with a /run, a /var/lib and a /var/cache of its own, in which commands run and daemons live.

What the machine has mounted and which tierd daemons it runs is not seen in there, and nothing done in
there is seen outside; it all goes with the last process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mounts import COMMAND_SECONDS, REPOSITORY, environment, wait_for_exit
from tierd.runtime import runtime_dir

_SETUP = """
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mount --bind "$1" /var/cache && echo ready && exec cat
"""
_CHANGE_DIRECTORY = 'cd "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Done:
    """How a command ended; `code` is None if it was still running after a while and was killed."""

    code: int | None
    out: str
    err: str

    @staticmethod
    def of(code: int | None, out: bytes, err: bytes) -> Done:
        """Bytes that are not UTF-8 become surrogate escapes."""
        return Done(code, out.decode("utf-8", "surrogateescape"), err.decode("utf-8", "surrogateescape"))

    def json(self) -> Any:
        """Standard output, which must be JSON, of a command that must have succeeded."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


class House:
    """See the module. `home` is the working directory of commands that are given none."""

    def __init__(self, home: Path) -> None:
        self.home = home
        cache = home / "var-cache"
        cache.mkdir()
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SETUP, "sh", str(cache)],
            stdin=subprocess.PIPE,  # its end, whatever becomes of us, is the holder's
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "a mount namespace needs root"
        self._zygote: subprocess.Popen[bytes] | None = None

    def inside(self, path: Path | str) -> Path:
        """Where a path of the namespace is seen from outside."""
        return Path(f"/proc/{self._holder.pid}/root") / str(path).lstrip("/")

    def command(self, *words: str | Path, cwd: Path | None = None) -> list[str]:
        """What runs a command in the namespace."""
        enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "sh", "-c", _CHANGE_DIRECTORY, "sh"]
        return [*enter, str(cwd or self.home), *map(str, words)]

    def shell(self, *words: str | Path) -> None:
        """Run a command that must succeed."""
        subprocess.run(self.command(*words), check=True, capture_output=True, timeout=COMMAND_SECONDS)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """That of our commands: a checkout that is not installed is found, too."""
        return {**environment(), "PYTHONPATH": str(REPOSITORY), **(more or {})}

    def python(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        wrapper: tuple[str, ...] = (),
    ) -> Done:
        """`python -m tierd` with these arguments; `wrapper` is a command that runs it, such as setpriv(1)."""
        done = subprocess.run(
            self.command(*wrapper, sys.executable, "-m", "tierd", *words, cwd=cwd),
            check=False,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_SECONDS,
        )
        return Done.of(done.returncode, done.stdout, done.stderr)

    def tierd(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        seconds: float = COMMAND_SECONDS,
    ) -> Done:
        """A tierd command, in a process of its own that need not import everything first (see zygote.py)."""
        request = {
            "arguments": [str(word) for word in arguments],
            "env": self.environment(env),
            "cwd": str(cwd or self.home),
            "seconds": seconds,
        }
        pipe = self._zygote = self._zygote or self._start_zygote()
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pipe.stdin.write(json.dumps(request).encode() + b"\n")
        pipe.stdin.flush()
        answer = json.loads(pipe.stdout.readline())
        return Done.of(answer["code"], answer["out"].encode("latin-1"), answer["err"].encode("latin-1"))

    def _start_zygote(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(sys.executable, "-m", "tests.cli.zygote"),
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, source: Path, mountpoint: Path, *flags: str | Path) -> Done:
        """A daemon in the background, which must come up."""
        done = self.tierd("mount", source, mountpoint, "--background", "--metrics", "127.0.0.1:0", *flags)
        assert done.code == 0, done.err
        return done

    # --- what is there ---

    def mounted(self, path: Path) -> str | None:
        """The type of the file system that is mounted at a path, or None."""
        found = None
        for line in Path(f"/proc/{self._holder.pid}/mountinfo").read_text(encoding="utf-8").splitlines():
            fields = line.split(" ")
            if fields[4].replace("\\040", " ") == str(path):
                found = fields[fields.index("-") + 1]
        return found

    def runtime(self, mountpoint: Path) -> Path:
        """The runtime directory of a mount, as seen from outside."""
        return self.inside(runtime_dir(mountpoint))

    def record(self, mountpoint: Path) -> dict[str, Any]:
        """What a daemon published of itself."""
        found: dict[str, Any] = json.loads((self.runtime(mountpoint) / "mount.json").read_text(encoding="utf-8"))
        return found

    def kill(self, mountpoint: Path) -> None:
        """SIGKILL, and wait until it has taken effect."""
        record = self.record(mountpoint)
        for pid in (record["keeper_pid"], record["pid"]):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                wait_for_exit(pidfd, f"process {pid} ends")
            finally:
                os.close(pidfd)

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every daemon that is left, and the namespace with the last process in it."""
        for record in self.inside("/run/tierd").glob("*/mount.json"):
            found = json.loads(record.read_text(encoding="utf-8"))
            with contextlib.suppress(ProcessLookupError):
                os.kill(found["keeper_pid"], signal.SIGKILL)
                os.kill(found["pid"], signal.SIGKILL)
        for process in (self._zygote, self._holder):
            if process is not None:
                process.kill()
                process.communicate()


def alive(pid: int) -> bool:
    """The process runs; one that ended and that nobody has reaped does not."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False
