"""What a running daemon tells and takes orders for, over a unix socket; health and metrics over TCP.

The admin socket is 0600 in a 0700 directory: who can open it is the daemon's own user. Nothing that
changes anything is reachable over TCP.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

import trio

from tierd import web
from tierd.errors import TierdError, UsageError
from tierd.metrics import Metrics

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PROBE_SECONDS = 5.0
_OPENS_MAX = 10_000
_BODY_BYTES_MAX = 1 << 20
_BAD_REQUEST = 400

Json = dict[str, Any] | list[Any]
Answer = Callable[["Request"], Awaitable[Json]]


def admin_app(routes: Mapping[tuple[str, str], Answer]) -> Starlette:
    """The app behind the unix socket: what answers each (method, path). A TierdError becomes 400 with its hint."""
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    def route(method: str, path: str, answer: Answer) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                body, code = json.dumps(await answer(request)), 200
            except TierdError as error:
                body, code = json.dumps({"error": str(error), "hint": error.hint}), _BAD_REQUEST
            return Response(body, code, media_type="application/json")

        return Route(path, endpoint, methods=[method])

    return Starlette(routes=[route(method, path, answer) for (method, path), answer in routes.items()])


async def arguments(request: Request) -> dict[str, Any]:
    """The JSON object that a POST carries. Raises UsageError."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _BODY_BYTES_MAX:
            raise UsageError("the request is too long", hint="name fewer models at once")
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError("the request is not a JSON object", hint="see docs/OPERATIONS.md")
    return found


def queries(request: Request, key: str) -> list[str]:
    """All values of a query parameter."""
    return parse_qs(request.url.query, errors="surrogateescape").get(key, [])


def query(request: Request, key: str) -> str:
    """A query parameter, or the empty string; bytes that are not UTF-8 become surrogate escapes, as in our JSON."""
    return next(iter(queries(request, key)), "")


def opens_limit(request: Request) -> int:
    """How many rows a client asked for, within bounds."""
    text = query(request, "limit")
    return max(1, min(_OPENS_MAX, int(text))) if text.isascii() and text.isdigit() else 100


def metrics_app(metrics: Metrics, mountpoint: Path) -> Starlette:
    """The app behind `--metrics`; ready is a mount that answers."""

    async def why_not_ready() -> str:
        return "" if await mount_answers(mountpoint) else "mount does not answer"

    return web.metrics_app(metrics.registry, why_not_ready, trio.to_thread.run_sync)


_probe_limit = trio.CapacityLimiter(2)


async def mount_answers(mountpoint: Path, seconds: float = PROBE_SECONDS) -> bool:
    """True if something is mounted there and answers a statfs in time (statfs(2) is never served from a cache)."""
    with trio.move_on_after(seconds):
        return await trio.to_thread.run_sync(_probe, mountpoint, abandon_on_cancel=True, limiter=_probe_limit)
    return False


def _probe(mountpoint: Path) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError:
        return False
    return mountpoint.is_mount()


def unix_listener(path: Path) -> socket.socket:
    """A listening unix socket that only our user can connect to."""
    return bind_private(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path)


def bind_private(server: socket.socket, path: Path) -> socket.socket:
    """Let a socket listen at a path that only our user can connect to."""
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.bind(os.fsencode(path))
    finally:
        os.umask(before)
    server.listen(16)
    return server


async def serve(app: Starlette, listener: socket.socket, until: Callable[[], Awaitable[None]]) -> None:
    """Serve `app` on a socket that is already listening, until `until` returns."""
    from hypercorn.trio import serve as hypercorn_serve

    await hypercorn_serve(cast(Any, app), web.config_of(listener), shutdown_trigger=until, mode="asgi")
