"""What a demoted model is: its files, links and directories with all their attributes. Pure: text in, data out.

A manifest lies in the source and beside the objects. Object keys are not in it: they are derived from model, version
and path (`keys.py`). It is read by whoever may, so nothing in it is believed: it can never name a path outside its
model, nor one below something that is no directory. How it is written down: `manifest_text.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from tierd.errors import TierdError, UsageError
from tierd.objects.keys import VERSION_MAX, ObjectName, object_key, path_parts, shown, validate_model_id

SIZE_MAX: Final = (1 << 63) - 1
NS_MIN: Final = -(1 << 63)
MODE_MAX: Final = 0o7777
ID_MAX: Final = (1 << 32) - 2
"""Users and groups; 2**32 - 1 means "leave it" (chown(2))."""
INODE_MAX: Final = (1 << 64) - 1
PATH_BYTES_MAX: Final = 4095
"""PATH_MAX without its NUL (limits.h), also of what a link holds."""
XATTR_NAME_BYTES_MAX: Final = 255
XATTR_VALUE_BYTES_MAX: Final = 65_536
"""Limits of Linux (xattr(7))."""


class ManifestDamaged(TierdError):
    """A manifest is torn, of another format, or says what cannot be; the message names the field."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"manifest is damaged: {field} {reason}", hint="there is a copy of it beside the objects")
        self.field = field


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a file, link or directory has besides its content. `mode` is permissions only; times are nanoseconds."""

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Names and values, in the order of the names."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name of a file. `path` is relative to the model; of a model that is a single file, the file's name."""

    path: bytes
    attributes: Attributes
    size: int
    sha256: str
    group: int | None = None
    """Entries of one group are names of one inode: the same bytes and attributes, and one stub."""
    stub: int | None = None
    """Inode number of the empty file that keeps its place in the source; None in the copy beside the objects."""
    elsewhere: ObjectName | None = None
    """Where its object is, of a file that was cold before: not at this version. None: it is at this version."""


@dataclass(frozen=True, slots=True)
class LinkEntry:
    """A symbolic link; where it leads is nobody's business here."""

    path: bytes
    attributes: Attributes
    target: bytes


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A directory, empty or not. The model's own has the empty path; of a single file there is none."""

    path: bytes
    attributes: Attributes


Entry = FileEntry | LinkEntry | DirectoryEntry


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the module. Entries are in the order of their paths; `manifest_of` puts them into it."""

    model_id: str
    version: int
    created_at: datetime
    """When the copy was made, in UTC."""
    directories: tuple[DirectoryEntry, ...]
    files: tuple[FileEntry, ...]
    links: tuple[LinkEntry, ...]

    def entries(self) -> Iterator[Entry]:
        """All of them, directories before what lies in them."""
        yield from self.directories
        yield from self.files
        yield from self.links

    def check(self) -> None:
        """Raises ManifestDamaged if it says what cannot be."""
        _check_head(self)
        for entry in self.entries():
            _check_entry(entry)
        _check_tree(self)
        _check_groups(self.files)
        _check_order("directories", [entry.path for entry in self.directories])
        _check_order("files", [entry.path for entry in self.files])
        _check_order("links", [entry.path for entry in self.links])


def manifest_of(model_id: str, version: int, created_at: datetime, entries: Iterable[Entry]) -> Manifest:
    """A manifest of these entries, checked. Raises ManifestDamaged."""
    listed = sorted(entries, key=lambda entry: entry.path)
    manifest = Manifest(
        model_id,
        version,
        created_at,
        tuple(entry for entry in listed if isinstance(entry, DirectoryEntry)),
        tuple(entry for entry in listed if isinstance(entry, FileEntry)),
        tuple(entry for entry in listed if isinstance(entry, LinkEntry)),
    )
    manifest.check()
    return manifest


def _check_head(manifest: Manifest) -> None:
    try:
        validate_model_id(manifest.model_id)
    except UsageError as error:
        raise ManifestDamaged("model_id", f"cannot be: {error}") from None
    _within("version", manifest.version, 1, VERSION_MAX)
    if manifest.created_at.tzinfo is not UTC:
        raise ManifestDamaged("created_at", "is not in UTC")


def _check_entry(entry: Entry) -> None:
    try:
        if entry.path or not isinstance(entry, DirectoryEntry):
            path_parts(entry.path)
    except UsageError as error:
        raise ManifestDamaged("path", f"cannot be: {error}") from None
    where = shown(entry.path)
    if len(entry.path) > PATH_BYTES_MAX:
        raise ManifestDamaged("path", f"of {len(entry.path)} bytes is too long")
    _check_attributes(where, entry.attributes)
    if isinstance(entry, LinkEntry) and (not 1 <= len(entry.target) <= PATH_BYTES_MAX or b"\0" in entry.target):
        raise ManifestDamaged(f"target of {where}", "cannot be one of a link")
    if isinstance(entry, FileEntry):
        _within(f"size of {where}", entry.size, 0, SIZE_MAX)
        if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise ManifestDamaged(f"sha256 of {where}", "is not 64 digits of hex")
        _within(f"group of {where}", entry.group or 0, 0, SIZE_MAX)
        if entry.stub is not None:
            _within(f"stub of {where}", entry.stub, 1, INODE_MAX)
        _check_elsewhere(where, entry.elsewhere)


def _check_elsewhere(where: str, elsewhere: ObjectName | None) -> None:
    if elsewhere is None:
        return
    try:
        object_key(*elsewhere)
    except UsageError as error:
        raise ManifestDamaged(f"elsewhere of {where}", f"cannot be: {error}") from None


def _check_attributes(where: str, attributes: Attributes) -> None:
    _within(f"mode of {where}", attributes.mode, 0, MODE_MAX)
    _within(f"uid of {where}", attributes.uid, 0, ID_MAX)
    _within(f"gid of {where}", attributes.gid, 0, ID_MAX)
    _within(f"atime_ns of {where}", attributes.atime_ns, NS_MIN, SIZE_MAX)
    _within(f"mtime_ns of {where}", attributes.mtime_ns, NS_MIN, SIZE_MAX)
    names = [name for name, _ in attributes.xattrs]
    if names != sorted(set(names)):
        raise ManifestDamaged(f"xattrs of {where}", "are not in the order of their names, each once")
    for name, value in attributes.xattrs:
        if not 1 <= len(name) <= XATTR_NAME_BYTES_MAX or b"\0" in name or len(value) > XATTR_VALUE_BYTES_MAX:
            raise ManifestDamaged(f"xattrs of {where}", f"cannot have {shown(name)} with {len(value)} bytes")


def _within(field: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ManifestDamaged(field, f"is {value}, not between {lowest} and {highest}")


def _check_order(field: str, paths: list[bytes]) -> None:
    if paths != sorted(paths):
        raise ManifestDamaged(field, "are not in the order of their paths")


def _check_tree(manifest: Manifest) -> None:
    """Each path once, and each below a directory that is listed: never through a link, never below a file."""
    directories = {entry.path for entry in manifest.directories}
    seen: set[bytes] = set()
    for entry in manifest.entries():
        if entry.path in seen:
            raise ManifestDamaged("path", f"{shown(entry.path)} is there twice")
        seen.add(entry.path)
        above = entry.path.rpartition(b"/")[0]
        if above and above not in directories:
            raise ManifestDamaged("path", f"{shown(entry.path)} lies in no directory of the model")


def _check_groups(files: Iterable[FileEntry]) -> None:
    first: dict[int, FileEntry] = {}
    owner: dict[int, FileEntry] = {}
    for entry in files:
        leader = first.setdefault(entry.group, entry) if entry.group is not None else entry
        if _inode(leader) != _inode(entry):
            raise ManifestDamaged("group", f"{entry.group} has names of different files, such as {shown(entry.path)}")
        if entry.stub is not None and owner.setdefault(entry.stub, leader) is not leader:
            raise ManifestDamaged("stub", f"{entry.stub} stands for different files, such as {shown(entry.path)}")


def _inode(entry: FileEntry) -> tuple[Attributes, int, str, int | None, ObjectName | None]:
    return entry.attributes, entry.size, entry.sha256, entry.stub, entry.elsewhere
