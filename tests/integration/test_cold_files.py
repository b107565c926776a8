"""Files whose bytes are in the object store, through a real mount: they look and behave like all others."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cold import freeze, stub_of
from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, idle, of_tier
from tests.mounts import OverlayMount, raises, wait_until
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key

BUCKET = "cold-models"


class Cold:
    """A mount with an object store beside it, and models to make cold."""

    def __init__(self, mount: OverlayMount, objects: Path) -> None:
        self.mount = mount
        self.store = DirectoryStore(objects)
        self.objects = objects

    def model(self, name: str, sizes: dict[str, int]) -> dict[str, bytes]:
        """A model all of whose files are cold; its bytes."""
        where = self.mount.source / "models" / name
        where.mkdir(parents=True)
        data = {file: os.urandom(size) for file, size in sizes.items()}
        for file, content in data.items():
            (where / file).write_bytes(content)
            os.utime(where / file, ns=(1_000_007_000, 2_000_009_000))
        self.freeze(name, list(sizes))
        return data

    def freeze(self, name: str, files: list[str]) -> None:
        """What a demotion leaves behind."""
        where = self.mount.source / "models" / name
        for file in files:
            size = (where / file).stat().st_size
            key = object_key(f"models/{name}", 1, os.fsencode(file))
            self.store.put_file(BUCKET, key, where / file, size)
        freeze({where / file: None for file in files}, f"models/{name}")

    def path(self, name: str) -> Path:
        """Through the mount."""
        return self.mount.mountpoint / "models" / name

    def beneath(self, name: str) -> Path:
        """In the source."""
        return self.mount.source / "models" / name

    def counter(self, name: str) -> int:
        """Of `tierd status`."""
        return int(self.mount.status()["counters"][name])


@pytest.fixture
def objects(new_directory: DirectoryFactory) -> Path:
    """An object store."""
    where = new_directory("objects")
    DirectoryStore(where).ensure_bucket(BUCKET)
    return where


@pytest.fixture
def cold(overlay_mount: MountFactory, objects: Path) -> Cold:
    """A mount whose names and attributes are never older than a moment."""
    return Cold(overlay_mount(objects=str(objects), prefetch="no", attr_timeout=0, entry_timeout=0), objects)


@pytest.fixture(params=["directory", "juicefs"])
def anywhere(
    request: pytest.FixtureRequest, overlay_mount: MountFactory, new_directory: DirectoryFactory, objects: Path
) -> Iterator[Cold]:
    """The same over a directory and over JuiceFS."""
    if request.param == "directory":
        source = new_directory("source")
    else:
        source = request.getfixturevalue("juicefs") / f"cold-{time.monotonic_ns()}"
        source.mkdir()
    return Cold(overlay_mount(source, objects=str(objects), prefetch="no"), objects)


def test_it_looks_as_before_and_its_bytes_are_right(anywhere: Cold) -> None:
    data = anywhere.model("m", {"config.json": 700, "x.safetensors": 9 * MIB + 5})
    for name, content in data.items():
        st = anywhere.path(f"m/{name}").stat()
        assert (st.st_size, st.st_mtime_ns, st.st_mode & 0o7777) == (len(content), 2_000_009_000, 0o644)
        assert anywhere.path(f"m/{name}").read_bytes() == content
    assert sorted(os.listdir(anywhere.path("m"))) == sorted(data)
    assert not anywhere.beneath("m/x.safetensors").exists()
    assert anywhere.counter("cold_opens") == 2


def test_it_can_be_mapped(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 5 * MIB})["x.safetensors"]
    with cold.path("m/x.safetensors").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[:] == data


def test_a_look_at_the_header_fetches_one_chunk(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 64 * MIB})["x.safetensors"]
    with cold.path("m/x.safetensors").open("rb", buffering=0) as file:
        assert file.read(4096) == data[:4096]
    assert cold.counter("cold_bytes") <= 8 * MIB
    assert cold.counter("cold_loads") == 0


def test_a_load_brings_the_whole_model_to_the_node(cold: Cold) -> None:
    data = cold.model("m", {"1.safetensors": 48 * MIB, "2.safetensors": 10 * MIB, "config.json": 100})
    assert cold.path("m/1.safetensors").read_bytes() == data["1.safetensors"]
    wait_until(lambda: of_tier(cold.mount)["copies"] == 3, 20, "the model is on the node")
    idle(cold.mount)
    fetched = cold.counter("cold_bytes")
    for name, content in data.items():
        assert cold.path(f"m/{name}").read_bytes() == content
    assert cold.counter("cold_bytes") == fetched, "the copies are read"
    assert not cold.beneath("m/1.safetensors").exists()


def test_a_scan_brings_nothing(cold: Cold) -> None:
    cold.model("m", {"1.safetensors": 48 * MIB, "2.safetensors": 10 * MIB})
    subprocess.run(["grep", "-r", "-c", "no such text", str(cold.path("m"))], capture_output=True, check=False)
    idle(cold.mount)
    assert cold.counter("cold_loads") == 0
    assert of_tier(cold.mount)["copies"] == 0


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
def test_whoever_writes_has_the_bytes(anywhere: Cold, flags: int) -> None:
    data = anywhere.model("m", {"x.safetensors": 6 * MIB})["x.safetensors"]
    fd = os.open(anywhere.path("m/x.safetensors"), flags)
    os.write(fd, b"new")
    os.close(fd)
    expected = data + b"new" if flags & os.O_APPEND else b"new" + data[3:]
    assert anywhere.path("m/x.safetensors").read_bytes() == expected
    assert anywhere.counter("recalls") == 1
    assert anywhere.beneath("m/x.safetensors").read_bytes() == expected, "it is where it was"


def test_truncation_needs_no_bytes(anywhere: Cold) -> None:
    """One by path: an open that truncates comes as two requests, and the first does not say so."""
    data = anywhere.model("m", dict.fromkeys(("x.safetensors", "y.safetensors", "z.safetensors"), 6 * MIB))
    os.truncate(anywhere.path("m/y.safetensors"), 0)
    assert anywhere.path("m/y.safetensors").stat().st_size == 0
    assert anywhere.counter("cold_bytes") == 0
    anywhere.path("m/x.safetensors").write_bytes(b"new")
    assert anywhere.path("m/x.safetensors").read_bytes() == b"new"
    os.truncate(anywhere.path("m/z.safetensors"), 10)
    assert anywhere.path("m/z.safetensors").read_bytes() == data["z.safetensors"][:10]


def test_names_come_and_go(anywhere: Cold) -> None:
    data = anywhere.model("m", {name: MIB + number for number, name in enumerate("abcdefg")})
    path = anywhere.path("m")
    (path / "a").unlink()
    (path / "b").rename(path / "moved")
    (path / "sub").mkdir()
    (path / "c").rename(path / "sub/c")
    (path / "link").hardlink_to(path / "d")
    (path / "e").chmod(0o600)
    (path / "hot").write_bytes(b"hot")
    (path / "hot").rename(path / "f")
    os.utime(path / "g", ns=(5000, 6000))
    assert sorted(os.listdir(path)) == ["d", "e", "f", "g", "link", "moved", "sub"]
    assert (path / "moved").read_bytes() == data["b"]
    assert (path / "sub/c").read_bytes() == data["c"]
    assert (path / "link").read_bytes() == (path / "d").read_bytes() == data["d"]
    assert (path / "link").stat().st_nlink == 2
    assert (path / "e").stat().st_mode & 0o7777 == 0o600
    assert (path / "e").read_bytes() == data["e"]
    assert (path / "f").read_bytes() == b"hot"
    assert (path / "g").stat().st_mtime_ns == 6000
    path.rename(anywhere.path("n"))
    assert anywhere.path("n/moved").read_bytes() == data["b"]
    shutil.rmtree(anywhere.path("n"))
    assert os.listdir(anywhere.path("")) == []
    assert list(anywhere.beneath("").iterdir()) == []


def test_ours_is_out_of_reach(anywhere: Cold) -> None:
    anywhere.model("m", {"x.safetensors": MIB})
    with raises(errno.ENOENT):
        os.stat(anywhere.path("m/.tierd"))
    with raises(errno.ENOENT):
        os.listdir(anywhere.path("m/.tierd/cold"))
    for attempt in (
        lambda: os.mkdir(anywhere.path("m/.tierd")),
        lambda: os.symlink("x", anywhere.path(".tierd")),
        lambda: anywhere.path("m/.tierd").write_bytes(b""),
        lambda: os.rename(anywhere.path("m/x.safetensors"), anywhere.path("m/.tierd")),
    ):
        with raises(errno.EPERM):
            attempt()


def test_whoever_has_it_open_keeps_it(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 9 * MIB})["x.safetensors"]
    with cold.path("m/x.safetensors").open("rb", buffering=0) as file:
        cold.path("m/x.safetensors").unlink()
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.fstat(file.fileno()).st_size == len(data)
        assert b"".join(iter(lambda: file.read(MIB), b"")) == data


def test_a_reader_keeps_its_bytes_beside_a_writer(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 9 * MIB})["x.safetensors"]
    with cold.path("m/x.safetensors").open("rb", buffering=0) as reader:
        with cold.path("m/x.safetensors").open("r+b", buffering=0) as writer:
            writer.write(b"new")
        assert b"".join(iter(lambda: reader.read(MIB), b"")) == data
    assert cold.path("m/x.safetensors").read_bytes() == b"new" + data[3:]


def test_readers_go_on_when_the_daemon_dies(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 9 * MIB})["x.safetensors"]
    with cold.path("m/x.safetensors").open("rb", buffering=0) as file:
        assert file.read(MIB) == data[:MIB]
        pid = cold.mount.status()["daemon_pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: cold.mount.status()["daemon_pid"] != pid, 20, "another daemon serves")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), MIB, 8 * MIB) == data[8 * MIB : 9 * MIB]
    cold.mount.expect_log("daemon_died")


def test_many_readers_of_one_file(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 40 * MIB})["x.safetensors"]
    wrong: list[int] = []

    def read(number: int) -> None:
        if cold.path("m/x.safetensors").read_bytes() != data:
            wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_bytes_that_cannot_be_had_are_an_error_and_never_wrong(cold: Cold, harm: str) -> None:
    cold.model("m", {"x.safetensors": 9 * MIB})
    (found,) = (path for path in (cold.objects / BUCKET / "models").rglob("x.safetensors") if path.is_file())
    if harm == "missing":
        found.unlink()
    else:
        with found.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"flipped")
    with raises(errno.EIO):
        cold.path("m/x.safetensors").read_bytes()
    with raises(errno.EIO):
        cold.path("m/x.safetensors").open("r+b")
    assert cold.path("m/x.safetensors").stat().st_size == 9 * MIB, "nothing was lost by trying"
    assert cold.path("m/x.safetensors").stat().st_mtime_ns == 2_000_009_000
    assert stub_of(cold.beneath("m/x.safetensors")).stat().st_size <= 1, "what came takes no room"
    cold.mount.expect_log("recall_failed")


def test_without_an_object_store_it_is_there_and_cannot_be_read(overlay_mount: MountFactory, objects: Path) -> None:
    mount = overlay_mount(prefetch="no")
    Cold(mount, objects).model("m", {"x.safetensors": MIB})
    path = mount.mountpoint / "models/m/x.safetensors"
    assert path.stat().st_size == MIB
    with raises(errno.EIO):
        path.read_bytes()
    with raises(errno.EIO):
        path.open("r+b")
    mount.expect_log("cold_file_unreadable")


def test_two_who_write_bring_the_bytes_once(cold: Cold) -> None:
    data = cold.model("m", {"x.safetensors": 20 * MIB})["x.safetensors"]

    def write(at: int) -> Callable[[], None]:
        def run() -> None:
            with cold.path("m/x.safetensors").open("r+b", buffering=0) as file:
                file.seek(at)
                file.write(b"new")

        return run

    threads = [threading.Thread(target=write(at)) for at in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cold.path("m/x.safetensors").read_bytes() == b"new" + data[3:10] + b"new" + data[13:]
    assert cold.counter("recalls") == 1


def test_what_one_user_brings_is_bounded(overlay_mount: MountFactory, objects: Path) -> None:
    """Whoever is beyond it reads on, range by range, and cannot open for writing."""
    mount = overlay_mount(objects=str(objects), prefetch="no", recall_bytes_per_hour="1MiB")
    cold = Cold(mount, objects)
    data = cold.model("m", {"x.safetensors": 6 * MIB, "y.safetensors": 48 * MIB})
    with cold.path("m/x.safetensors").open("r+b") as file:
        file.write(b"new")
    with raises(errno.EDQUOT):
        cold.path("m/y.safetensors").open("r+b")
    assert cold.path("m/y.safetensors").read_bytes() == data["y.safetensors"]
    idle(mount)
    assert of_tier(mount)["copies"] == 0, "the load was served by ranges"
    assert cold.counter("cold_loads") == 1
