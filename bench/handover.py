"""Measures what pods notice when the daemon is replaced: `python -m bench.handover --help`. Needs root and Linux 6.9.

Bars are reported, not enforced; calls that fail, or that are answered wrongly, are counted, and have a bar of 0.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import handover_load, mounts
from bench.handover_load import Load
from bench.handover_rig import (
    BY_KERNEL,
    COLUMNS,
    Line,
    Serving,
    Tree,
    answered,
    open_call,
    serving,
    stat_call,
    write_files,
)
from bench.juicefs import JuiceFS
from bench.mounts import MountError, make_tree, tree_names
from bench.report import Bar, Report, Section, Spread, number, percentile, progress, section_of

KILLS_A_ROUND = 10
SETTLED_S = 0.5
BEFORE_KILL_S = 0.3
PAUSE_S = (1.1, 1.6)
"""Between two kills: a daemon that served for less than a second makes the keeper wait before the next one starts."""
EXPIRED_S = 1.6
"""After so long the kernel asks again for every name and attribute that it knows."""
HUNG_S = 0.5
STAT_FILES, JUICEFS_STAT_FILES = 4000, 400
KNOWN_FILES = 100_000
CACHED_FILES = 500
CACHED_BYTES = 256 * 1024
DIRECTORIES = 1000
DAEMON, KEEPER, NODES = "daemon, resident", "keeper, resident", "files and directories that the kernel knows"
UNITS = {DAEMON: "MB", KEEPER: "MB", NODES: "number"}


@dataclass
class Bench:
    """What the measurements share. `scale` multiplies numbers of files and kills; the bars are meant for 1."""

    work: Path
    rounds: int
    scale: float
    tick: Callable[[str], None]

    def count(self, full: int) -> int:
        """A number, scaled; at least 1."""
        return max(1, round(full * self.scale))

    @property
    def mountpoint(self) -> Path:
        """Of the overlay."""
        return self.work / "overlay"


def upgrade(bench: Bench) -> Section:
    """`tierd upgrade` under load, and the same load for as long with no upgrade, in turns.

    The load is a process with a thread each that reads an open hot file, opens and reads hot files, reads a small
    file (by the daemon, its pages dropped before each read), stats 4000 names in turn, creates, renames and unlinks,
    appends; all without a pause, every answer checked. Stalls are the longest call of a round in milliseconds.
    """
    began: list[tuple[float, float, float]] = []
    with _loaded(bench) as (mount, load):
        for _ in range(bench.rounds):
            start = time.monotonic()
            mount.upgrade()
            time.sleep(SETTLED_S)
            middle = time.monotonic()
            time.sleep(middle - start)
            began.append((start, middle, time.monotonic()))
            bench.tick("upgrade")
    with_it = {c.kind: [c.longest(start, middle) * 1e3 for start, middle, _ in began] for c in load.calls}
    without = {c.kind: [c.longest(middle, end) * 1e3 for _, middle, end in began] for c in load.calls}
    lines = [Line(kind, "ms", Spread.of(with_it[kind]), Spread.of(without[kind])) for kind in with_it]
    total, beside = _largest(with_it), _largest(without)
    lines.append(Line("longest stall of all", "ms", total, beside))
    lines.append(Line("tierd upgrade", "s", Spread.of(middle - start - SETTLED_S for start, middle, _ in began)))
    found = f"{number(total.max)} ms (without an upgrade {number(beside.max)} ms)"
    bars = [_failures_bar(load, "upgrade"), Bar("upgrade: longest stall <= 1 s", found, total.max <= 1000)]
    return Section("upgrade", _how(upgrade), lines, bars, _notes(load), columns=COLUMNS)


def kill(bench: Bench) -> Section:
    """SIGKILL for the daemon under the load of `upgrade`, ten times a round, 1.1 to 1.6 s after the last one serves.

    In flight are the calls that had begun at the kill and were not answered, those excepted that the kernel answers
    by itself; their wait is counted from the kill. Undisturbed: the same from a moment 0.3 s before each kill.
    """
    kills: list[float] = []
    took: list[float] = []
    resent = 0
    with _loaded(bench) as (mount, load):
        for _ in range(bench.rounds):
            for _ in range(bench.count(KILLS_A_ROUND)):
                time.sleep(random.uniform(*PAUSE_S))
                pid, at = mount.kill()
                mount.succeeded(pid)
                kills.append(at)
                took.append((time.monotonic() - at) * 1e3)
                resent += mount.status()["counters"]["resent"]
            bench.tick("kill")
    kinds = [calls.kind for calls in load.calls if calls.kind not in BY_KERNEL]
    waits = [wait * 1e3 for wait in load.waits(kills, kinds)]
    beside = [wait * 1e3 for wait in load.waits([at - BEFORE_KILL_S for at in kills], kinds)]
    figures = {f"p{rank}": lambda waits, rank=rank: percentile(waits, rank / 100) for rank in (50, 99)} | {"max": max}
    lines = [
        Line(f"wait of a call in flight, {what}", "ms", Spread.of([figure(waits)]), Spread.of([figure(beside)]))
        for what, figure in figures.items()
    ]
    lines.append(Line("until the next daemon answers its admin socket", "ms", Spread.of(took)))
    p99 = percentile(waits, 0.99)
    bars = [_failures_bar(load, "kill"), Bar("kill: p99 <= 2 s", f"{number(p99)} ms", p99 <= 2000)]
    notes = [f"{len(kills)} kills, {len(waits)} calls in flight, {resent} requests sent again", *_notes(load)]
    return Section("kill", _how(kill), lines, bars, notes, columns=COLUMNS)


def restart(bench: Bench) -> Section:
    """SIGKILL for a daemon that the kernel knows 100,000 files of, and whose node tier holds 500 of 256 KiB.

    The files are made known by one `find -ls` of 1000 x 100 empty files (what `ls -lR` asks, without the ACL of each
    file). Each round kills the daemon when the kernel no longer trusts what it knows, and at that moment makes two
    calls, at once: stat of a known file, and open, read and close of a file of the node tier. Seconds are counted
    from the kill to each one's answer; undisturbed are the same calls before it, to other files.
    """
    found: dict[str, list[float]] = defaultdict(list)
    beside: dict[str, list[float]] = defaultdict(list)
    with _plain(bench) as source:
        known = bench.count(KNOWN_FILES // DIRECTORIES)
        make_tree(source / "tree", DIRECTORIES, known)
        names = [f"models/m{number % 5}/{number}.safetensors" for number in range(bench.count(CACHED_FILES))]
        hot = write_files(source, names, CACHED_BYTES)
        with serving(source, bench.mountpoint) as mount:
            _make_known(mount, names)
            bench.tick("restart: everything is known")
            _add(beside, _sizes(mount))
            for round_ in range(bench.rounds):
                for figures, killing in ((beside, False), (found, True)):
                    time.sleep(EXPIRED_S)
                    file = random.choice(tree_names(random.randrange(DIRECTORIES), known))
                    model = names[(2 * round_ + killing) % len(names)]
                    calls = {
                        "stat": stat_call(mount.mountpoint / "tree" / file, 0),
                        "hot open": open_call(mount.mountpoint / model, hot[model]),
                    }
                    pid, at = mount.kill() if killing else (0, None)
                    _add(figures, answered(calls, at))
                    if killing:
                        mount.succeeded(pid)
                        _add(figures, _sizes(mount))
                bench.tick("restart")
    lines = [Line(what, UNITS.get(what, "s"), Spread.of(found[what]), Spread.of(beside[what])) for what in found]
    worst = {what: max(found[what]) for what in ("stat", "hot open")}
    bars = [Bar(f"restart: {what} <= 2 s", f"{number(most)} s at most", most <= 2) for what, most in worst.items()]
    most = max(found[KEEPER] + beside[KEEPER])
    bars.append(Bar("keeper < 20 MB", f"{number(most)} MB", most < 20))
    return Section("restart", _how(restart), lines, bars, columns=COLUMNS)


def hanging_source(bench: Bench) -> Section:
    """A source that hangs, and a daemon that is killed while it waits for it, over a real JuiceFS (SQLite metadata).

    JuiceFS's process is stopped (SIGSTOP) under a load of stat, create, rename, unlink and append. Once every
    thread has been waiting for half a second, a hot file is opened and read (undisturbed: the daemon lives), then
    another one right after SIGKILL for the daemon: seconds from the kill to its bytes. Then JuiceFS goes on, and every
    call that hung must be answered rightly.
    """
    found: list[float] = []
    beside: list[float] = []
    after: list[float] = []
    with mounts.work_directory(bench.work) as work, JuiceFS(work / "volume", name="tierd-bench") as volume:
        volume.format()
        juicefs = volume.mount(work / "source")
        tree = Tree(juicefs.mountpoint, bench.mountpoint, bench.count(JUICEFS_STAT_FILES))
        with serving(juicefs.mountpoint, bench.mountpoint) as mount:
            tree.fill(mount)
            bench.tick("hanging source: filled")
            with handover_load.running(tree.source_works()) as load:
                for round_ in range(bench.rounds):
                    time.sleep(EXPIRED_S)
                    hot = list(tree.hot.items())
                    hits = [open_call(*hot[(round_ + turn) % len(hot)]) for turn in range(2)]
                    with juicefs.frozen():
                        _await(lambda: load.shortest_wait() > HUNG_S, "every call hangs")
                        beside.append(answered({"hit": hits[0]})["hit"])
                        time.sleep(EXPIRED_S)
                        pid, at = mount.kill()
                        found.append(answered({"hit": hits[1]}, at)["hit"])
                    after.append(_seconds_to_answers(load))
                    mount.succeeded(pid)
                    bench.tick("hanging source")
    lines = [
        Line("open and read of a hot file", "s", Spread.of(found), Spread.of(beside)),
        Line("until the last call that hung is answered, once the source goes on", "s", Spread.of(after)),
    ]
    bars = [
        Bar("hanging source: a hit <= 5 s after the kill", f"{number(max(found))} s at most", max(found) <= 5),
        _failures_bar(load, "hanging source"),
    ]
    return Section("hanging_source", _how(hanging_source), lines, bars, _notes(load), columns=COLUMNS)


MEASUREMENTS: dict[str, Callable[[Bench], Section]] = {
    measurement.__name__: measurement for measurement in (upgrade, kill, restart, hanging_source)
}


def _how(measurement: Callable[[Bench], Section]) -> str:
    """The docstring of a measurement is what a reader of its figures needs."""
    return " ".join((measurement.__doc__ or "").split())


@contextlib.contextmanager
def _plain(bench: Bench) -> Iterator[Path]:
    """A new plain directory as source, removed afterwards."""
    with mounts.work_directory(bench.work) as parent:
        (parent / "source").mkdir()
        yield parent / "source"


@contextlib.contextmanager
def _loaded(bench: Bench) -> Iterator[tuple[Serving, Load]]:
    """A mount under load; what the load was told is there after the block."""
    with _plain(bench) as source:
        tree = Tree(source, bench.mountpoint, bench.count(STAT_FILES))
        with serving(source, bench.mountpoint) as mount:
            tree.fill(mount)
            with handover_load.running(tree.works()) as load:
                time.sleep(EXPIRED_S)
                yield mount, load


def _make_known(mount: Serving, hot: Sequence[str]) -> None:
    """Loads files into the node tier; then the kernel asks for every name there is."""
    for name in hot:
        mounts.read_through(mount.mountpoint / name)
    mount.await_copies(len(hot))
    subprocess.run(["find", str(mount.mountpoint), "-ls"], stdout=subprocess.DEVNULL, check=True)
    mount.tierd.settle()


def _sizes(mount: Serving) -> dict[str, float]:
    return {DAEMON: mount.rss_mb(), KEEPER: mount.keeper_rss_mb(), NODES: mount.status()["queues"]["inodes"]}


def _add(figures: dict[str, list[float]], more: Mapping[str, float]) -> None:
    for what, value in more.items():
        figures[what].append(value)


def _seconds_to_answers(load: Load) -> float:
    """Until no call waits that began before now."""
    began = time.monotonic()
    _await(lambda: load.longest_wait() < time.monotonic() - began, "the calls that hung are answered")
    return time.monotonic() - began


def _await(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.005)


def _largest(by_kind: dict[str, list[float]]) -> Spread:
    """The largest of all kinds, round by round."""
    return Spread.of(max(values) for values in zip(*by_kind.values(), strict=True))


def _failures_bar(load: Load, what: str) -> Bar:
    calls = sum(len(calls.ended) for calls in load.calls)
    return Bar(f"{what}: no call fails", f"{load.failed} of {calls} failed", load.failed == 0)


def _notes(load: Load) -> list[str]:
    counts = ", ".join(f"{calls.kind} {len(calls.ended)}" for calls in load.calls)
    return [f"calls: {counts}", *load.complaints]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.handover", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    add("--rounds", type=int, default=10, help="upgrades, tens of kills, restarts, hangs (default 10)")
    add("--scale", type=float, default=1.0, help="multiplies numbers of files and kills, for a quick try (default 1)")
    add("--work-dir", type=Path, help="where to make a temporary directory: on the disk of a node tier")
    add("--json", type=Path, metavar="FILE", help="write every sample as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    return parser.parse_args()


def _measure(name: str, bench: Bench) -> Section:
    measurement = MEASUREMENTS[name]
    return section_of(name, _how(measurement), lambda: measurement(bench), bench.scale, "files and kills")


def _steps(names: Sequence[str], rounds: int) -> int:
    """How often `tick` is called."""
    return sum(rounds + (name in ("restart", "hanging_source")) for name in names)


def main() -> int:
    """Runs what the command line asks for; 1 when a measurement did not finish, 130 after Ctrl-C."""
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = Report("When the daemon is replaced", {"rounds": options.rounds, "scale": options.scale})
    names = options.only or list(MEASUREMENTS)
    code = 0
    try:
        with (
            mounts.work_directory(options.work_dir) as work,
            progress(Console(stderr=True), _steps(names, options.rounds)) as tick,
        ):
            for name in names:
                report.sections.append(_measure(name, Bench(work, options.rounds, options.scale, tick)))
                report.write(options.json, options.markdown)
    except KeyboardInterrupt:
        console.print("interrupted; everything is unmounted and removed", style="bold")
        code = 130
    except MountError as error:
        console.print(str(error), style="bold red", markup=False)
        code = 1
    report.show(console)
    return code or int(any(section.error for section in report.sections))


if __name__ == "__main__":
    sys.exit(main())
