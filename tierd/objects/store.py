"""What an object store does for us, whichever it is, and how it fails. No store is implemented here.

An object is written once: whoever has other bytes takes another key (`keys.py`: the version is a part of it). Putting
the same bytes again is fine; putting others over an object makes readers of the old ones fail, never read wrong ones.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from tierd.errors import TierdError
from tierd.objects.keys import shown


class Stored(NamedTuple):
    """The bytes of an object, as whoever wrote it down knows them: how many, and their SHA-256 in hex."""

    size: int
    sha256: str


class ObjectStat(NamedTuple):
    """What the store says of an object without reading it. `sha256` is what tierd noted there; None if it did not."""

    size: int
    sha256: str | None


class Listed(NamedTuple):
    """An object in a listing."""

    key: str
    size: int


class FileRange(NamedTuple):
    """Where bytes of an object are to go: `length` bytes of the file, from `offset` on."""

    fd: int
    offset: int
    length: int


Into = memoryview | FileRange
"""A writable, contiguous view of bytes, or a part of a file; its length says how much is read."""


class Place(NamedTuple):
    """Which object, for messages; without a key the bucket, without a bucket the store."""

    endpoint: str
    bucket: str = ""
    key: str = ""

    def __str__(self) -> str:
        """One line, whatever the key is."""
        if not self.bucket:
            return f"object store {self.endpoint}"
        if not self.key:
            return f"bucket {shown(self.bucket)} of {self.endpoint}"
        return f"object {shown(self.key)} in bucket {shown(self.bucket)} of {self.endpoint}"


class ObjectError(TierdError):
    """An object could not be written or read. `place` says which, the message also why."""

    def __init__(self, place: Place, reason: str, *, hint: str = "", errno: int = _errno.EIO) -> None:
        super().__init__(f"{place} {reason}", hint=hint, errno=errno)
        self.place = place


class ObjectMissing(ObjectError):
    """There is no such object, or no such bucket."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, "is not there", hint="was it deleted beside tierd?", errno=_errno.ENOENT)


class ObjectDamaged(ObjectError):
    """The object is there, and its bytes are not those that were stored."""

    def __init__(self, place: Place, reason: str, *, hint: str = "restore the object from a backup") -> None:
        super().__init__(place, f"is damaged: {reason}", hint=hint)


class ObjectStoreUnavailable(ObjectError):
    """The store did not do what it was asked, after as many tries as are worth it. The object may be all right.

    `refused` if it said so that asking again would be no use: keys, settings, something that it cannot do.
    """

    def __init__(self, place: Place, reason: str, *, hint: str = "", refused: bool = False) -> None:
        super().__init__(place, f"cannot be had: {reason}", hint=hint or "is the object store up, and reachable?")
        self.refused = refused


class SourceChanged(TierdError):
    """The file that was to be stored is not, or is no longer, what the caller said. No object was made."""


class ObjectStore(Protocol):
    """Contract: blocking, for worker threads; each method may be called from any number of threads at once.

    A method raises ObjectError, or UsageError for a key or bucket that cannot be. What fails on the caller's own file
    is an OSError.
    """

    def ensure_bucket(self, bucket: str) -> None:
        """The bucket is there afterwards."""
        ...

    def put_file(
        self,
        bucket: str,
        key: str,
        source: Path | int,
        size: int,
        sha256: str | None = None,
        journal: Path | None = None,
    ) -> Stored:
        """Store the first `size` bytes of a file, a path or a descriptor; what was stored.

        The object is there as a whole, with checksums of its chunks (`sums.py`), or not at all. If `sha256` is given
        and the file turns out to have another, or ends early: SourceChanged. `journal` is a file of this upload alone:
        with it a later call goes on where one was cut off; it is gone when the object is there.
        """
        ...

    def get_range(self, bucket: str, key: str, stored: Stored, offset: int, into: Into) -> None:
        """Read bytes from `offset` on, until `into` is full. `stored` says what the object must be.

        Nothing is handed on that was not compared: whole chunks are fetched and checked. After an error `into` holds
        anything. A range that does not lie within the object is a ValueError.
        """
        ...

    def stat(self, bucket: str, key: str) -> ObjectStat | None:
        """What is known of the object without reading it; None if it is not there."""
        ...

    def list(self, bucket: str, prefix: str = "") -> Iterator[Listed]:
        """Objects whose keys begin with `prefix`, in no particular order; tierd's own checksums are left out."""
        ...

    def delete(self, bucket: str, key: str) -> None:
        """The object is not there afterwards, nor are its checksums."""
        ...

    def hash(self, bucket: str, key: str) -> Stored:
        """Read every byte. ObjectDamaged if they are not what checksums of ours, where there are any, say."""
        ...

    def adopt(self, bucket: str, key: str) -> Stored:
        """Make an object that somebody else put there readable in ranges: read it once, write its checksums down."""
        ...

    def abort_abandoned(self, bucket: str, prefix: str, older_than_s: float) -> int:
        """Drop what uploads to keys with this prefix left behind that began so long ago; how many that were."""
        ...

    def close(self) -> None:
        """Calls that run fail soon, others from now on at once."""
        ...
