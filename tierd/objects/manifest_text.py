"""How a manifest is written down: one line of JSON, and one with the SHA-256 of the first. Decides nothing.

    {"created_at":"...","directories":[...],"files":[...],"format":1,"links":[...],"model_id":"...","version":1}
    sha256 0123...

The same manifest is always the same bytes, all of them ASCII. Names that are not UTF-8 are written with Python's
surrogate escapes (PEP 383): a byte 0xff as `\\udcff`. Reading is strict: a field that is missing, unknown, of another
type or written in another way is ManifestDamaged, and so is a file that was torn.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from tierd.objects.keys import ObjectName, shown
from tierd.objects.manifest import Attributes, DirectoryEntry, Entry, FileEntry, LinkEntry, Manifest, ManifestDamaged

FORMAT: Final = 1
BYTES_MAX: Final = 256 << 20
"""About a million files."""
_LABEL: Final = b"sha256 "
Field = TypeVar("Field")


def encode(manifest: Manifest) -> bytes:
    """What `decode` reads. Raises ManifestDamaged for a manifest that could not be."""
    manifest.check()
    content = {
        "format": FORMAT,
        "model_id": manifest.model_id,
        "version": manifest.version,
        "created_at": _time_text(manifest.created_at),
        "directories": [_written(entry) for entry in manifest.directories],
        "files": [_written(entry) for entry in manifest.files],
        "links": [_written(entry) for entry in manifest.links],
    }
    line = json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"
    if len(line) > BYTES_MAX:
        raise ManifestDamaged("length", f"is {len(line)} bytes, {BYTES_MAX} are allowed")
    return line + _LABEL + hashlib.sha256(line).hexdigest().encode() + b"\n"


def _written(entry: Entry) -> dict[str, Any]:
    attributes = entry.attributes
    content: dict[str, Any] = {
        "path": _text(entry.path),
        "mode": attributes.mode,
        "uid": attributes.uid,
        "gid": attributes.gid,
        "atime_ns": attributes.atime_ns,
        "mtime_ns": attributes.mtime_ns,
        "xattrs": [[_text(name), base64.b64encode(value).decode()] for name, value in attributes.xattrs],
    }
    if isinstance(entry, FileEntry):
        content |= {"size": entry.size, "sha256": entry.sha256, "group": entry.group, "stub": entry.stub}
        if entry.elsewhere is not None:
            content["elsewhere"] = entry.elsewhere._asdict() | {"path": _text(entry.elsewhere.path)}
    elif isinstance(entry, LinkEntry):
        content["target"] = _text(entry.target)
    return content


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _time_text(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")


def decode(content: bytes) -> Manifest:
    """What `encode` wrote. Raises ManifestDamaged."""
    fields = _Fields("", _checked_json(content))
    found = fields.integer("format")
    if found != FORMAT:
        raise ManifestDamaged("format", f"is {found}, this release knows {FORMAT}")
    manifest = Manifest(
        fields.text("model_id"),
        fields.integer("version"),
        fields.time("created_at"),
        tuple(fields.each("directories", _directory)),
        tuple(fields.each("files", _file)),
        tuple(fields.each("links", _link)),
    )
    fields.end()
    manifest.check()
    return manifest


def _checked_json(content: bytes) -> Any:
    if len(content) > BYTES_MAX:
        raise ManifestDamaged("length", f"is {len(content)} bytes, {BYTES_MAX} are allowed")
    line, _, rest = content.partition(b"\n")
    if rest != _LABEL + hashlib.sha256(line + b"\n").hexdigest().encode() + b"\n":
        raise ManifestDamaged("sha256", "does not match: it is torn, or was changed by hand")
    try:
        return json.loads(line.decode("ascii"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        raise ManifestDamaged("text", "is not JSON") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _directory(fields: _Fields) -> DirectoryEntry:
    return DirectoryEntry(fields.name("path"), _attributes(fields))


def _file(fields: _Fields) -> FileEntry:
    return FileEntry(
        fields.name("path"),
        _attributes(fields),
        fields.integer("size"),
        fields.text("sha256"),
        fields.integer_or_none("group"),
        fields.integer_or_none("stub"),
        _elsewhere(fields.object_or_none("elsewhere")),
    )


def _elsewhere(fields: _Fields | None) -> ObjectName | None:
    if fields is None:
        return None
    found = ObjectName(fields.text("model_id"), fields.integer("version"), fields.name("path"))
    fields.end()
    return found


def _link(fields: _Fields) -> LinkEntry:
    return LinkEntry(fields.name("path"), _attributes(fields), fields.name("target"))


def _attributes(fields: _Fields) -> Attributes:
    return Attributes(
        fields.integer("mode"),
        fields.integer("uid"),
        fields.integer("gid"),
        fields.integer("atime_ns"),
        fields.integer("mtime_ns"),
        fields.xattrs("xattrs"),
    )


class _Fields:
    """The fields of one JSON object: each is taken once, by its type, and `end` finds those that nobody took."""

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise ManifestDamaged(where or "text", "is no JSON object")
        self._where = where
        self._rest: dict[str, Any] = dict(content)

    def _named(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _take(self, key: str, kind: type[Field]) -> Field:
        if key not in self._rest:
            raise ManifestDamaged(self._named(key), "is missing")
        value = self._rest.pop(key)
        if type(value) is not kind or not isinstance(value, kind):  # True is an int to isinstance
            raise ManifestDamaged(self._named(key), f"is {type(value).__name__}, not {kind.__name__}")
        return value

    def integer(self, key: str) -> int:
        return self._take(key, int)

    def integer_or_none(self, key: str) -> int | None:
        if key in self._rest and self._rest[key] is None:
            del self._rest[key]
            return None
        return self._take(key, int)

    def object_or_none(self, key: str) -> _Fields | None:
        """An object that need not be there."""
        return _Fields(self._named(key), self._rest.pop(key)) if key in self._rest else None

    def text(self, key: str) -> str:
        return self._take(key, str)

    def name(self, key: str) -> bytes:
        """A name as bytes."""
        return self._bytes(key, self._take(key, str))

    def _bytes(self, key: str, text: str) -> bytes:
        try:
            name = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ManifestDamaged(self._named(key), "has characters in it that no name has") from None
        if _text(name) != text:
            raise ManifestDamaged(self._named(key), "is written in another way than tierd does")
        return name

    def time(self, key: str) -> datetime:
        text = self._take(key, str)
        try:
            at = datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            raise ManifestDamaged(self._named(key), "is no time") from None
        if _time_text(at) != text:
            raise ManifestDamaged(self._named(key), "is written in another way than tierd does")
        return at

    def xattrs(self, key: str) -> tuple[tuple[bytes, bytes], ...]:
        found = []
        for pair in self._take(key, list):
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
                raise ManifestDamaged(self._named(key), "is no list of names and values")
            found.append((self._bytes(key, pair[0]), self._value(key, pair[1])))
        return tuple(found)

    def _value(self, key: str, text: str) -> bytes:
        try:
            value = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ManifestDamaged(self._named(key), "has a value that is not base64") from None
        if base64.b64encode(value).decode() != text:
            raise ManifestDamaged(self._named(key), "is written in another way than tierd does")
        return value

    def each(self, key: str, read: Callable[[_Fields], Field]) -> list[Field]:
        """The objects of a list, each read whole."""
        found = []
        for number, content in enumerate(self._take(key, list)):
            fields = _Fields(f"{self._named(key)}[{number}]", content)
            found.append(read(fields))
            fields.end()
        return found

    def end(self) -> None:
        """Raises ManifestDamaged if a field is left that this release does not know."""
        if self._rest:
            raise ManifestDamaged(self._named(shown(min(self._rest))), "is unknown")
