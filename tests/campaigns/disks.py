"""Small ext4 file systems on loop devices, their images in memory where there is /dev/shm."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


@contextmanager
def ext4(mib: int, *options: str) -> Iterator[Path]:
    """Where a new, empty file system of that many MiB is mounted, for the length of a `with`."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="tierd-image-", dir=memory) as images,
        tempfile.TemporaryDirectory(prefix="tierd-disk-") as where,
    ):
        image = Path(images, "image")
        with image.open("wb") as file:
            file.truncate(mib * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", *options, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, where], check=True)
        try:
            Path(where).chmod(0o755)
            os.rmdir(Path(where, "lost+found"))
            yield Path(where)
        finally:
            subprocess.run(["umount", "-l", where], check=True)
