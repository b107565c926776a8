"""Servers for the length of the session, and a bucket of its own for each test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import s3
from tests.objects.servers import KINDS, LIMITS, Beneath, Files, Objects, Shop, moto, s3_store
from tierd.objects.directory import DirectoryStore
from tierd.objects.store import ObjectStore

_numbers = itertools.count(1)
Maker = Callable[..., tuple[ObjectStore, Beneath]]


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Store]:
    """A real S3 server over a directory."""
    base = tmp_path_factory.mktemp("rclone")
    (base / "data").mkdir()
    with s3.serve(base / "data", base / "s3.log") as running:
        yield running


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    """A second one, of other authors."""
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def bucket() -> str:
    """A name that no other test has."""
    return f"bucket-{next(_numbers)}"


@pytest.fixture
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    """Makes stores of each kind; they are closed at the end."""
    opened: list[ObjectStore] = []

    def make(kind: str, bytes_per_s: int = 0) -> tuple[ObjectStore, Beneath]:
        store: ObjectStore
        beneath: Beneath
        if kind == "directory":
            root = tmp_path / "objects"
            root.mkdir(exist_ok=True)
            store, beneath = DirectoryStore(root, bytes_per_s), Files(root)
        else:
            found = request.getfixturevalue("rclone" if kind == "rclone" else "moto_server")
            server = found.server if kind == "rclone" else found
            store = s3_store(server, LIMITS._replace(bytes_per_s=bytes_per_s))
            beneath = Objects(s3.client_of(server))
        opened.append(store)
        return store, beneath

    yield make
    for store in opened:
        store.close()


@pytest.fixture(params=KINDS)
def shop(request: pytest.FixtureRequest, bucket: str, new_store: Maker) -> Shop:
    """A store of each kind in its turn, and an empty bucket."""
    kind: str = request.param
    store, beneath = new_store(kind)
    store.ensure_bucket(bucket)
    return Shop(kind, store, bucket, beneath)


@pytest.fixture
def slow_store(new_store: Maker) -> Callable[[Shop], ObjectStore]:
    """Another client of the same store, which may move a byte a second."""
    return lambda shop: new_store(shop.kind, bytes_per_s=1)[0]
