"""A faulty proxy before rclone, files in its buckets, and a client that goes through the proxy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import s3
from tests.faulty_s3 import FaultyS3, Script
from tests.objects.servers import LIMITS, MIB, s3_store
from tierd.objects.endpoint import Limits
from tierd.objects.keys import SUMS_PREFIX
from tierd.objects.retries import Schedule
from tierd.objects.s3 import S3Store
from tierd.objects.store import Stored
from tierd.objects.sums import Summing

BUCKET = "cold-models"
PATIENT = LIMITS._replace(stall_s=1.0, schedule=Schedule(attempts_max=8, base_s=0.005, cap_s=0.05))
"""Notices a stall soon, and does not wait for long before it tries again."""
SMALL_BYTES_MAX = 64 << 10
LARGE_BYTES = 16 * MIB + 5


@dataclass(frozen=True)
class House:
    """`near` speaks to the server itself, `far` through the proxy."""

    data: Path
    proxy: FaultyS3
    near: S3Store
    far: S3Store
    server: s3.Server

    def put(self, key: str, content: bytes) -> Stored:
        """An object with its checksums, as our upload leaves it, past the server."""
        summing = Summing()
        summing.add(memoryview(content))
        sums = summing.end()
        for name, held in ((key, content), (SUMS_PREFIX + key, sums.encode())):
            path = self.data / BUCKET / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(held)
        return sums.stored


@contextlib.contextmanager
def house(
    base: Path,
    rate: float = 0.0,
    seed: int = 0,
    script: Script = lambda _: None,
    limits: Limits = PATIENT,
    other: s3.Server | None = None,
) -> Iterator[House]:
    """Everything for the length of a `with`, before `other` or an rclone of its own.

    rclone sees what is put beneath it before the first request.
    """
    data = base / "data"
    (data / BUCKET).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        server = other or stack.enter_context(s3.serve(data, base / "s3.log")).server
        proxy = stack.enter_context(FaultyS3(server.url, rate, seed, script).running())
        near, far = s3_store(server, limits), s3_store(server, limits, proxy.url)
        stack.callback(near.close)
        stack.callback(far.close)
        yield House(data, proxy, near, far, server)


def fetch_all(at: House, small: int, large: int, seed: int) -> None:
    """So many objects of each kind, each fetched once by one of eight threads; each must be right."""
    chance = random.Random(seed)
    pattern = chance.randbytes(LARGE_BYTES)
    wanted: list[tuple[str, Stored]] = []
    large_keys = [f"m/v1/large/{number}" for number in range(min(large, 4))]
    for key in large_keys:
        pattern = pattern[1:] + pattern[:1]
        wanted.append((key, at.put(key, pattern)))
    wanted = [wanted[number % len(wanted)] for number in range(large)]
    for number in range(small):
        first, length = chance.randrange(LARGE_BYTES // 2), chance.randint(1, SMALL_BYTES_MAX)
        key = f"m/v1/small/{number}"
        wanted.append((key, at.put(key, pattern[first : first + length])))
    chance.shuffle(wanted)
    with ThreadPoolExecutor(8) as pool:
        corrupt = [key for key, right in pool.map(lambda task: _fetch(at.far, *task), wanted) if not right]
    assert corrupt == []


def _fetch(store: S3Store, key: str, stored: Stored) -> tuple[str, bool]:
    buffer = bytearray(stored.size)
    store.get_range(BUCKET, key, stored, 0, memoryview(buffer))
    return key, hashlib.sha256(buffer).hexdigest() == stored.sha256


def random_file(path: Path, size: int) -> Path:
    """A file of bytes that no other has."""
    path.write_bytes(os.urandom(size))
    return path
