"""Stubs: what is left of a cold file in its directory, and the bytes that it stands for (docs/decisions, 10).

Names and the format only; shared by node and controller. A stub `DIRECTORY/.tierd/cold/NAME` is an empty file; the
files `DIRECTORY/.tierd/origins/*.json` say, by the stub's inode number, where its bytes come from. Such a file is
written once, and a later one (by name) overrules an earlier one. Object keys are not in it: they are derived.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

RESERVED: Final = b".tierd"
"""In every directory of a source; neither to be seen nor to be reached through an overlay."""
STUBS: Final = b"cold"
ORIGINS: Final = b"origins"
COLD_MARK: Final = 0o1000
"""In the mode of a stub: its bytes are elsewhere. The sticky bit, which Linux has no use for on files: so the mark is
the inode's, and one call takes it from all its names. Pods neither see nor set it on a cold file."""
ORIGINS_BYTES_MAX: Final = 64 << 20
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NUMBER_MAX = (1 << 63) - 1


class Origin(NamedTuple):
    """The bytes of a cold file: `path` within its model, as it was demoted as `version`; their number and SHA-256."""

    model_id: str
    version: int
    path: bytes
    size: int
    sha256: str


class OriginsDamaged(ValueError):
    """A file of origins is torn, or not one; `str()` says what is wrong."""


def encode(origins: Mapping[int, Origin]) -> bytes:
    """A file of origins, by the inode numbers of their stubs."""
    entries = [
        {
            "inode": inode,
            "model_id": origin.model_id,
            "version": origin.version,
            "path": origin.path.decode("utf-8", "surrogateescape"),
            "size": origin.size,
            "sha256": origin.sha256,
        }
        for inode, origin in sorted(origins.items())
    ]
    return json.dumps({"format": _FORMAT, "origins": entries}, ensure_ascii=True, indent=0).encode("ascii")


def decode(data: bytes) -> dict[int, Origin]:
    """What `encode` wrote. Raises OriginsDamaged."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        raise OriginsDamaged("not JSON") from None
    if not isinstance(told, dict) or told.get("format") != _FORMAT or not isinstance(told.get("origins"), list):
        raise OriginsDamaged(f"not of format {_FORMAT}")
    return dict(_entry(entry) for entry in told["origins"])


def _entry(entry: Any) -> tuple[int, Origin]:
    if not isinstance(entry, dict):
        raise OriginsDamaged("an origin is no object")
    inode, size, version = (_number(entry, name) for name in ("inode", "size", "version"))
    model_id, path, sha256 = (_text(entry, name) for name in ("model_id", "path", "sha256"))
    if not _SHA256.fullmatch(sha256):
        raise OriginsDamaged("sha256 is not 64 hexadecimal digits")
    try:
        return inode, Origin(model_id, version, path.encode("utf-8", "surrogateescape"), size, sha256)
    except UnicodeEncodeError:
        raise OriginsDamaged("path is no file name") from None


def _number(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _NUMBER_MAX:
        raise OriginsDamaged(f"{name} is no number that it can be")
    return value


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise OriginsDamaged(f"{name} is no text that it can be")
    return value
