"""How to reach Redis: what clients, sync and asyncio alike, are made with. Imports no client, connects to nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

_PORT: Final = 6379
_SCHEMES: Final = ("redis", "rediss", "unix")
_DEADLINE_SECONDS: Final = 5.0
"""For connecting, and for each answer: a Redis that is reached at all answers in milliseconds."""


def checked_url(url: str) -> str:
    """`url` itself. Raises ValueError that says what is wrong with it, and repeats nothing of it."""
    parts = split_url(url)
    if parts.scheme not in _SCHEMES or parts.query or parts.fragment:
        raise ValueError("must be redis://HOST:PORT/NUMBER, rediss://… for TLS, or unix:///PATH")
    if parts.scheme == "unix" and (not parts.path.strip("/") or parts.hostname):
        raise ValueError("must be unix:///PATH")
    if parts.scheme != "unix" and not (parts.hostname and re.fullmatch(r"(/[0-9]{0,4})?", parts.path)):
        raise ValueError("must be redis://HOST:PORT/NUMBER")
    return url


def address(url: str) -> str:
    """`HOST:PORT` or the socket's path: a URL as it may be shown."""
    parts = split_url(url)
    return unquote(parts.path) if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or _PORT}"


def redis_options(url: str, password: str | None = None, ca: Path | None = None) -> dict[str, Any]:
    """Arguments for `redis.Redis` and `redis.asyncio.Redis`; `ca` holds the certificates to trust instead of the
    system's. `password` comes before one in the URL. Raises ValueError if that is none."""
    parts = split_url(checked_url(url))
    options: dict[str, Any] = {
        "socket_timeout": _DEADLINE_SECONDS,
        "socket_connect_timeout": _DEADLINE_SECONDS,
        "username": unquote(parts.username) if parts.username else None,
        "password": password or (unquote(parts.password) if parts.password else None),
        "client_name": "tierd",
        "protocol": 2,  # one shape of answers, whatever the client's release prefers
    }
    if parts.scheme == "unix":
        return options | {"unix_socket_path": unquote(parts.path)}
    options |= {"host": parts.hostname, "port": parts.port or _PORT, "db": int(parts.path.strip("/") or 0)}
    if parts.scheme == "rediss":
        options |= {"ssl": True, "ssl_check_hostname": True, "ssl_ca_certs": str(ca) if ca is not None else None}
    return options


def split_url(url: str) -> SplitResult:
    """`urlsplit` that looks at the port, too. Raises ValueError without the URL, which urllib's own errors quote."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        return parts
    except ValueError:
        raise ValueError("is no URL; are special characters in the password written as %40 and the like?") from None
