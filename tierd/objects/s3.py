"""Objects behind any S3 endpoint. Puts uploads, downloads and plain requests behind `ObjectStore`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path

from minio.error import MinioException

from tierd.objects.download import Download
from tierd.objects.endpoint import Endpoint, Limits
from tierd.objects.faults import UploadGone
from tierd.objects.keys import RESERVED, SUMS_PREFIX, check_bucket, check_key
from tierd.objects.store import Into, Listed, ObjectMissing, ObjectStat, Place, Stored
from tierd.objects.sums import CHUNK_BYTES, AnySums, WholeSum
from tierd.objects.transport import Transport
from tierd.objects.upload import put_file, put_sums

_ABORTED_MAX = 10_000
"""Uploads looked at by one call; the next one finds the others."""


class S3Store:
    """See `ObjectStore`, whose contract this keeps. `close` it at the end."""

    def __init__(self, endpoint: Endpoint, limits: Limits) -> None:
        self._transport = Transport(endpoint, limits)
        self._download = Download(self._transport)

    @property
    def repeated(self) -> int:
        """Requests that were made again after a fault, since the start."""
        return self._transport.repeated

    def ensure_bucket(self, bucket: str) -> None:
        """See ObjectStore."""
        wire = self._transport.wire
        place = self._transport.place(check_bucket(bucket))

        def make() -> None:
            if wire.bucket_exists(bucket):
                return
            try:
                wire.make_bucket(bucket)
            except MinioException:  # another was faster, or the answer to the first try got lost
                if not wire.bucket_exists(bucket):
                    raise

        self._transport.call(place, make)

    def put_file(
        self,
        bucket: str,
        key: str,
        source: Path | int,
        size: int,
        sha256: str | None = None,
        journal: Path | None = None,
    ) -> Stored:
        """See ObjectStore. Objects of more than one part are sent in parallel, and can go on after a kill."""
        return put_file(self._transport, self._place(bucket, key), source, size, sha256, journal)

    def get_range(self, bucket: str, key: str, stored: Stored, offset: int, into: Into) -> None:
        """See ObjectStore."""
        self._download.read(self._place(bucket, key), stored, offset, into)

    def stat(self, bucket: str, key: str) -> ObjectStat | None:
        """See ObjectStore. An object in parts keeps its SHA-256 with the checksums, if it was not known before."""
        place = self._place(bucket, key)
        try:
            found = self._transport.call(place, lambda: self._transport.wire.head(bucket, key))
        except ObjectMissing:
            return None
        if found.sha256 is not None or found.size <= CHUNK_BYTES:
            return ObjectStat(found.size, found.sha256)
        sums = self._sums_or_none(place, found.size)
        return ObjectStat(found.size, sums.stored.sha256 if sums else None)

    def list(self, bucket: str, prefix: str = "") -> Iterator[Listed]:
        """See ObjectStore. A thousand at a time are in memory."""
        place = self._transport.place(check_bucket(bucket))
        ours = RESERVED.decode() + "/"
        token: str | None = None
        while True:
            page, token = self._transport.call(place, partial(self._transport.wire.page, bucket, prefix, token))
            yield from (entry for entry in page if not entry.key.startswith(ours))
            if token is None:
                return

    def delete(self, bucket: str, key: str) -> None:
        """See ObjectStore. The object goes first: without its checksums it could not be read."""
        place = self._place(bucket, key)
        for each in (place, place._replace(key=SUMS_PREFIX + key)):
            try:
                self._transport.call(each, partial(self._transport.wire.remove_object, each.bucket, each.key))
            except ObjectMissing:
                continue

    def hash(self, bucket: str, key: str) -> Stored:
        """See ObjectStore."""
        place = self._place(bucket, key)
        found = self._transport.call(place, lambda: self._transport.wire.head(bucket, key))
        expected: AnySums | None = None
        if found.size > CHUNK_BYTES:
            expected = self._sums_or_none(place, found.size)
        elif found.sha256 is not None:
            expected = WholeSum(Stored(found.size, found.sha256))
        return self._download.hash(place, found.size, expected).stored

    def adopt(self, bucket: str, key: str) -> Stored:
        """See ObjectStore. Nothing tells right bytes from wrong ones here but TLS: there are no checksums yet."""
        place = self._place(bucket, key)
        found = self._transport.call(place, lambda: self._transport.wire.head(bucket, key))
        sums = self._download.hash(place, found.size, None)
        put_sums(self._transport, place, sums)
        return sums.stored

    def abort_abandoned(self, bucket: str, prefix: str, older_than_s: float) -> int:
        """See ObjectStore. The server's own times decide which uploads those are."""
        place = self._transport.place(check_bucket(bucket))
        wire = self._transport.wire
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        try:
            uploads = self._transport.call(place, lambda: [*islice(wire.open_uploads(bucket, prefix), _ABORTED_MAX)])
        except UploadGone:  # rclone's way to say that there are none
            return 0
        aborted = 0
        for upload in uploads:
            if upload.began is None or upload.began > before:
                continue
            try:
                self._transport.call(place, partial(wire.abort_upload, bucket, upload.key, upload.upload_id))
            except UploadGone:
                continue
            aborted += 1
        return aborted

    def close(self) -> None:
        """See ObjectStore."""
        self._transport.close()

    def _place(self, bucket: str, key: str) -> Place:
        return self._transport.place(check_bucket(bucket), check_key(key))

    def _sums_or_none(self, place: Place, size: int) -> AnySums | None:
        try:
            return self._download.read_sums(place, size)
        except ObjectMissing:
            return None
