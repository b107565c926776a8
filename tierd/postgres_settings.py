"""Where a PostgreSQL is and how to get in: settings that several parts of tierd have in common. Connects to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from tierd.config import PathSetting, Seconds, Whole, read_secret
from tierd.errors import UsageError
from tierd.redis_options import split_url

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
"""As libpq has them (PostgreSQL documentation, 34.19)."""
_VERIFYING = ("verify-ca", "verify-full")
_POSTGRES_PORT = 5432


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
        parts = split_url(url)
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
            port=parts.port,
            database=unquote(name) or None,
            user=unquote(parts.username) if parts.username else None,
            password=SecretStr(unquote(parts.password)) if parts.password else None,
            sslmode=mode,  # type: ignore[arg-type] # one of them, as was just checked
            ca=Path(query["sslrootcert"]) if query.get("sslrootcert") else None,
        )


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


class PostgresSettings(BaseModel):
    """What a client of PostgreSQL needs to know. Times are seconds."""

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

    @field_validator("postgres")
    @classmethod
    def _postgres_is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            PostgresUrl.parse(value.get_secret_value())
        return value

    @field_validator("postgres_password_file")
    @classmethod
    def _one_password(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("postgres_password") is not None:
            raise ValueError("and postgres_password are both set; take one")
        return value

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
