"""Everything a model load can be measured on: local files, an S3 server, JuiceFS and tierd, each hot and cold.

Parts are built when they are first asked for, outside of any clock, and taken down together. The S3 server and
the local baseline share one copy of the models.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import hf_model, mounts, s3
from bench.juicefs import JuiceFS, Mount
from bench.mounts import MIB, MountError, Tierd

MODELS = "models"
CACHE_SIZE_GIB_MIN = 8
COPIES = 21  # of one model: as objects, as local files, in every cache, and those that a round makes and removes
ROOM_BYTES = 2 << 30
CACHE_PASSES_MAX = 6
COMPLETE_TIMEOUT_S = 300.0
COMPLETE_POLL_S = 0.01
SOURCE_BYTES = "juicefs_fuse_read_size_bytes_sum"
CACHE_MISSES = "juicefs_blockcache_miss"


@dataclass(frozen=True)
class Layout:
    """A model of the benchmark: its directory below `models`, in how many files, and how large beside the others."""

    directory: str
    title: str
    shards: int
    times: int = 1

    @property
    def model(self) -> str:
        """As tierd names it."""
        return f"{MODELS}/{self.directory}"

    def files(self, root: Path) -> list[Path]:
        """Its weight files below the root of any of the file systems."""
        names = (f"model-{shard:05}-of-{self.shards:05}.safetensors" for shard in range(1, self.shards + 1))
        return [root / MODELS / self.directory / name for name in names]


ONE_FILE = Layout("one-file", "one file", 1)
SHARDED = Layout("sharded", "16 shards", 16)
RAW = Layout("raw", "one file of twice the size", 1, times=2)
LAYOUTS = (ONE_FILE, SHARDED)


@dataclass(frozen=True)
class DeviceSetting:
    """A setting of the disk that tierd changes: a file of sysfs, what it held before, what tierd writes there."""

    path: Path
    found: str
    tuned: str

    @classmethod
    def of_status(cls, status: dict[str, Any]) -> list[DeviceSetting]:
        """From the key `device_settings` of tierd's status: a list of {"path", "found", "set"}; it may be absent."""
        entries = status.get("device_settings") or []
        return [cls(Path(entry["path"]), str(entry["found"]), str(entry["set"])) for entry in entries]


class Rig:
    """What is mounted and served below `work`, with models of `size_bytes` each.

    ```python
    with Rig(work, 1 << 30) as rig:
        rig.make_models(LAYOUTS)
        load_reads(ONE_FILE.files(rig.hot.mountpoint))
    ```
    """

    def __init__(self, work: Path, size_bytes: int) -> None:
        self.work = work
        self.size_bytes = size_bytes
        self.local = work / "local"
        self.checksums: dict[Layout, str] = {}
        self.settings: list[DeviceSetting] = []
        self._volume = JuiceFS(work / "volume", name="tierd-bench")
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.set_device, tuned=False)  # runs last, whatever the daemons left
        self._cold_mounts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def check_room(self) -> None:
        """MountError unless every copy fits on the disk."""
        need = COPIES * self.size_bytes + ROOM_BYTES
        free = shutil.disk_usage(self.work).free
        if free < need:
            raise MountError(
                f"{free / 2**30:.0f} GiB are free and {need / 2**30:.0f} are needed; "
                "give a smaller --size-mib, or another disk with --work-dir"
            )

    def make_models(self, layouts: Sequence[Layout]) -> None:
        """Writes the models to the local directory and into a new JuiceFS volume."""
        for seed, layout in enumerate(layouts):
            target, size = self.local / layout.model, self.size_bytes * layout.times
            self.checksums[layout] = hf_model.write_model(target, size, layout.shards, seed).checksum
        self._stack.enter_context(self._volume)
        self._volume.format()
        # A mount of its own, without a cache: the mounts that are measured have not written what they read.
        writer = self._volume.mount(self.work / "writer", cache_size_mib=0)
        shutil.copytree(self.local, writer.mountpoint, dirs_exist_ok=True)
        self._volume.umount(writer.mountpoint)

    def weight_bytes(self, layout: Layout) -> int:
        """Bytes of weights of a model, without the headers of its files."""
        return self.size_bytes * layout.times // hf_model.ROW_BYTES * hf_model.ROW_BYTES

    def file_bytes(self, layout: Layout) -> int:
        """Bytes of the weight files of a model."""
        return sum(file.stat().st_size for file in layout.files(self.local))

    def verify(self, root: Path, layout: Layout) -> None:
        """Reads a model once more, not timed; RuntimeError when its bytes are not those that were written."""
        if hf_model.load_model(root / layout.model).checksum != self.checksums[layout]:
            raise RuntimeError(f"{layout.model} has other bytes than were written")

    @cached_property
    def store(self) -> s3.Store:
        """A client of an S3 server that serves the local copy, with bucket `models`."""
        return self._stack.enter_context(s3.serve(self.local, self.work / "s3.log"))

    @cached_property
    def cached(self) -> Mount:
        """A JuiceFS mount with every block of the models in its local cache."""
        mount = self._mount_juicefs(self.work / "cached", self.work / "cached-cache")
        for _ in range(CACHE_PASSES_MAX):
            before = mount.stats()[CACHE_MISSES]
            mounts.drop_caches(3)
            for layout in self.checksums:
                for file in layout.files(mount.mountpoint):
                    mounts.read_through(file)
            if mount.stats()[CACHE_MISSES] == before:
                return mount
        raise MountError(f"JuiceFS did not cache the models within {CACHE_PASSES_MAX} passes")

    @cached_property
    def hot(self) -> Tierd:
        """tierd with every model complete in the node tier, over JuiceFS with its blocks cached."""
        tierd = self._stack.enter_context(self._tierd(self.cached.mountpoint, "hot"))
        self._fill(tierd, list(self.checksums))
        return tierd

    @cached_property
    def off(self) -> Tierd:
        """As `hot`, without passthrough: the daemon itself serves every read. It holds what `LAYOUTS` names."""
        tierd = self._stack.enter_context(self._tierd(self.cached.mountpoint, "off", passthrough="off"))
        self._fill(tierd, [layout for layout in self.checksums if layout in LAYOUTS])
        return tierd

    @contextlib.contextmanager
    def cold_juicefs(self) -> Iterator[Mount]:
        """A new JuiceFS mount with an empty cache; both go afterwards. Page caches are dropped when it is there."""
        self._cold_mounts += 1
        where, cache = self.work / "cold", self.work / f"cold-cache-{self._cold_mounts}"
        mount = self._mount_juicefs(where, cache)
        try:
            mounts.drop_caches(3)
            yield mount
        finally:
            self._volume.umount(where)
            shutil.rmtree(cache, ignore_errors=True)  # not made yet when nothing was read

    @contextlib.contextmanager
    def first_tierd(self) -> Iterator[tuple[Mount, Tierd]]:
        """A new tierd with an empty node tier over a new, cold JuiceFS mount, and that mount."""
        with self.cold_juicefs() as source, self._tierd(source.mountpoint, "first") as tierd:
            mounts.drop_caches(3)
            tierd.settle()
            yield source, tierd

    @contextlib.contextmanager
    def new_directory(self, name: str) -> Iterator[Path]:
        """A directory on the disk of the node tier, removed afterwards."""
        path = self.work / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def set_device(self, *, tuned: bool) -> None:
        """Writes what tierd changes on the disk, or what was there before."""
        for setting in self.settings:
            setting.path.write_text(setting.tuned if tuned else setting.found)

    def node_model(self, tierd: Tierd, layout: Layout) -> dict[str, Any]:
        """The model's entry in `tierd models --json`; empty when tierd does not know it."""
        found: list[dict[str, Any]] = tierd.ask("/v1/models")
        return next((entry for entry in found if entry["model"] == layout.model), {})

    def seconds_to_complete(self, tierd: Tierd, layout: Layout) -> float:
        """Waits until the node tier holds the whole model, and says how long that took."""
        began = time.monotonic()
        while (entry := self.node_model(tierd, layout)).get("state") != "complete":
            if time.monotonic() - began > COMPLETE_TIMEOUT_S:
                state, size = entry.get("state"), entry.get("node_bytes")
                raise MountError(f"{layout.model} is {state!r} with {size} bytes after {COMPLETE_TIMEOUT_S:.0f} s")
            time.sleep(COMPLETE_POLL_S)
        return time.monotonic() - began

    def _mount_juicefs(self, where: Path, cache: Path) -> Mount:
        size_mib = max(1024, 2 * COPIES * self.size_bytes // MIB)  # nothing is evicted
        return self._volume.mount(where, cache_dir=cache, cache_size_mib=size_mib)

    @contextlib.contextmanager
    def _tierd(self, source: Path, name: str, passthrough: str = "auto") -> Iterator[Tierd]:
        """An overlay of `source` with a node tier of its own; both go afterwards, and device settings are put back."""
        size_gib = max(CACHE_SIZE_GIB_MIN, math.ceil(6 * self.size_bytes / 2**30))
        cache = self.work / f"node-{name}"
        try:
            with mounts.tierd_mount(
                source,
                self.work / name,
                cache_dir=cache,
                cache_size=f"{size_gib}GiB",
                passthrough=passthrough,
            ) as tierd:
                # Of the first daemon only: a later one finds what the first has set.
                self.settings = self.settings or DeviceSetting.of_status(tierd.ask("/v1/status"))
                yield tierd
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def _fill(self, tierd: Tierd, layouts: Sequence[Layout]) -> None:
        """Loads models through tierd until the node tier holds them, then drops what that left in memory."""
        for layout in layouts:
            for file in layout.files(tierd.mountpoint):
                mounts.read_through(file)
            self.seconds_to_complete(tierd, layout)
