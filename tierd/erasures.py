"""What the controller tells nodes of deleted outputs: which Redis keys, and what is in them. Shared by both sides.

`tierd:erasures` holds the numbers of the erasures that nodes have yet to confirm, `tierd:erasure:NUMBER` the paths of
one, relative to the source. A node that has nothing of them says so in its reports, as long as it finds the number
there: it remembers nothing itself. Redis is no source of truth: the controller writes all of it again and again until
it has heard of every node.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

WAITING: Final = "tierd:erasures"
ERASURES_MAX: Final = 16
"""Told of at once."""
PATHS_MAX: Final = 500
"""In one erasure."""


def key_of(number: int) -> str:
    """Where the paths of an erasure are."""
    return f"tierd:erasure:{number}"


def encode(paths: Sequence[bytes]) -> bytes:
    """The paths of an erasure."""
    return json.dumps([path.decode("utf-8", "surrogateescape") for path in paths], ensure_ascii=True).encode()


def decode(data: bytes) -> frozenset[bytes] | None:
    """What `encode` wrote; None for anything else."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, list) or len(told) > PATHS_MAX or not all(isinstance(path, str) for path in told):
        return None
    try:
        return frozenset(path.encode("utf-8", "surrogateescape") for path in told)
    except UnicodeEncodeError:
        return None
