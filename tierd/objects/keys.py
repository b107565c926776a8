"""Names in the object store: `MODEL/vVERSION/PATH`, each part percent-encoded. Pure: nothing is looked up here.

Keys are derived from names, never read from anywhere, so what a name becomes must be the same in every release, on
every node. Nothing of ours can clash with a name: no encoded part begins with a dot, and none but the version reads
`v` and a number, so the first such part ends the model (`a` at version 1 with the file `v2/x` is not `a/v1` at 2).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from tierd.errors import UsageError

RESERVED: Final = b".tierd"
"""Ours in every directory of the source, and at the top of each bucket."""
SUMS_PREFIX: Final = ".tierd/sums/"
"""Where the checksums of an object lie, by its key."""
KEY_BYTES_MAX: Final = 1024 - len(SUMS_PREFIX)
"""S3 takes 1024 bytes of UTF-8 (Amazon S3 User Guide, "Naming Amazon S3 objects"), for the checksums' key too."""
MODEL_ID_CHARS_MAX: Final = 255
"""The catalogue's column is a varchar(255)."""
NAME_BYTES_MAX: Final = 255
"""NAME_MAX of Linux (limits.h)."""
VERSION_MAX: Final = (1 << 31) - 1
"""PostgreSQL's integer."""
IMPORTED: Final = 0
"""Stands for the version of objects that tierd did not write: their keys are `MODEL/PATH`, as plain as it gets."""
_SHOWN_CHARS: Final = 80

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.~\-\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3]")
"""Stands for itself: RFC 3986's unreserved characters, and kana, CJK ideographs and Hangul syllables.

Percent-encoding makes nine bytes of a Korean letter, so that names of 29 letters would pass the 255 bytes that file
systems, and object servers on top of them, allow for a part. These ranges are fixed, and no normalisation (NFC, NFD to
NFC) joins two of their characters, so no two names become one object.
"""
_VERSION: Final = re.compile(r"v[1-9][0-9]{0,9}")
_LOOKS_LIKE_VERSION: Final = re.compile(r"v[0-9]+")
_BUCKET: Final = re.compile(r"[a-z0-9](?:[a-z0-9\-]|\.(?![.\-])){1,61}[a-z0-9]")
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Control characters, line ends, and what turns the direction of writing: an ID is shown on one line, as it is."""


class ObjectName(NamedTuple):
    """What a key of ours stands for."""

    model_id: str
    version: int
    path: bytes


def validate_model_id(model_id: str) -> str:
    """`model_id`, if it can be one: a relative path in UTF-8 that stays below the root. Raises UsageError."""
    reason = _fault_of_model_id(model_id)
    if reason:
        raise UsageError(f"model {shown(model_id)}: {reason}", hint="for example meta-llama/Llama-3-8B")
    return model_id


def _fault_of_model_id(model_id: str) -> str:
    if len(model_id) > MODEL_ID_CHARS_MAX:
        return f"has {len(model_id)} characters, {MODEL_ID_CHARS_MAX} are allowed"
    if _UNPRINTABLE.search(model_id):
        return "has control characters in it"
    try:
        path = model_id.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return _fault_of_path(path)


def path_parts(path: bytes) -> list[bytes]:
    """The names that a relative path is made of. Raises UsageError if it could lead elsewhere, or is nobody's file."""
    reason = _fault_of_path(path)
    if reason:
        raise UsageError(f"path {shown(path)}: {reason}", hint="a path is relative to its model")
    return path.split(b"/")


def _fault_of_path(path: bytes) -> str:
    if not path:
        return "is empty"
    if path.startswith(b"/"):
        return "is absolute"
    if b"\0" in path:
        return "has a NUL in it"
    for part in path.split(b"/"):
        if part in (b"", b".", b".."):
            return f"has a part {shown(part)}"
        if part == RESERVED:
            return f"has a part {RESERVED.decode()}, which is tierd's own"
        if len(part) > NAME_BYTES_MAX:
            return f"has a part of {len(part)} bytes, {NAME_BYTES_MAX} are allowed"
    return ""


def object_key(model_id: str, version: int, path: bytes) -> str:
    """The key of a model's file. Raises UsageError for what is no name, and for one that is too long.

    That of version 0 (IMPORTED) is no key of ours. No such key is one of another version, because no part of it looks
    like a version.
    """
    if version == IMPORTED:
        return _plain_key(validate_model_id(model_id), path)
    return _checked_length("/".join([*_top(model_id, version), *map(_encoded, path_parts(path))]))


def _plain_key(model_id: str, path: bytes) -> str:
    path_parts(path)
    try:
        key = check_key(f"{model_id}/{path.decode()}")
    except UnicodeDecodeError:
        raise UsageError(f"path {shown(path)}: is not UTF-8", hint="copy the object to a plain name") from None
    if any(_LOOKS_LIKE_VERSION.fullmatch(part) for part in key.split("/")):
        raise UsageError(
            f"key {shown(key)} has a part that looks like a version", hint="copy the object to another name"
        )
    return key


def is_ours(key: str) -> bool:
    """True if tierd wrote the object of this key: a file of a model, or a manifest."""
    *above, name = key.split("/")
    try:
        parse_key("/".join([*above, "x"]) if name == ".manifest" and above and _VERSION.fullmatch(above[-1]) else key)
    except UsageError:
        return False
    return True


def manifest_key(model_id: str, version: int) -> str:
    """Where the manifest of a model lies, beside its objects; no file can have this key."""
    return _checked_length("/".join([*_top(model_id, version), ".manifest"]))


def _top(model_id: str, version: int) -> list[str]:
    if not 1 <= version <= VERSION_MAX:
        raise UsageError(f"model {shown(model_id)}: version {version} is not between 1 and {VERSION_MAX}")
    return [*map(_encoded, validate_model_id(model_id).encode().split(b"/")), f"v{version}"]


def _encoded(part: bytes) -> str:
    text = part.decode("utf-8", "surrogateescape")
    encoded = "".join(char if _PLAIN.match(char) else _percent(char) for char in text)
    if encoded.startswith(".") or _LOOKS_LIKE_VERSION.fullmatch(encoded):
        return _percent(encoded[0]) + encoded[1:]
    return encoded


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def _checked_length(key: str) -> str:
    length = len(key.encode())
    if length > KEY_BYTES_MAX:
        raise UsageError(
            f"key {shown(key)} has {length} bytes, the object store takes {KEY_BYTES_MAX}",
            hint="shorten the model's name or the path of the file in it",
        )
    return key


def parse_key(key: str) -> ObjectName:
    """What `object_key` made the key of. Raises UsageError if it did not."""
    parts = key.split("/")
    at = next((i for i, part in enumerate(parts) if _VERSION.fullmatch(part)), 0)
    try:
        model_id = "/".join(unquote_to_bytes(part).decode() for part in parts[:at])
        path = b"/".join(unquote_to_bytes(part) for part in parts[at + 1 :])
        name = ObjectName(model_id, int(parts[at][1:]), path)
        # One name has one key: what was written in another way is not ours.
        if object_key(*name) == key:
            return name
    except (UsageError, ValueError):
        reason = "it names no file of a model"
    else:
        reason = "it is written in another way than tierd does"
    raise UsageError(f"key {shown(key)} is not one of tierd's: {reason}", hint="MODEL/vVERSION/PATH")


def check_key(key: str) -> str:
    """`key`, if any object may have it, also one that tierd did not write. Raises UsageError."""
    reason = _fault_of_key(key)
    if reason:
        raise UsageError(f"key {shown(key)} {reason}", hint="copy the object to a plain name")
    return key


def _fault_of_key(key: str) -> str:
    if _UNPRINTABLE.search(key):
        return "has control characters in it"
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    if len(encoded) > KEY_BYTES_MAX:
        return f"has {len(encoded)} bytes, {KEY_BYTES_MAX} are allowed"
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty part, or one of dots only"
    if parts[0] == RESERVED.decode():
        return "is reserved for tierd's own objects"
    return ""


def check_bucket(bucket: str) -> str:
    """`bucket`, if S3 allows the name ("General purpose bucket naming rules"). Raises UsageError."""
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{shown(bucket)} cannot be a bucket", hint="3 to 63 of a-z, 0-9, - and ., such as cold-models"
        )
    return bucket


def shown(name: str | bytes) -> str:
    """A name from outside for a message of one line: what cannot be printed is escaped, what is long is cut."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…")
