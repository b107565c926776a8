"""Settings of the controller, and of the commands that work on its database. Connects to nothing.

In the environment they are called `TIERDCTL_NAME`, apart from the `TIERD_NAME` of a mount: an environment may hold
both, each side takes all that begins with its prefix, and so each refuses what it does not know. `TIERD_CONTROLLER_…`
would not do: a mount would have to overlook all of it, and Kubernetes puts `TIERD_CONTROLLER_PORT` and the like into
every pod beside a service `tierd-controller`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from tierd.config import (
    Bytes,
    ModelsRoots,
    Naming,
    Objects,
    PathSetting,
    Ratio,
    Seconds,
    Whole,
    host_port,
    load_as,
    read_secret,
    relative_root,
)
from tierd.errors import UsageError

CONTROLLER = Naming(
    env_prefix="TIERDCTL_",
    config_variable="TIERDCTL_CONFIG",
    help="docs/OPERATIONS.md",
    usage="name it in TIERDCTL_… or --config; see docs/OPERATIONS.md",
)
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
"""As libpq has them (PostgreSQL documentation, 34.19)."""
_VERIFYING = ("verify-ca", "verify-full")
_POSTGRES_PORT = 5432
_DAY_MINUTES = 24 * 60
_DAY_SECONDS = 86_400.0
_TIME_OF_DAY = re.compile(r"(?P<hour>[01]?[0-9]|2[0-3]):(?P<minute>[0-5][0-9])", re.ASCII)


class PostgresUrl(NamedTuple):
    """What a URL says of a database; None where it says nothing."""

    host: str | None = None
    port: int | None = None
    database: str | None = None
    user: str | None = None
    password: SecretStr | None = None
    sslmode: SslMode | None = None
    ca: Path | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """`postgresql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…&sslrootcert=FILE`; a `host=` may name a socket.

        Raises ValueError, which never repeats any of it: a `/` in a password moves it to where a port or database is
        expected.
        """
        parts, port = _split(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = query.keys() - {"host", "sslmode", "sslrootcert"}
        mode = query.get("sslmode")
        name = parts.path.removeprefix("/")
        if parts.scheme not in ("postgresql", "postgres") or parts.fragment or {"/", "@"} & set(name):
            raise ValueError("must be postgresql://USER@HOST:PORT/DATABASE; %2F stands for a '/', %23 for a '#'")
        if unknown or (mode is not None and mode not in get_args(SslMode)):
            raise ValueError("may ask for host, sslmode and sslrootcert only, and for a mode that libpq knows")
        return cls(
            host=query.get("host") or parts.hostname,
            port=port,
            database=unquote(name) or None,
            user=unquote(parts.username) if parts.username else None,
            password=SecretStr(unquote(parts.password)) if parts.password else None,
            sslmode=mode,  # type: ignore[arg-type] # one of them, as was just checked
            ca=Path(query["sslrootcert"]) if query.get("sslrootcert") else None,
        )


def _split(url: str) -> tuple[SplitResult, int | None]:
    """urllib's own errors quote what they stumbled over."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        raise ValueError("is no URL; are special characters in the password written as %40 and the like?") from None


@dataclass(frozen=True)
class PostgresAddress:
    """Where the database is and how to get in. `str()` names it for errors, without user and password."""

    host: str
    port: int
    database: str
    user: str
    password: SecretStr | None
    sslmode: SslMode
    ca: Path | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.database}"


def _time_of_day(value: Any) -> Any:
    """`02:00`, or None for `never`. YAML takes an unquoted 12:30 for a number in base 60, and `off` for False."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _DAY_MINUTES:
        return time(value // 60, value % 60)
    if value is None or isinstance(value, time):
        return value
    if value is False or value in ("never", "off"):
        return None
    match = _TIME_OF_DAY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a time of day such as 02:00, or never")
    return time(int(match["hour"]), int(match["minute"]))


def _zone_name(value: Any) -> Any:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, TypeError, OSError):  # of a name that is a directory, too
        raise ValueError("must be a time zone such as Asia/Seoul or UTC") from None
    return value


TimeOfDay = Annotated[time | None, BeforeValidator(_time_of_day)]


class ControllerSettings(BaseModel):
    """Everything the controller needs to know. Times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    postgres: SecretStr | None = None
    postgres_host: str | None = None
    postgres_port: Whole = Field(_POSTGRES_PORT, ge=1, le=65_535)
    postgres_database: str = "ai_platform"
    postgres_user: str = "platform"
    postgres_password: SecretStr | None = None
    postgres_password_file: PathSetting | None = None
    postgres_sslmode: SslMode | None = None
    postgres_ca: PathSetting | None = None
    postgres_connections: Whole = Field(10, ge=1, le=1000)
    postgres_connect_timeout: Seconds = Field(10.0, gt=0, le=3600)
    postgres_statement_timeout: Seconds = Field(30.0, gt=0, le=86_400)
    redis: SecretStr | None = None
    redis_password_file: PathSetting | None = None
    redis_ca: PathSetting | None = None
    source: PathSetting | None = None
    models_root: ModelsRoots = ("models", "hot-models")
    objects: Objects = None
    state_dir: PathSetting = Path("/var/lib/tierd-controller")
    metrics: str = "127.0.0.1:9569"
    time_zone: Annotated[str, BeforeValidator(_zone_name)] = "UTC"
    cleanup_at: TimeOfDay = time(2)
    unused_days: Ratio = Field(30.0, gt=0, le=36_500)
    models_hot_budget: Bytes = Field(0, ge=0)
    budget_spares_days: Ratio = Field(1.0, ge=0, le=36_500)
    cleanup_models_max: Whole = Field(20, ge=1)
    cleanup_bytes_max: Bytes = Field(2 << 40, ge=0)
    cleanup_share_max: Ratio = Field(0.25, gt=0, le=1)
    cleanup_errors_max: Ratio = Field(0.2, ge=0, le=1)
    catalogue_drop_max: Ratio = Field(0.5, ge=0, le=1)
    nodes_report: bool = True
    lease_report_max_age: Seconds = Field(300.0, gt=0, le=86_400)
    grace: Seconds = Field(7 * _DAY_SECONDS, ge=0)
    move_settle: Seconds = Field(3.0, ge=0, le=600)
    move_files_at_once: Whole = Field(4, ge=1, le=64)
    move_events_kept: Whole = Field(100_000, ge=0)
    shutdown_timeout: Seconds = Field(25.0, gt=0, le=3600)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"

    @field_validator("models_root")
    @classmethod
    def _roots_stay_inside(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        if not roots:
            raise ValueError("must name a directory")
        return tuple(relative_root(root) for root in roots)

    @field_validator("metrics")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host_port(value)
        return value

    @field_validator("postgres")
    @classmethod
    def _postgres_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            PostgresUrl.parse(value.get_secret_value())
        return value

    @field_validator("redis")
    @classmethod
    def _redis_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and _split(value.get_secret_value())[0].scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must be redis://HOST:PORT/NUMBER, rediss://… for TLS, or unix://…")
        return value

    @field_validator("postgres_password_file")
    @classmethod
    def _one_password(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("postgres_password") is not None:
            raise ValueError("and postgres_password are both set; take one")
        return value

    @property
    def zone(self) -> ZoneInfo:
        """Where the schedule's times are of."""
        return ZoneInfo(self.time_zone)

    @property
    def models_roots_bytes(self) -> tuple[bytes, ...]:
        """The models roots as paths are compared."""
        return tuple(root.encode("utf-8", "surrogateescape") for root in self.models_root)

    def database(self) -> PostgresAddress:
        """Where the database is: what the URL says, and the other settings for what it leaves out.

        Reads the file with the password. Raises UsageError if no host is known, that file has none, or a CA would not
        be used.
        """
        url = PostgresUrl.parse(self.postgres.get_secret_value()) if self.postgres else PostgresUrl()
        host = url.host or self.postgres_host
        if not host:
            raise UsageError("no database is named", hint="set postgres to its URL, or postgres_host")
        ca = url.ca or self.postgres_ca
        mode = url.sslmode or self.postgres_sslmode or ("verify-full" if ca else "prefer")
        if ca and mode not in _VERIFYING:
            raise UsageError(f"{ca} would not be used with sslmode {mode}", hint="take verify-full, or no CA")
        password = url.password or self.postgres_password
        if password is None and self.postgres_password_file:
            password = read_secret(self.postgres_password_file)
        return PostgresAddress(
            host=host,
            port=url.port or self.postgres_port,
            database=url.database or self.postgres_database,
            user=url.user or self.postgres_user,
            password=password,
            sslmode=mode,
            ca=ca,
        )


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str] = {}, config_file: Path | None = None
) -> ControllerSettings:
    """The controller's settings from the three layers. Raises UsageError; see `tierd.config.load_as`."""
    return load_as(ControllerSettings, CONTROLLER, flags, environ, config_file)
