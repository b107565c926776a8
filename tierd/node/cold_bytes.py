"""The bytes of cold files: ranges of their objects for readers and fills, whole files for whoever writes to one.

Every byte is compared with a checksum before it is handed on (`objects/sums.py`). What readers look at goes through a
small cache in memory; one that loads a model is served by a fill instead (`filler.py`).

Contract: blocking; any thread.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from tierd.node.copies import CHUNK_BYTES, Identity
from tierd.node.sources import version_of
from tierd.node.stub_layer import looking
from tierd.objects.store import FileRange, Into, ObjectStore
from tierd.recall import fetch_from, recall
from tierd.stub_files import is_cold
from tierd.stubs import Origin
from tierd.units import display

log = structlog.get_logger(__name__)

_CACHED_CHUNKS_MAX: Final = 16
_KNOWN_MAX: Final = 100_000


class _Chunk:
    """One chunk that readers wait for, or have."""

    __slots__ = ("data", "error", "there")

    def __init__(self) -> None:
        self.there = threading.Event()
        self.data = bytearray()
        self.error: BaseException | None = None


class ColdBytes:
    """See the module. `bucket` holds the objects of cold files, or tells which one does."""

    def __init__(self, store: ObjectStore, bucket: str | Callable[[Origin], str]) -> None:
        self._fetch_object = fetch_from(store, bucket)
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[str, int], _Chunk] = OrderedDict()
        self._origins: OrderedDict[int, Origin] = OrderedDict()
        self.fetched_bytes = 0
        """Bytes that came from the object store."""
        self.recalls = 0
        """Files that were brought back into the source."""

    # --- what stubs stand for ---

    def know(self, inode: int, origin: Origin) -> None:
        """The stub with this number stands for that: it may be filled from now on."""
        with self._lock:
            self._origins[inode] = origin
            self._origins.move_to_end(inode)
            if len(self._origins) > _KNOWN_MAX:
                self._origins.popitem(last=False)

    def origin_of(self, inode: int) -> Origin | None:
        """What was said of an inode."""
        return self._origins.get(inode)

    def identify(self, st: os.stat_result) -> Identity | None:
        """The version of the cold file whose stub has these attributes; None if it is no stub, or no longer."""
        origin = self.origin_of(st.st_ino) if is_cold(st) else None
        return Identity(st.st_ino, *version_of(looking(st, origin.size))) if origin is not None else None

    # --- ranges ---

    def fetch(self, origin: Origin, offset: int, into: Into) -> None:
        """Read bytes from `offset` on until `into` is full. Raises ObjectError."""
        self._fetch_object(origin, offset, into)
        length = into.length if isinstance(into, FileRange) else into.nbytes
        with self._lock:
            self.fetched_bytes += length

    def read(self, origin: Origin, view: memoryview, offset: int) -> int:
        """Read into `view`; how much, less only at the end of the file. Raises ObjectError."""
        end = min(offset + len(view), origin.size)
        at = offset
        while at < end:
            number, within = divmod(at, CHUNK_BYTES)
            part = memoryview(self._chunk(origin, number))[within : within + end - at]
            view[at - offset : at - offset + len(part)] = part
            at += len(part)
        return max(0, end - offset)

    def _chunk(self, origin: Origin, number: int) -> bytearray:
        """Whoever asks first fetches it, the others wait for him."""
        key = f"{origin.sha256}-{origin.size}", number
        with self._lock:
            chunk = self._chunks.get(key)
            ours = chunk is None
            if chunk is None:
                chunk = self._chunks[key] = _Chunk()
            self._chunks.move_to_end(key)
            while len(self._chunks) > _CACHED_CHUNKS_MAX and next(iter(self._chunks.values())).there.is_set():
                self._chunks.popitem(last=False)
        if ours:
            self._fetch_chunk(origin, number, key, chunk)
        chunk.there.wait()
        if chunk.error is not None:
            raise chunk.error
        return chunk.data

    def _fetch_chunk(self, origin: Origin, number: int, key: tuple[str, int], chunk: _Chunk) -> None:
        start = number * CHUNK_BYTES
        data = bytearray(min(CHUNK_BYTES, origin.size - start))
        try:
            self.fetch(origin, start, memoryview(data))
            chunk.data = data
        except BaseException as error:
            chunk.error = error
            with self._lock:
                self._chunks.pop(key, None)  # the next one tries again
        finally:
            chunk.there.set()

    def forget_chunks(self) -> None:
        """Nothing of what came is kept; who waits for a chunk gets it."""
        with self._lock:
            self._chunks = OrderedDict((key, chunk) for key, chunk in self._chunks.items() if not chunk.there.is_set())

    # --- whole files ---

    def recall(self, path: str, origin: Origin) -> None:
        """Bring the bytes back into the source, as `recall.recall` does. Raises ObjectError, OSError."""
        if recall(path, origin, self.fetch):
            with self._lock:
                self.recalls += 1
            model = display(os.fsencode(origin.model_id))
            log.info("recalled", model=model, path=display(origin.path), bytes=origin.size)
