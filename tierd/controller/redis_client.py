"""Makes the controller's client of Redis from its settings. Connects to nothing by itself."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tierd.config import read_secret
from tierd.controller.settings import ControllerSettings
from tierd.errors import UsageError
from tierd.redis_options import redis_options


def redis_of(settings: ControllerSettings) -> Redis:
    """A client that connects anew at most once for each command: who uses it comes round again anyway.

    Raises UsageError if no Redis is named, or its password cannot be read.
    """
    if settings.redis is None:
        raise UsageError("no Redis is named", hint="set redis to its URL, see docs/OPERATIONS.md")
    file = settings.redis_password_file
    password = read_secret(file).get_secret_value() if file is not None else None
    try:
        options = redis_options(settings.redis.get_secret_value(), password, settings.redis_ca)
    except ValueError as error:
        raise UsageError(f"redis: {error}", hint="see docs/OPERATIONS.md") from None
    return Redis(**options, retry=Retry(NoBackoff(), 1))
