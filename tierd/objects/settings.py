"""Settings of the object store, and the store they describe. Reads no environment by itself: it is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tierd.config import Bytes, PathSetting, Seconds, Whole
from tierd.errors import UsageError
from tierd.objects.endpoint import Endpoint, Keys, Limits
from tierd.objects.keys import check_bucket
from tierd.objects.retries import Schedule
from tierd.objects.store import ObjectStore
from tierd.objects.sums import CHUNK_BYTES

ACCESS_KEY: Final = "AWS_ACCESS_KEY_ID"
SECRET_KEY: Final = "AWS_SECRET_ACCESS_KEY"
SESSION_TOKEN: Final = "AWS_SESSION_TOKEN"
"""The environment variables that all S3 clients read; a file that is set goes before them."""
_KEY_BYTES_MAX: Final = 4096
_PART_BYTES_MAX: Final = 1 << 30


class ObjectsSettings(BaseModel):
    """An endpoint or a directory, and how it is used. Sizes are bytes, times are seconds. Holds no secret."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    endpoint: str | None = None
    directory: PathSetting | None = None
    region: str = "us-east-1"
    ca_file: PathSetting | None = None
    path_style: bool = True
    models_bucket: str = "cold-models"
    outputs_bucket: str = "generated-outputs"
    access_key_file: PathSetting | None = None
    secret_key_file: PathSetting | None = None
    part_size: Bytes = Field(16 << 20, ge=8 << 20, le=_PART_BYTES_MAX)
    parallel: Whole = Field(8, ge=1, le=64)
    bandwidth: Bytes = Field(0, ge=0)
    attempts: Whole = Field(8, ge=1, le=100)
    stall_timeout: Seconds = Field(10.0, gt=0, le=3600)

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return value if value is None else _endpoint(value)

    @field_validator("models_bucket", "outputs_bucket")
    @classmethod
    def _is_bucket(cls, value: str) -> str:
        try:
            return check_bucket(value)
        except UsageError as error:
            raise ValueError(f"{error}: {error.hint}") from None

    @field_validator("part_size")
    @classmethod
    def _whole_chunks(cls, value: int) -> int:
        if value % CHUNK_BYTES:
            raise ValueError("must be a multiple of 4 MiB, which is what a checksum covers")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.endpoint is None) == (self.directory is None):
            raise ValueError("needs an endpoint or a directory, and not both")
        return self


def _endpoint(value: str) -> str:
    """`http://HOST[:PORT]` or https. ValueError that does not repeat it: there may be a password in it."""
    try:
        url = urlsplit(value)
        port_is_right = url.port is None or url.port > 0
    except ValueError:
        raise ValueError("must be a URL such as https://s3.example.com:9000") from None
    if url.username is not None or url.password is not None:
        raise ValueError("must not hold keys: they come from files or the environment")
    if url.scheme not in ("http", "https") or not url.hostname or not port_is_right:
        raise ValueError("must be a URL such as https://s3.example.com:9000")
    if url.path.strip("/") or url.query or url.fragment:
        raise ValueError("must end after host and port")
    return f"{url.scheme}://{url.netloc}"


def describe(told: Mapping[str, Any]) -> ObjectsSettings:
    """The settings that `objects` of a mount or a controller tells. Raises UsageError."""
    try:
        return ObjectsSettings.model_validate(told)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        reason = fault["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in ("objects", *fault["loc"]))
        raise UsageError(f"{where}: {reason}", hint="docs/OPERATIONS.md lists its settings") from None


def open_store(settings: ObjectsSettings, environ: Mapping[str, str]) -> ObjectStore:
    """The store that is described; nothing is connected yet. Raises UsageError if keys or files are missing."""
    # Clients are imported where they are needed: they cost memory, and commands that only read settings have no use.
    if settings.directory is not None:
        from tierd.objects.directory import DirectoryStore

        if not settings.directory.is_dir():
            raise UsageError(f"object directory {settings.directory} is not there", hint="make it, or mount it")
        return DirectoryStore(settings.directory, settings.bandwidth)
    from tierd.objects.s3 import S3Store

    assert settings.endpoint is not None
    if settings.ca_file is not None and not settings.ca_file.is_file():
        raise UsageError(f"ca_file {settings.ca_file} is not there", hint="a file of certificates in PEM")
    endpoint = Endpoint(
        settings.endpoint,
        _keys(settings, environ),
        settings.region,
        str(settings.ca_file) if settings.ca_file else None,
        settings.path_style,
    )
    schedule = Schedule(attempts_max=settings.attempts)
    limits = Limits(settings.part_size, settings.parallel, settings.bandwidth, settings.stall_timeout, schedule)
    return S3Store(endpoint, limits)


def _keys(settings: ObjectsSettings, environ: Mapping[str, str]) -> Keys:
    access = _key("access_key_file", settings.access_key_file, ACCESS_KEY, environ)
    secret = _key("secret_key_file", settings.secret_key_file, SECRET_KEY, environ)
    # A token belongs to the keys beside it; with keys from files it would be somebody else's.
    token = None if settings.access_key_file or settings.secret_key_file else environ.get(SESSION_TOKEN) or None
    return Keys(access, secret, token)


def _key(setting: str, file: Path | None, variable: str, environ: Mapping[str, str]) -> str:
    if file is None:
        found, where = environ.get(variable, ""), variable
    else:
        where = f"{setting} {file}"
        try:
            with file.open(encoding="utf-8") as opened:
                found = opened.read(_KEY_BYTES_MAX).strip()
        except OSError as error:
            raise UsageError(f"cannot read {where}: {error.strerror}", hint="may this user read it?") from None
        except UnicodeDecodeError:
            raise UsageError(f"{where} does not hold a key", hint="one line of text") from None
    if not found:
        raise UsageError(f"{where} is empty: the object store needs keys", hint=f"set {setting} or {variable}")
    if not found.isascii() or not found.isprintable():
        raise UsageError(f"{where} does not hold a key", hint="one line of text")
    return found
