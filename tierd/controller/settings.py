"""Settings of the controller, and of the commands that work on its database. Connects to nothing.

In the environment they are called `TIERDCTL_NAME`, apart from the `TIERD_NAME` of a mount: an environment may hold
both, each side takes all that begins with its prefix, and so each refuses what it does not know. `TIERD_CONTROLLER_…`
would not do: a mount would have to overlook all of it, and Kubernetes puts `TIERD_CONTROLLER_PORT` and the like into
every pod beside a service `tierd-controller`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr, field_validator

from tierd.config import Naming, PathSetting, load_as
from tierd.postgres_settings import PostgresAddress, PostgresSettings, PostgresUrl
from tierd.redis_options import split_url

__all__ = ["CONTROLLER", "ControllerSettings", "PostgresAddress", "PostgresUrl", "load"]

CONTROLLER = Naming(
    env_prefix="TIERDCTL_",
    config_variable="TIERDCTL_CONFIG",
    help="docs/OPERATIONS.md",
    usage="name it in TIERDCTL_… or --config; see docs/OPERATIONS.md",
)


class ControllerSettings(PostgresSettings):
    """Everything the controller needs to know. Times are seconds."""

    redis: SecretStr | None = None
    redis_password_file: PathSetting | None = None
    redis_ca: PathSetting | None = None

    @field_validator("redis")
    @classmethod
    def _redis_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and split_url(value.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must be redis://HOST:PORT/NUMBER, rediss://… for TLS, or unix://…")
        return value


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str] = {}, config_file: Path | None = None
) -> ControllerSettings:
    """The controller's settings from the three layers. Raises UsageError; see `tierd.config.load_as`."""
    return load_as(ControllerSettings, CONTROLLER, flags, environ, config_file)
