"""Files that the kernel reads by itself: the same answers as through the daemon, whoever opens them how and when.

The kernel allows one way of reading per inode and answers EIO to a mix (docs/decisions/0001-node-ids.md); so
every combination of opens must be tried.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.mounts import OverlayMount, raises, tierd

MIB = 1 << 20


def kernel_can() -> bool:
    """FUSE passthrough is there since Linux 6.9."""
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= (6, 9)


@pytest.fixture(scope="module")
def shared(module_overlay_mount: MountFactory) -> OverlayMount:
    """A mount with passthrough where the kernel has it."""
    return module_overlay_mount()


@pytest.fixture
def mount(shared: OverlayMount) -> Iterator[OverlayMount]:
    """The same for each test; afterwards no backing may be left."""
    yield shared
    complaints = shared.ledger_complaints() + shared.log_complaints()
    assert not complaints, "\n".join(complaints)
    assert shared.status()["queues"]["backings"] == 0
    assert shared.status()["counters"]["backings_refused"] == 0


@pytest.fixture
def path(mount: OverlayMount) -> Path:
    """A file of 3 MiB in a directory of its own."""
    directory = Path(tempfile.mkdtemp(dir=mount.source))
    (directory / "file").write_bytes(random.Random(8).randbytes(3 * MIB))
    return mount.mountpoint / directory.name / "file"


def beneath(mount: OverlayMount, path: Path) -> Path:
    """The same file in the source."""
    return mount.source / path.relative_to(mount.mountpoint)


def test_the_status_says_which_way_bytes_go(mount: OverlayMount) -> None:
    assert mount.status()["data_path"] == ("passthrough" if kernel_can() else "daemon")
    assert mount.status()["passthrough"]["enabled"] == kernel_can()


def test_passthrough_can_be_insisted_on(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> None:
    if kernel_can():
        assert overlay_mount(passthrough="on").status()["data_path"] == "passthrough"
    else:
        base = new_directory("mount")
        options = ("--passthrough", "on", "--state-dir", base / "state", "--metrics", "127.0.0.1:0")
        (base / "mnt").mkdir()
        assert tierd("mount", new_directory("source"), base / "mnt", *options, check=False).returncode == 2


def test_reads_by_every_call(mount: OverlayMount, path: Path) -> None:
    data = beneath(mount, path).read_bytes()
    fd = os.open(path, os.O_RDONLY)
    try:
        assert mount.status()["queues"]["backings"] == kernel_can()
        assert os.read(fd, 4 * MIB) == data
        assert os.pread(fd, 100, MIB + 7) == data[MIB + 7 : MIB + 107]
        assert os.pread(fd, 100, len(data)) == b""
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            assert view[:] == data
        reader, writer = os.pipe()
        assert os.splice(fd, writer, 1000, offset_src=5) == 1000
        assert os.read(reader, 2000) == data[5:1005]
        os.close(reader)
        os.close(writer)
        assert os.lseek(fd, 0, os.SEEK_END) == len(data)
    finally:
        os.close(fd)


def test_direct_reads(mount: OverlayMount, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        block = mmap.mmap(-1, 65_536)
        assert os.preadv(fd, [block], 65_536) == 65_536
        assert block[:] == beneath(mount, path).read_bytes()[65_536:131_072]
    finally:
        os.close(fd)


def test_opens_are_recorded_and_bytes_are_not(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(cache_size=0)
    (mount.source / "models/m").mkdir(parents=True)
    (mount.source / "models/m/a.bin").write_bytes(b"x" * MIB)
    (mount.mountpoint / "models/m/a.bin").read_bytes()
    mount.settled()
    row = mount.models()["models/m"]
    assert (row["opens"], row["loads"]) == (1, 1)
    assert row["bytes_read"] == (0 if kernel_can() else MIB)


@pytest.mark.parametrize("how", ["r+b", "wb", "ab"])
def test_a_writer_comes_while_somebody_reads(mount: OverlayMount, path: Path, how: str) -> None:
    with path.open("rb", buffering=0) as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert reader.read(10) == view[:10]
        with path.open(how, buffering=0) as writer:
            writer.write(b"written!")
            expected = beneath(mount, path).read_bytes()
            assert b"written!" in expected
            assert os.pread(reader.fileno(), 4 * MIB, 0) == expected
            assert path.read_bytes() == expected
        assert path.read_bytes() == expected
        assert os.pread(reader.fileno(), 4 * MIB, 0) == expected
        if how != "wb":
            assert view[:] == expected[: 3 * MIB]
    assert path.read_bytes() == expected


def test_a_reader_comes_while_somebody_writes(mount: OverlayMount, path: Path) -> None:
    with path.open("r+b", buffering=0) as writer:
        with path.open("rb", buffering=0) as reader:
            writer.write(b"written!")
            assert reader.read(8) == b"written!"
            writer.write(b"again...")
            assert reader.read(8) == b"again..."
        assert mount.status()["queues"]["backings"] == 0
    assert path.read_bytes()[:16] == b"written!again..."


def test_truncated_while_somebody_reads(mount: OverlayMount, path: Path) -> None:
    with path.open("rb", buffering=0) as reader:
        assert len(reader.read()) == 3 * MIB
        os.truncate(path, 1000)
        assert len(os.pread(reader.fileno(), 4 * MIB, 0)) == 1000
        assert os.fstat(reader.fileno()).st_size == 1000
        os.truncate(path, 2 * MIB)
        assert len(os.pread(reader.fileno(), 4 * MIB, 0)) == 2 * MIB
    assert path.stat().st_size == 2 * MIB


def test_a_reader_sees_the_size_another_descriptor_made(mount: OverlayMount, path: Path) -> None:
    """As `tail -f` does: the reader was first, so the writer has another inode; bytes and size are seen at once."""
    with path.open("rb", buffering=0) as reader:
        reader.seek(0, os.SEEK_END)
        with path.open("ab", buffering=0) as writer:
            for number in range(5):
                writer.write(b"line %d\n" % number)
                assert reader.read(100) == b"line %d\n" % number
                assert os.fstat(reader.fileno()).st_size == 3 * MIB + 7 * (number + 1)
                assert reader.seek(0, os.SEEK_END) == 3 * MIB + 7 * (number + 1)


def test_truncated_by_another_name_than_the_writer_s(mount: OverlayMount, path: Path) -> None:
    """The reader's inode has that name, the writer's has its own: both must know how long the file is."""
    other = path.with_name("other")
    os.link(path, other)
    with other.open("rb", buffering=0) as reader, path.open("r+b", buffering=0) as writer:
        for size in (1000, 2 * MIB):
            assert os.fstat(writer.fileno()).st_size != size
            os.truncate(other, size)
            assert [os.fstat(file.fileno()).st_size for file in (reader, writer)] == [size, size]
            assert os.pread(writer.fileno(), 4 * MIB, 0) == beneath(mount, path).read_bytes()


def test_reopened_for_writing_through_proc(mount: OverlayMount, path: Path) -> None:
    """No name leads to another inode here, and the one there is cannot be written while the kernel reads it itself."""
    with path.open("rb") as reader:
        again = f"/proc/self/fd/{reader.fileno()}"
        if kernel_can():
            with raises(errno.ESTALE):
                os.open(again, os.O_RDWR)
        os.close(os.open(again, os.O_RDONLY))
    with path.open("r+b") as reader:
        os.close(os.open(f"/proc/self/fd/{reader.fileno()}", os.O_RDWR))


@pytest.mark.parametrize("first", [os.O_RDONLY, os.O_RDWR])
def test_locks_hold_between_readers_and_writers(mount: OverlayMount, path: Path, first: int) -> None:
    """One process locks a lock file that it opened one way, another tries what it opened the other way."""
    path.write_bytes(b"12345\n")
    other = os.O_RDWR if first == os.O_RDONLY else os.O_RDONLY
    one, two = os.open(path, first), os.open(path, other)
    try:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(one)
        os.close(two)


def test_a_shared_mapping_beside_a_reader_s(mount: OverlayMount, path: Path) -> None:
    """The reader mapped it first; what the writer stores in its mapping is seen once it is synced."""
    with path.open("rb") as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as seen:
        with path.open("r+b") as writer, mmap.mmap(writer.fileno(), 0) as view:
            view[5000:5005] = b"store"
            view.flush()
            assert seen[5000:5005] == b"store"
        assert path.read_bytes()[5000:5005] == b"store"


def test_replaced_and_removed_while_read(mount: OverlayMount, path: Path) -> None:
    data = path.read_bytes()
    with path.open("rb", buffering=0) as reader:
        (path.with_name("new")).write_bytes(b"new")
        (path.with_name("new")).rename(path)
        assert path.read_bytes() == b"new"
        assert reader.read(4 * MIB) == data
        path.unlink()
        assert os.pread(reader.fileno(), 10, MIB) == data[MIB : MIB + 10]
        assert os.fstat(reader.fileno()).st_nlink == 0


def test_attributes_change_while_read(mount: OverlayMount, path: Path) -> None:
    with path.open("rb") as reader:
        before = path.stat().st_ino
        path.chmod(0o600)
        os.chown(path, 5, 6)
        os.utime(path, ns=(10**18, 10**18))
        os.setxattr(path, "user.x", b"1")
        os.link(path, path.with_name("linked"))
        assert os.fstat(reader.fileno()).st_uid == 5
        with path.open("rb") as again:
            assert os.fstat(again.fileno()).st_ino == before, "our own changes are no new content"
            assert again.read(10) == reader.read(10)


def test_readers_and_writers_come_and_go(mount: OverlayMount) -> None:
    """Six threads open four files in all ways at once; not one call may fail."""
    names = [mount.mountpoint / f"{number}" for number in range(4)]
    for path in names:
        path.write_bytes(b"x" * 100_000)
    wrong: list[str] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for step in range(100):
            path, how = rng.choice(names), rng.choice(["rb", "rb", "rb", "r+b", "ab", "map"])
            try:
                with path.open("rb" if how == "map" else how, buffering=0) as file:
                    if how == "map":
                        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                            assert view[:1] == b"x"
                    elif how == "rb":
                        assert set(file.read(5000)) == {120}
                    else:
                        file.write(b"x" * 10)
                path.stat()
            except OSError as error:
                wrong.append(f"step {step}, {how}: {errno.errorcode[error.errno or 0]}")

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for path in names:
        assert path.read_bytes() == beneath(mount, path).read_bytes()
        assert set(path.read_bytes()) == {120}
