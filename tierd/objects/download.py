"""Reads ranges of objects in an S3 store in parallel, and compares each chunk before it hands anything on.

Contract: any thread. Memory is bounded: a buffer of one chunk per worker and per calling thread, to hash one of a part.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Final

from tierd.objects import sums
from tierd.objects.faults import Broken
from tierd.objects.keys import SUMS_PREFIX
from tierd.objects.ranges import Span, Target, spans
from tierd.objects.store import FileRange, Into, ObjectDamaged, ObjectMissing, Place, Stored
from tierd.objects.sums import CHUNK_BYTES, AnySums, Sums, WholeSum
from tierd.objects.transport import Transport

_SPAN_BYTES: Final = 64 << 20
"""What one request reads at most into a file: chunk by chunk, so it costs no memory. Other ones read a part."""
_CACHED_BYTES: Final = 16 << 20
"""Checksums kept in memory: those of 4 TiB of objects."""


Room = Callable[[Span], memoryview]
"""Where the bytes of a chunk are to be received."""
Put = Callable[[Span, memoryview], None]
"""Told of each chunk that is right."""


class _OwnFault(Exception):
    """The caller's file failed, not the store."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _not_the_stores_fault() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _OwnFault(error) from None


def _nowhere(chunk: Span, content: memoryview) -> None:
    """It lies where it is wanted."""


class SumsCache:
    """Checksums that were read, the least recently used leave. Bound to what was stored, so they never get stale."""

    def __init__(self, bytes_max: int = _CACHED_BYTES) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str, Stored], Sums] = OrderedDict()
        self._bytes = 0

    def get(self, place: Place, stored: Stored) -> Sums | None:
        """None if they must be read."""
        with self._lock:
            found = self._known.get((place.bucket, place.key, stored))
            if found is not None:
                self._known.move_to_end((place.bucket, place.key, stored))
            return found

    def put(self, place: Place, found: Sums) -> None:
        """The last one stays, however large."""
        with self._lock:
            old = self._known.pop((place.bucket, place.key, found.stored), None)
            self._bytes += len(found.sums) - (len(old.sums) if old else 0)
            self._known[place.bucket, place.key, found.stored] = found
            while self._bytes > self._bytes_max and len(self._known) > 1:
                self._bytes -= len(self._known.popitem(last=False)[1].sums)


class Download:
    """See the module."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._cache = SumsCache()
        self._spare: list[bytearray] = []
        self._lock = threading.Lock()

    def read(self, place: Place, stored: Stored, offset: int, into: Into) -> None:
        """As `ObjectStore.get_range`."""
        target = Target(offset, into)
        if offset < 0 or offset + target.length > stored.size:
            raise ValueError(f"bytes {offset} to {offset + target.length} of {stored.size}")
        if not target.length:
            return
        known = self._sums(place, stored)
        span_bytes = _SPAN_BYTES if isinstance(into, FileRange) else self._transport.limits.part_bytes
        wanted = spans(offset, target.length, stored.size, span_bytes)
        self._in_parallel(place, known, target, wanted)

    def _in_parallel(self, place: Place, known: AnySums, target: Target, wanted: Iterator[Span]) -> None:
        """A single span is read here: a thread of its own would only cost time."""
        first = next(wanted)
        second = next(wanted, None)
        if second is None:
            self._fetch_into(place, known, target, first)
            return
        running: set[Future[None]] = set()
        failed = threading.Event()

        def fetch(span: Span) -> None:
            if not failed.is_set():
                self._fetch_into(place, known, target, span)

        try:
            for span in itertools.chain((first, second), wanted):
                while len(running) >= self._transport.limits.parallel:
                    done, running = wait(running, return_when="FIRST_COMPLETED")
                    for future in done:
                        future.result()
                running.add(self._transport.submit(place, fetch, span))
            for future in running:
                future.result()
        finally:
            failed.set()
            wait(running)  # they write where the caller may write again once this returns

    def _fetch_into(self, place: Place, known: AnySums, target: Target, span: Span) -> None:
        with self._buffer(CHUNK_BYTES) as spare:

            def room_for(chunk: Span) -> memoryview:
                own = target.room_for(chunk)
                return spare[: chunk.length] if own is None else own

            def put(chunk: Span, content: memoryview) -> None:
                if target.room_for(chunk) is None:
                    target.put(chunk, content)

            self._fetch(place, known, span, room_for, put)

    def _fetch(
        self, place: Place, known: AnySums | None, span: Span, room_for: Room, put: Put = _nowhere, size: int = 0
    ) -> None:
        """Receive each chunk where there is room for it, compare it, and hand it on; none of that is done twice.

        Without checksums `size` is the object's.
        """
        at = span.offset
        size = known.stored.size if known else size

        def one_try() -> None:
            nonlocal at
            with self._transport.wire.reading(place.bucket, place.key, at, span.end - at, size) as incoming:
                while at < span.end:
                    chunk = Span(at, min(CHUNK_BYTES, span.end - at))
                    view = room_for(chunk)
                    # Its own deadline: what the caller's file takes in between is not the store's fault.
                    incoming.fill(view, self._transport.pace(chunk.length))
                    if known is not None and not known.matches(chunk.offset // CHUNK_BYTES, view):
                        raise Broken(f"bytes {at} to {chunk.end - 1} do not match their checksum")
                    with _not_the_stores_fault():
                        put(chunk, view)
                    at = chunk.end

        try:
            self._transport.call(place, one_try, lambda: at)
        except _OwnFault as fault:
            raise fault.error from None

    def hash(self, place: Place, size: int, expected: AnySums | None) -> Sums:
        """Read all bytes, in parallel, and hash them in their order; they are compared if anything is expected."""
        summing = sums.Summing()
        running: deque[tuple[Span, Future[bytearray]]] = deque()

        def fetch(span: Span) -> bytearray:
            buffer = self._take(span.length)

            def room_for(chunk: Span) -> memoryview:
                return memoryview(buffer)[chunk.offset - span.offset :][: chunk.length]

            self._fetch(place, expected, span, room_for, size=size)
            return buffer

        def add_oldest() -> None:
            span, future = running.popleft()
            buffer = future.result()
            summing.add(memoryview(buffer)[: span.length])
            self._give(buffer)

        try:
            for span in spans(0, size, size, self._transport.limits.part_bytes):
                if len(running) >= self._transport.limits.parallel:
                    add_oldest()
                running.append((span, self._transport.submit(place, fetch, span)))
            while running:
                add_oldest()
        finally:
            for _, future in running:
                future.cancel()
            wait([future for _, future in running])
        return summing.end()

    # --- checksums ---

    def _sums(self, place: Place, stored: Stored) -> AnySums:
        if stored.size <= CHUNK_BYTES:
            return WholeSum(stored)
        found = self._cache.get(place, stored)
        if found is not None:
            return found
        try:
            found = self.read_sums(place, stored.size)
        except ObjectMissing:
            self._transport.call(place, lambda: self._transport.wire.head(place.bucket, place.key))
            hint = "`tierd import` reads it once and writes them down"
            raise ObjectDamaged(place, "it has no checksums of ours", hint=hint) from None
        if found.stored != stored:
            raise ObjectDamaged(place, f"SHA-256 {found.stored.sha256} is there, {stored.sha256} was stored")
        self._cache.put(place, found)
        return found

    def read_sums(self, place: Place, size: int) -> Sums:
        """The checksums that lie beside an object of that size. Raises ObjectMissing if there are none."""
        beside = place._replace(key=SUMS_PREFIX + place.key)
        content = memoryview(bytearray(sums.encoded_bytes(size)))

        def one_try() -> Sums:
            with self._transport.wire.reading(beside.bucket, beside.key, 0, len(content), len(content)) as incoming:
                incoming.fill(content, self._transport.pace(len(content)))
            try:
                return sums.decode(bytes(content))
            except sums.SumsDamaged as damage:
                raise Broken(str(damage)) from None

        found = self._transport.call(beside, one_try)
        if found.stored.size != size:
            raise ObjectDamaged(beside, f"it is of {found.stored.size} bytes, the object has {size}")
        return found

    # --- buffers ---

    @contextmanager
    def _buffer(self, length: int) -> Iterator[memoryview]:
        buffer = self._take(length)
        try:
            yield memoryview(buffer)[:length]
        finally:
            self._give(buffer)

    def _take(self, length: int) -> bytearray:
        """Of the spare ones, because a new one costs as much as to fill it."""
        with self._lock:
            for at, buffer in enumerate(self._spare):
                if len(buffer) >= length:
                    return self._spare.pop(at)
        return bytearray(length)

    def _give(self, buffer: bytearray) -> None:
        with self._lock:
            if len(self._spare) < self._transport.limits.parallel:
                self._spare.append(buffer)
