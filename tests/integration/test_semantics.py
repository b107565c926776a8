"""Files through the overlay behave as files do: data, sizes, descriptors, locks. Over a directory and over JuiceFS."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import random
import select
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Tree
from tests.mounts import raises

pytestmark = pytest.mark.sources("directory", "juicefs", "daemon-reads")

MIB = 1 << 20
GIB = 1 << 30


# --- data ---


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 131_072, MIB + 1, 5 * MIB + 17])
def test_what_is_written_is_read_back(tree: Tree, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tree.top / "file").write_bytes(data)
    assert (tree.beneath / "file").read_bytes() == data
    assert (tree.top / "file").read_bytes() == data
    assert (tree.top / "file").stat().st_size == size


def test_what_lies_in_the_source_is_read(tree: Tree) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    (tree.beneath / "file").write_bytes(data)
    with (tree.top / "file").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(data).digest()
        rng = random.Random(2)
        for _ in range(50):
            offset, length = rng.randrange(len(data)), rng.randrange(1, 200_000)
            assert os.pread(file.fileno(), length, offset) == data[offset : offset + length]


def test_reading_past_the_end_gives_nothing(tree: Tree) -> None:
    (tree.top / "file").write_bytes(b"0123456789")
    with (tree.top / "file").open("rb") as file:
        assert os.pread(file.fileno(), 100, 4) == b"456789"
        assert os.pread(file.fileno(), 100, 10) == b""
        assert os.pread(file.fileno(), 100, 1 << 40) == b""


def test_appends_land_at_the_end_whoever_grew_the_file(tree: Tree) -> None:
    path = tree.top / "log"
    with path.open("ab", buffering=0) as one, path.open("ab", buffering=0) as other:
        for number in range(20):
            (one if number % 2 else other).write(b"%02d\n" % number)
        one.seek(0)
        one.write(b"end\n")
    assert path.read_bytes() == b"".join(b"%02d\n" % number for number in range(20)) + b"end\n"
    assert (tree.beneath / "log").read_bytes() == path.read_bytes()


def test_writing_at_offsets_leaves_the_rest_and_zeroes_in_holes(tree: Tree) -> None:
    fd = os.open(tree.top / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"end", 100_000)
        os.pwrite(fd, b"begin", 0)
        os.pwrite(fd, b"B", 0)
        assert os.fstat(fd).st_size == 100_003
        assert os.pread(fd, 10, 0) == b"Begin" + bytes(5)
        assert os.pread(fd, 10, 99_995) == bytes(5) + b"end"
    finally:
        os.close(fd)
    assert (tree.beneath / "file").read_bytes() == b"Begin" + bytes(99_995) + b"end"


def test_truncation_by_name_and_by_descriptor(tree: Tree) -> None:
    path = tree.top / "file"
    path.write_bytes(b"x" * 10_000)
    os.truncate(path, 5000)
    assert path.read_bytes() == b"x" * 5000
    with path.open("r+b", buffering=0) as file:
        file.truncate(3)
        assert os.fstat(file.fileno()).st_size == 3
        file.truncate(8)
        assert file.read() == b"xxx" + bytes(5)
    assert (tree.beneath / "file").read_bytes() == b"xxx" + bytes(5)


def test_truncating_on_open(tree: Tree) -> None:
    path = tree.top / "file"
    path.write_bytes(b"old content")
    os.close(os.open(path, os.O_RDWR | os.O_TRUNC))
    assert path.stat().st_size == 0
    path.write_bytes(b"new")
    assert (tree.beneath / "file").read_bytes() == b"new"


def test_exclusive_creation(tree: Tree) -> None:
    path = tree.top / "file"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640))
    with raises(errno.EEXIST):
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    (tree.beneath / "made-beneath").touch()
    with raises(errno.EEXIST):
        os.open(tree.top / "made-beneath", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    assert stat.S_IMODE((tree.beneath / "file").stat().st_mode) == 0o640


def test_a_descriptor_may_do_only_what_it_was_opened_for(tree: Tree) -> None:
    path = tree.top / "file"
    path.write_bytes(b"data")
    reader, writer = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)
    try:
        with raises(errno.EBADF):
            os.write(reader, b"x")
        with raises(errno.EBADF):
            os.read(writer, 1)
        with raises(errno.EINVAL):
            os.ftruncate(reader, 0)
    finally:
        os.close(reader)
        os.close(writer)
    assert path.read_bytes() == b"data"


def test_direct_io(tree: Tree) -> None:
    path = tree.top / "file"
    block = mmap.mmap(-1, 65_536)  # page-aligned, as O_DIRECT wants it
    block.write(random.Random(3).randbytes(65_536))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        assert os.pwritev(fd, [block], 0) == 65_536
        assert os.pwritev(fd, [block], 65_536) == 65_536
        back = mmap.mmap(-1, 65_536)
        assert os.preadv(fd, [back], 65_536) == 65_536
        assert back[:] == block[:]
    finally:
        os.close(fd)
    assert (tree.beneath / "file").read_bytes() == block[:] * 2
    assert path.read_bytes() == block[:] * 2


def test_shared_mapping_reads_and_writes(tree: Tree) -> None:
    path = tree.top / "file"
    path.write_bytes(b"." * 20_000)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[10_000:10_005] = b"hello"
        assert os.pread(file.fileno(), 5, 10_000) == b"hello"
        os.pwrite(file.fileno(), b"world", 15_000)
        assert view[15_000:15_005] == b"world"
        view.flush()
        assert (tree.beneath / "file").read_bytes()[10_000:10_005] == b"hello"
    expected = bytearray(b"." * 20_000)
    expected[10_000:10_005], expected[15_000:15_005] = b"hello", b"world"
    assert path.read_bytes() == expected


def test_a_mapping_outlives_its_descriptor_and_its_name(tree: Tree) -> None:
    path = tree.top / "file"
    data = random.Random(4).randbytes(300_000)
    path.write_bytes(data)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    path.unlink()
    with view:
        assert view[:] == data
    assert not (tree.beneath / "file").exists()


def test_stores_through_a_mapping_show_in_the_times_by_msync(tree: Tree) -> None:
    """Found by the comparer: seed 966592805, part 34. What POSIX leaves open until msync(2) is not asked for."""
    for name, unlinked in (("kept", False), ("gone", True)):
        path = tree.top / name
        path.write_bytes(bytes(100_000))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            if unlinked:
                path.unlink()
            view[:4] = b"once"
            view.flush()
            os.utime(file.fileno(), ns=(1, 1))
            assert os.fstat(file.fileno()).st_mtime_ns < 1_000_000_000
            view[:4] = b"more"
            view.flush()
            assert os.fstat(file.fileno()).st_mtime_ns > 1_000_000_000


def test_offsets_beyond_4_gib(tree: Tree) -> None:
    path = tree.top / "sparse"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"far", 5 * GIB)
        assert os.fstat(fd).st_size == 5 * GIB + 3
        assert os.pread(fd, 10, 5 * GIB - 2) == b"\0\0far"
        assert os.pread(fd, 4, 4 * GIB) == bytes(4)
    finally:
        os.close(fd)
    assert (tree.beneath / "sparse").stat().st_size == 5 * GIB + 3
    assert path.stat().st_blocks * 512 < GIB or path.stat().st_blocks == (tree.beneath / "sparse").stat().st_blocks


def test_copies_between_files(tree: Tree) -> None:
    data = random.Random(5).randbytes(2 * MIB + 3)
    (tree.top / "from").write_bytes(data)
    shutil.copy2(tree.top / "from", tree.top / "to")
    assert (tree.beneath / "to").read_bytes() == data
    assert (tree.top / "to").stat().st_mtime_ns == (tree.top / "from").stat().st_mtime_ns


def test_syncing_files_and_directories(tree: Tree) -> None:
    with (tree.top / "file").open("wb", buffering=0) as file:
        file.write(b"data")
        os.fsync(file.fileno())
        file.write(b"more")
        os.fdatasync(file.fileno())
    directory = os.open(tree.top, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    assert (tree.beneath / "file").read_bytes() == b"datamore"


def test_size_seen_while_another_descriptor_writes(tree: Tree) -> None:
    with (tree.top / "file").open("wb", buffering=0) as writer, (tree.top / "file").open("rb", buffering=0) as reader:
        for number in range(1, 30):
            writer.write(b"x" * 1000)
            assert os.fstat(reader.fileno()).st_size == number * 1000
            assert len(os.pread(reader.fileno(), 100_000, 0)) == number * 1000


# --- open files whose names change ---


def test_an_unlinked_open_file_lives_on(tree: Tree) -> None:
    path = tree.top / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        assert not path.exists()
        assert list(tree.top.iterdir()) == []
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 4, 3) == b"3456"
        os.pwrite(fd, b"AB", 10)
        assert os.fstat(fd).st_size == 12
        os.ftruncate(fd, 5)
        assert os.pread(fd, 100, 0) == b"01234"
        os.fchmod(fd, 0o600)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        os.utime(fd, ns=(1_000, 2_000_001_000))
        assert os.fstat(fd).st_mtime_ns == 2_000_001_000
        path.write_bytes(b"a new file")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"01234"
    finally:
        os.close(fd)
    assert path.read_bytes() == b"a new file"


def test_an_unlinked_file_can_be_opened_again_through_proc(tree: Tree) -> None:
    (tree.top / "file").write_bytes(b"still here")
    with (tree.top / "file").open(
        "r+b", buffering=0
    ) as file:  # (opened for reading alone, passthrough allows no writer)
        (tree.top / "file").unlink()
        with Path(f"/proc/self/fd/{file.fileno()}").open("r+b") as again:
            assert again.read() == b"still here"
            again.write(b"!")
        assert file.read() == b"still here!"


def test_an_open_file_that_is_renamed_over(tree: Tree) -> None:
    (tree.top / "model").write_bytes(b"old")
    (tree.top / "model.tmp").write_bytes(b"new, longer")
    with (tree.top / "model").open("r+b", buffering=0) as old:
        (tree.top / "model.tmp").rename(tree.top / "model")
        assert (tree.top / "model").read_bytes() == b"new, longer"
        assert old.read() == b"old"
        old.write(b" and gone")
        assert os.fstat(old.fileno()).st_nlink == 0
        assert os.fstat(old.fileno()).st_size == 12
    assert (tree.top / "model").read_bytes() == b"new, longer"
    assert os.listdir(tree.top) == ["model"]


def test_files_stay_open_while_their_directories_are_renamed(tree: Tree) -> None:
    (tree.top / "a/b/c").mkdir(parents=True)
    (tree.top / "other").mkdir()
    with (tree.top / "a/b/c/file").open("w+b", buffering=0) as file:
        file.write(b"one")
        (tree.top / "a/b").rename(tree.top / "other/moved")
        file.write(b"two")
        os.fchmod(file.fileno(), 0o604)
        (tree.top / "other").rename(tree.top / "a/other")
        assert os.pread(file.fileno(), 10, 0) == b"onetwo"
        assert (tree.top / "a/other/moved/c/file").read_bytes() == b"onetwo"
        (tree.top / "a/other/moved/c/second").write_bytes(b"beside")
    assert (tree.beneath / "a/other/moved/c/file").read_bytes() == b"onetwo"
    assert stat.S_IMODE((tree.beneath / "a/other/moved/c/file").stat().st_mode) == 0o604
    assert (tree.beneath / "a/other/moved/c/second").read_bytes() == b"beside"


def test_a_working_directory_that_is_renamed_or_removed(tree: Tree) -> None:
    (tree.top / "dir").mkdir()
    fd = os.open(tree.top / "dir", os.O_RDONLY)
    try:
        (tree.top / "dir").rename(tree.top / "elsewhere")
        made = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        os.close(made)
        assert os.listdir(tree.top / "elsewhere") == ["file"]
        os.unlink("file", dir_fd=fd)
        (tree.top / "elsewhere").rmdir()
        with raises(errno.ENOENT):
            os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        if not tree.on_juicefs:  # which has forgotten the directory by now
            assert os.listdir(fd) == []
            assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


# --- locks, devices, programs ---


_LOCKER = """
import fcntl, os, sys
fd = os.open(sys.argv[2], os.O_RDWR)
lock = fcntl.flock if sys.argv[1] == "flock" else fcntl.lockf
try:
    lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked")
except BlockingIOError:
    print("busy")
"""


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_locks_between_two_processes(tree: Tree, kind: str) -> None:
    path = tree.top / "lock"
    path.touch()

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LOCKER, kind, path], check=True, capture_output=True, text=True
        ).stdout.strip()

    lock = fcntl.flock if kind == "flock" else fcntl.lockf
    with path.open("r+b") as file:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert other() == "busy"
        lock(file, fcntl.LOCK_UN)
        assert other() == "locked"
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert other() == "locked", "closing gives locks back"


def test_programs_run_from_the_mount(tree: Tree) -> None:
    program = tree.top / "echo"
    shutil.copy(shutil.which("echo") or "/bin/echo", program)
    program.chmod(0o755)
    assert subprocess.run([program, "from the mount"], check=True, capture_output=True).stdout == b"from the mount\n"
    script = tree.top / "script"
    script.write_text("#!/bin/sh\nexec ./echo script\n")
    with raises(errno.EACCES):
        subprocess.run([script], check=True)
    script.chmod(0o700)
    assert subprocess.run([script], check=True, capture_output=True, cwd=tree.top).stdout == b"script\n"


def test_polling_a_file_says_ready(tree: Tree) -> None:
    with (tree.top / "file").open("wb") as file:
        poll = select.poll()
        poll.register(file, select.POLLIN | select.POLLOUT)
        assert poll.poll(1000) == [(file.fileno(), select.POLLIN | select.POLLOUT)]


def test_statvfs_is_the_source_s(tree: Tree) -> None:
    through, below = os.statvfs(tree.top), os.statvfs(tree.beneath)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(through, field) == getattr(below, field), field
    assert abs(through.f_bavail - below.f_bavail) < through.f_blocks // 20
