"""Settings of publishing: which URLs lead to Redis, and that no password is repeated."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_outbox import MODEL
from tierd.cli.keeper import given
from tierd.config import MountSettings, load
from tierd.errors import UsageError
from tierd.redis_options import address, checked_url, redis_options

PATHS = {"source": "/source", "mountpoint": "/mnt"}


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:1/0",
        "rediss://u@h:6379/15",
        "redis://:secret@h/1",
        "unix:///run/redis.sock",
        "redis://[::1]:7",
    ],
)
def test_urls_that_lead_to_redis(url: str) -> None:
    settings = load({**PATHS, "redis": url})
    assert settings.redis is not None
    assert settings.redis.get_secret_value() == url
    assert "secret" not in f"{settings!r}{settings}"
    assert redis_options(url)
    assert "secret" not in address(url)


@pytest.mark.parametrize(
    "url",
    ["", "h:6379", "http://h", "redis://", "redis://h/x", "redis://h?db=1", "unix://h/x", "redis://:secret@h:port"],
)
def test_urls_that_do_not(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        load({**PATHS, "redis": url})
    assert "--redis" in str(caught.value)
    assert "secret" not in f"{caught.value}{caught.value.hint}"
    with pytest.raises(ValueError, match=r"must|no URL"):
        checked_url(url)


def test_a_password_on_the_command_line_is_refused() -> None:
    with pytest.raises(UsageError, match="command line") as caught:
        given({"redis": "redis://:secret@h:1"})
    assert "secret" not in f"{caught.value}{caught.value.hint}"
    assert given({"redis": "redis://h:1", "attach": True}) == {"redis": "redis://h:1"}
    assert load(PATHS, {"TIERD_REDIS": "redis://:secret@h:1"}).redis is not None, "an environment is not for everybody"


def test_what_clients_are_made_with() -> None:
    found = redis_options("rediss://user:p%40ss@host:1234/7", ca=Path("/ca.pem"))
    assert found["socket_timeout"] == found["socket_connect_timeout"] == 5
    wanted = {"host": "host", "port": 1234, "db": 7, "username": "user", "password": "p@ss"}
    wanted |= {"ssl": True, "ssl_check_hostname": True, "ssl_ca_certs": "/ca.pem"}
    assert {key: found[key] for key in wanted} == wanted
    assert redis_options("redis://h", "from the file")["password"] == "from the file"
    assert redis_options("unix:///run/r.sock")["unix_socket_path"] == "/run/r.sock"


def test_defaults_publish_nothing() -> None:
    settings = load(PATHS)
    assert settings.redis is None
    assert settings.publish_interval == MountSettings.model_fields["publish_interval"].default == 10


@pytest.mark.parametrize(
    ("key", "value"), [("node_name", ""), ("node_name", "a b"), ("node_name", "n" * 256), ("publish_interval", 0.5)]
)
def test_other_settings_that_are_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key.replace("_", "-")):
        load({**PATHS, key: value})


def test_an_unreadable_size_is_none(tmp_path: Path) -> None:
    from tierd.node.listings import Listings
    from tierd.node.publish_setup import _size_of

    def fail(model: bytes) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert _size_of(Listings(fail), MODEL) is None
