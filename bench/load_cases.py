"""The cases of the model load benchmark: how one load is prepared, timed and looked at. It makes no tables.

Every case starts from the state that its name says and leaves nothing that helps the next one: page caches are
dropped before it, and what it downloaded or mounted for itself is gone after it.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import loaders, mounts
from bench.juicefs import Mount
from bench.load_report import COLD, DROPPED, WARM, rotated
from bench.load_rig import LAYOUTS, MODELS, ONE_FILE, RAW, SHARDED, SOURCE_BYTES, Layout, Rig
from bench.loaders import Load
from bench.mounts import Tierd
from bench.report import percentile

PODS = 8
PODS_TIMEOUT_S = 600.0
READERS = 4
STREAM_SECONDS = 10.0
RANDOM_READS = 100_000
OPENS = 2000
OPEN_BATCHES = 20

States = dict[str, Load]
"""A load for each state of the caches that a case knows."""


@dataclass(frozen=True)
class Case:
    """A way of getting at a model. `tuned`: measured with the settings that tierd gives the disk."""

    name: str
    what: str
    measure: Callable[[Rig, Layout, str], States]
    tuned: bool = False


def download(rig: Rig, layout: Layout, loader: str) -> States:
    """Downloads into a new directory and loads from there; the server's own files are in memory beforehand."""
    mounts.drop_caches(3)
    for file in layout.files(rig.local):
        mounts.read_through(file)  # the server's disk is not ours to measure, and ours is its disk here
    store = rig.store
    with rig.new_directory("download") as directory:
        target, downloaded = directory / layout.model, 0.0
        target.mkdir(parents=True)

        def fetch() -> None:
            nonlocal downloaded
            began = time.perf_counter()
            store.download(MODELS, f"{layout.directory}/", target)
            downloaded = time.perf_counter() - began

        load = _load(rig, directory, layout, loader, fetch)
        return {COLD: replace(load, extras={"download_s": downloaded})}


def juicefs_cold(rig: Rig, layout: Layout, loader: str) -> States:
    """A new mount with an empty block cache."""
    with rig.cold_juicefs() as source:
        return {COLD: _load(rig, source.mountpoint, layout, loader)}


def juicefs_cached(rig: Rig, layout: Layout, loader: str) -> States:
    """Every block in JuiceFS's local cache."""
    return _dropped_then_warm(rig, rig.cached.mountpoint, layout, loader)


def tierd_first(rig: Rig, layout: Layout, loader: str) -> States:
    """The first load through an empty node tier over a cold JuiceFS, and what the fill took beyond it."""
    with rig.first_tierd() as (source, tierd):
        before = _source_bytes(source)
        load = _load(rig, tierd.mountpoint, layout, loader)
        complete_s = rig.seconds_to_complete(tierd, layout)
        ratio = (_source_bytes(source) - before) / rig.file_bytes(layout)
        rig.verify(tierd.mountpoint, layout)
        return {COLD: replace(load, extras={"complete_s": complete_s, "source_ratio": ratio})}


def tierd_hot(rig: Rig, layout: Layout, loader: str) -> States:
    """The node tier holds the model."""
    return _hot(rig, rig.hot, layout, loader)


def tierd_off(rig: Rig, layout: Layout, loader: str) -> States:
    """As `tierd_hot`, and the daemon reads the files itself, as on kernels without passthrough."""
    return _hot(rig, rig.off, layout, loader)


def local(rig: Rig, layout: Layout, loader: str) -> States:
    """A plain file on the disk of the node tier."""
    return _dropped_then_warm(rig, rig.local, layout, loader)


CASES: tuple[Case, ...] = (
    Case("download", "from S3 to the local disk in 8 ranges, then load", download),
    Case("juicefs-cold", "JuiceFS, its block cache empty", juicefs_cold),
    Case("juicefs-cached", "JuiceFS, every block in its local cache", juicefs_cached),
    Case("tierd-first", "tierd, node tier empty, JuiceFS cold", tierd_first, tuned=True),
    Case("tierd-hot", "tierd, model in the node tier", tierd_hot, tuned=True),
    Case("tierd-off", "tierd, model in the node tier, --passthrough off", tierd_off, tuned=True),
    Case("local", "bare local file, disk as found", local),
    Case(
        "local-tuned", "bare local file, disk set as tierd sets it (skipped when it changes nothing)", local, tuned=True
    ),
)


def read_requests(status: dict[str, Any]) -> int | None:
    """READ requests that reached the daemon since it started; None when its status does not tell."""
    count = status["counters"].get("reads")
    return None if count is None else int(count)


def raw_reads(rig: Rig, case: str, round_: int, scale: float) -> dict[tuple[str, str], float]:
    """One round of reading the raw file on one side, dropped first, then out of memory."""
    root = rig.hot.mountpoint if case == "tierd-hot" else rig.local
    path = RAW.files(root)[0]
    _drop(rig.hot if case == "tierd-hot" else None)
    dropped = loaders.gb_per_s(mounts.read_through, path)
    warm = loaders.gb_per_s(mounts.read_through, path)
    count = max(1, round(RANDOM_READS * scale))
    return {
        ("sequential, dropped", "GB/s"): dropped,
        ("sequential, warm", "GB/s"): warm,
        ("4 KiB random, warm", "reads/s"): loaders.random_reads_per_s(path, count, round_),
        ("mmap, warm", "GB/s"): loaders.gb_per_s(loaders.copy_mapped, path),
    }


def open_close(rig: Rig, sides: Sequence[str], scale: float) -> dict[str, list[tuple[float, float]]]:
    """p50 and p99 in us of open and close of one shard, per side and batch; batches of all sides interleave."""
    roots = {"tierd-hot": lambda: rig.hot.mountpoint, "juicefs-cached": lambda: rig.cached.mountpoint}
    names = {side: str(SHARDED.files(roots.get(side, lambda: rig.local)())[0]) for side in sides}
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    count = max(2, round(OPENS / OPEN_BATCHES * scale))
    for batch in range(OPEN_BATCHES):
        for side in rotated(sides, batch):
            found[side].append(_open_batch(names[side], count))
    return found


def eight_pods(rig: Rig, case: str) -> dict[tuple[str, str], float]:
    """Eight processes load the same cold model at once: seconds until the last has it, and what the source gave."""
    layout = SHARDED
    if case == "juicefs-cold":
        with rig.cold_juicefs() as source:
            return _pods(rig, source, source.mountpoint, layout, lambda: None)
    with rig.first_tierd() as (source, tierd):
        return _pods(rig, source, tierd.mountpoint, layout, lambda: rig.seconds_to_complete(tierd, layout))


def daemon_cpu(rig: Rig, scale: float) -> dict[tuple[str, str], float]:
    """CPU of the daemon in percent of one core, and GB/s of four readers that stream a hot file out of memory."""
    path = ONE_FILE.files(rig.hot.mountpoint)[0]
    mounts.read_through(path)
    rig.hot.settle()
    with mounts.streaming([path] * READERS, drop=False) as moved_bytes:
        used, moved, began = rig.hot.cpu_seconds(), moved_bytes(), time.monotonic()
        time.sleep(STREAM_SECONDS * scale)
        seconds = time.monotonic() - began
        used, moved = rig.hot.cpu_seconds() - used, moved_bytes() - moved
    return {("daemon", "% of a core"): used / seconds * 100, ("four readers", "GB/s"): moved / seconds / 1e9}


def verify(rig: Rig, case: Case) -> None:
    """Compares what a hot or cached case serves with what was written; RuntimeError when it differs."""
    roots: dict[str, Callable[[], Path]] = {
        "juicefs-cached": lambda: rig.cached.mountpoint,
        "tierd-hot": lambda: rig.hot.mountpoint,
        "tierd-off": lambda: rig.off.mountpoint,
    }
    if case.name in roots:
        for layout in LAYOUTS:
            rig.verify(roots[case.name](), layout)


def _load(rig: Rig, root: Path, layout: Layout, loader: str, before: Callable[[], object] = lambda: None) -> Load:
    return loaders.timed_load(loader, layout.files(root), rig.weight_bytes(layout), before)


def _drop(tierd: Tierd | None) -> None:
    """Drops every page cache, dentry and inode, and lets tierd finish the forgets that this brings."""
    mounts.drop_caches(3)
    if tierd is not None:
        tierd.settle()


def _dropped_then_warm(rig: Rig, root: Path, layout: Layout, loader: str, tierd: Tierd | None = None) -> States:
    """The load that finds the caches dropped leaves them warm for the second one."""
    _drop(tierd)
    dropped = _load(rig, root, layout, loader)
    return {DROPPED: dropped, WARM: _load(rig, root, layout, loader)}


def _hot(rig: Rig, tierd: Tierd, layout: Layout, loader: str) -> States:
    """Dropped and warm, and the READ requests that both together brought to the daemon."""
    before = read_requests(tierd.ask("/v1/status"))
    states = _dropped_then_warm(rig, tierd.mountpoint, layout, loader, tierd)
    after = read_requests(tierd.ask("/v1/status"))
    if before is None or after is None:
        return states
    return {state: replace(load, extras={"reads": float(after - before)}) for state, load in states.items()}


def _source_bytes(source: Mount) -> float:
    """Bytes that JuiceFS gave to readers of its mount so far."""
    return source.stats()[SOURCE_BYTES]


def _open_batch(name: str, count: int) -> tuple[float, float]:
    clock, samples = time.perf_counter_ns, array("q")
    for _ in range(count):
        began = clock()
        os.close(os.open(name, os.O_RDONLY))
        samples.append(clock() - began)
    return percentile(samples, 0.5) / 1e3, percentile(samples, 0.99) / 1e3


def _pods(
    rig: Rig, source: Mount, root: Path, layout: Layout, wait: Callable[[], object]
) -> dict[tuple[str, str], float]:
    before = _source_bytes(source)
    seconds = _load_together(layout.files(root), rig.weight_bytes(layout))
    wait()
    ratio = (_source_bytes(source) - before) / rig.file_bytes(layout)
    return {("until all have loaded", "s"): seconds, ("bytes of the source", "x size"): ratio}


def _load_together(files: Sequence[Path], weight_bytes: int) -> float:
    """Seconds in which `PODS` processes load these files, all starting at once."""
    context = get_context("fork")
    gate = context.Barrier(PODS + 1)
    pods = [context.Process(target=_pod, args=(gate, files, weight_bytes), daemon=True) for _ in range(PODS)]
    try:
        for pod in pods:
            pod.start()
        gate.wait(PODS_TIMEOUT_S)
        began = time.perf_counter()
        for pod in pods:
            pod.join(PODS_TIMEOUT_S)
        seconds = time.perf_counter() - began
        if any(pod.exitcode != 0 for pod in pods):
            raise RuntimeError(f"not all of {PODS} processes could load the model")
        return seconds
    finally:
        for pod in (pod for pod in pods if pod.pid is not None):
            pod.kill()
            pod.join()


def _pod(gate: Any, files: Sequence[Path], weight_bytes: int) -> None:
    mounts.leave_signals_to_parent()
    gate.wait(PODS_TIMEOUT_S)
    loaders.timed_load("safetensors", files, weight_bytes)
