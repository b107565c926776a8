"""Object stores that tests run against, and what lies in them: a directory, rclone, moto. Starts and stops them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

from minio import Minio

from bench import guard, s3
from tierd.objects.endpoint import Endpoint, Keys, Limits
from tierd.objects.retries import Schedule
from tierd.objects.s3 import S3Store
from tierd.objects.store import ObjectStore

MIB = 1 << 20
KINDS = ("directory", "rclone", "moto")
LIMITS = Limits(part_bytes=8 * MIB, parallel=4, stall_s=10.0, schedule=Schedule(base_s=0.01, cap_s=0.1))
"""Small parts, and no long pauses: the tests wait for nobody."""
_MOTO_RUNS = re.compile(r"Running on (?P<url>http://[0-9.:]+)")


class Beneath(Protocol):
    """What lies in the store, past tierd: for damages, and to see what is left."""

    def put(self, bucket: str, key: str, content: bytes) -> None: ...

    def get(self, bucket: str, key: str) -> bytes: ...

    def remove(self, bucket: str, key: str) -> None: ...

    def keys(self, bucket: str) -> set[str]: ...


class Files:
    """Beneath a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, bucket: str, key: str, content: bytes) -> None:
        path = self._root / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def get(self, bucket: str, key: str) -> bytes:
        return (self._root / bucket / key).read_bytes()

    def remove(self, bucket: str, key: str) -> None:
        (self._root / bucket / key).unlink()

    def keys(self, bucket: str) -> set[str]:
        top = self._root / bucket
        return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}


class Objects:
    """Beneath a server: a plain client."""

    def __init__(self, client: Minio) -> None:
        self._client = client

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self._client.put_object(bucket, key, BytesIO(content), len(content))

    def get(self, bucket: str, key: str) -> bytes:
        response = self._client.get_object(bucket, key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    def remove(self, bucket: str, key: str) -> None:
        self._client.remove_object(bucket, key)

    def keys(self, bucket: str) -> set[str]:
        return {str(entry.object_name) for entry in self._client.list_objects(bucket, recursive=True)}


@dataclass(frozen=True)
class Shop:
    """A store, a bucket of one test's own in it, and what lies beneath."""

    kind: str
    store: ObjectStore
    bucket: str
    beneath: Beneath


def endpoint_of(server: s3.Server, url: str | None = None) -> Endpoint:
    """As our store takes it; `url` is another way to the same server."""
    return Endpoint(url or server.url, Keys(server.access_key, server.secret_key))


def s3_store(server: s3.Server, limits: Limits = LIMITS, url: str | None = None) -> S3Store:
    """Our client of a server."""
    return S3Store(endpoint_of(server, url), limits)


@contextlib.contextmanager
def moto(directory: Path) -> Iterator[s3.Server]:
    """Moto's server; it keeps objects in memory, and takes any keys."""
    log = directory / "moto.log"
    # -W ignore: what its libraries warn of is not about us. Unbuffered: its address is in what it writes.
    command = [sys.executable, "-u", "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = guard.start(command, directory, log)
    try:
        yield s3.Server(s3.await_match(process, log, _MOTO_RUNS, "moto_server")["url"], "access", "secret")
    finally:
        s3.stop(process)
