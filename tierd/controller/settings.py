"""Settings of the controller, and of the commands that work on its database. Connects to nothing.

In the environment they are called `TIERDCTL_NAME`, apart from the `TIERD_NAME` of a mount: an environment may hold
both, each side takes all that begins with its prefix, and so each refuses what it does not know. `TIERD_CONTROLLER_…`
would not do: a mount would have to overlook all of it, and Kubernetes puts `TIERD_CONTROLLER_PORT` and the like into
every pod beside a service `tierd-controller`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, SecretStr, field_validator

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
    relative_root,
)
from tierd.errors import UsageError
from tierd.objects.keys import check_bucket
from tierd.outputs import ROOT_CHARS_MAX
from tierd.postgres_settings import PostgresAddress, PostgresSettings, PostgresUrl
from tierd.redis_options import split_url

__all__ = ["CONTROLLER", "ControllerSettings", "PostgresAddress", "PostgresUrl", "load"]

CONTROLLER = Naming(
    env_prefix="TIERDCTL_",
    config_variable="TIERDCTL_CONFIG",
    help="docs/OPERATIONS.md",
    usage="name it in TIERDCTL_… or --config; see docs/OPERATIONS.md",
)
_DAY_MINUTES = 24 * 60
_DAY_SECONDS = 86_400.0
_TIME_OF_DAY = re.compile(r"(?P<hour>[01]?[0-9]|2[0-3]):(?P<minute>[0-5][0-9])", re.ASCII)


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


class ControllerSettings(PostgresSettings):
    """Everything the controller needs to know. Times are seconds."""

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
    outputs_root: str = "outputs"
    outputs_scan_at: TimeOfDay = time(3)
    outputs_cleanup_at: TimeOfDay = time(4)
    outputs_hot_days: Ratio = Field(7.0, gt=0, le=36_500)
    outputs_hot_budget: Bytes = Field(100 * 10**9, ge=0)
    outputs_cleanup_max: Whole = Field(100_000, ge=1)
    outputs_grace: Seconds = Field(_DAY_SECONDS, ge=0)
    outputs_drop_max: Ratio = Field(0.5, ge=0, le=1)
    outputs_compress_at: TimeOfDay = time(5)
    outputs_compress_after_days: Ratio = Field(0.0, ge=0, le=36_500)
    outputs_compress_max: Whole = Field(1000, ge=1)
    outputs_delete_wait: Seconds = Field(3600.0, ge=0)
    outputs_tombstone_days: Ratio = Field(30.0, gt=0, le=36_500)
    outputs_promote_accesses: Whole = Field(5, ge=0)
    outputs_promote_window: Seconds = Field(7 * _DAY_SECONDS, gt=0)
    archive_at: TimeOfDay = time(3)
    contexts_warm_days: Ratio = Field(30.0, gt=0, le=36_500)
    contexts_archive_workers: Whole = Field(2, ge=1, le=16)
    contexts_tablespace: str = ""
    purge_contexts_at: TimeOfDay = time(4)
    contexts_archive_days: Ratio = Field(365.0, gt=0, le=36_500)
    contexts_export: bool = True
    contexts_bucket: str = "context-archive"
    contexts_grace: Seconds = Field(7 * _DAY_SECONDS, ge=0)
    contexts_purge_months_max: Whole = Field(1, ge=1)
    contexts_purge_share_max: Ratio = Field(0.5, gt=0, le=1)
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

    @field_validator("outputs_root")
    @classmethod
    def _outputs_stay_inside(cls, root: str) -> str:
        found = relative_root(root)
        if not found or len(found) > ROOT_CHARS_MAX:
            raise ValueError(f"must name a directory below the source, in at most {ROOT_CHARS_MAX} characters")
        found.encode()  # UnicodeEncodeError is a ValueError
        return found

    @field_validator("contexts_bucket")
    @classmethod
    def _is_bucket(cls, value: str) -> str:
        try:
            return check_bucket(value)
        except UsageError as error:
            raise ValueError(f"{error}: {error.hint}") from None

    @field_validator("metrics")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host_port(value)
        return value

    @field_validator("redis")
    @classmethod
    def _redis_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and split_url(value.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must be redis://HOST:PORT/NUMBER, rediss://… for TLS, or unix://…")
        return value

    @property
    def zone(self) -> ZoneInfo:
        """Where the schedule's times are of."""
        return ZoneInfo(self.time_zone)

    @property
    def models_roots_bytes(self) -> tuple[bytes, ...]:
        """The models roots as paths are compared."""
        return tuple(root.encode("utf-8", "surrogateescape") for root in self.models_root)

    @property
    def outputs_root_bytes(self) -> bytes:
        """The outputs root as paths are compared."""
        return self.outputs_root.encode()


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str] = {}, config_file: Path | None = None
) -> ControllerSettings:
    """The controller's settings from the three layers. Raises UsageError; see `tierd.config.load_as`."""
    return load_as(ControllerSettings, CONTROLLER, flags, environ, config_file)
