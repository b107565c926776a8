"""What the source says is what the caller gets: no space, no writing, no extended attributes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.mounts import raises, wait_until

MIB = 1 << 20


@pytest.fixture
def mounted(new_directory: DirectoryFactory) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system of the kernel's, as a source with limits: `mounted("tmpfs", "size=1m")`."""
    with ExitStack() as stack:

        def mount(fstype: str, options: str = "rw") -> Path:
            path = new_directory(fstype)
            subprocess.run(["mount", "-t", fstype, "-o", options, fstype, path], check=True)
            stack.callback(lambda: subprocess.run(["umount", path], check=True))
            return path

        yield mount


def test_a_full_source_is_enospc(mounted: Callable[..., Path], overlay_mount: MountFactory) -> None:
    small = mounted("tmpfs", "size=1m")
    path = overlay_mount(small).mountpoint / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert os.pwrite(fd, b"x" * 1000, 0) == 1000
        with raises(errno.ENOSPC):
            for position in range(1, 5):
                os.pwrite(fd, b"x" * MIB, position * MIB)
    finally:
        os.close(fd)
    path.unlink()
    wait_until(lambda: os.statvfs(small).f_bavail > 200, 5, "the space comes back")
    path.write_bytes(b"x" * 500_000)
    assert (small / "file").read_bytes() == b"x" * 500_000


def test_a_read_only_source_is_erofs(mounted: Callable[..., Path], overlay_mount: MountFactory) -> None:
    source = mounted("tmpfs")
    (source / "file").write_bytes(b"data")
    subprocess.run(["mount", "-o", "remount,ro", source], check=True)
    top = overlay_mount(source).mountpoint
    for call in (
        (top / "new").touch, (top / "new").mkdir, (top / "file").unlink, (top / "file").touch,
        lambda: (top / "file").write_bytes(b"new"), lambda: (top / "file").chmod(0o600),
    ):  # fmt: skip
        with raises(errno.EROFS):
            call()
    assert (top / "file").read_bytes() == b"data"


def test_a_source_without_extended_attributes(mounted: Callable[..., Path], overlay_mount: MountFactory) -> None:
    source = mounted("ramfs")
    (source / "file").touch()
    for base in (source, overlay_mount(source).mountpoint):
        for _ in range(2):  # the second answer is the kernel's own
            with raises(errno.ENOTSUP):
                os.setxattr(base / "file", "user.x", b"1")
            with raises(errno.ENOTSUP):
                os.getxattr(base / "file", "user.x")
