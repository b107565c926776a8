"""Names of conversations: what an ID may be, and what it is called in Redis and among tombstones. Pure."""

from __future__ import annotations

import hashlib
import zlib
from typing import Final
from urllib.parse import quote

from tierd.contexts.errors import InvalidContext

ID_BYTES_MAX: Final = 255
"""As UTF-8; the columns are varchar(255)."""
FENCES: Final = 1024
TRUST: Final = "context-trust"
"""No key of a conversation: these begin with `context:`."""
_SHOWN_CHARS: Final = 40


def check_id(what: str, value: str) -> str:
    """`value`, if it can be an ID. Raises InvalidContext."""
    if not isinstance(value, str):
        raise InvalidContext(f"{what} is {type(value).__name__}, not text", hint="pass a str")
    fault = _fault(value)
    if fault:
        shown = repr(value[:_SHOWN_CHARS] + ("…" if len(value) > _SHOWN_CHARS else ""))
        raise InvalidContext(f"{what} {shown} {fault}", hint=f"1 to {ID_BYTES_MAX} bytes of UTF-8 without NUL")
    return value


def _fault(value: str) -> str:
    if not value:
        return "is empty"
    if "\0" in value:
        return "has a NUL in it"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    return f"has {size} bytes" if size > ID_BYTES_MAX else ""


def entry_key(user_id: str, conversation_id: str) -> str:
    """Where a conversation lies in Redis. Each part is percent-encoded, so `a:b`, `c` is not `a`, `b:c`."""
    return f"{user_prefix(user_id)}{_part(conversation_id)}"


def user_prefix(user_id: str) -> str:
    """What all keys of a user's conversations begin with, and nobody else's; it has no character that MATCH knows."""
    return f"context:{_part(user_id)}:"


def _part(value: str) -> str:
    return quote(value, safe="")


def fence_key(user_id: str) -> str:
    """The fence that a user shares with a thousandth of the others (`cache.py`)."""
    return f"context-fence:{zlib.crc32(user_id.encode()) % FENCES}"


def user_digest(user_id: str) -> bytes:
    """What the tombstone of a whole user is kept by."""
    return hashlib.sha256(f"user\0{user_id}".encode()).digest()


def conversation_digest(user_id: str, conversation_id: str) -> bytes:
    """What the tombstone of one conversation is kept by."""
    return hashlib.sha256(f"conversation\0{user_id}\0{conversation_id}".encode()).digest()
