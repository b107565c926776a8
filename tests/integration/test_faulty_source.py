"""The faulty source itself: without orders it is the directory beneath, with them it does what they say."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import DirectoryFactory
from tests.faulty import FaultySource
from tests.integration.calls import outcome
from tests.mounts import is_mounted, raises, wait_until
from tierd.syscalls import forced_stat

DATA = bytes(range(256)) * 4096


@pytest.fixture
def faulty(new_directory: DirectoryFactory) -> Iterator[FaultySource]:
    """One that holds `file`, and caches nothing."""
    with FaultySource(new_directory("faulty")) as source:
        (source.backing / "file").write_bytes(DATA)
        yield source


def test_without_orders_it_is_the_directory(faulty: FaultySource) -> None:
    top, below = faulty.mountpoint, faulty.backing
    assert (top / "file").read_bytes() == DATA
    (top / "dir").mkdir()
    (top / "dir/new").write_bytes(b"through")
    (top / "dir/new").rename(top / "dir/renamed")
    os.utime(top / "dir/renamed", ns=(1, 2))
    os.truncate(top / "dir/renamed", 4)
    assert (below / "dir/renamed").read_bytes() == b"thro"
    assert os.listdir(top / "dir") == ["renamed"]
    inode = (top / "dir/renamed").stat().st_ino
    (below / "dir/renamed").write_bytes(b"beneath")
    assert (top / "dir/renamed").read_bytes() == b"beneath"
    assert (top / "dir/renamed").stat().st_ino == inode
    (top / "dir/renamed").unlink()
    (top / "dir").rmdir()
    assert os.listdir(below) == ["file"]
    assert not faulty.tell()["injected"]


def test_a_stalled_read_goes_on_when_released(faulty: FaultySource) -> None:
    with faulty.stalling("read", path="fi*"):
        reader = subprocess.Popen(["cat", faulty.mountpoint / "file"], stdout=subprocess.PIPE)
        wait_until(lambda: faulty.stalled("read") > 0, 10, "the read is stalled")
        assert os.stat(faulty.mountpoint / "file").st_size == len(DATA)
        assert reader.poll() is None
    assert reader.communicate(timeout=10)[0] == DATA
    assert faulty.tell()["injected"]["stall read"] > 0
    assert not faulty.tell()["stalled"]


def test_it_goes_while_everything_is_stalled(new_directory: DirectoryFactory) -> None:
    with FaultySource(new_directory("faulty")) as faulty:
        (faulty.backing / "file").write_bytes(DATA)
        faulty.stall()
        readers = [subprocess.Popen(["cat", faulty.mountpoint / name], stderr=subprocess.DEVNULL) for name in "abc"]
        wait_until(lambda: faulty.stalled("lookup") + faulty.stalled("getattr") > 0, 10, "something is stalled")
    assert not is_mounted(faulty.mountpoint)
    assert all(reader.wait(10) != -signal.SIGKILL for reader in readers)


def test_failures_come_as_often_as_the_seed_says(faulty: FaultySource) -> None:
    def failing_opens() -> list[int]:
        rule = faulty.fail(errno.ENOTCONN, "open", probability=0.5, seed=7)
        failed = [number for number in range(40) if outcome((faulty.mountpoint / "file").read_bytes) == "ENOTCONN"]
        faulty.remove(rule)
        return failed

    first = failing_opens()
    assert 10 < len(first) < 30
    assert failing_opens() == first
    assert faulty.tell()["failures"]["ENOTCONN file"] == 2 * len(first)


def test_a_path_fails_only_so_many_times(faulty: FaultySource) -> None:
    faulty.fail(errno.EIO, "open", path="file", times_per_path=1)
    with raises(errno.EIO):
        (faulty.mountpoint / "file").read_bytes()
    assert (faulty.mountpoint / "file").read_bytes() == DATA


def test_short_reads_lose_nothing(faulty: FaultySource) -> None:
    faulty.set(direct_io=True)
    faulty.shorten(probability=0.5, seed=1)
    fd = os.open(faulty.mountpoint / "file", os.O_RDONLY)
    sizes, data = [], b""
    while part := os.pread(fd, 100_000, len(data)):
        sizes.append(len(part))
        data += part
    os.close(fd)
    assert data == DATA
    assert any(size < 100_000 for size in sizes[:-1])


def test_cached_attributes_hide_an_overwrite_of_equal_size(faulty: FaultySource) -> None:
    """As JuiceFS does: `stat` is behind, an attribute read past the cache is not."""
    faulty.set(attr_timeout=60.0, entry_timeout=60.0)
    before = os.stat(faulty.mountpoint / "file")
    (faulty.backing / "file").write_bytes(DATA[::-1])
    assert os.stat(faulty.mountpoint / "file").st_ctime_ns == before.st_ctime_ns
    fd = os.open(faulty.mountpoint / "file", os.O_RDONLY)
    assert os.fstat(fd).st_ctime_ns == before.st_ctime_ns
    assert forced_stat(fd).st_ctime_ns > before.st_ctime_ns
    os.close(fd)
