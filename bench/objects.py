"""Throughput of our object store client beside plain parallel clients: `python -m bench.objects --help`.

Both fetch and store the same whole object at the same rclone server, in turns within one run, with as many connections
and parts of the same size. Ours compares every byte with its checksum and hashes what it stores; the plain clients do
neither. Needs no rights. The server's cost is in both figures: it shares the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import s3
from tierd.objects.endpoint import Endpoint, Keys, Limits
from tierd.objects.s3 import S3Store
from tierd.objects.store import FileRange, Stored

BUCKET = "cold-models"
PREFIX = "plain/v1/"
PLAIN, OURS = PREFIX + "plain", "ours/v1/ours"
MIB = 1 << 20


class Both:
    """The server with the object in it twice, a plain client and ours; each method moves the object once."""

    def __init__(self, work: Path, running: s3.Store, size: int, limits: Limits) -> None:
        self._plain = running
        self._limits = limits
        endpoint = Endpoint(running.server.url, Keys(running.server.access_key, running.server.secret_key))
        self.ours = S3Store(endpoint, limits)
        self.ours.ensure_bucket(BUCKET)
        self._size = size
        self._source = work / "source"
        self._target = work / "fetched"
        self._target.mkdir()
        with self._source.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        self.stored: Stored = self.ours.put_file(BUCKET, OURS, self._source, size)
        self.put_plain()

    def get_plain(self) -> None:
        """Parallel ranges into a file."""
        self._plain.download(BUCKET, PREFIX, self._target)

    def get_ours(self) -> None:
        """The same, each chunk compared before it is written."""
        fd = os.open(self._target / "ours", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.truncate(fd, self._size)
            self.ours.get_range(BUCKET, OURS, self.stored, 0, FileRange(fd, 0, self._size))
        finally:
            os.close(fd)

    def put_plain(self) -> None:
        """minio's own upload in parallel parts."""
        self._plain.client.fput_object(
            BUCKET,
            PLAIN,
            str(self._source),
            part_size=self._limits.part_bytes,
            num_parallel_uploads=self._limits.parallel,
        )

    def put_ours(self) -> None:
        """The same, with checksums, to be gone on with after a kill."""
        self.ours.put_file(BUCKET, OURS, self._source, self._size, None, self._target / "journal")


def mib_per_s(move: Callable[[], None], size: int) -> float:
    """How fast it moved."""
    began = time.perf_counter()
    move()
    return size / MIB / (time.perf_counter() - began)


def measure(both: Both, size: int, rounds: int) -> dict[str, list[float]]:
    """MiB/s of each, one sample per round; whoever is first takes turns."""
    moves = {
        "GET plain": both.get_plain,
        "GET ours": both.get_ours,
        "PUT plain": both.put_plain,
        "PUT ours": both.put_ours,
    }
    found: dict[str, list[float]] = {name: [] for name in moves}
    for name, move in moves.items():  # page cache and connections, before anything counts
        del name
        move()
    for number in range(rounds):
        for name in list(moves)[:: 1 if number % 2 else -1]:
            found[name].append(mib_per_s(moves[name], size))
    return found


def show(found: dict[str, list[float]]) -> None:
    """Medians with their spread, and what ours is of the plain one, round by round."""
    for name, samples in found.items():
        print(f"{name:10} {statistics.median(samples):8.0f} MiB/s  [{min(samples):.0f} .. {max(samples):.0f}]")
    for way in ("GET", "PUT"):
        pairs = zip(found[f"{way} ours"], found[f"{way} plain"], strict=True)
        ratios = [ours / plain for ours, plain in pairs]
        print(f"{way} ours / plain: {statistics.median(ratios):.2f}  [{min(ratios):.2f} .. {max(ratios):.2f}]")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.objects", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the object (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (default 5)")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    limits = Limits(parallel=s3.STREAMS)
    with tempfile.TemporaryDirectory(prefix="tierd-bench-", dir=options.dir) as directory:
        work = Path(directory)
        (work / "data").mkdir()
        with s3.serve(work / "data", work / "s3.log") as running:
            both = Both(work, running, options.mib * MIB, limits)
            show(measure(both, options.mib * MIB, options.rounds))
            both.ours.close()


if __name__ == "__main__":
    main()
