"""What went wrong with a request, in our words: from exceptions of minio, urllib3 and the socket. Decides no pauses.

Messages carry the status and S3's error code, never what the server wrote: it may quote the access key.
"""

from __future__ import annotations

import enum
import ssl
from typing import Final, NamedTuple
from xml.etree import ElementTree

import urllib3.exceptions as http
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from tierd.objects.keys import shown
from tierd.objects.retries import worth_another_try
from tierd.objects.store import ObjectDamaged, ObjectError, ObjectMissing, ObjectStoreUnavailable, Place


class Broken(Exception):
    """The answer came, and its bytes are not what they must be; `str()` says how."""


class Unlike(Exception):
    """The object is certainly not what was stored, so that asking again is no use; `str()` says how."""


FAULTS: Final = (MinioException, http.HTTPError, OSError, Broken, Unlike, ElementTree.ParseError, UnicodeDecodeError)
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchBucket"})
_UPLOAD_GONE: Final = "NoSuchUpload"
_KEYS: Final = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})


class UploadGone(ObjectError):
    """The upload that was to go on is not there any more: somebody ended it."""


class Kind(enum.Enum):
    """What the fault means for the object."""

    MISSING = enum.auto()
    DAMAGED = enum.auto()
    UNAVAILABLE = enum.auto()
    UPLOAD_GONE = enum.auto()


class Fault(NamedTuple):
    """See the module; `again` if another try may help."""

    kind: Kind
    reason: str
    again: bool
    hint: str = ""

    def as_error(self, place: Place, tries: int) -> ObjectError:
        """What to raise after so many tries."""
        reason = f"{self.reason} ({tries} tries)" if tries > 1 else self.reason
        if self.kind is Kind.MISSING:
            return ObjectMissing(place)
        if self.kind is Kind.DAMAGED:
            return ObjectDamaged(place, reason)
        if self.kind is Kind.UPLOAD_GONE:
            return UploadGone(place, "has no such upload")
        return ObjectStoreUnavailable(place, reason, hint=self.hint, refused=not self.again)


def explain(error: BaseException) -> Fault:
    """One of FAULTS, explained."""
    if isinstance(error, Broken):
        return Fault(Kind.DAMAGED, str(error), again=True)
    if isinstance(error, Unlike):
        return Fault(Kind.DAMAGED, str(error), again=False)
    if isinstance(error, S3Error):
        return _answered(error.response.status, error.code)
    if isinstance(error, ServerError):
        return _answered(error.status_code, None)
    if isinstance(error, InvalidResponseError):
        return _answered(error._code, _code_in(error._body))
    if isinstance(error, (ElementTree.ParseError, UnicodeDecodeError, MinioException)):
        return Fault(Kind.UNAVAILABLE, "its answer makes no sense", again=True, hint="does it speak S3?")
    return _not_answered(error)


def _code_in(body: str | None) -> str | None:
    """S3's error code; minio takes none from a server that says `text/xml`, as rclone does."""
    try:
        return ElementTree.fromstring(body or "").findtext("Code")
    except ElementTree.ParseError:
        return None


def _answered(status: int, code: str | None) -> Fault:
    if code in _MISSING:
        return Fault(Kind.MISSING, "", again=False)
    if code == _UPLOAD_GONE:
        return Fault(Kind.UPLOAD_GONE, "", again=False)
    if status == 416 or code == "InvalidRange":
        return Fault(Kind.DAMAGED, "it is shorter than what was stored", again=False)
    reason = f"it answered {status}" + (f" {shown(code)}" if code else "")
    hint = ""
    if code in _KEYS or status in (401, 403):
        hint = "check the access key, the secret key and what they are allowed to do"
    elif status in (301, 307, 400):
        hint = "check the region and the endpoint"
    return Fault(Kind.UNAVAILABLE, reason, worth_another_try(status, code), hint)


def _not_answered(error: BaseException) -> Fault:
    cause = error.args[0] if isinstance(error, http.SSLError) and error.args else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = f"its certificate does not pass: {cause.verify_message}"
        return Fault(Kind.UNAVAILABLE, reason, again=False, hint="set ca_file to the authority that signed it")
    if isinstance(error, http.NameResolutionError):
        return Fault(Kind.UNAVAILABLE, "its name cannot be resolved", again=True)
    if isinstance(error, http.NewConnectionError):
        return Fault(Kind.UNAVAILABLE, _system_reason(error, "no connection"), again=True)
    if isinstance(error, (http.TimeoutError, TimeoutError)):
        return Fault(Kind.UNAVAILABLE, "it stalled", again=True)
    return Fault(Kind.UNAVAILABLE, _system_reason(error, "the connection broke off"), again=True)


def _system_reason(error: BaseException, otherwise: str) -> str:
    """The operating system's words, where they are the cause."""
    for cause in (error, error.__cause__, error.__context__, *error.args):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return otherwise
