"""Settings of the controller: layers, what a URL leaves out, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierd import config
from tierd.controller.settings import ControllerSettings, PostgresUrl, load
from tierd.errors import UsageError

SECRET = "hunter2"
URL = "postgresql://ann@db.example/books"


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "controller.yaml"


def refusal(flags: dict[str, Any], environ: dict[str, str] | None = None, file: Path | None = None) -> UsageError:
    """The one error that loading gives, or looking up the database: one line and a hint, without the secret."""
    with pytest.raises(UsageError) as caught:
        load(flags, environ or {}, file).database()
    error = caught.value
    assert "\n" not in f"{error}{error.hint}"
    assert error.hint
    assert SECRET not in f"{error!r}{error.hint}"
    assert error.__cause__ is None
    return error


def test_flags_over_environment_over_file(yaml_file: Path) -> None:
    yaml_file.write_text("postgres_host: file\npostgres_user: file\npostgres_port: 1\n", encoding="utf-8")
    environ = {"TIERDCTL_POSTGRES_HOST": "variable", "TIERDCTL_POSTGRES_USER": "variable", "TIERDCTL_CONFIG": "/x"}
    found = load({"postgres_host": "flag", "postgres_user": None}, environ, yaml_file)
    assert (found.postgres_host, found.postgres_user, found.postgres_port) == ("flag", "variable", 1)


def test_each_side_overlooks_the_variables_of_the_other() -> None:
    environ = {"TIERDCTL_POSTGRES_HOST": "db", "TIERD_ATTR_TIMEOUT": "7"}
    assert load({}, environ).postgres_host == "db"
    assert config.load({"source": "/a", "mountpoint": "/b"}, environ).attr_timeout == 7


def test_unknown_names_are_refused(yaml_file: Path) -> None:
    yaml_file.write_text("postgres_hots: db\n", encoding="utf-8")
    for error, where in (
        (refusal({}, {"TIERDCTL_POSTGRES_HOTS": "db"}), "TIERDCTL_POSTGRES_HOTS"),
        (refusal({}, {}, yaml_file), f"{yaml_file}: postgres_hots"),
    ):
        assert str(error) == f"{where}: unknown setting"
        assert "postgres_host" in error.hint
    assert "docs/OPERATIONS.md" in refusal({}, {"TIERDCTL_ZZZ": "1"}).hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("postgres_port", "0"),
        ("postgres_port", "65536"),
        ("postgres_port", "many"),
        ("postgres_connections", "0"),
        ("postgres_connect_timeout", "0"),
        ("postgres_statement_timeout", "nan"),
        ("postgres_sslmode", "perhaps"),
        ("postgres_ca", ""),
        ("redis_ca", ""),
    ],
)
def test_ill_typed_values(key: str, value: str) -> None:
    variable = f"TIERDCTL_{key.upper()}"
    assert str(refusal({"postgres": URL}, {variable: value})).startswith(f"{variable}: ")


# --- where the database is ---


def test_what_the_url_leaves_out_comes_from_the_other_settings(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(f"{SECRET}\n", encoding="utf-8")
    others = {"postgres_port": 7, "postgres_database": "other", "postgres_user": "bob"}
    address = load({"postgres": URL, **others, "postgres_password_file": str(password)}).database()
    assert (address.host, address.port, address.database, address.user) == ("db.example", 7, "books", "ann")
    assert address.password is not None
    assert address.password.get_secret_value() == SECRET
    assert (address.sslmode, address.ca) == ("prefer", None)
    assert str(address) == "db.example:7/books"


def test_defaults_are_those_of_the_platform() -> None:
    address = load({"postgres_host": "db"}).database()
    assert (address.port, address.database, address.user, address.password) == (5432, "ai_platform", "platform", None)


def test_everything_in_the_url() -> None:
    url = f"postgres://a%40b:{SECRET}%2F%3A@[::1]:99/d%2Fb?sslmode=verify-ca&sslrootcert=/ca.pem"
    address = load({"postgres": url, "postgres_password_file": "/missing"}).database()
    assert address.password is not None
    assert address.password.get_secret_value() == f"{SECRET}/:"
    found = (address.host, address.port, address.database, address.user, address.sslmode, address.ca)
    assert found == ("::1", 99, "d/b", "a@b", "verify-ca", Path("/ca.pem"))


def test_a_socket_in_the_url() -> None:
    assert load({"postgres": "postgresql:///books?host=/run/postgresql"}).database().host == "/run/postgresql"


def test_a_ca_is_used_or_refused() -> None:
    address = load({"postgres": URL, "postgres_ca": "/ca.pem"}).database()
    assert (address.sslmode, address.ca) == ("verify-full", Path("/ca.pem"))
    error = refusal({"postgres": URL, "postgres_ca": "/ca.pem", "postgres_sslmode": "require"})
    assert str(error) == "/ca.pem would not be used with sslmode require"


def test_no_database() -> None:
    assert str(refusal({})) == "no database is named"


def test_two_passwords() -> None:
    error = refusal({"postgres_host": "db", "postgres_password": SECRET, "postgres_password_file": "/x"})
    assert str(error) == "--postgres-password-file: and postgres_password are both set; take one (got '/x')"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read {}: No such file or directory"),
        (b"", "{} holds no password in its first line"),
        (b"\nhunter2\n", "{} holds no password in its first line"),
        (b"hunter2\xff", "{} is not UTF-8 text"),
    ],
    ids=["missing", "empty", "blank", "binary"],
)
def test_password_file(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    assert str(refusal({"postgres": URL, "postgres_password_file": str(file)})) == says.format(file)


# --- secrets ---

SLIPS = [
    f"mysql://ann:{SECRET}@db/books",
    f"ann:{SECRET}@db/books",
    f"postgresql://ann:{SECRET}@db:port/books",
    f"postgresql://ann:{SECRET}@db:99999/books",
    f"postgresql://ann:{SECRET}@[db/books",
    f"postgresql://ann:{SECRET}\u2100@db/books",
    f"postgresql://ann:x/{SECRET}@db/books",
    f"postgresql://ann:1/{SECRET}@db/books",
    f"postgresql://ann:1/{SECRET}@db",
    f"postgresql://ann:1?{SECRET}@db/books",
    f"postgresql://ann:1#{SECRET}@db/books",
    f"postgresql://ann:{SECRET}@db/books?sslmode={SECRET}",
    f"postgresql://ann@db/books?password={SECRET}",
    f"postgresql://{SECRET}@db/bo/oks",
]
"""URLs that went wrong around the password."""


@pytest.mark.parametrize("url", SLIPS)
def test_a_wrong_url_is_refused_without_repeating_it(url: str) -> None:
    assert str(refusal({}, {"TIERDCTL_POSTGRES": url})).startswith("TIERDCTL_POSTGRES: ")
    with pytest.raises(ValueError, match=r"^(must|may|is)") as caught:
        PostgresUrl.parse(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://:{SECRET}@cache/0", f"redis://:{SECRET}@[cache", f":{SECRET}@cache"])
def test_a_wrong_redis_url_is_refused_without_repeating_it(url: str) -> None:
    assert str(refusal({}, {"TIERDCTL_REDIS": url})).startswith("TIERDCTL_REDIS: ")


@pytest.mark.parametrize("value", [5, ["hunter2"], {"a": "hunter2"}])
@pytest.mark.parametrize("key", ["postgres", "postgres_password", "redis"])
def test_a_secret_of_the_wrong_type(key: str, value: Any, yaml_file: Path) -> None:
    yaml_file.write_text(f"{key}: {value}\n", encoding="utf-8")
    assert str(refusal({}, {}, yaml_file)).startswith(f"{yaml_file}: {key}: ")


@pytest.mark.parametrize(
    "line",
    [
        'postgres_password: "hunter2',
        "postgres_password: *hunter2",
        "postgres_password: !hunter2 x",
        "postgres_password: 'hunter2'hunter2",
        "postgres_password: hunter2: hunter2",
        "postgres_password: {hunter2",
        "postgres_password: @hunter2",
        "postgres_password: %hunter2",
        "postgres_password: hunter2\x07",
        "postgres_password:hunter2",
        "postgres_password: |hunter2",
    ],
)
def test_a_file_that_is_no_yaml_is_refused_without_quoting_it(line: str, yaml_file: Path) -> None:
    yaml_file.write_text(f"postgres_host: db\n{line}\n", encoding="utf-8")
    assert str(refusal({}, {}, yaml_file)).startswith(str(yaml_file))


def test_nothing_shows_a_secret() -> None:
    found = load(
        {
            "postgres": f"postgresql://ann:{SECRET}@db/books",
            "postgres_password": SECRET,
            "redis": f"redis://:{SECRET}@cache/1",
        }
    )
    shown = (repr(found), str(found), found.model_dump_json(), repr(found.database()), str(found.database()))
    assert not [text for text in shown if SECRET in text]
    secret = [name for name in ControllerSettings.model_fields if config._is_secret(ControllerSettings, name)]
    assert secret == ["postgres", "postgres_password", "redis"]
