"""Read-ahead into memory: when a hot model's file is opened, its pages are asked for faster than faults do.

A plain mmap load from a dropped page cache is bound by fault read-ahead, not by the disk (FUSE-NOTES, "Page cache").
Here a thread streams the whole file to /dev/null with sendfile(2), which copies nothing, and then the next files of
the model in load order. The pages are those of the copy's own inode, which the kernel serves passthrough reads from, so
nothing is held twice. posix_fadvise(WILLNEED) is as fast, but fills the page cache with single pages, where streaming
makes large folios: reading them again from memory was 2.2 times slower (docs/BENCHMARKS.md).

Contract: called from the trio thread; nothing waits for it, and nothing is wrong if it does nothing.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import psutil
import structlog

from tierd.node.chores import Chores
from tierd.node.copies import Copy, Damaged
from tierd.node.store import Store, opened

log = structlog.get_logger(__name__)

_STEP_BYTES = 16 << 20
_RESIDENT_ENOUGH = 0.98
_AGAIN_SECONDS = 0.2
_LOOKED_AT_MAX = 10_000
_BUDGET_STEPS = 8
"""The budget is judged anew after this many steps."""
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_CACHESTAT = 451
"""cachestat(2), since Linux 6.5; the same number on all architectures."""
_CACHESTAT = struct.Struct("=QQQQQ")
"""nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted, in pages"""
_RANGE = struct.Struct("=QQ")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CGROUP_FILES = ("memory.max", "memory.high")


def resident_bytes(fd: int, size: int) -> int:
    """How much of a file is in the page cache: cachestat(2), else mincore(2). Raises OSError."""
    if size == 0:
        return 0
    found = bytearray(_CACHESTAT.size)
    buffer = (ctypes.c_char * len(found)).from_buffer(found)
    if _libc.syscall(_SYS_CACHESTAT, fd, _RANGE.pack(0, 0), buffer, 0) == 0:
        return min(size, int(_CACHESTAT.unpack(found)[0]) * _PAGE)
    return _resident_by_mincore(fd, size)


def _resident_by_mincore(fd: int, size: int) -> int:
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * (-(-size // _PAGE)))()
        anchor = ctypes.c_char.from_buffer(mapped)
        try:
            if _libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            del anchor
        return min(size, sum(page & 1 for page in pages) * _PAGE)


class ReadAhead:
    """See the module. `share` is how much of the memory that is available may be filled; 0 switches it off."""

    def __init__(
        self,
        store: Store,
        share: float,
        *,
        available: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._looked_at: OrderedDict[str, float] = OrderedDict()
        self._share = share
        self._available = available or available_bytes
        self._chores = Chores("read-ahead", capacity=1000)
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self.requested_bytes = 0
        """Bytes asked for since the start."""
        self.skipped = 0
        """Files left out because they would not have fitted into the budget."""

    def start(self) -> None:
        """Start the thread."""
        self._chores.start()

    def stop(self) -> None:
        """End it."""
        self._chores.stop()
        os.close(self._null)

    def __call__(self, copy: Copy) -> None:
        """A copy was opened: get its pages, then those of the files that are usually read after it."""
        if self._share > 0 and not copy.removed and self._is_due(copy.name):
            self._chores.add(copy.name, lambda: self._bring(copy))

    def _is_due(self, name: str) -> bool:
        """Not looked at a moment ago: whoever opens a file over and over does not need its pages over and over."""
        now = self._clock()
        if now - self._looked_at.get(name, -math.inf) < _AGAIN_SECONDS:
            return False
        self._looked_at[name] = now
        self._looked_at.move_to_end(name)
        if len(self._looked_at) > _LOOKED_AT_MAX:
            self._looked_at.popitem(last=False)
        return True

    def _bring(self, copy: Copy) -> None:
        for each in (copy, *self._following(copy)):
            if not self._bring_one(each):
                return

    def _following(self, copy: Copy) -> list[Copy]:
        return sorted((c for c in self._store.copies_of(copy.model) if c.path > copy.path), key=lambda c: c.path)

    def _bring_one(self, copy: Copy) -> bool:
        """False if the budget is spent."""
        size = copy.identity.size
        try:
            with opened(self._store, copy) as fd:
                have = resident_bytes(fd, size)
                if have >= _RESIDENT_ENOUGH * size:
                    return True
                if size - have > self._share * self._available():
                    self.skipped += 1
                    return False
                self._ask(fd, size)
        except (Damaged, OSError) as error:
            log.debug("read_ahead_failed", file=copy.name, reason=str(error))
        return True

    def _ask(self, fd: int, size: int) -> None:
        for step, offset in enumerate(range(0, size, _STEP_BYTES)):
            if step % _BUDGET_STEPS == _BUDGET_STEPS - 1 and self._share * self._available() < _STEP_BYTES:
                return
            self._stream(fd, offset, min(offset + _STEP_BYTES, size))

    def _stream(self, fd: int, offset: int, end: int) -> None:
        while offset < end and (got := os.sendfile(self._null, fd, offset, end - offset)):
            offset += got
            self.requested_bytes += got


def available_bytes() -> int:
    """Memory that can be filled without pushing processes out: the machine's, and the daemon's own cgroup's."""
    found = int(psutil.virtual_memory().available)
    for directory in _own_cgroups():
        found = min(found, _cgroup_room(directory))
    return found


def _own_cgroups() -> list[Path]:
    """The daemon's cgroup and those above it (cgroup v2), as far as they are visible."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    path = Path("/sys/fs/cgroup") / own.lstrip("/")
    return [path, *(parent for parent in path.parents if parent.is_relative_to("/sys/fs/cgroup"))]


def _cgroup_room(directory: Path) -> int:
    """What a cgroup's limits leave: page cache that was read in counts, but what is clean and inactive can go."""
    room = 1 << 62
    try:
        current = int((directory / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
        for name in _CGROUP_FILES:
            limit = (directory / name).read_text(encoding="ascii").strip()
            if limit != "max":
                room = min(room, max(0, int(limit) - current + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):
        return room
    return room
