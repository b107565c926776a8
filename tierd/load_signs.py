"""Whether an open of a cold file looks like a load of its model. Pure."""

from __future__ import annotations

import threading

SCANNERS = frozenset(
    {
        "grep", "egrep", "fgrep", "zgrep", "rg", "ag", "ack", "ugrep", "file", "find", "du", "strings", "hexdump",
        "xxd", "od", "head", "tail", "wc", "md5sum", "sha1sum", "sha256sum", "sha512sum", "b2sum", "xxhsum", "cksum",
        "updatedb", "clamscan", "clamd", "rsync", "tar", "restic", "borg", "rclone", "juicefs", "ncdu",
    }
)  # fmt: skip
"""Programs that read whatever there is, and load nothing."""
LOAD_BYTES = 32 << 20
_WEIGHTY_BYTES = 8 << 20


class LoadSigns:
    """Whether one open of a cold file looks like a load: weights, read by no scanner, and not just their header.

    Half of a file will do: what others looked at before comes from the kernel's memory, and is not seen here. (All of a
    small one, because the kernel reads ahead of whoever looks at its header.) `program` is the name of the reading
    process, empty if it cannot be seen. Any thread.
    """

    def __init__(self, size: int, *, weights: bool, program: str) -> None:
        self._left = min(LOAD_BYTES, max(size // 2, min(size, _WEIGHTY_BYTES)))
        self._lock = threading.Lock()
        self._possible = (weights or size >= _WEIGHTY_BYTES) and program not in SCANNERS
        self._told = False

    def read(self, size: int) -> bool:
        """So many bytes more were read; True once, when it is a load."""
        with self._lock:
            self._left -= size
            if self._told or not self._possible or self._left > 0:
                return False
            self._told = True
            return True
