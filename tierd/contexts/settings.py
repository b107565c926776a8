"""Settings of the library, for applications: from `TIERDCTX_NAME`, a YAML file, or arguments. Connects to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field, SecretStr, field_validator
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tierd.config import Bytes, Naming, PathSetting, Seconds, Whole, load_as, read_secret
from tierd.errors import UsageError
from tierd.postgres_settings import PostgresSettings
from tierd.redis_options import checked_url, redis_options

CONTEXTS: Final = Naming(
    env_prefix="TIERDCTX_",
    config_variable="TIERDCTX_CONFIG",
    help="docs/CONTEXTS.md",
    usage="name it in TIERDCTX_…; see docs/CONTEXTS.md",
)


class ContextSettings(PostgresSettings):
    """Everything the library needs to know. Times are seconds, sizes are bytes."""

    postgres_statement_timeout: Seconds = Field(5.0, gt=0, le=86_400)
    redis: SecretStr | None = None
    redis_password_file: PathSetting | None = None
    redis_ca: PathSetting | None = None
    redis_connections: Whole = Field(50, ge=1, le=10_000)
    redis_timeout: Seconds = Field(0.25, gt=0, le=60)
    ttl: Whole = Field(24 * 3600, ge=1, le=30 * 86_400)
    ttl_read: Whole = Field(3600, ge=1, le=30 * 86_400)
    trust: Seconds = Field(2.0, gt=0, le=3600)
    max_bytes: Bytes = Field(8 << 20, ge=1024, le=64 << 20)
    compress_from: Bytes = Field(4 << 10, ge=0)

    @field_validator("redis")
    @classmethod
    def _redis_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            checked_url(value.get_secret_value())
        return value

    def client(self, *, deadlines: bool = True) -> Redis:
        """A client of the Redis that is named. Raises UsageError if none is, or its password cannot be read.

        Without `deadlines` for whoever has one around each call: the client's own two take a quarter of its time.
        """
        if self.redis is None:
            raise UsageError("no Redis is named", hint="set redis to its URL, such as redis://HOST:6379/1")
        password = read_secret(self.redis_password_file).get_secret_value() if self.redis_password_file else None
        options = redis_options(self.redis.get_secret_value(), password, self.redis_ca)
        options |= {"client_name": "tierd-contexts"} | ({} if deadlines else {"socket_timeout": None})
        return Redis(**options, retry=Retry(NoBackoff(), 1))


def load(flags: Mapping[str, Any], environ: Mapping[str, str] = {}, config_file: Path | None = None) -> ContextSettings:
    """The settings from the three layers. Raises UsageError; see `tierd.config.load_as`."""
    return load_as(ContextSettings, CONTEXTS, flags, environ, config_file)
