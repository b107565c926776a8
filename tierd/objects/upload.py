"""Stores a file as an object of an S3 store: small ones at once, large ones in parts, in parallel, resumable.

A file is read once, in its order, by the calling thread: its SHA-256 needs that. Parts are hashed and sent by workers;
there are never more of them in memory than `Limits` says. A part that an earlier process sent is not sent again if our
record of it, the server's and the bytes that are read now agree. The checksums of the chunks are stored before the
object, so there is no moment at which it could be seen without them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
from minio.datatypes import Part

from tierd.objects.faults import UploadGone
from tierd.objects.journal import Journal, Progress, SentPart, Task
from tierd.objects.keys import SUMS_PREFIX, shown
from tierd.objects.ranges import read_fully
from tierd.objects.store import ObjectError, ObjectMissing, ObjectStoreUnavailable, Place, SourceChanged, Stored
from tierd.objects.sums import CHUNK_BYTES, Summing, Sums
from tierd.objects.transport import Transport
from tierd.objects.wire import Body

log = structlog.get_logger(__name__)

PARTS_MAX: Final = 10_000
"""S3's limit ("Amazon S3 multipart upload limits")."""
OBJECT_BYTES_MAX: Final = 5 << 40


class Source:
    """The file that is stored. For one thread."""

    def __init__(self, fd: int, size: int, sha256: str | None, name: str) -> None:
        self.size = size
        self.sha256 = sha256
        self._fd = fd
        self._name = name
        self._summing = Summing()

    def read(self, offset: int, length: int) -> memoryview:
        """The next bytes. Raises SourceChanged if there are fewer, OSError if they cannot be read."""
        content = memoryview(bytearray(length))
        if read_fully(self._fd, content, offset) != length:
            raise SourceChanged(f"{self._name} has become shorter than {self.size} bytes", hint="try again")
        self._summing.add(content)
        return content

    def sums(self) -> Sums:
        """Of all that was read. Raises SourceChanged if that is not what was announced."""
        sums = self._summing.end()
        if self.sha256 not in (None, sums.stored.sha256):
            raise SourceChanged(
                f"{self._name} has SHA-256 {sums.stored.sha256} and not {self.sha256}", hint="it changed meanwhile"
            )
        return sums

    def again(self) -> Source:
        """From the start."""
        return Source(self._fd, self.size, self.sha256, self._name)


def put_file(
    transport: Transport, place: Place, file: Path | int, size: int, sha256: str | None, journal_path: Path | None
) -> Stored:
    """As `ObjectStore.put_file`."""
    if size > OBJECT_BYTES_MAX:
        raise ObjectStoreUnavailable(place, f"{size} bytes are more than an object may have", hint="split the file")
    if isinstance(file, int):
        return _put(transport, place, Source(file, size, sha256, f"descriptor {file}"), Journal(journal_path))
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _put(transport, place, Source(fd, size, sha256, shown(os.fsencode(file))), Journal(journal_path))
    finally:
        os.close(fd)


def _put(transport: Transport, place: Place, source: Source, journal: Journal) -> Stored:
    if source.size <= transport.limits.part_bytes:
        stored = _put_whole(transport, place, source)
        journal.forget()
        return stored
    try:
        try:
            return Upload(transport, place, source, journal).run()
        except UploadGone:  # somebody aborted it, or a life-cycle rule did
            return Upload(transport, place, source.again(), journal).run()
    finally:
        journal.close()


def _put_whole(transport: Transport, place: Place, source: Source) -> Stored:
    content = source.read(0, source.size)
    sums = source.sums()
    put_sums(transport, place, sums)
    stored = sums.stored

    def send() -> None:
        body = Body(content, stored.sha256, transport.pace(len(content)))
        transport.wire.write(place.bucket, place.key, body, stored.sha256)

    transport.call(place, send)
    return stored


def put_sums(transport: Transport, place: Place, sums: Sums) -> None:
    """Store the checksums beside the object; one of one chunk has none."""
    if sums.stored.size <= CHUNK_BYTES:
        return
    beside = place._replace(key=SUMS_PREFIX + place.key)
    content = sums.encode()
    sha256 = hashlib.sha256(content).hexdigest()

    def send() -> None:
        body = Body(memoryview(content), sha256, transport.pace(len(content)))
        transport.wire.write(beside.bucket, beside.key, body)

    transport.call(beside, send)


def part_bytes_for(size: int, part_bytes: int) -> int:
    """How large the parts of an object must be, so that they are not too many; whole chunks."""
    least = -(-size // PARTS_MAX)
    return max(part_bytes, -(-least // CHUNK_BYTES) * CHUNK_BYTES)


class Upload:
    """One object in parts: `run` is called once."""

    def __init__(self, transport: Transport, place: Place, source: Source, journal: Journal) -> None:
        self._transport = transport
        self._place = place
        self._source = source
        self._journal = journal
        limits = transport.limits
        self._part_bytes = part_bytes_for(source.size, limits.part_bytes)
        # Larger parts, fewer at once: the memory is what the settings say.
        self._window = max(1, limits.parallel * limits.part_bytes // self._part_bytes)
        self._etags: dict[int, str] = {}
        self._progress = Progress("", "", {})
        self._on_server: dict[int, Part] = {}
        self._failed = threading.Event()

    def run(self) -> Stored:
        """Raises UploadGone if the upload vanished meanwhile. What failed goes on with the journal, if there is one."""
        self._begin()
        try:
            self._send_parts()
            sums = self._source.sums()
            put_sums(self._transport, self._place, sums)
            self._finish(sums.stored)
        except (SourceChanged, UploadGone):  # nothing of it is of use any more
            self._abort(self._progress.upload_id)
            self._journal.forget()
            raise
        except BaseException:
            if not self._journal.kept:
                self._abort(self._progress.upload_id)
            raise
        self._journal.forget()
        return sums.stored

    # --- begin, or go on ---

    def _begin(self) -> None:
        task = Task(*self._place, self._source.size, self._part_bytes, self._source.sha256)
        found = self._journal.read()
        if found is not None and found[0] == task and self._goes_on(found[1]):
            self._journal.resume(task, self._progress)
            return
        if found is not None and found[0].endpoint == self._place.endpoint:
            self._abort(found[1].upload_id, self._place._replace(bucket=found[0].bucket, key=found[0].key))
        name = secrets.token_hex(16)
        bucket, key = self._place.bucket, self._place.key
        wire, sha256 = self._transport.wire, self._source.sha256
        upload_id = self._transport.call(self._place, lambda: wire.begin_upload(bucket, key, name, sha256))
        self._progress = Progress(upload_id, name, {})
        self._journal.begin(task, upload_id, name)

    def _goes_on(self, progress: Progress) -> bool:
        """False if the server knows nothing of it any more."""
        bucket, key, wire = self._place.bucket, self._place.key, self._transport.wire
        with suppress(UploadGone, ObjectMissing):
            self._on_server = self._transport.call(self._place, lambda: wire.parts(bucket, key, progress.upload_id))
            self._progress = progress
            return True
        return False

    # --- parts ---

    def _send_parts(self) -> None:
        room = threading.BoundedSemaphore(self._window)
        futures: list[Future[None]] = []
        try:
            for number, offset in enumerate(range(0, self._source.size, self._part_bytes), start=1):
                room.acquire()
                if self._failed.is_set():
                    break
                content = self._source.read(offset, min(self._part_bytes, self._source.size - offset))
                future = self._transport.submit(self._place, self._send_part, (number, content))
                future.add_done_callback(lambda _: room.release())
                futures.append(future)
        except BaseException:
            self._failed.set()
            raise
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def _send_part(self, work: tuple[int, memoryview]) -> None:
        number, content = work
        if self._failed.is_set():
            return
        try:
            sha256 = hashlib.sha256(content).hexdigest()
            etag = self._sent_before(number, len(content), sha256)
            if etag is None:
                etag = self._sent(number, content, sha256)
                self._journal.add(number, SentPart(etag, sha256))
            self._etags[number] = etag
        except BaseException:
            self._failed.set()
            raise

    def _sent(self, number: int, content: memoryview, sha256: str) -> str:
        """The ETag of a part that is sent now. Raises UploadGone if the server has another and will not replace it."""
        bucket, key, upload_id = self._place.bucket, self._place.key, self._progress.upload_id

        def send() -> str:
            body = Body(content, sha256, self._transport.pace(len(content)))
            return self._transport.wire.write_part(bucket, key, upload_id, number, body)

        try:
            return self._transport.call(self._place, send)
        except ObjectStoreUnavailable as error:
            if error.refused and number in self._on_server:  # S3 replaces parts, rclone answers 501
                raise UploadGone(self._place, f"cannot be gone on with: {error}") from None
            raise

    def _sent_before(self, number: int, size: int, sha256: str) -> str | None:
        """The ETag of a part that need not be sent again; None when in doubt."""
        ours, theirs = self._progress.parts.get(number), self._on_server.get(number)
        if ours is None or theirs is None or ours.sha256 != sha256:
            return None
        return ours.etag if (theirs.etag, theirs.size) == (ours.etag, size) else None

    # --- end ---

    def _finish(self, stored: Stored) -> None:
        """Make the object of its parts. An answer that got lost is not mistaken for an upload that was."""
        bucket, key, upload_id = self._place.bucket, self._place.key, self._progress.upload_id
        wire = self._transport.patient_wire
        try:
            self._transport.call(self._place, lambda: wire.finish_upload(bucket, key, upload_id, self._etags))
        except UploadGone:
            with suppress(ObjectMissing):
                found = self._transport.call(self._place, lambda: wire.head(bucket, key))
                if found.upload == self._progress.name:
                    return
            raise
        found = self._transport.call(self._place, lambda: wire.head(bucket, key))
        if found.size != stored.size:
            reason = f"it has {found.size} bytes after {stored.size} were stored"
            raise ObjectStoreUnavailable(self._place, reason, hint="does the store implement multipart uploads?")

    def _abort(self, upload_id: str, place: Place | None = None) -> None:
        """Give the parts back; what fails here only costs the store's space, until `abort_abandoned`."""
        where = place or self._place
        wire = self._transport.wire
        try:
            self._transport.call(where, lambda: wire.abort_upload(where.bucket, where.key, upload_id))
        except UploadGone:
            return
        except ObjectError as error:
            log.warning("upload_not_aborted", object=str(where), reason=str(error))
