"""What daemons tell over HTTP: /metrics, /healthz, /readyz. Shared by node (trio) and controller (asyncio).

Nothing that changes anything is reachable here.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from tierd.config import host_port
from tierd.errors import UsageError

if TYPE_CHECKING:
    from hypercorn.config import Config
    from prometheus_client import CollectorRegistry
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_GRACE_SECONDS = 1.0
_BACKLOG = 128


def metrics_app(
    registry: CollectorRegistry, why_not_ready: Callable[[], Awaitable[str]], in_thread: Callable[..., Awaitable[Any]]
) -> Starlette:
    """The app behind `metrics`: /metrics, /healthz (the process answers), /readyz (200, or 503 with a reason).

    `in_thread(function, argument)` runs a function in a worker thread of the caller's kind.
    """
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    async def tell_metrics(_: Request) -> Response:
        return Response(await in_thread(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)

    async def healthy(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(_: Request) -> Response:
        reason = await why_not_ready()
        return PlainTextResponse(f"{reason or 'ok'}\n", 503 if reason else 200)

    return Starlette(routes=[Route("/metrics", tell_metrics), Route("/healthz", healthy), Route("/readyz", ready)])


def config_of(listener: socket.socket) -> Config:
    """How hypercorn serves a socket that is already listening, which is its own from now on."""
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.accesslog = None
    config.errorlog = None
    config.graceful_timeout = _GRACE_SECONDS
    return config


def listen(address: str, setting: str) -> socket.socket:
    """A listening TCP socket, so that a taken port is found before anything is begun. Raises UsageError."""
    host, port = host_port(address)
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, proto)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(where)
            server.listen(_BACKLOG)
        except OSError:
            server.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise UsageError(
            f"cannot serve metrics on {address}: {reason}", hint=f"choose another with {setting}"
        ) from None
    return server
