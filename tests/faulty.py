"""A source that fails on command: a FUSE file system over a directory, in a process of its own, and its client.

Tests put an overlay over `FaultySource.mountpoint` and write what it holds into `FaultySource.backing`, which no fault
touches. It is taken down even while requests are stalled: everything is released first.

    python -m tests.faulty BACKING MOUNTPOINT CONTROL_SOCKET
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyfuse3
import trio

from bench import guard
from tests.faults import STALL_SECONDS_MAX, Faults, Rule
from tests.faulty_fs import FaultyOperations, Settings
from tests.mounts import REPOSITORY, is_mounted, wait_until

ANSWER_SECONDS = 10.0
START_SECONDS = 20.0
STOP_SECONDS = 15.0
_TASKS_MAX = 10_000
"""Requests in work at once, stalled ones included: pyfuse3's own limit of 99 would stall the rest, too."""
_BACKGROUND_MAX = 4096
"""The same in the kernel, whose default of 12 stalled reads would hold up all others."""


class FaultySource:
    """See the module. `with FaultySource(directory) as source: source.stall("read", path="models/*")`."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        """Everything lies in `directory`. Settings are those of `faulty_fs.Settings`."""
        self.backing = directory / "backing"
        self.mountpoint = directory / "faulty"
        self._control = directory / "control"
        self._log = directory / "faulty.log"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for path in (self.backing, self.mountpoint):
            path.mkdir()
        command = [sys.executable, "-m", "tests.faulty", str(self.backing), str(self.mountpoint), str(self._control)]
        self._process = guard.start(command, self.mountpoint, self._log, {"PYTHONPATH": str(REPOSITORY)})
        try:
            wait_until(self._answers, START_SECONDS, lambda: f"the faulty source starts: {self._log.read_text()}")
            self.set(**self._settings)
            self._widen()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            self.tell()
        except OSError:
            return False
        return is_mounted(self.mountpoint)

    def _widen(self) -> None:
        """Raise the kernel's limit of background requests; libfuse's own way to say so is not pyfuse3's."""
        connections = self.mountpoint.parent / "connections"
        connections.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "fusectl", str(connections)], check=True)
        try:
            number = os.minor(self.mountpoint.stat().st_dev)
            for name in ("max_background", "congestion_threshold"):
                (connections / str(number) / name).write_text(str(_BACKGROUND_MAX))
        finally:
            subprocess.run(["umount", str(connections)], check=True)

    def close(self) -> None:
        """Release everything, unmount and end the process. Safe to repeat, and while requests are stalled."""
        with suppress(OSError):
            self.release()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        while is_mounted(self.mountpoint):
            reason = guard.unmount(self.mountpoint, lazy=True)
            assert reason is None, reason

    # --- commands ---

    def _ask(self, **command: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(self._control))
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as answer:
                line = answer.readline()
        if not line:
            raise ConnectionResetError("the faulty source ended")
        return json.loads(line)

    def _add(self, rule: Rule) -> int:
        number: int = self._ask(do="add", rule=asdict(rule))
        return number

    def stall(self, *ops: str, path: str = "*", seconds: float = STALL_SECONDS_MAX) -> int:
        """Do not answer such operations (none named: all) until released; the number of the rule."""
        return self._add(Rule("stall", ops, path, seconds=seconds))

    @contextmanager
    def stalling(self, *ops: str, path: str = "*") -> Iterator[None]:
        """`stall` for the length of a `with`."""
        number = self.stall(*ops, path=path)
        try:
            yield
        finally:
            self.remove(number)

    def fail(self, number: int, *ops: str, path: str = "*", **further: Any) -> int:
        """Answer with this errno; `probability`, `seed` and `times_per_path` are those of `Rule`."""
        return self._add(Rule("fail", ops, path, number, **further))

    def shorten(self, path: str = "*", **further: Any) -> int:
        """Give a part of what a read asks for. Only with `direct_io`: the page cache takes it for the file's end."""
        return self._add(Rule("short", ("read",), path, **further))

    def delay(self, seconds: float, *ops: str, path: str = "*", **further: Any) -> int:
        """Answer that much later."""
        return self._add(Rule("delay", ops, path, seconds=seconds, **further))

    def remove(self, number: int) -> None:
        """End one rule."""
        self._ask(do="remove", number=number)

    def release(self) -> None:
        """End all rules; what was stalled goes on."""
        self._ask(do="release")

    def set(self, **settings: Any) -> None:
        """Change settings for replies from now on."""
        self._ask(do="set", settings=settings)

    def tell(self) -> dict[str, Counter[str]]:
        """What is stalled now by operation, what was injected by kind and operation, failures by errno and path."""
        return {name: Counter(counts) for name, counts in self._ask(do="tell").items()}

    def stalled(self, op: str) -> int:
        """How many such operations wait now."""
        return self.tell()["stalled"][op]


# --- the process behind it ---


class _Control:
    """Carries out commands: one line of JSON each, one line back."""

    def __init__(self, faults: Faults, settings: Settings) -> None:
        self._faults = faults
        self._settings = settings

    async def serve(self, path: str) -> None:
        """Until cancelled."""
        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(path)
            listener.listen(64)
            await trio.serve_listeners(self._answer, [trio.SocketListener(listener)])

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            while not line.endswith(b"\n"):
                more = await stream.receive_some()
                if not more:
                    return
                line += more
            with suppress(trio.BrokenResourceError):
                await stream.send_all(json.dumps(self._do(**json.loads(line))).encode() + b"\n")

    def _do(
        self, do: str, rule: dict[str, Any] | None = None, number: int = 0, settings: dict[str, Any] | None = None
    ) -> Any:
        if do == "add" and rule is not None:
            return self._faults.add(Rule(**{**rule, "ops": tuple(rule["ops"])}))
        if do == "remove":
            self._faults.remove(number)
        elif do == "release":
            self._faults.release()
        elif do == "set" and settings is not None:
            for name, value in settings.items():
                assert hasattr(self._settings, name), name
                setattr(self._settings, name, value)
        return self._faults.tell()


async def _serve(faults: Faults, settings: Settings, control: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_Control(faults, settings).serve, control)
        await pyfuse3.main(max_tasks=_TASKS_MAX)
        nursery.cancel_scope.cancel()


def main(backing: str, mountpoint: str, control: str) -> None:
    """Serve until unmounted."""
    faults, settings = Faults(), Settings()
    options = {"default_permissions", "allow_other", "fsname=faulty", "subtype=faulty"}
    pyfuse3.init(FaultyOperations(backing, faults, settings), mountpoint, options)
    trio.run(_serve, faults, settings, control)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
