"""The requests of S3 that we make, by minio's client; one try each. The only module that uses what minio keeps private.

minio-py uploads parts and takes uploads up again nowhere in public, so `Wire` derives from its client; the contract
tests run every method against two servers, and would notice a release of minio that changed one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from http.client import HTTPResponse
from typing import Any, Final, NamedTuple, cast

from minio import Minio
from minio.datatypes import ListMultipartUploadsResult, Part, parse_list_objects
from minio.error import ServerError
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import IncompleteRead

from tierd.objects.faults import Broken, Unlike
from tierd.objects.store import Listed

BLOCK_BYTES: Final = 256 << 10
"""What is sent before bandwidth and deadline are looked at again."""
_RECEIVE_BYTES: Final = 1 << 20
"""What is received by one system call before that, if so much is there; more gained nothing."""
META_SHA256: Final = "x-amz-meta-tierd-sha256"
META_UPLOAD: Final = "x-amz-meta-tierd-upload"
"""Tells an upload of ours that was finished from another object of the same name."""
_PAGE: Final = 1000
_INTERNAL_ERROR: Final = 500
Pace = Callable[[int], None]
"""Called before so many bytes are sent, or after they came; raises to end the try."""


class Body:
    """Bytes to send whose SHA-256 is known: it signs the request, so the server notices what breaks on the way."""

    def __init__(self, content: memoryview, sha256: str, pace: Pace) -> None:
        self.sha256 = sha256
        self._content = content
        self._pace = pace
        self._sent = 0

    def __len__(self) -> int:
        return len(self._content)

    def read(self, size: int) -> memoryview:
        """The next bytes, as urllib3 asks for them; none at the end."""
        piece = self._content[self._sent : self._sent + size]
        if piece:
            self._pace(len(piece))
        self._sent += len(piece)
        return piece


class Incoming:
    """Bytes of an answer, received where the caller wants them: urllib3 would make an object of each piece, to be
    copied from. For one thread."""

    def __init__(self, response: BaseHTTPResponse, length: int) -> None:
        self._response: HTTPResponse = cast(Any, response)._fp
        self._length = length
        self._came = 0
        if self._response.chunked:
            raise Broken("its length is not told")

    def fill(self, view: memoryview, pace: Pace) -> None:
        """The next bytes, until the view is full. Raises what `faults.FAULTS` lists, and what `pace` does."""
        filled = 0
        while filled < len(view):
            # One system call each: `readinto` would wait for all of it, however slowly it drips.
            received = self._response.fp.readinto1(view[filled : filled + _RECEIVE_BYTES])
            if not received:
                raise IncompleteRead(self._came, self._length - self._came)
            filled += received
            self._came += received
            pace(received)

    def end(self) -> None:
        """All of it came: the connection may be used again."""
        if self._came != self._length:
            raise Broken(f"{self._came} bytes were taken of {self._length}")
        self._response.close()


class Answered(NamedTuple):
    """What a HEAD says of an object."""

    size: int
    sha256: str | None
    upload: str | None


class OpenUpload(NamedTuple):
    """An upload that nobody has finished or aborted."""

    key: str
    upload_id: str
    began: datetime | None


class Wire(Minio):
    """See the module. Raises what `faults.FAULTS` lists; any thread may call."""

    def _build_headers(
        self, host: str, headers: Any = None, body: Any = None, creds: Any = None
    ) -> tuple[Any, datetime]:
        """minio would hash a body once more, and over TLS only with MD5."""
        if not isinstance(body, Body):
            return super()._build_headers(host, headers, body, creds)
        made, date = super()._build_headers(host, headers, None, creds)
        made["Content-Length"] = str(len(body))
        made["x-amz-content-sha256"] = body.sha256
        return made, date

    def head(self, bucket: str, key: str) -> Answered:
        """What is known of an object."""
        found = self.stat_object(bucket, key)
        metadata: Mapping[str, str] = found.metadata or {}
        return Answered(found.size or 0, metadata.get(META_SHA256), metadata.get(META_UPLOAD))

    @contextmanager
    def reading(self, bucket: str, key: str, offset: int, length: int, size: int) -> Iterator[Incoming]:
        """So many bytes of the object from `offset` on, to be taken in their order; `size` is how long it must be."""
        response = self.get_object(bucket, key, offset=offset, length=length)
        try:
            _check_head(response, offset, length, size)
            incoming = Incoming(response, length)
            yield incoming
            incoming.end()
        except BaseException:
            response.close()  # what is still on its way must not be taken for the next answer
            raise
        finally:
            response.release_conn()

    def write(self, bucket: str, key: str, body: Body, sha256: str | None = None) -> None:
        """Store an object with one request."""
        metadata = {META_SHA256: sha256} if sha256 else {}
        self._put_object(bucket, key, cast(bytes, body), {"Content-Type": "application/octet-stream", **metadata})

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Listed], str | None]:
        """Up to a thousand objects, and the token for those that follow; None at the end."""
        query = {"list-type": "2", "encoding-type": "url", "max-keys": str(_PAGE), "delimiter": "", "prefix": prefix}
        if token:
            query["continuation-token"] = token
        answer = self._execute("GET", bucket, query_params={**query})
        found, more, following, _ = parse_list_objects(answer)
        if more and following in (None, token):
            raise ServerError("a listing that never ends", _INTERNAL_ERROR)
        return [Listed(str(entry.object_name), entry.size or 0) for entry in found], following if more else None

    # --- uploads in parts ---

    def begin_upload(self, bucket: str, key: str, upload: str, sha256: str | None) -> str:
        """Begin one, under a name of ours; its ID."""
        metadata = {META_UPLOAD: upload} | ({META_SHA256: sha256} if sha256 else {})
        return self._create_multipart_upload(bucket, key, {**metadata})

    def write_part(self, bucket: str, key: str, upload_id: str, number: int, body: Body) -> str:
        """Send a part, over an older one of that number if there is one; its ETag."""
        return self._upload_part(bucket, key, cast(bytes, body), None, upload_id, number)

    def parts(self, bucket: str, key: str, upload_id: str) -> dict[int, Part]:
        """What the server has of an upload, by number."""
        found: dict[int, Part] = {}
        marker: str | None = None
        while True:
            answer = self._list_parts(bucket, key, upload_id, part_number_marker=marker)
            found.update((part.part_number, part) for part in answer.parts)
            if not answer.is_truncated or answer.next_part_number_marker in (None, marker):
                return found
            marker = answer.next_part_number_marker

    def finish_upload(self, bucket: str, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Make the object of its parts."""
        parts = [Part(number, etag) for number, etag in sorted(etags.items())]
        answer = self._complete_multipart_upload(bucket, key, upload_id, parts)
        if not (answer.etag or answer.location or answer.bucket_name):
            # S3 may say 200, and then send an error ("CompleteMultipartUpload", Amazon S3 API Reference).
            raise ServerError("the parts were not put together", _INTERNAL_ERROR)

    def abort_upload(self, bucket: str, key: str, upload_id: str) -> None:
        """Drop its parts."""
        self._abort_multipart_upload(bucket, key, upload_id)

    def open_uploads(self, bucket: str, prefix: str) -> Iterator[OpenUpload]:
        """Uploads that were neither finished nor aborted. Of more than a thousand for one key some may be left out."""
        marker: str | None = None
        while True:
            # Not minio's own method: rclone finds nothing for the empty delimiter that it sends.
            query = {"uploads": "", "prefix": prefix} | ({"key-marker": marker} if marker else {})
            answer = ListMultipartUploadsResult(self._execute("GET", bucket, query_params={**query}))
            for upload in answer.uploads:
                if upload.upload_id:
                    yield OpenUpload(upload.object_name, upload.upload_id, upload.initiated_time)
            if not answer.is_truncated or answer.next_key_marker in (None, marker):
                return
            marker = answer.next_key_marker


def _check_head(response: BaseHTTPResponse, offset: int, length: int, size: int) -> None:
    """Raises Broken or Unlike if the answer cannot be this range of an object of this size.

    The status is not looked at: rclone answers 200 to ranges, too.
    """
    announced = response.headers.get("content-length", "")
    span, _, total = response.headers.get("content-range", "").partition("/")
    if total not in ("", "*", str(size)):
        raise Unlike(f"it has {total} bytes, {size} were stored")
    if span and not span.startswith(f"bytes {offset}-"):
        raise Broken(f"bytes from {offset} on were asked for, {span} came")
    if announced == str(length):
        return
    if not span and announced.isdigit() and int(announced) > length:
        raise Unlike(f"a part of it was asked for, and all of {announced} bytes came")
    raise Broken(f"{announced or 'an unknown number of'} bytes came of {length}")
