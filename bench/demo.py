"""The demo: a real JuiceFS volume, tierd over it, one model loaded twice, and what tierd saw.

Needs no server and no configuration. Leaves nothing behind: not after success, Ctrl-C, SIGTERM or a failure.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

from bench import guard, hf_model
from bench.juicefs import JuiceFS, JuiceFSError

MIB = 1 << 20
MODEL = "models/demo-llama"
LOADS = 2
SHARD_MIB = 256
LOAD_IDLE_GAP_S = 5
GAP_MARGIN_S = 0.5
COUNT_TIMEOUT_S = 15.0
COUNT_POLL_S = 0.2
COMMAND_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """Why the demo stopped, in one line."""


class Interrupted(BaseException):
    """A signal asked the demo to stop; not an `Exception`, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


@dataclass(frozen=True)
class Seen:
    """One load: how long it took here, and what tierd said about the model after it."""

    load: int
    seconds: float
    bytes: int
    tensors: int
    checksum: str
    opens: int
    loads: int
    hits: int
    last_access: str


class Steps:
    """Shows progress on stderr: bars on a terminal, one plain line per finished step elsewhere."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._number = 0
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[size]}", justify="right"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    @contextlib.contextmanager
    def step(self, title: str, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
        """One step; yields what to call with the bytes that were moved."""
        self._number += 1
        start = time.monotonic()
        size = f"{total_bytes // MIB} MiB" if total_bytes else ""
        task = self._progress.add_task(title, total=total_bytes, size=size)
        yield lambda moved: self._progress.advance(task, moved)
        if total_bytes is None:
            self._progress.update(task, total=1, completed=1)
        if not self._console.is_terminal:
            took = f"{time.monotonic() - start:.1f} s"
            print(f"[{self._number}/{self._count}] {title}: {took}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Steps":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class Demo:
    """The parts that run, below one temporary directory that `close()` removes."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tierd-demo-")).resolve()
        self.source = self.directory / "juicefs"
        self.mountpoint = self.directory / "mnt"
        self._volume = JuiceFS(self.directory / "volume", name="tierd-demo")
        self._overlay_started = False

    def format(self) -> None:
        """Makes the volume and mounts it for the writer."""
        self._volume.format()
        self._volume.mount(self.source, cache_size_mib=0)

    def mount_overlay(self) -> None:
        """Mounts the volume anew, as on a node that did not write the model, and tierd over it."""
        self._volume.umount(self.source)
        self._volume.mount(self.source)
        self._overlay_started = True
        self.mountpoint.mkdir()
        options = ["--background", "--state-dir", str(self.directory / "state")]
        options += ["--cache-dir", str(self.directory / "cache")]
        options += ["--metrics", "127.0.0.1:0", "--load-idle-gap", str(LOAD_IDLE_GAP_S)]
        tierd("mount", str(self.source), str(self.mountpoint), *options)

    def model(self) -> dict[str, Any]:
        """What tierd knows about the model; empty before its first open."""
        answer = tierd("models", str(self.mountpoint), "--json")
        try:
            models: list[dict[str, Any]] = json.loads(answer)
        except json.JSONDecodeError as error:
            raise DemoError(f"`tierd models --json` did not print JSON: {error}") from None
        return next((entry for entry in models if entry["model"].endswith(Path(MODEL).name)), {})

    def load(self, number: int, progress: Callable[[int], None]) -> tuple[hf_model.LoadResult, dict[str, Any]]:
        """Loads the model through the overlay and waits until tierd has counted that load."""
        result = hf_model.load_model(self.mountpoint / MODEL, progress)
        time.sleep(LOAD_IDLE_GAP_S + GAP_MARGIN_S)  # opens within the gap would count as the same load
        deadline = time.monotonic() + COUNT_TIMEOUT_S
        while (seen := self.model()).get("loads", 0) < number:
            if time.monotonic() > deadline:
                raise DemoError(f"tierd did not count load {number} within {COUNT_TIMEOUT_S:.0f} s; it says {seen}")
            time.sleep(COUNT_POLL_S)
        return result, seen

    def close(self) -> None:
        """Unmounts and ends everything; removes the directory unless something is still mounted there."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            stack.callback(self._detach_leftovers)
            stack.callback(self._volume.close)
            stack.callback(self._end_leftovers)
            if self._overlay_started and guard.mounts_under(self.mountpoint):
                with contextlib.suppress(DemoError):
                    tierd("umount", str(self.mountpoint))

    def _end_leftovers(self) -> None:
        """Lets what tierd runs for our directory end, then ends it, such as a mount that was interrupted."""
        running = [process for process in psutil.process_iter() if self._belongs_here(process)]
        for signum in (None, signal.SIGTERM, signal.SIGKILL):
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if signum is not None:
                        process.send_signal(signum)
            running = psutil.wait_procs(running, timeout=STOP_TIMEOUT_S)[1]

    def _belongs_here(self, process: psutil.Process) -> bool:
        """Whether it is a tierd process that was given a path in our directory, which is named at random."""
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            ours = any(word.startswith(f"{self.directory}/") for word in words)
            return ours and any(re.fullmatch(r"(.*/)?tierd(\.[a-z_.]+)?", word) for word in words)
        return False

    def _detach_leftovers(self) -> None:
        for entry in guard.mounts_under(self.directory):
            guard.unmount(entry.mountpoint, lazy=True)

    def _remove(self) -> None:
        if left := guard.mounts_under(self.directory):
            raise DemoError(f"cannot unmount {left[0].mountpoint}; unmount it, then remove {self.directory}")
        shutil.rmtree(self.directory)


def tierd(*arguments: str) -> str:
    """Runs tierd's own command line; `DemoError` with its message when it fails."""
    command = [sys.executable, "-m", "tierd", *arguments]
    what = f"tierd {arguments[0]}"
    try:
        # A session of its own: Ctrl-C reaches the demo alone, which then stops things in order.
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"{what} took more than {COMMAND_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise DemoError(f"{what} failed with exit code {done.returncode}: {reason}")
    return done.stdout


def check_space(size_mib: int) -> None:
    """`DemoError` unless the model fits as objects, in JuiceFS's cache and as a copy on the node."""
    where = Path(tempfile.gettempdir())
    need_mib = 3 * size_mib + 512
    free_mib = shutil.disk_usage(where).free // MIB
    if free_mib < need_mib:
        raise DemoError(
            f"{where} has {free_mib} MiB free, the demo needs {need_mib}; "
            "set TMPDIR to another disk, or pass a smaller --size-mib"
        )


def run(demo: Demo, steps: Steps, size_mib: int) -> list[Seen]:
    """Everything between an empty directory and the figures."""
    with steps.step("Format and mount JuiceFS"):
        demo.format()
    shards = max(1, -(-size_mib // SHARD_MIB))
    with steps.step(f"Write {MODEL}, {size_mib} MiB", size_mib * MIB) as advance:
        written = hf_model.write_model(demo.source / MODEL, size_mib * MIB, shards, progress=advance)
    with steps.step("Mount tierd over it"):
        demo.mount_overlay()
    seen = []
    for number in range(1, LOADS + 1):
        with steps.step(f"Load {number} through tierd", written.bytes) as advance:
            result, model = demo.load(number, advance)
        if result.checksum != written.checksum:
            raise DemoError(f"load {number} read other bytes than were written")
        counters = {key: model[key] for key in ("opens", "loads", "hits", "last_access")}
        seen.append(Seen(load=number, **asdict(result), **counters))
    return seen


def show(seen: list[Seen]) -> None:
    """The table, what it means, and where to go from there."""
    table = Table(title=f"{MODEL} through tierd")
    for heading in ("load", "time", "GB/s", "opens", "loads", "last access (UTC)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in seen:
        when = one.last_access.replace("T", " ")[:19]
        rate = f"{one.bytes / one.seconds / 1e9:.2f}"
        table.add_row(str(one.load), f"{one.seconds:.2f} s", rate, str(one.opens), str(one.loads), when)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    first, last = seen[0], seen[-1]
    console.print(
        f"tierd saw {last.loads} loads of {MODEL} ({last.opens} opens), and both read exactly the "
        f"{last.bytes / 1e9:.2f} GB in {last.tensors} tensors that were written. "
        f"The first took {first.seconds:.2f} s from JuiceFS, the second {last.seconds:.2f} s."
    )
    console.print(
        "Look further: `tierd mount SOURCE MOUNTPOINT --background` over a JuiceFS mount of yours, "
        "then `tierd models` and `tierd status`."
    )


def stop_on_signals() -> None:
    """The first signal raises `Interrupted`; later ones change nothing, so that cleaning up can end."""

    def interrupt(signum: int, _frame: object) -> None:
        ignore_signals()
        raise Interrupted(signum)

    for signum in SIGNALS:
        signal.signal(signum, interrupt)


def ignore_signals() -> None:
    """From here on only cleaning up is left, and each of its steps has a deadline."""
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)  # and not SIG_IGN, which child processes would inherit


def perform(size_mib: int) -> list[Seen]:
    """Runs the demo and cleans up behind it, whatever happens."""
    check_space(size_mib)
    stop_on_signals()
    demo = None
    try:
        demo = Demo()
        with Steps(count=3 + LOADS) as steps:
            return run(demo, steps, size_mib)
    finally:
        ignore_signals()
        if demo is not None:
            demo.close()


def main(
    size_mib: Annotated[int, typer.Option(min=1, help="Size of the model in MiB.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Mount tierd over a real JuiceFS volume, load a model twice through it, and show what tierd saw."""
    try:
        seen = perform(size_mib)
    except Interrupted as stop:
        print(f"demo: stopped by {stop}; nothing was left behind", file=sys.stderr)
        raise typer.Exit(128 + stop.signum) from None
    except (DemoError, JuiceFSError, SafetensorError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"model": MODEL, "loads": [asdict(one) for one in seen]}, indent=2))
    else:
        show(seen)


if __name__ == "__main__":
    typer.run(main)
