"""How a mount begins and ends, and what is left of it afterwards: nothing but its index and log."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import guard
from tests.conftest import DirectoryFactory, MountFactory
from tests.mounts import (
    REPOSITORY,
    STOP_SECONDS,
    OverlayMount,
    environment,
    is_mounted,
    raises,
    tierd,
    wait_for_exit,
    wait_until,
)
from tierd.runtime import runtime_dir


def nothing_left(mount: OverlayMount) -> None:
    """No mount, no process, and soon no runtime directory: the keeper ends after the daemon."""
    assert not is_mounted(mount.mountpoint)
    assert not mount.alive
    assert os.listdir(mount.mountpoint) == []
    runtime = runtime_dir(mount.mountpoint)
    wait_until(lambda: not runtime.exists(), STOP_SECONDS, lambda: f"{sorted(runtime.iterdir())} are gone")


def opens_in_index(mount: OverlayMount) -> list[bytes]:
    """Paths of the opens that are in the index on disk."""
    with contextlib.closing(sqlite3.connect(mount.state_dir / "index.db")) as db:
        return [path for (path,) in db.execute("SELECT path FROM opens ORDER BY id")]


class Foreground:
    """`tierd mount` in the foreground, as systemd or a container runs it; its log goes to standard error."""

    def __init__(self, source: Path, directory: Path) -> None:
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.log = directory / "stderr"
        arguments = ["mount", source, self.mountpoint, "--state-dir", directory / "state", "--metrics", "127.0.0.1:0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tierd", *map(str, arguments)],
                cwd=REPOSITORY, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def ready(self) -> None:
        """Wait until the mount answers."""
        wait_until(lambda: b'"mounted"' in self.log.read_bytes(), 30, self.log.read_text)


@pytest.fixture
def foreground(new_directory: DirectoryFactory) -> Iterator[Callable[[], Foreground]]:
    """Starts daemons in the foreground; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start() -> Foreground:
            started = Foreground(new_directory("source"), new_directory("mount"))
            stack.callback(guard.unmount, started.mountpoint, lazy=True)
            stack.callback(started.process.wait)
            stack.callback(started.process.kill)
            started.ready()
            return started

        yield start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_foreground_daemon_cleanly(
    foreground: Callable[[], Foreground], number: signal.Signals
) -> None:
    daemon = foreground()
    (daemon.mountpoint / "file").write_bytes(b"data")
    (daemon.mountpoint / "file").read_bytes()
    daemon.process.send_signal(number)
    assert daemon.process.wait(STOP_SECONDS) == 0, daemon.log.read_text()
    assert not is_mounted(daemon.mountpoint)
    assert not runtime_dir(daemon.mountpoint).exists()
    log = daemon.log.read_text()
    assert f'"signal": "{number.name}"' in log
    assert '"event": "stopped"' in log
    assert not any(f'"level": "{level}"' in log for level in ("warning", "error", "critical")), log


def test_a_second_signal_does_no_harm(foreground: Callable[[], Foreground]) -> None:
    daemon = foreground()
    (daemon.mountpoint / "file").touch()
    with (daemon.mountpoint / "file").open("rb"):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            daemon.process.send_signal(number)
        assert daemon.process.wait(STOP_SECONDS) == 0, daemon.log.read_text()
    assert not is_mounted(daemon.mountpoint)


def test_an_umount_ends_the_foreground_daemon_cleanly(foreground: Callable[[], Foreground]) -> None:
    daemon = foreground()
    subprocess.run(["umount", daemon.mountpoint], check=True)
    assert daemon.process.wait(STOP_SECONDS) == 0, daemon.log.read_text()
    assert not runtime_dir(daemon.mountpoint).exists()
    assert '"unmounted_by_somebody"' in daemon.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_opens_just_made_are_in_the_index_after_a_stop(overlay_mount: MountFactory, number: signal.Signals) -> None:
    mount = overlay_mount(passthrough="off")
    (mount.source / "models/m").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (mount.source / f"models/m/{name}.bin").write_bytes(b"x" * 1000)
        (mount.mountpoint / f"models/m/{name}.bin").read_bytes()
    mount.end(number)
    nothing_left(mount)
    assert opens_in_index(mount) == [b"models/m/a.bin", b"models/m/b.bin", b"models/m/c.bin"]
    with contextlib.closing(sqlite3.connect(mount.state_dir / "index.db")) as db:
        assert db.execute("SELECT opens, loads, bytes_read FROM models").fetchall() == [(3, 1, 3000)]


def test_statistics_survive_a_restart(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    (mount.source / "models/m").mkdir(parents=True)
    (mount.source / "models/m/a.bin").write_bytes(b"x" * 1000)
    for generation in range(1, 3):
        (mount.mountpoint / "models/m/a.bin").read_bytes()
        wait_until(lambda n=generation: mount.models()["models/m"]["opens"] == n, 5, "the open counts")  # type: ignore[misc]
        mount.end()
        mount.start()
    assert mount.models()["models/m"]["opens"] == 2
    assert len(mount.opens()) == 2


def test_a_stop_while_files_are_open(overlay_mount: MountFactory) -> None:
    """What write(2) accepted is in the source; what asks the dead mount is told so."""
    mount = overlay_mount(passthrough="off")
    (mount.source / "models/m").mkdir(parents=True)
    (mount.source / "models/m/a.bin").write_bytes(b"x" * 1000)
    held = os.open(mount.mountpoint / "models/m/a.bin", os.O_RDONLY)
    written = os.open(mount.mountpoint / "new", os.O_WRONLY | os.O_CREAT)
    try:
        assert os.pread(held, 10, 0) == b"x" * 10
        os.write(written, b"written before the end")
        mount.end()
        nothing_left(mount)
        with raises(errno.ENOTCONN):
            os.write(written, b"too late")
    finally:
        for fd in (held, written):
            with contextlib.suppress(OSError):
                os.close(fd)
    assert (mount.source / "new").read_bytes() == b"written before the end"
    assert opens_in_index(mount) == [b"models/m/a.bin"]


def test_tierd_umount(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    done = tierd("umount", mount.mountpoint)
    assert (done.stdout, done.stderr) == ("", "")
    nothing_left(mount)
    again = tierd("umount", mount.mountpoint, check=False)
    assert again.returncode == 2
    assert "is not a tierd mount" in again.stderr


def test_an_umount_by_somebody_ends_the_daemon(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    (mount.mountpoint / "file").write_bytes(b"x")
    (mount.mountpoint / "file").read_bytes()
    mount.settled()
    pidfd = os.pidfd_open(mount.pid)
    try:
        subprocess.run(["umount", mount.mountpoint], check=True)
        wait_for_exit(pidfd, "the daemon ends after umount(8)")
    finally:
        os.close(pidfd)
    nothing_left(mount)
    assert "unmounted_by_somebody" in [line["event"] for line in mount.log()]
    assert opens_in_index(mount) == [b"file"]


def test_a_killed_daemon_is_replaced_by_the_next_mount(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    (mount.source / "file").write_bytes(b"data")
    with (mount.mountpoint / "file").open("rb"):
        mount.end(signal.SIGKILL)
        with raises(errno.ENOTCONN):
            os.statvfs(mount.mountpoint)
        mount.start()
        assert "dead_mount_cleared" in mount.started_with
        assert (mount.mountpoint / "file").read_bytes() == b"data"
    assert len([entry for entry in guard.mounts() if entry.mountpoint == str(mount.mountpoint)]) == 1
    mount.end()
    nothing_left(mount)


def test_tierd_umount_clears_a_dead_mount(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    mount.end(signal.SIGKILL)
    assert is_mounted(mount.mountpoint)
    tierd("umount", mount.mountpoint)
    nothing_left(mount)


def test_a_mountpoint_that_is_not_empty(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> None:
    mount = OverlayMount(new_directory("source"), new_directory("mount"))
    (mount.mountpoint / "hidden").write_text("hidden while mounted")
    try:
        mount.start()
        assert os.listdir(mount.mountpoint) == []
        mount.expect_log("mountpoint_not_empty")
    finally:
        complaints = mount.close()
    assert complaints == []
    assert (mount.mountpoint / "hidden").read_text() == "hidden while mounted"


def test_a_second_daemon_for_one_mountpoint_or_state_is_refused(
    overlay_mount: MountFactory, new_directory: DirectoryFactory
) -> None:
    mount = overlay_mount()
    other = new_directory("other")
    for mountpoint, state in ((mount.mountpoint, other / "state"), (other, mount.state_dir)):
        options: list[str | Path] = ["--background", "--state-dir", state, "--metrics", "127.0.0.1:0"]
        done = tierd("mount", mount.source, mountpoint, *options, check=False)
        assert done.returncode == 2, done.stderr
        assert "busy" in done.stderr or f"process {mount.record.keeper_pid}" in done.stderr
        assert "Traceback" not in done.stderr
    assert not is_mounted(other)
    (mount.mountpoint / "file").write_bytes(b"the first one lives")
    assert mount.status()["daemon_pid"] == mount.pid
