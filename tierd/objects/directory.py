"""Objects in a plain directory: what stands for an object store where there is none. Same contract, no network.

`ROOT/BUCKET/KEY` is the object, `ROOT/BUCKET/.tierd/sums/KEY` its SHA-256 and the checksums of its chunks, and
`ROOT/BUCKET/.tierd/new` what is being written. A part of a key that is longer than a file name may be is refused, and
no object can lie below another one, as files do not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tierd.errors import UsageError
from tierd.objects import beneath
from tierd.objects.keys import NAME_BYTES_MAX, RESERVED, SUMS_PREFIX, check_bucket, check_key, shown
from tierd.objects.pace import Stopping, Throttle
from tierd.objects.ranges import Target, read_fully, spans, write_all
from tierd.objects.store import (
    Into,
    Listed,
    ObjectDamaged,
    ObjectMissing,
    ObjectStat,
    ObjectStoreUnavailable,
    Place,
    SourceChanged,
    Stored,
)
from tierd.objects.sums import CHUNK_BYTES, Summing, Sums, SumsDamaged, decode, encoded_bytes

_NEW: Final = [RESERVED.decode(), "new"]
_SUMS_BYTES_MAX: Final = encoded_bytes(5 << 40)
_TRIES: Final = 5
"""How often a directory is made again that somebody who deletes removes just then."""


class DirectoryStore:
    """See `ObjectStore`, whose contract this keeps. Several processes may use one directory."""

    def __init__(self, root: Path, bytes_per_s: int = 0) -> None:
        self._root = root
        self._stopping = threading.Event()
        self._throttle = Throttle(bytes_per_s, self._stopping)

    def ensure_bucket(self, bucket: str) -> None:
        """See ObjectStore."""
        with self._explained(self._bucket(bucket)), beneath.directory(self._root, [bucket, *_NEW], make=True):
            return

    def put_file(
        self,
        bucket: str,
        key: str,
        source: Path | int,
        size: int,
        sha256: str | None = None,
        journal: Path | None = None,
    ) -> Stored:
        """See ObjectStore. There is no going on after a kill: the next call copies from the start."""
        place = self._place(bucket, key)
        if isinstance(source, int):
            return self._put(place, source, f"descriptor {source}", size, sha256)
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._put(place, fd, shown(os.fsencode(source)), size, sha256)
        finally:
            os.close(fd)

    def _put(self, place: Place, source: int, name: str, size: int, sha256: str | None) -> Stored:
        with self._draft(place) as (fd, draft):
            sums = self._copied(place, source, name, fd, size)
            if sha256 not in (None, sums.stored.sha256):
                raise SourceChanged(f"{name} has SHA-256 {sums.stored.sha256} and not {sha256}", hint="it changed")
            with self._explained(place):
                os.fsync(fd)
            self._put_sums(place, sums)
            self._place_draft(place, draft, place.key)
        return sums.stored

    def _copied(self, place: Place, source: int, name: str, fd: int, size: int) -> Sums:
        summing, buffer = Summing(), memoryview(bytearray(min(size, CHUNK_BYTES)))
        for offset in range(0, size, CHUNK_BYTES):
            content = buffer[: min(CHUNK_BYTES, size - offset)]
            if read_fully(source, content, offset) != len(content):
                raise SourceChanged(f"{name} has become shorter than {size} bytes", hint="try again")
            summing.add(content)
            with self._explained(place):
                self._throttle.wait(len(content))
                write_all(fd, content, offset)
        return summing.end()

    def _put_sums(self, place: Place, sums: Sums) -> None:
        with self._draft(place) as (fd, draft), self._explained(place):
            write_all(fd, memoryview(sums.encode()), 0)
            os.fsync(fd)
            self._place_draft(place, draft, SUMS_PREFIX + place.key)

    @contextmanager
    def _draft(self, place: Place) -> Iterator[tuple[int, str]]:
        """A new file and its name in `_NEW`, removed at the end if it is still there. Locked: it has an owner."""
        name = secrets.token_hex(16)
        self._require_bucket(place)
        with self._explained(place), beneath.directory(self._root, [place.bucket, *_NEW], make=True) as above:
            fd = beneath.open_file(above, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield fd, name
        finally:
            os.close(fd)
            with suppress(FileNotFoundError), beneath.directory(self._root, [place.bucket, *_NEW]) as above:
                os.unlink(name, dir_fd=above)

    def _place_draft(self, place: Place, draft: str, key: str) -> None:
        *parts, name = key.split("/")
        lies_there = "another object lies where it would, or above it"
        with self._explained(place, lies_there), beneath.directory(self._root, [place.bucket, *_NEW]) as new:
            for tries_left in reversed(range(_TRIES)):
                try:
                    with beneath.directory(self._root, [place.bucket, *parts], make=True) as above:
                        os.rename(draft, name, src_dir_fd=new, dst_dir_fd=above)
                        os.fsync(above)
                    return
                except FileNotFoundError:  # `delete` of a neighbour removed the directory, which was empty
                    if not tries_left:
                        raise

    def get_range(self, bucket: str, key: str, stored: Stored, offset: int, into: Into) -> None:
        """See ObjectStore."""
        place, target = self._place(bucket, key), Target(offset, into)
        if offset < 0 or offset + target.length > stored.size:
            raise ValueError(f"bytes {offset} to {offset + target.length} of {stored.size}")
        with self._opened(place) as fd:
            if os.fstat(fd).st_size != stored.size:
                raise ObjectDamaged(place, f"it has {os.fstat(fd).st_size} bytes, {stored.size} were stored")
            sums = self._sums(place)
            if sums is None:
                raise ObjectDamaged(place, "it has no checksums of ours", hint="`tierd import` writes them down")
            if sums.stored != stored:
                raise ObjectDamaged(place, f"SHA-256 {sums.stored.sha256} is there, {stored.sha256} was stored")
            self._read(place, fd, sums, target, offset)

    def _read(self, place: Place, fd: int, sums: Sums, target: Target, offset: int) -> None:
        buffer = memoryview(bytearray(min(sums.stored.size, CHUNK_BYTES)))
        for span in spans(offset, target.length, sums.stored.size, CHUNK_BYTES):
            content = buffer[: span.length]
            with self._explained(place):
                self._throttle.wait(span.length)
                read = read_fully(fd, content, span.offset)
            if read != span.length or not sums.matches(span.offset // CHUNK_BYTES, content):
                raise ObjectDamaged(place, f"bytes {span.offset} to {span.end - 1} do not match their checksum")
            target.put(span, content)

    def stat(self, bucket: str, key: str) -> ObjectStat | None:
        """See ObjectStore."""
        place = self._place(bucket, key)
        try:
            with self._opened(place) as fd:
                size = os.fstat(fd).st_size
        except ObjectMissing:
            return None
        sums = self._sums(place)
        return ObjectStat(size, sums.stored.sha256 if sums and sums.stored.size == size else None)

    def list(self, bucket: str, prefix: str = "") -> Iterator[Listed]:
        """See ObjectStore. What is no plain file with a name in UTF-8 is not listed."""
        place = self._bucket(bucket)
        self._require_bucket(place)
        above, _, _ = prefix.rpartition("/")
        try:
            waiting = [check_key(above).split("/") if above else []]
        except UsageError:
            return  # no object can be there
        while waiting:
            parts = waiting.pop()
            for name, found in self._entries(place, parts):
                key = "/".join([*parts, name])
                if key == RESERVED.decode():
                    continue
                if stat.S_ISDIR(found.st_mode) and (key + "/").startswith(prefix[: len(key) + 1]):
                    waiting.append([*parts, name])
                elif stat.S_ISREG(found.st_mode) and key.startswith(prefix):
                    yield Listed(key, found.st_size)

    def _entries(self, place: Place, parts: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
        """What lies in a directory; nothing if that went meanwhile."""
        with (
            suppress(ObjectMissing),
            self._explained(place),
            beneath.directory(self._root, [place.bucket, *parts]) as fd,
            os.scandir(fd) as entries,
        ):
            for entry in entries:
                try:
                    entry.name.encode()
                    found = entry.stat(follow_symlinks=False)
                except (FileNotFoundError, UnicodeEncodeError):
                    continue
                yield entry.name, found

    def delete(self, bucket: str, key: str) -> None:
        """See ObjectStore."""
        place = self._place(bucket, key)
        for each in (key, SUMS_PREFIX + key):
            *parts, name = each.split("/")
            with suppress(ObjectMissing), self._explained(place):
                with beneath.directory(self._root, [bucket, *parts]) as above:
                    os.unlink(name, dir_fd=above)
                    os.fsync(above)
                beneath.prune(self._root, [bucket, *parts], keep=1)

    def hash(self, bucket: str, key: str) -> Stored:
        """See ObjectStore."""
        place = self._place(bucket, key)
        found = self._hashed(place)
        sums = self._sums(place)
        if sums is not None and sums != found:
            raise ObjectDamaged(place, f"SHA-256 is {found.stored.sha256}, {sums.stored.sha256} was stored")
        return found.stored

    def adopt(self, bucket: str, key: str) -> Stored:
        """See ObjectStore."""
        place = self._place(bucket, key)
        found = self._hashed(place)
        self._put_sums(place, found)
        return found.stored

    def _hashed(self, place: Place) -> Sums:
        summing, buffer, offset = Summing(), memoryview(bytearray(CHUNK_BYTES)), 0
        with self._opened(place) as fd, self._explained(place):
            while read := read_fully(fd, buffer, offset):
                self._throttle.wait(read)
                summing.add(buffer[:read])
                offset += read
        return summing.end()

    def abort_abandoned(self, bucket: str, prefix: str, older_than_s: float) -> int:
        """See ObjectStore. Here a lock tells whether somebody still writes, whatever the key."""
        removed = 0
        before = time.time() - older_than_s
        with self._explained(self._bucket(bucket)), beneath.directory(self._root, [bucket, *_NEW]) as above:
            for name in os.listdir(above):
                with suppress(FileNotFoundError, BlockingIOError):
                    removed += _removed_if_unowned(above, name, before)
        return removed

    def close(self) -> None:
        """See ObjectStore."""
        self._stopping.set()

    # --- common ---

    def _bucket(self, bucket: str) -> Place:
        return Place(str(self._root), check_bucket(bucket))

    def _place(self, bucket: str, key: str) -> Place:
        return Place(str(self._root), check_bucket(bucket), check_key(key))

    def _require_bucket(self, place: Place) -> None:
        with self._explained(place._replace(key="")), beneath.directory(self._root, [place.bucket]):
            return

    @contextmanager
    def _explained(self, place: Place, not_as_expected: str = "") -> Iterator[None]:
        """Errors of the operating system in terms of objects. A file for a directory, or the reverse: not there.

        Where something is written that is not what it means, and `not_as_expected` is.
        """
        try:
            yield
        except Stopping:
            raise ObjectStoreUnavailable(place, "tierd stops using it", hint="start it again") from None
        except FileNotFoundError:
            raise ObjectMissing(place) from None
        except (NotADirectoryError, IsADirectoryError):
            if not_as_expected:
                raise ObjectStoreUnavailable(place, not_as_expected, hint="a directory has limits") from None
            raise ObjectMissing(place) from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                reason = f"{place}: a part of the key has more than {NAME_BYTES_MAX} bytes"
                raise UsageError(reason, hint="shorten the name") from None
            raise ObjectStoreUnavailable(place, error.strerror or str(error), hint="is the disk all right?") from None

    @contextmanager
    def _opened(self, place: Place) -> Iterator[int]:
        *parts, name = place.key.split("/")
        with self._explained(place), beneath.directory(self._root, [place.bucket, *parts]) as above:
            fd = beneath.open_file(above, name)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ObjectMissing(place)
            yield fd
        finally:
            os.close(fd)

    def _sums(self, place: Place) -> Sums | None:
        """None if there are none. Raises ObjectDamaged if they are torn."""
        *parts, name = (SUMS_PREFIX + place.key).split("/")
        try:
            with self._explained(place), beneath.directory(self._root, [place.bucket, *parts]) as above:
                fd = beneath.open_file(above, name)
        except ObjectMissing:
            return None
        try:
            with os.fdopen(fd, "rb") as file:
                return decode(file.read(_SUMS_BYTES_MAX))
        except SumsDamaged as damage:
            raise ObjectDamaged(place, f"its checksums are: {damage}") from None


def _removed_if_unowned(above: int, name: str, before: float) -> bool:
    """False if it was written to since, which is also so of one that is not locked yet. Raises BlockingIOError."""
    fd = beneath.open_file(above, name)
    try:
        if os.fstat(fd).st_mtime > before:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=above)
    finally:
        os.close(fd)
    return True
