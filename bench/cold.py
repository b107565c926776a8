"""Cold files beside plain clients of the same object server: `python -m bench.cold --help`. Needs root and /dev/fuse.

First byte: open a cold file through the overlay and read one byte, of a chunk that nobody has read; plainly, one GET of
that byte. Recall: bring the whole file back into its stub, as a promotion does, each chunk compared with its checksum,
synced and the file read again; plainly, parallel ranges into a file; safely, the same, then fsync and SHA-256, which is
what a recall promises, one after the other. In turns within one run. The server shares the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from bench import s3
from bench.cpu import Cost, cost_of
from bench.mounts import MIB, Tierd, tierd_mount, work_directory
from tierd.controller.source.promote import RANGES_AT_ONCE
from tierd.objects.endpoint import Endpoint, Keys, Limits
from tierd.objects.keys import object_key
from tierd.objects.s3 import S3Store
from tierd.objects.store import Stored
from tierd.objects.sums import CHUNK_BYTES
from tierd.recall import fetch_from, recall
from tierd.stub_files import make_layer, write_origins
from tierd.stubs import COLD_MARK, RESERVED, STUBS, Origin

BUCKET = "cold-models"
MODEL = "models/m"
FIRST_BYTE_MS_MAX = 300.0
RECALL_RATIO_MIN = 0.8


class Rig:
    """A server with one object, and a source in which it is cold under as many names as are asked for."""

    def __init__(self, work: Path, running: s3.Store, size: int) -> None:
        self.work = work
        self.running = running
        self.size = size
        self.source = work / "source"
        self.model = self.source / MODEL
        self.model.mkdir(parents=True)
        self.target = work / "plain"
        self.target.mkdir()
        server = running.server
        endpoint = Endpoint(server.url, Keys(server.access_key, server.secret_key))
        self.store = S3Store(endpoint, Limits(parallel=s3.STREAMS))
        self.store.ensure_bucket(BUCKET)
        self.stored = self._put(work / "data.bin")
        self.key = object_key(MODEL, 1, b"weights.safetensors")

    def _put(self, path: Path) -> Stored:
        with path.open("wb") as file:
            for _ in range(self.size // MIB):
                file.write(os.urandom(MIB))
        stored = self.store.put_file(BUCKET, object_key(MODEL, 1, b"weights.safetensors"), path, self.size)
        path.unlink()
        return stored

    def stub(self, name: str) -> Path:
        """A cold file of that name; where its stub is."""
        origin = Origin(MODEL, 1, b"weights.safetensors", *self.stored)
        fd = os.open(self.model, os.O_RDONLY | os.O_DIRECTORY)
        make_layer(fd)
        stub = self.model / os.fsdecode(RESERVED) / os.fsdecode(STUBS) / name
        stub.touch()
        base = os.open(RESERVED, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        write_origins(base, {stub.stat().st_ino: origin})
        stub.chmod(0o644 | COLD_MARK)
        os.close(base)
        os.close(fd)
        return stub

    # --- the sides ---

    def recalls(self) -> dict[str, Callable[[], Cost]]:
        """Each brings the whole file once, into a new one, which is gone afterwards."""
        return {
            "ours": self._ours,
            "plain": self._plain,
            "safe": lambda: self._plain(safe=True),
            "load": self._load,
        }

    def _ours(self) -> Cost:
        stub = self.stub("recalled.safetensors")
        origin = Origin(MODEL, 1, b"weights.safetensors", *self.stored)

        def move() -> None:
            with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
                recall(str(stub), origin, fetch_from(self.store, BUCKET), workers=pool)

        try:
            return cost_of(move, self.running.pid)
        finally:
            stub.unlink()

    def _plain(self, *, safe: bool = False) -> Cost:
        path = self.target / "weights.safetensors"

        def move() -> None:
            self.running.download(BUCKET, f"{MODEL}/v1/", self.target)
            if safe:
                self._make_sure(path)

        try:
            return cost_of(move, self.running.pid)
        finally:
            path.unlink()

    def _load(self) -> Cost:
        stub = self.stub("loaded.safetensors")
        try:
            with self.mounted() as mount:
                path = mount.mountpoint / MODEL / stub.name
                return cost_of(lambda: self._read(path), self.running.pid, mount.process.pid)
        finally:
            stub.unlink()

    def _read(self, path: Path) -> None:
        buffer = bytearray(MIB)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                continue
            if file.tell() != self.size:
                raise s3.S3Error(f"{path} ended at {file.tell()}")

    def mounted(self) -> AbstractContextManager[Tierd]:
        """The source under an overlay with an empty node tier."""
        server = self.running.server
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = server.access_key, server.secret_key
        return tierd_mount(self.source, self.work / "mnt", objects=server.url, prefetch="no")

    def _make_sure(self, path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hashlib.file_digest(file, "sha256").hexdigest() != self.stored.sha256:
                raise s3.S3Error(f"{path} has other bytes than were stored")

    def first_byte_plain(self, offset: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        response = self.running.client.get_object(BUCKET, self.key, offset=offset, length=1)
        response.read()
        response.close()
        response.release_conn()
        return time.perf_counter() - began


def first_byte(path: Path, offset: int) -> float:
    """Seconds from the open of a file to a byte of it."""
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 1, offset)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def in_turns(rounds: int, ours: Callable[[int], float], plain: Callable[[int], float]) -> list[tuple[float, float]]:
    """Seconds of both in each round; whoever is first takes turns."""
    found = []
    for number in range(rounds):
        if number % 2:
            theirs = plain(number)
            found.append((ours(number), theirs))
        else:
            mine = ours(number)
            found.append((mine, plain(number)))
    return found


def measure_first_bytes(rig: Rig, rounds: int) -> list[tuple[float, float]]:
    """A chunk that nobody has read in each round, and a file that nobody has opened: what is remembered of others would
    flatter."""
    stubs = [rig.stub(f"{number}.safetensors") for number in range(rounds)]
    chunks = rig.size // CHUNK_BYTES
    with rig.mounted() as mount, ExitStack() as stack:
        for stub in stubs:
            stack.callback(stub.unlink)  # or a load would bring them, too

        def ours(number: int) -> float:
            path = mount.mountpoint / MODEL / stubs[number].name
            return first_byte(path, number % chunks * CHUNK_BYTES)

        return in_turns(rounds, ours, lambda number: rig.first_byte_plain(number % chunks * CHUNK_BYTES))


def measure_recalls(rig: Rig, rounds: int) -> dict[str, list[Cost]]:
    """Of each side, one cost a round; whoever is first takes turns."""
    sides = rig.recalls()
    for side in sides.values():  # page cache and connections, before anything counts
        side()
    found: dict[str, list[Cost]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
    return found


def show_first_bytes(found: list[tuple[float, float]]) -> None:
    """Both sides' medians with their spread, in milliseconds."""
    for side, seconds in zip(("ours", "plain"), zip(*found, strict=True), strict=True):
        _show_spread(f"first byte {side}", "ms", [each * 1000 for each in seconds])
    slowest = max(ours for ours, _ in found) * 1000
    print(f"first byte: each within {FIRST_BYTE_MS_MAX:.0f} ms: {'met' if slowest <= FIRST_BYTE_MS_MAX else 'MISSED'}")


def show_recalls(found: dict[str, list[Cost]], size: int) -> None:
    """Speed and processors of each side, and what ours is of the others, round by round."""
    gib = size / (MIB << 10)
    for name, costs in found.items():
        _show_spread(f"whole {name}", "MiB/s", [size / MIB / cost.wall for cost in costs])
        client = statistics.median(cost.client for cost in costs) / gib
        server = statistics.median(cost.server for cost in costs) / gib
        print(f"whole {name:6} processor seconds per GiB: {client:.2f} here, {server:.2f} in the server")
    ratios = {
        name: statistics.median(theirs.wall / ours.wall for ours, theirs in zip(found["ours"], costs, strict=True))
        for name, costs in found.items()
    }
    met = "met" if ratios["plain"] >= RECALL_RATIO_MIN else "MISSED"
    print(f"recall ours / plain {ratios['plain']:.2f}; bar {RECALL_RATIO_MIN} of plain: {met}")
    print(f"recall ours / safe {ratios['safe']:.2f}")
    print(f"load / plain {ratios['plain'] / ratios['load']:.2f}")


def _show_spread(what: str, unit: str, values: list[float]) -> None:
    print(f"{what:16} {statistics.median(values):9.1f} {unit}  [{min(values):.1f} .. {max(values):.1f}]")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="recalls of each side (default 5)")
    parser.add_argument("--opens", type=int, default=20, help="first bytes of each side (default 20, 0 for none)")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} processors")
    with work_directory(options.dir) as work:
        (work / "data").mkdir()
        with s3.serve(work / "data", work / "s3.log") as running:
            rig = Rig(work, running, options.mib * MIB)
            if options.opens:
                show_first_bytes(measure_first_bytes(rig, options.opens))
            show_recalls(measure_recalls(rig, options.rounds), rig.size)
            rig.store.close()
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
