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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Final

from tierd.objects.keys import object_key
from tierd.objects.store import FileRange, Into, ObjectStore, Stored
from tierd.stub_files import is_cold, locked, warm
from tierd.stubs import Origin
from tierd.units import display

STREAMS: Final = 4
RANGE_BYTES: Final = 16 << 20
"""What one request asks for, a multiple of what a checksum covers: smaller ones cost speed."""
_HASH_BYTES: Final = 1 << 20

Fetch = Callable[[Origin, int, Into], None]
"""Reads bytes of an origin from an offset on, until the last argument is full. Raises ObjectError."""
Progress = Callable[[int], None]
"""Told of bytes that have come. What it raises ends the recall."""


def fetch_from(store: ObjectStore, bucket: str) -> Fetch:
    """Reads origins from a bucket."""

    def fetch(origin: Origin, offset: int, into: Into) -> None:
        key = object_key(origin.model_id, origin.version, origin.path)
        store.get_range(bucket, key, Stored(origin.size, origin.sha256), offset, into)

    return fetch


def recall(
    path: str, origin: Origin, fetch: Fetch, progress: Progress = lambda size: None, streams: int = STREAMS
) -> bool:
    """Bring the bytes of the stub that `path` leads to, in that many streams. Waits for whoever else does so.

    False if it has its own bytes by now. Raises ObjectError, OSError; the stub is then as cold as before.
    """
    with locked(path) as fd:
        before = os.fstat(fd)
        if not is_cold(before):
            return False
        writable = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(writable, 0)  # what somebody left who did not end
            _bring(writable, origin, fetch, progress, streams)
            os.utime(writable, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.fsync(writable)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(writable, 0)
            raise
        finally:
            os.close(writable)
        warm(fd)  # not undone if it fails: nobody knows then whether the mark is gone, and the bytes are right
    return True


def _bring(fd: int, origin: Origin, fetch: Fetch, progress: Progress, streams: int) -> None:
    """Each range is read back as soon as those before it are, while the next ones come."""
    digest = hashlib.sha256()
    for target in _landed(fd, origin, fetch, streams):
        for offset in range(target.offset, target.offset + target.length, _HASH_BYTES):
            digest.update(os.pread(fd, min(_HASH_BYTES, target.offset + target.length - offset), offset))
        progress(target.length)
    os.fsync(fd)
    if digest.hexdigest() != origin.sha256:
        name = display(origin.path)
        raise OSError(errno.EIO, f"{name}: what came back from the source is not what was written to it")


def _landed(fd: int, origin: Origin, fetch: Fetch, streams: int) -> Iterator[FileRange]:
    """The ranges of a file in their order, each once its bytes are there; at most twice `streams` are under way."""
    running: deque[tuple[FileRange, Future[None]]] = deque()
    with ThreadPoolExecutor(streams, thread_name_prefix="recall") as pool:
        try:
            for offset in range(0, origin.size, RANGE_BYTES):
                target = FileRange(fd, offset, min(RANGE_BYTES, origin.size - offset))
                running.append((target, pool.submit(fetch, origin, offset, target)))
                if len(running) >= 2 * streams:
                    yield _first(running)
            while running:
                yield _first(running)
        finally:
            for _, future in running:
                future.cancel()
            wait([future for _, future in running])


def _first(running: deque[tuple[FileRange, Future[None]]]) -> FileRange:
    target, future = running.popleft()
    future.result()
    return target
