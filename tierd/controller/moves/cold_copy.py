"""The copy of a model in the object store: made, compared, and described by a manifest. Changes nothing in the source.

Blocking, any thread. An object is written once: whoever goes on after a kill writes the same bytes, or none. The
manifest that lies beside the objects is the one that counts, whoever wrote it: another process goes on with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tierd.controller.moves.books import FileNews, Move
from tierd.controller.moves.steps import FileState
from tierd.controller.moves.workshop import Workshop, subject_of
from tierd.controller.source.file_calls import opened, same
from tierd.controller.source.hot_scan import Scan, scan, scan_some
from tierd.controller.source.hot_tree import joined, split
from tierd.controller.source.moved_file import ChangedMeanwhile, HotFile, MoveFile, MoveRefused
from tierd.objects.keys import ObjectName, manifest_key, object_key, shown
from tierd.objects.manifest import Manifest, ManifestDamaged
from tierd.objects.manifest_text import BYTES_MAX, decode, encode
from tierd.objects.store import ObjectDamaged, ObjectMissing, Place, Stored
from tierd.syscalls import forced_stat

_HASH_BYTES: Final = 1 << 20


class ColdCopy:
    """Of one move."""

    def __init__(self, workshop: Workshop, move: Move) -> None:
        self._tree = workshop.tree
        self._store = workshop.store
        subjects = workshop.subjects(move)
        self._bucket = subjects.bucket
        self._whole = subjects.whole
        self._uploads = workshop.settings.state_dir / "uploads"
        self._subject = subject_of(move)
        self._move = move
        self._at = workshop.at
        self.manifest_key = manifest_key(move.subject, move.version)

    def begin(self) -> None:
        """Raises ChangedMeanwhile if objects of this version are there: the books are older than the store."""
        self._store.ensure_bucket(self._bucket)
        prefix = self.manifest_key.removesuffix(".manifest") if self._whole else self.manifest_key
        found = next(iter(self._store.list(self._bucket, prefix)), None)
        if found is not None:
            raise ChangedMeanwhile(f"objects of version {self._move.version} are there already, such as {found.key}")

    # --- files ---

    def put(self, moved: MoveFile) -> FileNews:
        """Store a file. Raises ChangedMeanwhile if it is not the one that was planned, ObjectError."""
        file = moved.file
        self._uploads.mkdir(parents=True, exist_ok=True)
        fd = self._open(file)
        try:
            # A page that is dirty takes more writes, through a mapping, without a change of any time.
            os.fsync(fd)
            self._expect(fd, file)
            self._at("put object")
            stored = self._store.put_file(self._bucket, self._key(moved), fd, file.size, journal=self._journal(file))
            self._at("object was put")
            self._expect(fd, file)
        finally:
            os.close(fd)
        return FileNews(file.path, FileState.COPIED, stored.sha256)

    def verify(self, moved: MoveFile) -> FileNews:
        """Read an object to its end. Raises ObjectDamaged if it is not what was stored, ObjectError."""
        stored = self._store.hash(self._bucket, self._key(moved))
        if stored != Stored(moved.file.size, moved.sha256 or ""):
            place = Place("the object store", self._bucket, self._key(moved))
            raise ObjectDamaged(place, f"it has SHA-256 {stored.sha256}, {moved.sha256} was stored")
        return FileNews(moved.file.path, FileState.VERIFIED)

    def missing(self, files: Sequence[MoveFile]) -> str:
        """What the store no longer has, as far as it says without reading objects; empty if all is there.

        Raises ObjectError, also if there is no such bucket: then it is the store that is not there.
        """
        next(iter(self._store.list(self._bucket, self.manifest_key)), None)
        if not self._manifest_is_there():
            return "its manifest"
        return next((f"the object of {shown(moved.file.path)}" for moved in files if not self._is_there(moved)), "")

    def _is_there(self, moved: MoveFile) -> bool:
        found = self._store.stat(self._bucket, self._key(moved))
        return found is not None and found.size == moved.file.size and found.sha256 in (moved.sha256, None)

    def is_right(self, moved: MoveFile) -> bool:
        """Reads the object to its end. Raises ObjectError if the store does not answer."""
        try:
            self.verify(moved)
        except (ObjectDamaged, ObjectMissing):
            return False
        return True

    def _open(self, file: HotFile) -> int:
        above, leaf = split(file.path)
        with self._tree.directory_if_there(joined(self._subject.base, above)) as fd:
            if fd is not None:
                file_fd = opened(fd, leaf, os.O_NOATIME)
                if file_fd >= 0:
                    return file_fd
        raise ChangedMeanwhile(f"{shown(file.path)} went")

    def _expect(self, fd: int, file: HotFile) -> None:
        st = forced_stat(fd)
        if not same(st, file) or st.st_ctime_ns != file.ctime_ns:
            raise ChangedMeanwhile(f"{shown(file.path)} changed")

    def _key(self, moved: MoveFile) -> str:
        return object_key(self._move.subject, moved.version or self._move.version, moved.file.path)

    def _journal(self, file: HotFile) -> Path:
        return self._uploads / f"{self._move.id}-{hashlib.sha256(file.path).hexdigest()[:32]}"

    # --- the whole ---

    def compare(self, files: Sequence[MoveFile]) -> Scan:
        """The model, or what was planned of it, as it is now. Raises ChangedMeanwhile if that is not as planned."""
        try:
            found = self._scan(files)
        except MoveRefused as error:
            raise ChangedMeanwhile(str(error)) from None
        planned = {moved.file.path: moved.file for moved in files}
        now = {file.path: file for file in found.files}
        for path in sorted(planned.keys() | now.keys()):
            if planned.get(path) != now.get(path):
                what = "went" if path not in now else "changed" if path in planned else "appeared"
                raise ChangedMeanwhile(f"{shown(path)} {what}")
        return found

    def _scan(self, files: Sequence[MoveFile]) -> Scan:
        if self._whole:
            return scan(self._tree, self._move.subject)
        found = scan_some(self._tree, self._subject, [moved.file.path for moved in files])
        # The plan has no mode: who changed it changed the ctime, too.
        return replace(found, files=tuple(replace(file, mode=0) for file in found.files))

    def manifest(self, files: Sequence[MoveFile]) -> bytes:
        """The manifest beside the objects, written if it is not there, and read back.

        Raises ChangedMeanwhile, ObjectError, ManifestDamaged.
        """
        if self._store.stat(self._bucket, self.manifest_key) is None:
            digests = {moved.file.path: moved.sha256 or "" for moved in files}
            elsewhere = {
                moved.file.path: ObjectName(self._move.subject, moved.version, moved.file.path)
                for moved in files
                if moved.version is not None
            }
            made = self.compare(files).manifest(self._move.version, datetime.now(UTC), digests, elsewhere)
            self._put_manifest(encode(made))
        content = self._read_manifest()
        self._check(decode(content), files)
        return content

    def _manifest_is_there(self) -> bool:
        """It can be read, and is the one of this version."""
        try:
            found = decode(self._read_manifest())
        except (ObjectMissing, ObjectDamaged, ManifestDamaged):
            return False
        return (found.model_id, found.version) == (self._move.subject, self._move.version)

    def _put_manifest(self, content: bytes) -> None:
        fd = os.memfd_create("manifest", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            self._at("put manifest")
            self._store.put_file(self._bucket, self.manifest_key, fd, len(content))
            self._at("manifest was put")
        finally:
            os.close(fd)

    def _read_manifest(self) -> bytes:
        stored = self._store.hash(self._bucket, self.manifest_key)
        if stored.size > BYTES_MAX:
            raise ManifestDamaged("length", f"is {stored.size} bytes, {BYTES_MAX} are allowed")
        content = bytearray(stored.size)
        self._store.get_range(self._bucket, self.manifest_key, stored, 0, memoryview(content))
        return bytes(content)

    def _check(self, manifest: Manifest, files: Sequence[MoveFile]) -> None:
        names = {name for moved in files for name in moved.file.names()}
        said = {
            (entry.path, entry.size, entry.sha256)
            for entry in manifest.files
            if entry.size and (not entry.elsewhere or entry.path in names)
        }
        meant = {(name, moved.file.size, moved.sha256) for moved in files for name in moved.file.names()}
        if (manifest.model_id, manifest.version) != (self._move.subject, self._move.version) or said != meant:
            raise ManifestDamaged("files", "are not those that were copied")


def sha256_of(fd: int) -> str:
    """Of a whole file. Raises OSError."""
    digest = hashlib.sha256()
    offset = 0
    while content := os.pread(fd, _HASH_BYTES, offset):
        digest.update(content)
        offset += len(content)
    return digest.hexdigest()
