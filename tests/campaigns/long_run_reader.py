"""A process full of readers for the long run: reads random ranges of random files and checks every byte.

Each page of a file says which file, version and page it is, so a reader needs nothing but two small tables, shared by
all processes: which version of each file was begun, and which is finished.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

PAGE = 4096
_MARK = struct.Struct("<QQQ8x")
_NUMBER = struct.Struct("<Q")


class FileOf(NamedTuple):
    """A file of the set: `path` below the mount, size in pages, how often it is chosen beside others, whether it is
    replaced now and then."""

    number: int
    path: str
    pages: int
    weight: int
    changes: bool


def page_of(number: int, version: int, page: int) -> bytes:
    """What a page holds."""
    return _MARK.pack(number, version, page) * (PAGE // _MARK.size)


def content_of(number: int, version: int, first: int, count: int) -> bytes:
    """What some pages hold."""
    return b"".join(page_of(number, version, page) for page in range(first, first + count))


class Versions:
    """For each file, the version last begun and the one last finished; in a file that all processes map."""

    def __init__(self, path: Path, count: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, 2 * count * _NUMBER.size)
            self._table = mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def begun(self, number: int) -> int:
        return int(_NUMBER.unpack_from(self._table, 16 * number)[0])

    def finished(self, number: int) -> int:
        return int(_NUMBER.unpack_from(self._table, 16 * number + 8)[0])

    def begin(self, number: int, version: int) -> None:
        _NUMBER.pack_into(self._table, 16 * number, version)

    def finish(self, number: int, version: int) -> None:
        _NUMBER.pack_into(self._table, 16 * number + 8, version)


class Work(NamedTuple):
    """What one process does."""

    mountpoint: Path
    table: Path
    files: tuple[FileOf, ...]
    seed: int
    readers: int
    seconds: float


class Reader(threading.Thread):
    """One of many."""

    def __init__(self, work: Work, versions: Versions, number: int) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.versions = versions
        self.random = random.Random(work.seed * 1000 + number)
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.until = time.monotonic() + work.seconds

    def run(self) -> None:
        weights = [file.weight for file in self.work.files]
        while time.monotonic() < self.until and len(self.problems) < 10:
            file = self.random.choices(self.work.files, weights)[0]
            try:
                self.read(file)
            except OSError as error:
                if error.errno == errno.ESTALE and file.changes:
                    self.seen["estale"] += 1
                    continue
                self.problems.append(f"{file.path}: {error}")
                self.seen["errors"] += 1

    def read(self, file: FileOf) -> None:
        """Open, read one to four ranges, close; all are of one version, and that was there when we opened."""
        oldest = self.versions.finished(file.number)
        with open(self.work.mountpoint / file.path, "rb", buffering=0) as opened:
            self.seen["opens"] += 1
            version = None
            for _ in range(self.random.choice((1, 1, 2, 4))):
                first = self.random.randrange(file.pages)
                count = min(self.random.choice((1, 16, 64, 256)), file.pages - first)
                data = os.pread(opened.fileno(), count * PAGE, first * PAGE)
                self.seen["bytes"] += len(data)
                version = _MARK.unpack_from(data)[1] if version is None and data else version
                if version is None or data != content_of(file.number, version, first, count):
                    self.wrong(file, f"pages {first}+{count} are not of version {version}")
                    return
        if not oldest <= version <= self.versions.begun(file.number):
            self.wrong(file, f"version {version} is older than {oldest}, which was finished before the open")

    def wrong(self, file: FileOf, what: str) -> None:
        self.seen["wrong"] += 1
        self.problems.append(f"{file.path}: {what}")


def read_for_long(work: Work) -> tuple[dict[str, Any], list[str]]:
    """The whole work of a process: counts, and what was wrong."""
    versions = Versions(work.table, len(work.files))
    readers = [Reader(work, versions, number) for number in range(work.readers)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(work.seconds + 60)
    seen, problems = Counter[str](), [problem for reader in readers for problem in reader.problems]
    for reader in readers:
        seen.update(reader.seen)
        if reader.is_alive():
            problems.append("a reader hangs")
    return dict(seen), problems[:20]
