"""Brings the bytes of a cold file back into its stub: in place, under a lock, verified. Shared by node and controller.

The stub's inode gets the bytes, so that links, attributes and open descriptors stay, and loses its mark last. Where it
is to go then is the caller's business. Blocking, any thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import Final

from tierd.objects.keys import object_key
from tierd.objects.store import FileRange, Into, ObjectStore, Stored
from tierd.objects.sums import CHUNK_BYTES
from tierd.stub_files import is_cold, locked, mtime_of, warm
from tierd.stubs import Origin
from tierd.syscalls import begin_writeback, forced_stat
from tierd.units import display

STREAMS: Final = 4
RANGE_BYTES_MAX: Final = 64 << 20
"""What one request asks for. Each costs a round trip, and has some servers read on for nobody: rclone 16 MiB."""
RANGE_BYTES_MIN: Final = 16 << 20
"""At the end of a file: the last ranges land together, and then only the hash is left to be waited for."""
_RANGES_LEFT: Final = 8
"""As many ranges as this are what is left of a file, until they would be too short."""
_HASH_BYTES: Final = 4 << 20
"""Read back at once: less, and this thread waits more often for the interpreter's lock; more gained nothing."""
_AHEAD: Final = 12
"""Ranges of one file that are under way."""

Fetch = Callable[[Origin, int, Into], None]
"""Reads bytes of an origin from an offset on, until the last argument is full. Raises ObjectError."""
Progress = Callable[[int], None]
"""Told of bytes that have come. What it raises ends the recall."""


def fetch_from(store: ObjectStore, bucket: str | Callable[[Origin], str]) -> Fetch:
    """Reads origins from a bucket, or from the one that is told of each."""

    def fetch(origin: Origin, offset: int, into: Into) -> None:
        key = object_key(origin.model_id, origin.version, origin.path)
        where = bucket if isinstance(bucket, str) else bucket(origin)
        store.get_range(where, key, Stored(origin.size, origin.sha256), offset, into)

    return fetch


def recall(
    path: str, origin: Origin, fetch: Fetch, progress: Progress = lambda size: None, workers: Executor | None = None
) -> bool:
    """Bring the bytes of the stub that `path` leads to, by `workers` (some of its own). Waits for whoever else does so.

    `workers` must not be those that call this. False if it has its own bytes by now. Raises ObjectError, OSError; the
    stub is then as cold as before.
    """
    with locked(path) as fd:
        before = forced_stat(fd)  # what this mount remembers may be older than the lock: bytes would be lost
        if not is_cold(before):
            return False
        # Reads would change the time of the last access, which is what `mtime_of` goes by.
        writable = os.open(path, os.O_RDWR | os.O_NOATIME | os.O_CLOEXEC)
        try:
            _keep_mtime(writable, before, origin)
            _bring(writable, origin, fetch, progress, workers)
            mtime_ns = mtime_of(forced_stat(fd))
            os.utime(writable, ns=(mtime_ns, mtime_ns))
            os.fsync(writable)
        except BaseException:
            with suppress(OSError):
                if os.fstat(writable).st_size:
                    os.ftruncate(writable, 1)
            raise
        finally:
            os.close(writable)
        warm(fd)  # not undone if it fails: nobody knows then whether the mark is gone, and the bytes are right
    return True


def _keep_mtime(fd: int, st: os.stat_result, origin: Origin) -> None:
    """So that it is known whenever this ends, see `mtime_of`. Bytes that somebody left are written over."""
    if not st.st_size:
        os.utime(fd, ns=(st.st_mtime_ns, st.st_mtime_ns))
    elif st.st_size > origin.size:
        os.ftruncate(fd, origin.size)


def _bring(fd: int, origin: Origin, fetch: Fetch, progress: Progress, workers: Executor | None) -> None:
    """Each range is read back as soon as those before it are, while the next ones come."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_HASH_BYTES, origin.size)))
    with ExitStack() as stack:
        pool = workers or stack.enter_context(ThreadPoolExecutor(STREAMS, thread_name_prefix="recall"))
        for target in _landed(fd, origin, fetch, pool):
            end = target.offset + target.length
            for offset in range(target.offset, end, _HASH_BYTES):
                digest.update(buffer[: os.preadv(fd, [buffer[: end - offset]], offset)])
            progress(target.length)
    if digest.hexdigest() != origin.sha256:
        name = display(origin.path)
        raise OSError(errno.EIO, f"{name}: what came back from the source is not what was written to it")


def _landed(fd: int, origin: Origin, fetch: Fetch, pool: Executor) -> Iterator[FileRange]:
    """The ranges of a file in their order, each once its bytes are there and on their way to the disk."""

    def bring(target: FileRange) -> None:
        fetch(origin, target.offset, target)
        begin_writeback(fd, target.offset, target.length)

    running: deque[tuple[FileRange, Future[None]]] = deque()
    try:
        for target in ranges_of(fd, origin.size):
            running.append((target, pool.submit(bring, target)))
            if len(running) >= _AHEAD:
                yield _first(running)
        while running:
            yield _first(running)
    finally:
        for _, future in running:
            future.cancel()
        wait([future for _, future in running])  # they write where the caller truncates


def ranges_of(fd: int, size: int) -> Iterator[FileRange]:
    """Cuts a file into what is asked for by one request each, whole chunks of checksums, shorter towards its end."""
    offset = 0
    while offset < size:
        share = (size - offset) // _RANGES_LEFT // CHUNK_BYTES * CHUNK_BYTES
        length = min(max(share, RANGE_BYTES_MIN), RANGE_BYTES_MAX, size - offset)
        yield FileRange(fd, offset, length)
        offset += length


def _first(running: deque[tuple[FileRange, Future[None]]]) -> FileRange:
    target, future = running[0]
    future.result()
    running.popleft()
    return target
