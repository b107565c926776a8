"""Reads of cold outputs through the overlay: `python -m bench.outputs --help`. Needs root and /dev/fuse.

Each read opens an output that nobody has opened before, of 10 MB, and reads all of it; plainly, one GET of an object of
that size. In turns within one run. The object server shares the machine, its files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from bench import s3
from bench.cold import in_turns
from bench.mounts import tierd_mount, work_directory
from tierd.objects.endpoint import Endpoint, Keys, Limits
from tierd.objects.keys import object_key
from tierd.objects.s3 import S3Store
from tierd.objects.store import Stored
from tierd.stub_files import make_layer, write_origins
from tierd.stubs import COLD_MARK, RESERVED, STUBS, Origin

BUCKET = "generated-outputs"
DAY = "outputs/user123/2026/01/12"
OUTPUT_BYTES = 10_000_000
READ_P99_MS_MAX = 300.0
OBJECTS = 40
"""More than a node keeps chunks of in memory: no read finds what the one before it fetched."""


class Rig:
    """A server with objects, and a source in which they are cold outputs, under as many names as there are reads."""

    def __init__(self, work: Path, running: s3.Store, reads: int) -> None:
        self.running = running
        server = running.server
        store = S3Store(Endpoint(server.url, Keys(server.access_key, server.secret_key)), Limits(parallel=s3.STREAMS))
        store.ensure_bucket(BUCKET)
        self.origins = [self._put(store, work / "data.bin") for _ in range(min(OBJECTS, reads))]
        store.close()
        self.source = work / "source"
        (self.source / DAY).mkdir(parents=True)
        self.names = self._stubs(reads)

    def _put(self, store: S3Store, path: Path) -> Origin:
        path.write_bytes(os.urandom(OUTPUT_BYTES))
        name = f"{uuid4()}.png".encode()
        stored: Stored = store.put_file(BUCKET, object_key(DAY, 1, name), path, OUTPUT_BYTES)
        path.unlink()
        return Origin(DAY, 1, name, *stored)

    def _stubs(self, reads: int) -> list[str]:
        """Cold outputs; their names, in the order in which they are read."""
        fd = os.open(self.source / DAY, os.O_RDONLY | os.O_DIRECTORY)
        make_layer(fd)
        names, origins = [f"{uuid4()}.png" for _ in range(reads)], {}
        for number, name in enumerate(names):
            stub = self.source / DAY / os.fsdecode(RESERVED) / os.fsdecode(STUBS) / name
            stub.touch()
            origins[stub.stat().st_ino] = self.origins[number % len(self.origins)]
            stub.chmod(0o644 | COLD_MARK)
        base = os.open(RESERVED, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        write_origins(base, origins)
        os.close(base)
        os.close(fd)
        return names

    def plain(self, number: int) -> float:
        """Seconds of a GET."""
        origin = self.origins[(number + len(self.origins) // 2) % len(self.origins)]
        began = time.perf_counter()
        response = self.running.client.get_object(BUCKET, object_key(DAY, 1, origin.path))
        size = len(response.read())
        seconds = time.perf_counter() - began
        response.close()
        response.release_conn()
        assert size == OUTPUT_BYTES
        return seconds


def measure(rig: Rig, work: Path) -> list[tuple[float, float]]:
    """Seconds of both sides in each round."""
    server = rig.running.server
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = server.access_key, server.secret_key
    with tierd_mount(rig.source, work / "mnt", objects=server.url, prefetch="no") as mount:
        day = mount.mountpoint / DAY

        def ours(number: int) -> float:
            began = time.perf_counter()
            size = len((day / rig.names[number]).read_bytes())
            seconds = time.perf_counter() - began
            assert size == OUTPUT_BYTES
            return seconds

        return in_turns(len(rig.names), ours, rig.plain)


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.outputs", description=__doc__)
    parser.add_argument("--reads", type=int, default=300, help="outputs that are read (default 300)")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} processors")
    with work_directory(options.dir) as work:
        (work / "data").mkdir()
        with s3.serve(work / "data", work / "s3.log") as running:
            samples = measure(Rig(work, running, options.reads), work)
    for side, seconds in zip(("ours", "plain"), zip(*samples, strict=True), strict=True):
        values = [1000 * value for value in seconds]
        print(
            f"10 MB {side:6} p50 {statistics.median(values):7.1f} ms, p99 {p99(values):7.1f} ms, max {max(values):.1f}"
        )
    slow = 1000 * p99([ours for ours, _ in samples])
    met = "met" if slow <= READ_P99_MS_MAX else "MISSED"
    print(f"cold 10 MB read p99 {slow:.1f} ms; bar {READ_P99_MS_MAX:.0f} ms: {met}")
    print(f"load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
