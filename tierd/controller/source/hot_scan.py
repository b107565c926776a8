"""What a model in the source consists of: its files, links and directories, each with its attributes. Changes nothing.

Files with bytes can be demoted; empty ones, links and directories stay where they are, and so do files that are cold
already: all are in the manifest. Blocking, any thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from tierd.controller.source.hot_tree import HotTree, joined, split, stat_of
from tierd.controller.source.moved_file import HotFile, MoveRefused
from tierd.errors import UsageError
from tierd.objects.keys import VERSION_MAX, ObjectName, manifest_key, object_key, shown
from tierd.objects.manifest import Attributes, DirectoryEntry, Entry, FileEntry, LinkEntry, Manifest, manifest_of
from tierd.stub_files import is_cold, mtime_of, read_origins
from tierd.stubs import COLD_MARK, ORIGINS, RESERVED, STUBS

FILES_MAX: Final = 1_000_000
"""As many as a manifest describes."""
_EMPTY_SHA256: Final = hashlib.sha256().hexdigest()
_EMPTY_GROUPS: Final = FILES_MAX
_COLD_GROUPS: Final = 2 * FILES_MAX
"""Groups of links among empty and among cold files are numbered from here on."""
_NO_XATTRS: Final = (errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Subject:
    """Where a model is. `base` is its directory; of a single file the one in which that lies."""

    model_id: str
    base: bytes
    single: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """A model as it was just now."""

    subject: Subject
    files: tuple[HotFile, ...]
    attributes: Mapping[bytes, Attributes]
    """Of the files, by path."""
    staying: tuple[Entry, ...]
    """Directories, links and empty files, and files that are cold already: of another version."""

    @property
    def size_bytes(self) -> int:
        """What demoting it frees."""
        return sum(file.size for file in self.files)

    def manifest(
        self,
        version: int,
        created_at: datetime,
        digests: Mapping[bytes, str],
        elsewhere: Mapping[bytes, ObjectName] = {},
    ) -> Manifest:
        """Of the copy of that version; by path `digests`, the SHA-256 of the files, and where objects are that are not
        of this version. Raises ManifestDamaged."""
        entries: list[Entry] = list(self.staying)
        for number, file in enumerate(self.files):
            group = number if file.links else None
            for name in file.names():
                place = elsewhere.get(file.path)
                attributes = self.attributes[file.path]
                entries.append(FileEntry(name, attributes, file.size, digests[file.path], group, elsewhere=place))
        return manifest_of(self.subject.model_id, version, created_at.astimezone(UTC), entries)


def scan(tree: HotTree, model_id: str) -> Scan:
    """Raises MoveRefused if there is no such model, or something in it cannot be moved, OSError."""
    subject = find(tree, model_id)
    found = _Found()
    try:
        if subject.single:
            with tree.directory(subject.base) as fd:
                found.add(fd, os.path.basename(model_id).encode(), b"", tree.device)
        else:
            _walk(tree, subject.base, found)
    except FileNotFoundError:
        raise MoveRefused(f"{shown(model_id)} is being changed just now", hint="try again later") from None
    return _made(subject, found)


def scan_some(tree: HotTree, subject: Subject, names: Sequence[bytes]) -> Scan:
    """Only these files of a directory, as far as they are there. Raises MoveRefused as `scan`, OSError."""
    found = _Found()
    with tree.directory_if_there(subject.base) as fd:
        if fd is None:
            raise MoveRefused(f"{shown(subject.model_id)} is not in the source")
        found.staying.append(DirectoryEntry(b"", _attributes(fd, b".", os.fstat(fd))))
        for name in names:
            st = stat_of(fd, name)
            if st is not None and stat.S_ISREG(st.st_mode):
                with suppress(FileNotFoundError):  # it goes this moment
                    found.add(fd, name, b"", tree.device)
    return _made(subject, found)


def find(tree: HotTree, model_id: str) -> Subject:
    """Where the model is. Raises MoveRefused if there is none, or it is no directory and no file."""
    above, name = split(model_id.encode())
    with tree.directory_if_there(above) as fd:
        st = stat_of(fd, name) if fd is not None else None
    if st is None:
        raise MoveRefused(f"{shown(model_id)} is not in the source", hint="is its name right, and the source mounted?")
    if not stat.S_ISDIR(st.st_mode) and not stat.S_ISREG(st.st_mode):
        raise MoveRefused(f"{shown(model_id)} is no directory and no file", hint="name what it leads to")
    single = stat.S_ISREG(st.st_mode)
    return Subject(model_id, above if single else model_id.encode(), single)


@dataclass(slots=True)
class _Found:
    """What a walk came by."""

    inodes: dict[int, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    stats: dict[int, os.stat_result] = field(default_factory=dict)
    attributes: dict[int, Attributes] = field(default_factory=dict)
    staying: list[Entry] = field(default_factory=list)
    cold_groups: dict[int, int] = field(default_factory=dict)
    """By inode."""
    directories: list[bytes] = field(default_factory=list)
    """Still to be walked."""

    def add(self, fd: int, name: bytes, above: bytes, device: int) -> None:
        """An entry of a directory. Raises MoveRefused, OSError."""
        path = joined(above, name)
        st = stat_of(fd, name)
        if st is None:
            raise FileNotFoundError
        if st.st_dev != device:
            raise MoveRefused(f"{shown(path)} lies on another file system", hint="unmount it, or move it away")
        if stat.S_ISDIR(st.st_mode):
            self.staying.append(DirectoryEntry(path, _attributes(fd, name, st)))
            self.directories.append(path)
        elif stat.S_ISLNK(st.st_mode):
            self.staying.append(LinkEntry(path, _attributes(fd, name, st), os.readlink(name, dir_fd=fd)))
        elif stat.S_ISREG(st.st_mode):
            self._add_file(fd, name, path, st)
        else:
            raise MoveRefused(f"{shown(path)} is a device, pipe or socket", hint="models consist of files")

    def _add_file(self, fd: int, name: bytes, path: bytes, st: os.stat_result) -> None:
        if st.st_size and st.st_mode & COLD_MARK:
            raise MoveRefused(f"{shown(path)} has the sticky bit, which marks cold files", hint="chmod -t it")
        if st.st_ino not in self.inodes:
            self.stats[st.st_ino], self.attributes[st.st_ino] = st, _attributes(fd, name, st)
        self.inodes[st.st_ino].append(path)
        if len(self.inodes) + len(self.staying) > FILES_MAX:
            raise MoveRefused(f"it has more than {FILES_MAX} files", hint="move parts of it")


def _walk(tree: HotTree, base: bytes, found: _Found) -> None:
    with tree.directory(base) as fd:
        st = os.fstat(fd)
        if st.st_dev != tree.device:
            raise MoveRefused(f"{shown(base)} lies on another file system", hint="name that one as the source")
        found.staying.append(DirectoryEntry(b"", _attributes(fd, b".", st)))
    found.directories.append(b"")
    while found.directories:
        above = found.directories.pop()
        with tree.directory(joined(base, above)) as fd:
            names = [os.fsencode(name) for name in os.listdir(fd)]
            for name in names:
                if name != RESERVED:
                    found.add(fd, name, above, tree.device)
        if RESERVED in names:
            found.staying += _cold(tree, base, above, set(names), found.cold_groups)


def _cold(
    tree: HotTree, base: bytes, above: bytes, hot: set[bytes], cold_groups: dict[int, int]
) -> Iterator[FileEntry]:
    """The files of a directory that are cold: as they look, and where their objects are."""
    layer = joined(joined(base, above), RESERVED)
    with tree.directory_if_there(joined(layer, STUBS)) as fd, tree.directory_if_there(joined(layer, ORIGINS)) as known:
        names = [os.fsencode(name) for name in os.listdir(fd)] if fd is not None else []
        origins = read_origins(known) if known is not None and names else {}
        for name in names:
            st = stat_of(fd, name) if fd is not None and name not in hot else None
            if fd is None or st is None:
                continue
            path, origin = joined(above, name), origins.get(st.st_ino)
            if not is_cold(st):
                raise MoveRefused(f"{shown(path)} comes back from the cold tier", hint="try again later")
            if origin is None:
                raise MoveRefused(f"{shown(path)} is cold, and nobody knows where its bytes are", hint="remove it")
            attributes = replace(_attributes(fd, name, st), mode=st.st_mode & 0o6777, mtime_ns=mtime_of(st))
            group = cold_groups.setdefault(st.st_ino, _COLD_GROUPS + len(cold_groups)) if st.st_nlink > 1 else None
            elsewhere = ObjectName(origin.model_id, origin.version, origin.path)
            yield FileEntry(path, attributes, origin.size, origin.sha256, group, elsewhere=elsewhere)


def _made(subject: Subject, found: _Found) -> Scan:
    files, attributes, staying = [], {}, list(found.staying)
    for number, (inode, names) in enumerate(found.inodes.items()):
        path, *links = sorted(names)
        st = found.stats[inode]
        if not st.st_size:
            group = _EMPTY_GROUPS + number if links else None
            staying += [FileEntry(name, found.attributes[inode], 0, _EMPTY_SHA256, group) for name in names]
            continue
        if st.st_nlink != len(names):
            raise MoveRefused(f"{shown(path)} has hard links outside of the model", hint="demotion would part them")
        attributes[path] = found.attributes[inode]
        files.append(HotFile(path, tuple(links), st.st_size, st.st_mtime_ns, st.st_ctime_ns, inode, st.st_mode))
    files.sort(key=lambda file: file.path)
    _check_keys(subject.model_id, files)
    return Scan(subject, tuple(files), attributes, tuple(staying))


def _check_keys(model_id: str, files: list[HotFile]) -> None:
    """Whatever the version will be, each object has a key. Raises MoveRefused."""
    try:
        manifest_key(model_id, VERSION_MAX)
        for file in files:
            for name in file.names():
                object_key(model_id, VERSION_MAX, name)
    except UsageError as error:
        raise MoveRefused(str(error), hint=error.hint) from None


def _attributes(fd: int, name: bytes, st: os.stat_result) -> Attributes:
    return Attributes(
        stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_atime_ns, st.st_mtime_ns, xattrs_of(fd, name)
    )


def xattrs_of(fd: int, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Of what a name in a directory means, link or not, in the order of their names."""
    opened = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        return read_xattrs(f"/proc/self/fd/{opened}")
    finally:
        os.close(opened)


def read_xattrs(path: str | int) -> tuple[tuple[bytes, bytes], ...]:
    """Of an inode; none where the file system keeps none."""
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return ()
        raise
    return tuple(sorted((os.fsencode(name), os.getxattr(path, name)) for name in names))
