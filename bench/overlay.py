"""Measures the overlay against its own source: `python -m bench.overlay --help`. Needs root and /dev/fuse.

Both sides are measured in one run, in interleaved rounds whose order alternates, because disk and machine
swing more from minute to minute than most changes do. Bars are reported, not enforced.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from bench import mounts
from bench.juicefs import JuiceFS
from bench.mounts import MIB, MountError, Tierd, drop_caches, make_tree, tree_names
from bench.report import Bar, Figures, Report, Row, Section, Spread, alone, interleave, number, percentile, section_of

GB = 1e9
MB = 1e6
READERS = 32
STAT_NAMES = 4000
STAT_FEW = 8
STAT_SECONDS = 2.0
STAT_SAMPLES_MAX = 500_000
STAT_TIMEOUT_S = 120.0
OPENS = 2000
WALKS = 10
ARENA_WALKS = 3
MODELS = 5
MEMORY_GROWTH_MB_MAX = 5.0


@dataclass(frozen=True)
class Bench:
    """What the measurements share. `scale` multiplies numbers of files; the bars are meant for 1."""

    work: Path
    size_bytes: int
    rounds: int
    scale: float
    source_kind: str

    def count(self, files: int) -> int:
        """A number of files, scaled; at least 1."""
        return max(1, round(files * self.scale))

    @contextlib.contextmanager
    def plain(self) -> Iterator[Path]:
        """A new plain directory as source, removed afterwards: the trees are large."""
        with mounts.work_directory(self.work) as parent:
            (parent / "source").mkdir()
            yield parent / "source"

    @contextlib.contextmanager
    def juicefs(self) -> Iterator[Path]:
        """The mountpoint of a new JuiceFS volume (SQLite and files, mounted with defaults) as source."""
        work = mounts.work_directory(self.work)
        with work as parent, JuiceFS(parent / "volume", name="tierd-bench") as volume:
            volume.format()
            yield volume.mount(parent / "source").mountpoint

    def mount(self, source: Path) -> contextlib.AbstractContextManager[Tierd]:
        """An overlay of `source`, with a daemon of its own."""
        return mounts.tierd_mount(source, self.work / "overlay")


def sequential(bench: Bench) -> Section:
    """GB/s (10^9 bytes) of one process reading one incompressible file with 1 MiB preads, open included.

    Cold: before each round the file's pages on the source and on the overlay are dropped, by fadvise and by
    writing 3 to drop_caches. Warm: the same read again right after, from whatever the kernel kept.
    """
    with bench.plain() as source:
        mounts.fill(source / "big.bin", bench.size_bytes)
        with bench.mount(source) as tierd:

            def measure(root: Path, _round: int) -> Figures:
                for path in (source, tierd.mountpoint):
                    mounts.drop_pages(path / "big.bin")
                drop_caches(3)
                tierd.settle()
                cold = _read_speed(root / "big.bin", bench.size_bytes)
                warm = _read_speed(root / "big.bin", bench.size_bytes)
                return {("cold", "GB/s"): cold, ("warm", "GB/s"): warm}

            rows = interleave(bench.rounds, source, tierd.mountpoint, measure)
            notes = [f"tierd's data path: {tierd.status().get('data_path')}"]
    speed, ratio = rows[0].overlay_median, rows[0].ratio or 0.0
    found = f"{number(speed)} GB/s, {number(ratio)} x"
    bar = Bar("cold: >= 0.8 GB/s, or >= 0.4 x the local file", found, speed >= 0.8 or ratio >= 0.4)
    return Section("sequential", _how(sequential), rows, [bar], notes)


def listing(bench: Bench) -> Section:
    """Seconds of `ls -lR` over 10,000 empty files in 100 directories, output discarded.

    Dropped: before each listing 2 is written to drop_caches and the daemon is left to finish its forgets.
    Kept: the same listing again right after. On a plain directory and on a real JuiceFS mount.
    """
    rows: list[Row] = []
    for kind, open_source in _sources(bench):
        with open_source() as source:
            make_tree(source / "tree", 100, bench.count(100))
            with bench.mount(source) as tierd:
                rows += _listing_rows(bench, kind, tierd)
    ratios = {row.what: row.ratio or float("inf") for row in rows}
    bars = [Bar(f"{what}: <= 3 x the source", f"{number(ratio)} x", ratio <= 3) for what, ratio in ratios.items()]
    return Section("listing", _how(listing), rows, bars)


def stat_under_load(bench: Bench) -> Section:
    """Milliseconds of os.stat in one process, in a tight loop, while 32 processes stream a file each.

    The readers use 1 MiB preads and drop their own pages after each pass, so that they keep reaching the
    daemon (or, on the source, the disk). Cached: 8 files in turn, which the kernel's attribute cache mostly
    answers. Fresh: each name once, in a directory that this round is the first to use, after 2 was written to
    drop_caches, so that each stat is a LOOKUP in the daemon. At most 2 s and 500,000 stats each. Percentiles
    are per round. When the kernel answers, the loop takes a whole CPU from the readers; their speed is a row.
    """
    streams, fresh = [f"stream-{index:02}.bin" for index in range(READERS)], bench.count(STAT_NAMES)
    with bench.plain() as source:
        for name in streams:
            mounts.fill(source / name, max(MIB, bench.size_bytes // READERS))
        make_tree(source / "names", bench.rounds, fresh)
        with bench.mount(source) as tierd:

            def measure(root: Path, round_: int) -> Figures:
                drop_caches(2)
                tierd.settle()
                names = [str(root / "names" / name) for name in tree_names(round_, fresh)]
                few = itertools.cycle([str(root / name) for name in streams[:STAT_FEW]])
                with mounts.streaming([root / name for name in streams]) as moved_bytes:
                    moved, began = moved_bytes(), time.monotonic()
                    figures = _stat_figures("fresh", names) | _stat_figures("cached", few)
                    speed = (moved_bytes() - moved) / (time.monotonic() - began) / GB
                return figures | {("all readers together", "GB/s"): speed}

            rows = interleave(bench.rounds, source, tierd.mountpoint, measure)
    bars = [_stat_bar(row) for row in rows if row.what.endswith("p99")]
    return Section("stat_under_load", _how(stat_under_load), rows, bars)


def memory(bench: Bench) -> Section:
    """Resident memory in MB (10^6 bytes) of the daemon and its children over ten walks of 100,000 files.

    A walk is os.walk and os.stat of each of 1000 x 100 empty files through the overlay. It is measured right
    after the walk, and again after 2 was written to drop_caches and the daemon went quiet: by then the kernel
    has sent its forgets. Always ten walks, and the spread is over them; the source is walked once. Growth is that from
    the fourth walk to the last: in the first three the allocator's arenas fill up, and stay.
    """
    before, after, seconds = array("d"), array("d"), array("d")
    files = 1000 * bench.count(100)
    with bench.plain() as source:
        make_tree(source / "tree", 1000, bench.count(100))
        with bench.mount(source) as tierd:
            drop_caches(2)
            on_source = _walk_seconds(source / "tree", files)
            drop_caches(2)
            mounted = tierd.rss_bytes() / MB
            for _ in range(WALKS):
                seconds.append(_walk_seconds(tierd.mountpoint / "tree", files))
                before.append(tierd.rss_bytes() / MB)
                drop_caches(2)
                tierd.settle(quiet_s=1.0)
                after.append(tierd.rss_bytes() / MB)
    rows = [
        alone("mounted", "MB", mounted),
        alone("after a walk", "MB", *before),
        alone("after a walk and the drop", "MB", *after),
        Row("walk", "s", Spread.of([on_source]), Spread.of(seconds)),
    ]
    growth = max(values[-1] - values[ARENA_WALKS] for values in (before, after))
    limit = f"no growth: last walk within {number(MEMORY_GROWTH_MB_MAX)} MB of the fourth, also after the drop"
    bars = [
        Bar("after the first walk: <= 150 MB", f"{number(before[0])} MB", before[0] <= 150),
        Bar(limit, f"{growth:+.1f} MB", growth <= MEMORY_GROWTH_MB_MAX),
    ]
    return Section("memory", _how(memory), rows, bars)


def metric_series(bench: Bench) -> Section:
    """Number of series at /metrics (lines that are not comments) before and after 100,000 distinct names.

    The names are 1-byte files of five models, `models/org/NAME`, each opened, read and closed once through the
    overlay. A model may have series, a file name may not: so the bar compares the count after one file of each
    model with the count after all files. Each count is taken when the daemon has gone quiet.
    """
    each = bench.count(100_000 // MODELS)
    with bench.plain() as source:
        make_tree(source / "models" / "org", MODELS, each, b"x")  # each directory is a model
        with bench.mount(source) as tierd:
            root = tierd.mountpoint / "models" / "org"
            names = [str(root / name) for model in range(MODELS) for name in tree_names(model, each)]
            mounted = tierd.series()
            one, _ = _series_after(tierd, names[:1])
            before, _ = _series_after(tierd, names[::each])
            after, seconds = _series_after(tierd, names)
    rows = [
        alone("when mounted", "series", len(mounted)),
        alone("after 1 file", "series", len(one)),
        alone(f"after 1 file of each of {MODELS} models", "series", len(before)),
        alone(f"after {len(names)} files", "series", len(after)),
        alone("open, read and close", "ms each", seconds / len(names) * 1e3),
    ]
    notes = [f"new series: {name}" for name in sorted(after - before)[:10]]
    bar = Bar("no series for a file name", f"{len(before)}, then {len(after)}", len(before) == len(after))
    return Section("metric_series", _how(metric_series), rows, [bar], notes)


def open_close(bench: Bench) -> Section:
    """Microseconds of os.open (read-only) and os.close of one small file, 2000 times a round, caches kept.

    Percentiles are per round. For the record: there is no bar.
    """
    with bench.plain() as source:
        (source / "file").write_bytes(b"x")
        with bench.mount(source) as tierd:

            def measure(root: Path, _round: int) -> Figures:
                name, clock, samples = str(root / "file"), time.perf_counter_ns, array("q")
                for _ in range(OPENS):
                    began = clock()
                    os.close(os.open(name, os.O_RDONLY))
                    samples.append(clock() - began)
                return {(f"p{rank}", "us"): percentile(samples, rank / 100) / 1e3 for rank in (50, 99)}

            rows = interleave(bench.rounds, source, tierd.mountpoint, measure)
    return Section("open_close", _how(open_close), rows)


MEASUREMENTS: dict[str, Callable[[Bench], Section]] = {
    measurement.__name__: measurement
    for measurement in (sequential, listing, stat_under_load, memory, metric_series, open_close)
}


def _how(measurement: Callable[[Bench], Section]) -> str:
    """The docstring of a measurement is what a reader of its figures needs."""
    return " ".join((measurement.__doc__ or "").split())


def _read_speed(path: Path, size_bytes: int) -> float:
    """GB/s of reading a whole file; RuntimeError when its size is not `size_bytes`."""
    began = time.perf_counter()
    read = mounts.read_through(path)
    seconds = time.perf_counter() - began
    if read != size_bytes:
        raise RuntimeError(f"read {read} bytes of a file of {size_bytes}")
    return read / seconds / GB


def _sources(bench: Bench) -> Iterator[tuple[str, Callable[[], contextlib.AbstractContextManager[Path]]]]:
    if bench.source_kind in ("dir", "both"):
        yield "directory", bench.plain
    if bench.source_kind in ("juicefs", "both"):
        yield "JuiceFS", bench.juicefs


def _listing_rows(bench: Bench, kind: str, tierd: Tierd) -> list[Row]:
    def measure(root: Path, _round: int) -> Figures:
        drop_caches(2)
        tierd.settle()
        dropped = _list_seconds(root / "tree")
        return {(f"{kind}, dropped", "s"): dropped, (f"{kind}, kept", "s"): _list_seconds(root / "tree")}

    return interleave(bench.rounds, tierd.source, tierd.mountpoint, measure)


def _list_seconds(tree: Path) -> float:
    environment = {**os.environ, "LC_ALL": "C"}
    began = time.perf_counter()
    subprocess.run(["ls", "-lR", str(tree)], stdout=subprocess.DEVNULL, check=True, env=environment)
    return time.perf_counter() - began


def _stat_figures(what: str, names: Iterable[str]) -> Figures:
    """Percentiles in milliseconds of os.stat of each name, timed in a process of its own."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_stat_loop, args=(names, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(STAT_TIMEOUT_S):
            raise RuntimeError(f"the stat loop did not end within {STAT_TIMEOUT_S:.0f} s")
        nanoseconds = receiver.recv()
    finally:
        process.kill()
        process.join()
    samples = {(f"{what} stats", "number"): nanoseconds.pop("count")}
    return {(f"{what} {label}", "ms"): value / 1e6 for label, value in nanoseconds.items()} | samples


def _stat_loop(names: Iterable[str], sender: Connection) -> None:
    mounts.leave_signals_to_parent()
    stat, clock, samples = os.stat, time.perf_counter_ns, array("q")
    deadline = clock() + int(STAT_SECONDS * 1e9)
    for name in itertools.islice(names, STAT_SAMPLES_MAX):
        began = clock()
        stat(name)
        ended = clock()
        samples.append(ended - began)
        if ended >= deadline:
            break
    ordered = sorted(samples)
    p50, p99 = percentile(ordered, 0.5), percentile(ordered, 0.99)
    sender.send({"p50": p50, "p99": p99, "max": ordered[-1], "count": len(ordered)})


def _stat_bar(row: Row) -> Bar:
    found = f"{number(row.overlay_median)} ms (source {number(row.source_median)} ms)"
    return Bar(f"{row.what}: <= 1 ms", found, row.overlay_median <= 1)


def _walk_seconds(tree: Path, files: int) -> float:
    """Seconds of one os.walk and os.stat of everything; RuntimeError when it does not find `files` files."""
    began, seen = time.perf_counter(), 0
    for directory, _, names in os.walk(tree):
        for name in names:
            os.stat(f"{directory}/{name}")
        seen += len(names)
    if seen != files:
        raise RuntimeError(f"the walk found {seen} files instead of {files}")
    return time.perf_counter() - began


def _series_after(tierd: Tierd, names: list[str]) -> tuple[set[str], float]:
    """The series after reading these files, and the seconds that reading took."""
    began = time.monotonic()
    for name in names:
        mounts.read_through(name)
    seconds = time.monotonic() - began
    tierd.settle()
    return tierd.series(), seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overlay", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    add("--size-gib", type=float, default=2.0, help="the streamed file; also the 32 readers' files together")
    add("--rounds", type=int, default=10, help="interleaved rounds per measurement (default 10)")
    add("--scale", type=float, default=1.0, help="multiplies numbers of files, for a quick try (default 1)")
    add("--source-kind", choices=("dir", "juicefs", "both"), default="both", help="of listing (default both)")
    add("--work-dir", type=Path, help="where to make a temporary directory: on the disk to be measured")
    add("--json", type=Path, metavar="FILE", help="write every sample as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    return parser.parse_args()


def _measure(name: str, bench: Bench) -> Section:
    measurement = MEASUREMENTS[name]
    return section_of(name, _how(measurement), lambda: measurement(bench), bench.scale, "files")


def main() -> int:
    """Runs what the command line asks for; 1 when a measurement did not finish, 130 after Ctrl-C."""
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    settings = {"size_gib": options.size_gib, "rounds": options.rounds, "scale": options.scale}
    report = Report("The overlay against its source", settings)
    size_bytes = int(options.size_gib * 2**30)
    try:
        with mounts.work_directory(options.work_dir) as work:
            bench = Bench(work, size_bytes, options.rounds, options.scale, options.source_kind)
            for name in options.only or MEASUREMENTS:
                console.print(f"measuring {name} ...", style="dim")
                report.sections.append(section := _measure(name, bench))
                section.show(console)
                report.write(options.json, options.markdown)
    except KeyboardInterrupt:
        console.print("interrupted; everything is unmounted and removed", style="bold")
        return 130
    except MountError as error:
        console.print(str(error), style="bold red", markup=False)
        return 1
    return 1 if any(section.error for section in report.sections) else 0


if __name__ == "__main__":
    sys.exit(main())
