"""What lies in Redis for a conversation: a line that a script there can read, then the messages. Pure.

`1 VERSION FORM CREATED_US UPDATED_US\\n` and JSON, as it is (`j`) or deflated (`z`).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

_HEAD: Final = re.compile(rb"1 (?P<version>[0-9]{1,19}) (?P<form>[jz]) (?P<created>-?[0-9]+) (?P<updated>-?[0-9]+)\n")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LEVEL: Final = 1
"""Higher ones take twice the time for a tenth less."""


@dataclass(frozen=True)
class Stored:
    """A conversation as the database has it; `text` is its messages as JSON."""

    version: int
    created_at: datetime
    updated_at: datetime
    text: str


def pack(stored: Stored, compress_from: int) -> bytes:
    """An entry; messages of `compress_from` bytes and more are compressed, if that makes them smaller. 0: none are."""
    content, form = stored.text.encode(), b"j"
    if compress_from and len(content) >= compress_from:
        small = zlib.compress(content, _LEVEL)
        if len(small) < len(content):
            content, form = small, b"z"
    created, updated = (_microseconds(at) for at in (stored.created_at, stored.updated_at))
    return b"1 %d %s %d %d\n%s" % (stored.version, form, created, updated, content)


def unpack(entry: bytes) -> Stored | None:
    """None for what is no entry of ours, or a torn one: a miss."""
    head = _HEAD.match(entry)
    if head is None:
        return None
    try:
        content = entry[head.end() :]
        text = (zlib.decompress(content) if head["form"] == b"z" else content).decode()
    except (zlib.error, UnicodeDecodeError):
        return None
    return Stored(int(head["version"]), _time(int(head["created"])), _time(int(head["updated"])), text)


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
