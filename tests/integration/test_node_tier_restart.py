"""The node tier after the daemon ended, was killed, or lost its disk or its source."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from bench import guard
from bench.juicefs import JuiceFS
from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, command, data_file, data_files, idle, leftovers, make_model, of_tier
from tests.mounts import OverlayMount, raises

IDLE_SECONDS = 0.1


def killed(mount: OverlayMount) -> None:
    """SIGKILL, and away with the dead mount."""
    mount.end(signal.SIGKILL)
    while guard.mounts_under(mount.mountpoint):
        assert guard.unmount(mount.mountpoint, lazy=True) is None


def test_copies_survive_a_restart(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    models = [make_model(mount, f"m{number}", 3 * MIB + number).filled() for number in range(3)]
    command(mount, "pin", "m1")
    held = of_tier(mount)["held_bytes"]
    for end in (mount.end, lambda: killed(mount)):
        end()
        mount.start()
        told = of_tier(mount)
        assert (told["copies"], told["held_bytes"], told["pins"]) == (3, held, 1)
        for model in models:
            model.read()
        idle(mount)
        assert of_tier(mount)["fill_source_bytes"] == 0
        assert mount.models()["models/m1"]["pinned"]


def test_what_was_damaged_while_it_was_down_is_dropped(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    models = [make_model(mount, f"m{number}", 5 * MIB).filled() for number in range(6)]
    files = [data_file(model) for model in models]
    mount.end()
    os.truncate(files[0], MIB)
    with files[1].open("r+b") as file:
        file.write(b"flipped")
    files[2].unlink()
    files[3].with_name(files[3].name + ".meta").unlink()
    meta = files[4].with_name(files[4].name + ".meta")
    meta.write_bytes(meta.read_bytes()[:-5])
    (mount.cache_dir / "1-2-3.fill").write_bytes(b"left")
    mount.start()
    assert of_tier(mount)["copies"] == 1
    assert leftovers(mount) == []
    for model in models:
        model.filled()
    mount.expect_log("copy_dropped")


def test_the_source_changed_while_it_was_down(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    model = make_model(mount, "m", 5 * MIB).filled()
    mount.end()
    new = make_model(mount, "m", 5 * MIB + 1)
    mount.start()
    assert new.files != model.files
    new.read()
    new.filled()
    assert of_tier(mount)["copies"] == 1


def test_a_daemon_killed_in_the_middle_of_fills(overlay_mount: MountFactory) -> None:
    """Again and again, at any moment: no wrong byte, nothing left over, and what was here before still hits."""
    mount = overlay_mount(prefetch="no", read_ahead_memory=0)
    kept = make_model(mount, "kept", 3 * MIB).filled()
    rng = random.Random(4)
    for round_ in range(4):
        model = make_model(mount, f"m{round_}", {f"{n}.safetensors": 9 * MIB + n for n in range(3)})
        readers = [
            subprocess.Popen(["cat", model.through(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for file in model.files
        ]
        time.sleep(rng.uniform(0.0, 0.15))
        killed(mount)
        for reader in readers:
            reader.wait(20)
        mount.start()
        assert leftovers(mount) == []
        before = of_tier(mount)["fill_source_bytes"]
        kept.read()
        assert of_tier(mount)["fill_source_bytes"] == before == 0
        model.read()
        model.await_state("complete")
        model.read()
        mount.settled()
    command(mount, "check", "--deep")


def test_the_hot_come_back_into_an_empty_cache(overlay_mount: MountFactory) -> None:
    """The disk was replaced; the index knows what was loaded."""
    mount = overlay_mount(load_idle_gap=IDLE_SECONDS)
    hot = make_model(mount, "hot", {"a.safetensors": 5 * MIB, "b.safetensors": MIB}).filled()
    never = make_model(mount, "never", MIB)
    hot.await_row(loads=1)
    mount.end()
    shutil.rmtree(mount.cache_dir)
    mount.start()
    hot.await_state("complete")
    before = of_tier(mount)["fill_source_bytes"]
    hot.read()
    assert of_tier(mount)["fill_source_bytes"] == before == hot.size
    assert never.row()["state"] == "absent"


def test_the_cache_directory_vanishes_while_it_runs(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    model = make_model(mount, "m", 5 * MIB).filled()
    another = make_model(mount, "another", 5 * MIB)
    shutil.rmtree(mount.cache_dir)
    mount.expect_log("copy_damaged", "fill_ended")
    model.read()
    another.read()
    idle(mount)
    model.read()
    another.read()


# --- a source that fails ---


@pytest.fixture
def faulty(new_directory: DirectoryFactory) -> Iterator[tuple[Path, Path]]:
    """A JuiceFS mount that gives up soon, and the directory with its objects: what is removed there cannot be read."""
    with tempfile.TemporaryDirectory(prefix="tierd-tests-") as directory, JuiceFS(directory) as volume:
        volume.format()
        mount = volume.mount(new_directory("faulty"), cache_size_mib=0, extra=["--io-retries", "1"])
        yield mount.mountpoint, Path(directory) / "objects"


def test_a_read_error_of_the_source_reaches_the_reader_and_makes_no_copy(
    faulty: tuple[Path, Path], overlay_mount: MountFactory
) -> None:
    source, objects = faulty
    mount = overlay_mount(source, prefetch="no")
    model = make_model(mount, "m", 13 * MIB)
    data = model.files["a.safetensors"]
    lost = next(objects.rglob("*_1_4194304"))
    hidden = lost.rename(objects / "hidden")
    mount.expect_log("fill_ended")
    with model.through().open("rb", buffering=0) as reader:
        assert os.pread(reader.fileno(), 100, MIB) == data[MIB : MIB + 100]
        with raises(errno.EIO):
            os.pread(reader.fileno(), 100, 5 * MIB)
    idle(mount)
    assert (leftovers(mount), data_files(mount)) == ([], [])
    hidden.rename(lost)
    model.read()


# --- a source that stalls ---


class Stalling:
    """A JuiceFS volume whose process can be stopped and go on."""

    def __init__(self, volume: JuiceFS, where: Path) -> None:
        self.mountpoint = volume.mount(where, cache_size_mib=0).mountpoint
        self._processes = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "mount" in (process.info["cmdline"] or ()) and str(where) in process.info["cmdline"]
            and "juicefs" in process.info["cmdline"][0]
        ]  # fmt: skip
        assert self._processes

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nothing is answered for the length of a `with`."""
        for process in self._processes:
            process.suspend()
        try:
            yield
        finally:
            for process in self._processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()


@pytest.fixture
def stalling(new_directory: DirectoryFactory) -> Iterator[Stalling]:
    """A volume of its own for each test."""
    with tempfile.TemporaryDirectory(prefix="tierd-tests-") as directory, JuiceFS(directory) as volume:
        volume.format()
        yield Stalling(volume, new_directory("stalling"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_reader_that_waits_for_a_stalled_fill_can_be_ended(
    stalling: Stalling, overlay_mount: MountFactory, number: signal.Signals
) -> None:
    mount = overlay_mount(stalling.mountpoint, prefetch="no", fill_bandwidth=1, stale_if_unreachable="yes")
    model = make_model(mount, "m", 40 * MIB)
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); fd = os.open(sys.argv[1], os.O_RDONLY)"
    )
    code += "; os.pread(fd, 10, 0); print('open', flush=True); sys.stdin.read(1); os.pread(fd, 10, 30 << 20)"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, model.through()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline() == b"open\n"
            with stalling.stopped():
                reader.stdin.write(b"x")
                reader.stdin.close()
                time.sleep(0.5)  # it shall wait in pread; nothing tells
                assert reader.poll() is None
                reader.send_signal(number)
                assert reader.wait(5) == -number
        finally:
            reader.kill()
    model.read()


def test_readers_go_on_when_the_source_does(stalling: Stalling, overlay_mount: MountFactory) -> None:
    mount = overlay_mount(stalling.mountpoint, prefetch="no")
    model = make_model(mount, "m", 60 * MIB)
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(model.through().read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    with stalling.stopped():
        time.sleep(0.5)  # wherever they are
    for thread in threads:
        thread.join(30)
    assert answers == [model.files["a.safetensors"]] * 3
    model.await_state("complete")


def test_an_open_hot_file_is_read_while_the_source_stands_still(
    stalling: Stalling, overlay_mount: MountFactory
) -> None:
    mount = overlay_mount(stalling.mountpoint, prefetch="no")
    model = make_model(mount, "m", 9 * MIB).filled()
    with model.through().open("rb", buffering=0) as reader, stalling.stopped():
        assert reader.read(99 * MIB) == model.files["a.safetensors"]


def test_a_hot_model_opens_while_the_source_stands_still(stalling: Stalling, overlay_mount: MountFactory) -> None:
    mount = overlay_mount(stalling.mountpoint, prefetch="no", source_timeout=0.5)
    model = make_model(mount, "m", {"a.safetensors": 9 * MIB, "b.safetensors": MIB}).filled()
    time.sleep(1.5)  # the kernel's own memory of names and attributes is over
    expected = subprocess.check_output(["sha256sum", *map(model.beneath, model.files)])
    with stalling.stopped():
        reader = subprocess.Popen(["sha256sum", *map(model.through, model.files)], stdout=subprocess.PIPE)
        with suppress(subprocess.TimeoutExpired):
            reader.wait(8)  # a request on its way cannot be killed: whatever comes of it, the source must go on
        in_time = reader.poll() == 0
        stale_serves = of_tier(mount)["stale_serves"]
    reader.kill()
    out, _ = reader.communicate(timeout=20)
    assert in_time
    assert [line.split()[0] for line in out.splitlines()] == [line.split()[0] for line in expected.splitlines()]
    assert stale_serves >= 2
