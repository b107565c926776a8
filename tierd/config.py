"""Typed settings: flags over the environment over a YAML file; unknown keys are refused. Holds those of `tierd mount`.

Loading (`load`, and `load_as` for other models of settings) only merges and checks types. Whether paths exist, nest
or clash is checked against the machine by who uses them (`node/daemon.py`). What a secret is (pydantic's SecretStr) is
never repeated in an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tierd.errors import UsageError
from tierd.policy import Watermarks
from tierd.redis_options import checked_url
from tierd.units import split

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s]+)):(?P<port>[0-9]{1,5})", re.ASCII)
_PORT_MAX = 65_535
_Settings = TypeVar("_Settings", bound=BaseModel)


@dataclass(frozen=True)
class Naming:
    """What the settings of one model are called in the layers, and where people read about them."""

    env_prefix: str
    config_variable: str
    """Has the prefix, and names the YAML file: no setting itself."""
    help: str
    """What lists and explains them."""
    usage: str
    arguments: frozenset[str] = frozenset()
    """Settings that the command takes by position, not as options."""

    def flag(self, key: str) -> str:
        """How a setting is called on the command line."""
        return key.upper() if key in self.arguments else "--" + key.replace("_", "-")


MOUNT = Naming(
    env_prefix="TIERD_",
    config_variable="TIERD_CONFIG",
    help="`tierd mount --help`",
    usage="tierd mount SOURCE MOUNTPOINT",
    arguments=frozenset({"source", "mountpoint"}),
)


def _as_list(value: Any) -> Any:
    """Environment variables carry lists as comma-separated text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _no_truth_value(value: Any) -> Any:
    """YAML's `yes` is True, and True would pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _not_empty(value: Any) -> Any:
    """An empty path would mean the working directory."""
    if value == "":
        raise ValueError("must not be empty")
    return value


def _object_store(value: Any) -> Any:
    """A URL or a directory, or in a file all that can be said of an object store (`objects/settings.py`)."""
    if not isinstance(value, str):
        return value
    return {"endpoint": value} if "://" in value else {"directory": _not_empty(value)}


_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[KMGTP]i?)?B?", re.IGNORECASE)
_UNITS = {unit: 1 << (10 * power) for power, unit in enumerate(("", "ki", "mi", "gi", "ti", "pi"))} | {
    unit: 1000**power for power, unit in enumerate(("k", "m", "g", "t", "p"), start=1)
}

_SIZE_BYTES_MAX = 1 << 63
"""off_t holds no more."""


def size_bytes(value: Any) -> Any:
    """`200GiB`, `1.5TB` or a number of bytes; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, str):
        return _no_truth_value(value)
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a size such as 200GiB, 1.5TB or 0")
    found = float(match["number"]) * _UNITS[(match["unit"] or "").lower()]
    if found >= _SIZE_BYTES_MAX:
        raise ValueError("must be less than 8 EiB")
    return int(found)


Bytes = Annotated[int, BeforeValidator(size_bytes)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Ratio = Annotated[float, BeforeValidator(_no_truth_value)]
Seconds = Annotated[float, BeforeValidator(_no_truth_value)]
PathSetting = Annotated[Path, BeforeValidator(_not_empty)]
ModelsRoots = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Objects = Annotated[dict[str, Any] | None, BeforeValidator(_object_store)]


class MountSettings(BaseModel):
    """Everything one node daemon needs to know. Sizes are bytes, times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    source: PathSetting
    mountpoint: PathSetting
    state_dir: PathSetting | None = None
    models_root: ModelsRoots = ("models", "hot-models")
    outputs_root: str = "outputs"
    metrics: str = "127.0.0.1:9568"
    metrics_models: Whole = Field(50, ge=0, le=1000)
    load_idle_gap: Seconds = Field(30.0, gt=0, le=86_400)
    attr_timeout: Seconds = Field(1.0, ge=0, le=86_400)
    entry_timeout: Seconds = Field(1.0, ge=0, le=86_400)
    read_ahead_kib: Whole = Field(1024, ge=4, le=65_536)
    journal_capacity: Whole = Field(65_536, ge=16, le=10_000_000)
    history_rows: Whole = Field(100_000, ge=0, le=10_000_000)
    max_files_known: Whole = Field(1_000_000, ge=1000)
    passthrough: Literal["auto", "on", "off"] = "auto"
    cache_dir: PathSetting | None = None
    cache_size: Bytes = Field(200 << 30, ge=0)
    free_space_ratio: Ratio = Field(0.10, ge=0, lt=1)
    free_space_target: Ratio | None = Field(None, gt=0, lt=1)
    fill_bandwidth: Bytes = Field(0, ge=0)
    fill_workers: Whole = Field(4, ge=1, le=256)
    prefetch: bool = True
    heat_half_life: Seconds = Field(7 * 86_400.0, gt=0)
    read_ahead_memory: Ratio = Field(0.5, ge=0, le=1)
    source_timeout: Seconds = Field(2.0, gt=0, le=3600)
    stale_if_unreachable: bool = True
    objects: Objects = None
    recalls_per_user: Whole = Field(4, ge=0, le=1000)
    recall_bytes_per_hour: Bytes = Field(4 << 40, ge=0)
    handover: bool = True
    allow_other: bool | None = None
    redis: SecretStr | None = None
    redis_password_file: PathSetting | None = None
    redis_ca: PathSetting | None = None
    node_name: str | None = Field(None, min_length=1, max_length=255, pattern=r"^[^\s\x00-\x1f\x7f]+$")
    publish_interval: Seconds = Field(10.0, ge=1, le=3600)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_file: PathSetting | None = None

    @field_validator("models_root")
    @classmethod
    def _roots_stay_inside(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(relative_root(root) for root in roots)

    @field_validator("outputs_root")
    @classmethod
    def _root_stays_inside(cls, root: str) -> str:
        return relative_root(root)

    @field_validator("free_space_target")
    @classmethod
    def _watermarks_in_order(cls, target: float | None, info: ValidationInfo) -> float | None:
        start = info.data.get("free_space_ratio")
        if target is not None and start is not None and target <= start:
            raise ValueError(f"must be above free_space_ratio, which is {start}")
        return target

    @property
    def watermarks(self) -> Watermarks:
        """Free ratios at which eviction starts and stops; halfway to full again by default (0.10 -> 0.15)."""
        start = self.free_space_ratio
        return Watermarks(start, self.free_space_target or min(start * 1.5 or 0.01, (1 + start) / 2))

    @field_validator("metrics")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host_port(value)
        return value

    @field_validator("redis")
    @classmethod
    def _is_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            checked_url(value.get_secret_value())
        return value

    @property
    def models_roots_bytes(self) -> tuple[bytes, ...]:
        """The models roots as the overlay compares them."""
        return tuple(root.encode("utf-8", "surrogateescape") for root in self.models_root)

    @property
    def outputs_root_bytes(self) -> bytes:
        """The outputs root as the overlay compares it."""
        return self.outputs_root.encode("utf-8", "surrogateescape")


def relative_root(root: str) -> str:
    """`root` in its plain form; ValueError if it is absolute or climbs out of the source. `.` is the source itself."""
    if root.startswith("/") or "\0" in root:
        raise ValueError("must be relative to the source")
    parts = [part.decode("utf-8", "surrogateescape") for part in split(root.encode("utf-8", "surrogateescape"))]
    if ".." in parts:
        raise ValueError("must not climb out of the source with '..'")
    return "/".join(part for part in parts if part != ".")


def host_port(address: str) -> tuple[str, int]:
    """`HOST:PORT` (IPv6 in brackets) as a pair; ValueError otherwise. Port 0 means any free port."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > _PORT_MAX:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:9568 or [::1]:9568")
    return match["v6"] or match["host"], int(match["port"])


def load(flags: Mapping[str, Any], environ: Mapping[str, str] = {}, config_file: Path | None = None) -> MountSettings:
    """The settings of a mount; see `load_as`."""
    return load_as(MountSettings, MOUNT, flags, environ, config_file)


def load_as(
    model: type[_Settings],
    naming: Naming,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] = {},
    config_file: Path | None = None,
) -> _Settings:
    """Merge the three layers and check them.

    Raises UsageError that names the layer and the key at fault, and near names for a mistyped one.
    """
    origin: dict[str, str] = {}
    values: dict[str, Any] = {}
    for layer, where in (
        (_from_yaml(config_file), lambda key: f"{config_file}: {key}"),
        (_from_environ(environ, naming), lambda key: naming.env_prefix + key.upper()),
        ({key: value for key, value in flags.items() if value is not None}, naming.flag),
    ):
        for key, value in layer.items():
            values[key] = value
            origin[key] = where(key)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin, model, naming) from None


def read_secret(path: Path) -> SecretStr:
    """The first line of a file that holds one secret, as Kubernetes mounts them. Raises UsageError, without content."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check the setting that names it") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint="check the setting that names it") from None
    if not lines or not lines[0]:
        raise UsageError(f"{path} holds no password in its first line", hint="write it there") from None
    return SecretStr(lines[0])


def _from_environ(environ: Mapping[str, str], naming: Naming) -> dict[str, Any]:
    return {
        key[len(naming.env_prefix) :].lower(): value
        for key, value in environ.items()
        if key.startswith(naming.env_prefix) and key != naming.config_variable
    }


def _from_yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read configuration {path}: {error.strerror}", hint="check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {_yaml_fault(error)}", hint="mend the file") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold settings, one `name: value` a line", hint="see docs/OPERATIONS.md")
    return {str(key): value for key, value in data.items()}


def _yaml_fault(error: Exception) -> str:
    """What is wrong and where, without what stands there: that may be a password."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "a character that YAML forbids"
    return re.sub(r"(['\"]).{2,}\1", "a word", " ".join(str(problem).split())) + where


def _is_secret(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))


def _explain(error: ValidationError, origin: Mapping[str, str], model: type[BaseModel], naming: Naming) -> UsageError:
    """One line for the first fault; the rest would only follow from it."""
    fault = error.errors(include_url=False)[0]
    key = str(fault["loc"][0]) if fault["loc"] else ""
    where = origin.get(key, naming.flag(key))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"{naming.help} lists all settings"
        return UsageError(f"{where}: unknown setting", hint=hint)
    if fault["type"] == "missing":
        return UsageError(f"{where} is missing", hint=naming.usage)
    reason = fault["msg"].removeprefix("Value error, ")
    got = "" if _is_secret(model, key) else f" (got {fault['input']!r})"
    return UsageError(f"{where}: {reason}{got}", hint=f"{naming.help} explains it")
