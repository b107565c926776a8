"""Measures how long ranking for eviction takes: `python -m bench.ranking --help`. Touches no disk, needs no rights.

CPU time of one core, garbage collection as the daemon sets it (`tierd.node.process.calm_garbage_collector`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tierd.policy import NS, Candidate, Resident, Space, Watermarks, admit, lru, next_victim, prefetch_order

EPOCH_NS = 1_700_000_000 * NS
MONTH_NS = 30 * 86400 * NS
FIRST = 1000
MARKS = Watermarks()


@dataclass(slots=True)
class Sum:
    """What the files of one model add up to."""

    held_bytes: int = 0
    last_access_ns: int = 0


def files(count: int, models: int, seed: int) -> Iterator[tuple[bytes, int, int]]:
    """Model, size and last access of each file, in no order."""
    chance = random.Random(seed)
    for number in range(count):
        yield b"models/%d" % (number % models), chance.randrange(1, 1 << 30), EPOCH_NS + chance.randrange(MONTH_NS)


def grouped(entries: Iterable[tuple[bytes, int, int]]) -> list[Resident]:
    """One resident per model, as the node tier sums up its files."""
    sums: dict[bytes, Sum] = {}
    for model, size, at_ns in entries:
        found = sums.setdefault(model, Sum())
        found.held_bytes += size
        found.last_access_ns = max(found.last_access_ns, at_ns)
    return [
        Resident(model, found.held_bytes, found.last_access_ns, number % 97 / 10, number % 50 == 0, number % 70 == 0)
        for number, (model, found) in enumerate(sums.items())
    ]


def full(residents: list[Resident]) -> Space:
    """A disk that is filled up to the mark at which eviction starts."""
    held = sum(resident.held_bytes for resident in residents)
    total = int(held / (1 - MARKS.start))
    return Space(total, total - held, held, 0, total)


def first_victims(residents: list[Resident]) -> int:
    """Rank, and take as many as a long eviction would."""
    return sum(1 for _ in itertools.islice(lru(residents), FIRST))


def all_of_them(residents: list[Resident]) -> int:
    """Rank, and take every one: what no eviction does."""
    return sum(1 for _ in lru(residents))


def one_admission(residents: list[Resident]) -> int:
    """Make room for one more model on a full disk."""
    return len(admit(100 << 30, b"models/new", 5.0, residents, full(residents), MARKS).victims)


def prefetch(residents: list[Resident]) -> int:
    """Judge as many candidates as there are models, on a full disk."""
    candidates = [
        Candidate(b"models/c%d" % number, 1 << 30, number % 101 / 10, False) for number in range(len(residents))
    ]
    return sum(choice.take for choice in prefetch_order(candidates, residents, full(residents), MARKS, 0.5))


def seconds(function: Callable[[list[Resident]], object], residents: list[Resident]) -> float:
    """CPU seconds of one call."""
    gc.collect()
    begin = time.process_time()
    function(residents)
    return time.process_time() - begin


MEASUREMENTS: dict[str, Callable[[list[Resident]], object]] = {
    "next_victim": next_victim,
    f"lru, the first {FIRST:,}": first_victims,
    "lru, all of them": all_of_them,
    "admit, full disk": one_admission,
    "prefetch_order, as many candidates": prefetch,
}


def measure(count: int, models: int, seed: int) -> None:
    """Print the CPU seconds of each step for `count` files in `models` models."""
    entries = list(files(count, models, seed))
    begin = time.process_time()
    residents = grouped(entries)
    print(f"{count:,} files in {models:,} models")
    print(f"  {'summing up the files':36} {time.process_time() - begin:6.2f} s")
    for name, function in MEASUREMENTS.items():
        print(f"  {name:36} {seconds(function, residents):6.2f} s")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranking", description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000, help="files on the node (default 1000000)")
    parser.add_argument("--models", type=int, default=100_000, help="models they belong to (default 100000)")
    parser.add_argument("--seed", type=int, default=1, help="of sizes and times (default 1)")
    arguments = parser.parse_args()
    gc.set_threshold(50_000, 20, 50)
    measure(arguments.files, arguments.models, arguments.seed)
    measure(arguments.files, arguments.files, arguments.seed)


if __name__ == "__main__":
    main()
