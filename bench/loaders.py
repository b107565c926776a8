"""Ways of reading model files, timed; it knows nothing of mounts and makes no files.

What a load must cost in every case alike is one copy of every byte into memory that is already there, as a
copy to a device through a staging buffer does. So plain reads reuse one buffer. safetensors' `get_tensor` copies
out of the mapping into new memory each time (framework numpy; it has no view to offer, and a second `.copy()`
would add a pass over memory that no device load has), and `reuse_memory` makes malloc give the same pages again:
otherwise the kernel zeroes every page of the target, which takes eight times as long as the copy and is the
same in every case.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open

from bench.mounts import MIB

BUFFER_BYTES = 4 * MIB
STAGING_BYTES = 32 * MIB
PAGE_BYTES = 4096
LENGTH_BYTES = 8  # a safetensors file starts with the length of its header
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Load:
    """One timed load. `extras` are what else was seen, such as the READ requests that the daemon got."""

    seconds: float
    first_byte_s: float
    size_bytes: int
    extras: dict[str, float] = field(default_factory=dict)


def reuse_memory() -> None:
    """Makes malloc (glibc's) keep what is freed, also large blocks: mallopt(3). Elsewhere it changes nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def load_safetensors(files: Sequence[Path]) -> int:
    """Copies every tensor out of safetensors' mapping, one at a time; the bytes of tensors."""
    loaded = 0
    for file in files:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                loaded += weights.get_tensor(name).nbytes
    return loaded


def load_reads(files: Sequence[Path]) -> int:
    """Reads every file from start to end into one buffer of 4 MiB, which stays in the CPU's cache; the bytes read."""
    buffer, loaded = bytearray(BUFFER_BYTES), 0
    for name in files:
        with name.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                loaded += got
    return loaded


LOADERS: dict[str, Callable[[Sequence[Path]], int]] = {"safetensors": load_safetensors, "reads": load_reads}
"""By the name that tables show."""


def timed_load(
    loader: str, files: Sequence[Path], weight_bytes: int, before: Callable[[], object] = lambda: None
) -> Load:
    """Opens the first file, reads the length of its header, then loads all files; the clock runs during `before`.

    Raises `RuntimeError` when fewer than `weight_bytes` came.
    """
    began = time.perf_counter()
    before()
    with files[0].open("rb", buffering=0) as file:
        head = file.read(LENGTH_BYTES)
    first_byte = time.perf_counter() - began
    loaded = LOADERS[loader](files)
    seconds = time.perf_counter() - began
    if len(head) != LENGTH_BYTES or loaded < weight_bytes:
        raise RuntimeError(f"{loaded} bytes came of {weight_bytes} of {files[0].parent.name}")
    return Load(seconds, first_byte, loaded)


def random_reads_per_s(path: Path, count: int, seed: int) -> float:
    """Reads of 4 KiB at random places of the file, a second. The interpreter takes about half of each."""
    pages = path.stat().st_size // PAGE_BYTES
    rng = random.Random(seed)
    offsets = [rng.randrange(pages) * PAGE_BYTES for _ in range(count)]
    buffers, preadv = [bytearray(PAGE_BYTES)], os.preadv
    descriptor = os.open(path, os.O_RDONLY)
    try:
        began = time.perf_counter()
        for offset in offsets:
            preadv(descriptor, buffers, offset)
        return count / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def copy_mapped(path: Path) -> int:
    """Maps the file and copies it through one staging buffer that is already there; the bytes copied."""
    staging = np.ones(STAGING_BYTES, dtype=np.uint8)  # ones, because zeros would not be there yet
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        size = len(mapping)
        whole = np.frombuffer(mapping, dtype=np.uint8)
        for offset in range(0, size, STAGING_BYTES):
            part = whole[offset : offset + STAGING_BYTES]
            np.copyto(staging[: len(part)], part)
            del part
        del whole  # the mapping cannot be closed while an array looks into it
    return size


def gb_per_s(read: Callable[[Path], int], path: Path) -> float:
    """10^9 bytes a second of one pass over a file, open included; RuntimeError when it was not all of it."""
    expected = path.stat().st_size
    began = time.perf_counter()
    got = read(path)
    seconds = time.perf_counter() - began
    if got != expected:
        raise RuntimeError(f"read {got} bytes of a file of {expected}")
    return got / seconds / 1e9
