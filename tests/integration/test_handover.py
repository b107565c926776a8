"""A mount whose daemon is replaced: killed, upgraded, rolled out by somebody else, on a kernel that cannot resend."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, make_model
from tests.mounts import REPOSITORY, STOP_SECONDS, OverlayMount, environment, is_mounted, raises, tierd, wait_until


@contextmanager
def busy(mount: OverlayMount) -> Iterator[list[str]]:
    """Reads and writes without a pause; what failed."""
    done = threading.Event()
    failed: list[str] = []

    def work() -> None:
        path = mount.mountpoint / "busy"
        while not done.is_set():
            try:
                path.write_bytes(b"data")
                assert path.read_bytes() == b"data"
                path.unlink()
            except (OSError, AssertionError) as error:
                failed.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield failed
    finally:
        done.set()
        thread.join()


def test_open_files_outlive_the_daemon(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    model = make_model(mount, "m", 3 * MIB).filled()
    with model.through().open("rb", buffering=0) as hot, (mount.mountpoint / "new").open("w+b", buffering=0) as new:
        new.write(b"before ")
        (mount.mountpoint / "new").unlink()
        mount.succeeded(mount.kill_daemon())
        assert hot.read(9 * MIB) == model.files["a.safetensors"]
        new.write(b"after")
        new.seek(0)
        assert new.read() == b"before after"
    told = mount.status()
    assert (told["restarts"], told["handover"]) == (1, "resend")
    mount.expect_log("daemon_died")


def test_upgrade_under_load(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    keeper, daemon = mount.record.keeper_pid, mount.pid
    with busy(mount) as failed:
        told = json.loads(tierd("upgrade", mount.mountpoint, "--json").stdout)
    assert failed == []
    mount.refresh()
    assert told == {"pid": mount.pid, "keeper_pid": keeper, "restarts": 1}
    assert mount.pid != daemon


def test_a_mount_on_a_kernel_that_cannot_resend(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(handover="no")
    (mount.source / "file").write_bytes(b"data")
    with (mount.mountpoint / "file").open("rb", buffering=0) as held:
        assert mount.status()["handover"] == "remount"
        mount.succeeded(mount.kill_daemon())
        with raises(errno.ENOTCONN):
            os.pread(held.fileno(), 4, 0)
    assert (mount.mountpoint / "file").read_bytes() == b"data"
    mount.expect_log("daemon_died", "remounting")


@pytest.fixture
def arguments(new_directory: DirectoryFactory) -> list[str]:
    """Of a mount of its own."""
    base, source = new_directory("kept"), new_directory("source")
    (base / "mnt").mkdir()
    (source / "file").write_bytes(b"data")
    private = ["--state-dir", base / "state", "--cache-dir", base / "cache", "--metrics", "127.0.0.1:0"]
    return [str(word) for word in (source, base / "mnt", *private)]


def start(*words: str, under: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    command = [*under, sys.executable, "-m", "tierd", *words]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdin=null, stdout=null, stderr=null)


def test_a_keeper_of_its_own_outlives_daemons_and_is_replaced(arguments: list[str]) -> None:
    mountpoint = Path(arguments[1])
    keeper = start("keeper", *arguments)
    wait_until(lambda: is_mounted(mountpoint), STOP_SECONDS, "it is mounted")  # a stat would wait for a daemon
    first = start("mount", *arguments, "--attach")
    with (mountpoint / "file").open("rb", buffering=0) as held:
        first.terminate()
        assert first.wait(STOP_SECONDS) == 0
        second = start("mount", *arguments, "--attach")
        assert held.read() == b"data", "the call waits for the next daemon"
        newer = start("keeper", *arguments, "--take-over")
        assert keeper.wait(STOP_SECONDS) == 0
        assert (mountpoint / "file").read_bytes() == b"data"
    newer.send_signal(signal.SIGTERM)
    assert [process.wait(STOP_SECONDS) for process in (newer, second)] == [0, 0]
    assert not is_mounted(mountpoint)
