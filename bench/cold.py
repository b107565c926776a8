"""Cold files beside plain clients of the same object server: `python -m bench.cold --help`. Needs root and /dev/fuse.

First byte: open a cold file through the overlay and read one byte, of a chunk that nobody has read; plainly, one GET of
that byte. Recall: bring the whole file back into its stub, as a promotion does, each chunk compared with its checksum
and the file read again; plainly, parallel ranges into a file. In turns within one run. The server shares the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import s3
from bench.mounts import MIB, tierd_mount, work_directory
from tierd.controller.promote import RANGES_AT_ONCE
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

    # --- the two sides ---

    def recall_plain(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        self.running.download(BUCKET, f"{MODEL}/v1/", self.target)
        return time.perf_counter() - began

    def recall_ours(self) -> float:
        """Seconds, into a new stub, which is gone afterwards."""
        stub = self.stub("recalled.safetensors")
        origin = Origin(MODEL, 1, b"weights.safetensors", *self.stored)
        began = time.perf_counter()
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            recall(str(stub), origin, fetch_from(self.store, BUCKET), workers=pool)
        seconds = time.perf_counter() - began
        stub.unlink()
        return seconds

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


def measure_first_bytes(rig: Rig, work: Path, rounds: int) -> list[tuple[float, float]]:
    """A chunk that nobody has read in each round, and a file that nobody has opened: what is remembered of others would
    flatter."""
    server = rig.running.server
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = server.access_key, server.secret_key
    names = [f"{number}.safetensors" for number in range(rounds)]
    for name in names:
        rig.stub(name)
    chunks = rig.size // CHUNK_BYTES
    with tierd_mount(rig.source, work / "mnt", objects=server.url, prefetch="no") as mount:
        top = mount.mountpoint / MODEL

        def ours(number: int) -> float:
            return first_byte(top / names[number], number % chunks * CHUNK_BYTES)

        return in_turns(rounds, ours, lambda number: rig.first_byte_plain(number % chunks * CHUNK_BYTES))


def show(what: str, unit: str, samples: list[tuple[float, float]], ratio: float, met: bool, bar: str) -> None:
    """Both sides' medians with their spread, and the ratio."""
    for side, values in zip(("ours", "plain"), zip(*samples, strict=True), strict=True):
        print(f"{what} {side:6} {statistics.median(values):9.1f} {unit}  [{min(values):.1f} .. {max(values):.1f}]")
    print(f"{what} ours / plain {ratio:.2f}; bar {bar}: {'met' if met else 'MISSED'}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="recalls of each side (default 5)")
    parser.add_argument("--opens", type=int, default=20, help="first bytes of each side (default 20)")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    size = options.mib * MIB
    print(f"load average {os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} processors")
    with work_directory(options.dir) as work:
        (work / "data").mkdir()
        with s3.serve(work / "data", work / "s3.log") as running:
            rig = Rig(work, running, size)
            first = [(a * 1000, b * 1000) for a, b in measure_first_bytes(rig, work, options.opens)]
            rig.recall_plain(), rig.recall_ours()  # page cache and connections, before anything counts
            whole = in_turns(options.rounds, lambda _: rig.recall_ours(), lambda _: rig.recall_plain())
            rig.store.close()
    slowest = max(ours for ours, _ in first)
    ratio = statistics.median(ours / plain for ours, plain in first)
    show("first byte", "ms", first, ratio, slowest <= FIRST_BYTE_MS_MAX, f"each within {FIRST_BYTE_MS_MAX:.0f} ms")
    speeds = [(options.mib / ours, options.mib / plain) for ours, plain in whole]
    ratio = statistics.median(ours / plain for ours, plain in speeds)
    show("recall", "MiB/s", speeds, ratio, ratio >= RECALL_RATIO_MIN, f"{RECALL_RATIO_MIN} of plain")
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
