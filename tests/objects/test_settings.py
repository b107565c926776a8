"""Settings of the object store: what is refused and why, where keys come from, and that they are never shown."""

from __future__ import annotations

import datetime
import ipaddress
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from bench import s3
from tierd.errors import UsageError
from tierd.objects.endpoint import Endpoint, Keys
from tierd.objects.settings import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN, ObjectsSettings, open_store
from tierd.objects.store import ObjectStoreUnavailable, Stored

SECRET = "the-secret-key"
KEYS = {ACCESS_KEY: "the-access-key", SECRET_KEY: SECRET}


def test_what_holds_without_a_word() -> None:
    settings = ObjectsSettings(endpoint="https://s3.example.com")
    assert settings.models_bucket == "cold-models"
    assert settings.outputs_bucket == "generated-outputs"
    assert settings.part_size * settings.parallel == 128 << 20, "what an upload takes of memory"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("http://h:9000", "http://h:9000"), ("https://s3.example.com/", "https://s3.example.com"), ("http://[::1]:1", "http://[::1]:1")],
)  # fmt: skip
def test_endpoints(given: str, shown: str) -> None:
    assert ObjectsSettings(endpoint=given).endpoint == shown


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "an endpoint or a directory"),
        ({"endpoint": "http://h", "directory": "/tmp"}, "and not both"),
        ({"endpoint": "h:9000"}, "must be a URL"),
        ({"endpoint": "ftp://h"}, "must be a URL"),
        ({"endpoint": "http://"}, "must be a URL"),
        ({"endpoint": "http://h:99999"}, "must be a URL"),
        ({"endpoint": "http://h/path"}, "must end after host and port"),
        ({"endpoint": "http://h?x"}, "must end after host and port"),
        ({"endpoint": "http://u:the-secret-key@h"}, "must not hold keys"),
        ({"endpoint": "http://h", "models_bucket": "Cold"}, "cannot be a bucket"),
        ({"endpoint": "http://h", "part_size": "5MiB"}, "greater than or equal"),
        ({"endpoint": "http://h", "part_size": "9MiB"}, "multiple of 4 MiB"),
        ({"endpoint": "http://h", "parallel": 0}, "greater than or equal"),
        ({"endpoint": "http://h", "attempts": True}, "must be a number"),
        ({"endpoint": "http://h", "directory": ""}, "must not be empty"),
        ({"endpoint": "http://h", "endpiont": "x"}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match) as raised:
        ObjectsSettings.model_validate(values)
    assert SECRET not in str(raised.value)


def test_keys_come_from_files_before_the_environment(tmp_path: Path, rclone: s3.Store) -> None:
    (tmp_path / "access").write_text(rclone.server.access_key + "\n")
    (tmp_path / "secret").write_text(rclone.server.secret_key + "\n")
    base = {"endpoint": rclone.server.url, "attempts": 1}
    files = {"access_key_file": tmp_path / "access", "secret_key_file": tmp_path / "secret"}
    environ = {ACCESS_KEY: rclone.server.access_key, SECRET_KEY: rclone.server.secret_key}
    wrong = {**KEYS, SESSION_TOKEN: "a token of other keys"}
    for values, variables in (({**base, **files}, wrong), (base, environ)):
        store = open_store(ObjectsSettings.model_validate(values), variables)
        assert store.stat("no-such-bucket", "x") is None
        store.close()
    store = open_store(ObjectsSettings.model_validate(base), wrong)
    with pytest.raises(ObjectStoreUnavailable, match="it answered 403"):
        store.stat("no-such-bucket", "x")
    store.close()


def missing(tmp_path: Path) -> Iterator[tuple[dict[str, Any], dict[str, str], str]]:
    """Settings, environment, and what is said."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "lines").write_text("one\ntwo\n")
    yield {}, {}, f"{ACCESS_KEY} is empty"
    yield {}, {ACCESS_KEY: "x"}, f"{SECRET_KEY} is empty"
    yield {}, {ACCESS_KEY: "x", SECRET_KEY: "a\nb"}, f"{SECRET_KEY} does not hold a key"
    for name, match in (
        ("none", "No such file"), ("empty", "is empty"), ("binary", "does not hold"), ("lines", "does not hold")
    ):  # fmt: skip
        yield {"secret_key_file": tmp_path / name}, KEYS, f"secret_key_file .*{name}.*{match}|{match}"
    yield {"ca_file": tmp_path / "none"}, KEYS, "ca_file .*none is not there"


def test_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    for values, environ, match in missing(tmp_path):
        settings = ObjectsSettings.model_validate({"endpoint": "http://h", **values})
        with pytest.raises(UsageError, match=match) as raised:
            open_store(settings, environ)
        assert raised.value.hint
        assert SECRET not in str(raised.value) + raised.value.hint


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"object directory .*none is not there"):
        open_store(ObjectsSettings(directory=tmp_path / "none"), {})


def test_a_directory_needs_no_keys(tmp_path: Path) -> None:
    store = open_store(ObjectsSettings(directory=tmp_path), {})
    store.ensure_bucket("cold-models")
    assert list(store.list("cold-models")) == []


def test_no_secret_is_ever_shown(tmp_path: Path) -> None:
    settings = ObjectsSettings(endpoint="http://127.0.0.1:1", attempts=1)
    store = open_store(settings, KEYS)
    endpoint = vars(store)["_transport"]
    shown = [repr(settings), settings.model_dump_json(), repr(store), repr(vars(store)), repr(vars(endpoint))]
    with pytest.raises(ObjectStoreUnavailable) as raised:
        store.stat("cold-models", "x")
    store.close()
    keys = Keys("the-access-key", SECRET, SECRET)
    shown += [repr(keys), str(keys), f"{Endpoint('http://h', keys)}"]
    shown += [str(raised.value), repr(raised.value), raised.value.hint, repr(pickle.dumps(settings))]
    assert SECRET not in "".join(shown)
    assert "the-access-key" not in "".join(shown)


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "OPERATIONS.md").read_text()
    section = text.partition("## The object store")[2].partition("\n## ")[0]
    assert [name for name in ObjectsSettings.model_fields if f"`{name}`" not in section] == []


# --- TLS ---


def certificate(directory: Path) -> None:
    """One for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip


def test_over_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    certificate(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "source").write_bytes(b"x" * (20 << 20))
    options = ["--cert", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem")]
    with s3.serve(tmp_path / "data", tmp_path / "s3.log", options) as running:
        assert running.server.url.startswith("https://")
        environ = {ACCESS_KEY: running.server.access_key, SECRET_KEY: running.server.secret_key}
        settings = ObjectsSettings(endpoint=running.server.url, ca_file=tmp_path / "cert.pem", attempts=1)
        store = open_store(settings, environ)
        store.ensure_bucket("cold-models")
        stored = store.put_file("cold-models", "m/v1/x", tmp_path / "source", 20 << 20)
        assert isinstance(stored, Stored)
        assert store.hash("cold-models", "m/v1/x") == stored
        store.close()
        unknown = open_store(settings.model_copy(update={"ca_file": None, "attempts": 8}), environ)
        with pytest.raises(ObjectStoreUnavailable, match="certificate does not pass: self-signed") as raised:
            unknown.stat("cold-models", "m/v1/x")
        assert raised.value.refused, "and was not asked again"
        assert "ca_file" in raised.value.hint
        unknown.close()
