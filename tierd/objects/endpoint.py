"""Where an S3 store is, with which keys, and within which bounds it is used. Data only."""

from __future__ import annotations

from typing import NamedTuple

from tierd.objects.retries import Schedule


class Keys(NamedTuple):
    """What requests are signed with; shows nothing of it."""

    access_key: str
    secret_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "Keys(...)"


class Endpoint(NamedTuple):
    """Where the store is, and how to speak to it."""

    url: str
    keys: Keys
    region: str = "us-east-1"
    ca_file: str | None = None
    path_style: bool = True


class Limits(NamedTuple):
    """Bounds of one store: bytes, seconds; 0 bytes per second means no limit."""

    part_bytes: int = 16 << 20
    parallel: int = 8
    bytes_per_s: int = 0
    stall_s: float = 10.0
    schedule: Schedule = Schedule()
