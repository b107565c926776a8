"""Measures how long a model takes to load: `python -m bench.model_load --help`. Needs root, /dev/fuse and JuiceFS.

All cases run in one process, in interleaved rounds whose order rotates, because disk and machine swing more from
minute to minute than most changes do. A case that fails is reported and left out; the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench import load_cases, load_report, loaders, mounts
from bench.load_cases import CASES, Case
from bench.load_report import FIGURE_COLUMNS, LOAD_COLUMNS, CaseFigures, Loads, rotated
from bench.load_rig import LAYOUTS, RAW, Layout, Rig
from bench.mounts import MIB
from bench.report import Bar, Report, Section, progress

LOAD_HOW = (
    "Seconds of {loader} over {title}, {mib} MiB in all, from the open of the first file to the last byte in memory. "
    "{detail} First byte: open and read of 8 bytes of the first file. cold: empty caches below and dropped page cache. "
    "dropped: 3 was written to drop_caches. warm: the same load again right after. Ratios are of seconds (below 1 is "
    "faster), of medians, and [min .. max] round by round."
)
DETAILS = {
    "safetensors": "safe_open with numpy and get_tensor of each tensor, one at a time: one copy out of the mapping.",
    "reads": "readinto of one 4 MiB buffer, from start to end of each file.",
}
EPILOG = """\
A first try that takes a minute: python -m bench.model_load --size-mib 64 --rounds 2 --scale 0.1
Only two cases, with a plot:     python -m bench.model_load --only tierd-hot local --plot plots
The names for --only:            python -m bench.model_load --list

Every round measures each case once for one file and for 16 shards, with safetensors and with plain reads. With
the defaults that is about half an hour, and about 25 GiB of disk while it runs. Nothing is left behind after
success, Ctrl-C, SIGTERM or a failure. Exit codes: 0 measured (bars are reported, not enforced), 1 something did
not finish, 130 interrupted.
"""


@dataclass
class Bench:
    """What the measurements share. `scale` multiplies counts and seconds of what is no load; `failed` says why
    a case is left out from then on.
    """

    rig: Rig
    rounds: int
    scale: float
    tick: Callable[[str], None]
    failed: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def attempt(self, case: str, round_: int = -1) -> Iterator[None]:
        """A boundary: whatever goes wrong in one case shall not take the figures of the others away."""
        try:
            yield
        except Exception as error:
            when = f"in round {round_ + 1}" if round_ >= 0 else "when it was prepared"
            self.failed[case] = f"{case} failed {when}: {type(error).__name__}: {error}"

    def alive(self, cases: Sequence[str]) -> list[str]:
        return [case for case in cases if case not in self.failed]

    def problem(self, cases: Sequence[str]) -> str | None:
        """What went wrong with any of these, as the error of a section."""
        return "; ".join(self.failed[case] for case in cases if case in self.failed) or None


class LoadMatrix:
    """Every case, for both layouts and both loaders."""

    def __init__(self, bench: Bench, cases: Sequence[Case]) -> None:
        self._bench = bench
        self._cases = {case.name: case for case in cases}
        self._loads = {
            (layout, loader): Loads(bench.rig.weight_bytes(layout)) for layout in LAYOUTS for loader in loaders.LOADERS
        }

    def prepare(self) -> None:
        """Builds what lasts, compares the bytes that it serves, and lets malloc get the memory that loads reuse."""
        rig, bench = self._bench.rig, self._bench
        for layout, loader in self._loads:
            loaders.timed_load(loader, layout.files(rig.local), rig.weight_bytes(layout))
        for case in self._cases.values():
            bench.tick(f"preparing {case.name}")
            with bench.attempt(case.name):
                load_cases.verify(rig, case)
        if "local-tuned" in self._cases and "tierd-hot" not in self._cases:
            with bench.attempt("local-tuned"):
                _ = rig.hot  # only tierd knows what it sets
        if not rig.settings:
            self._cases.pop("local-tuned", None)

    def run_round(self, round_: int) -> None:
        """Each case once for each layout and loader; the same ones follow each other, in an order that rotates."""
        for (layout, loader), loads in self._loads.items():
            for name in rotated(list(self._cases), round_):
                self._bench.tick(f"round {round_ + 1}: {layout.title}, {loader}, {name}")
                if name not in self._bench.failed:
                    with self._bench.attempt(name, round_):
                        self._measure(self._cases[name], layout, loader, loads)

    def sections(self) -> list[Section]:
        """A section for each layout and loader, with what is there so far."""
        return [self._section(layout, loader, loads) for (layout, loader), loads in self._loads.items()]

    def panels(self) -> dict[str, list[load_report.LoadRow]]:
        """The rows to draw."""
        return {f"{layout.title}, {loader}": loads.rows(self._cases) for (layout, loader), loads in self._loads.items()}

    def _measure(self, case: Case, layout: Layout, loader: str, loads: Loads) -> None:
        self._bench.rig.set_device(tuned=case.tuned)
        loads.add(case.name, case.measure(self._bench.rig, layout, loader))

    def _section(self, layout: Layout, loader: str, loads: Loads) -> Section:
        mib = loads.size_bytes // MIB
        how = LOAD_HOW.format(loader=loader, title=layout.title, mib=mib, detail=DETAILS[loader])
        notes = [*load_report.load_notes(loads), *_device_notes(self._bench.rig)]
        bars = load_report.load_bars(layout.title, loader, loads)
        error = self._bench.problem(list(self._cases))
        name = f"Load {layout.title} with {loader}"
        return Section(name, how, loads.rows(self._cases), bars, notes, error, LOAD_COLUMNS)


def raw(bench: Bench) -> Section:
    """Reading one hot file of twice the size in plain ways, with 1 MiB preads, 4 KiB preads at random places (the
    interpreter takes about half of each) and a copy out of a mapping, beside a bare local file. Ratios are of speeds.
    """
    sides = ["local", "local-tuned", "tierd-hot"]
    with bench.attempt("tierd-hot"):
        _ = bench.rig.hot
    if not bench.rig.settings:
        sides.remove("local-tuned")
    figures = _rounds(bench, sides, lambda side, round_: load_cases.raw_reads(bench.rig, side, round_, bench.scale))
    return _section(bench, raw, "Raw reads of a hot file", figures, load_report.raw_bars(figures), sides)


def open_close(bench: Bench) -> Section:
    """Microseconds of os.open (read-only) and os.close of one shard, caches kept, in 20 interleaved batches of 100.
    A sample is the percentile of one batch.
    """
    sides, figures = ["local", "juicefs-cached", "tierd-hot"], CaseFigures()
    bench.tick("open and close")
    with bench.attempt("open-close", 0):
        for side, batches in load_cases.open_close(bench.rig, sides, bench.scale).items():
            for p50, p99 in batches:
                figures.add(side, {("open+close p50", "us"): p50, ("open+close p99", "us"): p99})
    return _section(bench, open_close, "Open and close", figures, load_report.open_bars(figures), ["open-close"])


def pods(bench: Bench) -> Section:
    """Eight processes load the same cold model of 16 shards with safetensors, all starting at once; JuiceFS and node
    tier are empty. Bytes of the source: what JuiceFS gave to its readers until the node tier was complete.
    """
    sides = ["juicefs-cold", "tierd-first"]
    figures = _rounds(bench, sides, lambda side, _: load_cases.eight_pods(bench.rig, side))
    return _section(bench, pods, "Eight processes, one cold model", figures, load_report.pod_bars(figures), sides)


def cpu(bench: Bench) -> Section:
    """CPU time of the daemon while four processes read a hot file out of memory for 10 s, with 1 MiB preads, opening
    it anew after each pass.
    """
    figures = CaseFigures()
    bench.tick("CPU of the daemon")
    with bench.attempt("cpu", 0):
        figures.add("tierd-hot", load_cases.daemon_cpu(bench.rig, bench.scale))
    return _section(bench, cpu, "CPU of the daemon", figures, load_report.cpu_bars(figures), ["cpu"])


OTHERS: dict[str, Callable[[Bench], Section]] = {"raw": raw, "open-close": open_close, "pods": pods, "cpu": cpu}


def _rounds(
    bench: Bench, sides: Sequence[str], measure: Callable[[str, int], dict[tuple[str, str], float]]
) -> CaseFigures:
    figures = CaseFigures()
    for round_ in range(bench.rounds):
        for side in rotated(bench.alive(sides), round_):
            bench.tick(f"round {round_ + 1}: {side}")
            with bench.attempt(side, round_):
                bench.rig.set_device(tuned=side not in ("local", "juicefs-cold"))
                figures.add(side, measure(side, round_))
    return figures


def _section(
    bench: Bench,
    measurement: Callable[[Bench], Section],
    name: str,
    figures: CaseFigures,
    bars: list[Bar],
    cases: Sequence[str],
) -> Section:
    how = " ".join((measurement.__doc__ or "").split())
    return Section(name, how, figures.rows(), bars, _device_notes(bench.rig), bench.problem(cases), FIGURE_COLUMNS)


def _device_notes(rig: Rig) -> list[str]:
    return [
        f"{setting.path}: {setting.found} as found, {setting.tuned} for tierd's cases and local-tuned"
        for setting in rig.settings
    ]


def _arguments() -> argparse.Namespace:
    names = [case.name for case in CASES] + list(OTHERS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.model_load",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=names, metavar="CASE", help="measure these; ratios need local and juicefs-cached")
    add("--list", action="store_true", help="list the cases and end")
    add("--size-mib", type=_at_least_one, default=1024, help="size of each model (default 1024)")
    add("--rounds", type=_at_least_one, default=10, help="interleaved rounds (default 10)")
    add("--scale", type=float, default=1.0, help="multiplies opens, random reads and seconds of load (default 1)")
    add("--work-dir", type=Path, help="where to make a temporary directory: on the disk to be measured")
    add("--json", type=Path, metavar="FILE", help="write every sample as JSON, anew after each round")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown, anew after each round")
    add("--plot", type=Path, metavar="DIR", help="write the load times as model-load.png and model-load.svg")
    return parser.parse_args()


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _list(console: Console) -> None:
    table = Table("case", "what", box=None)
    for case in CASES:
        table.add_row(case.name, case.what)
    for name, measurement in OTHERS.items():
        table.add_row(name, " ".join((measurement.__doc__ or "").split()).split(". ")[0].rstrip("."))
    console.print(table)


def _steps(cases: Sequence[Case], others: Sequence[str], rounds: int) -> int:
    """How often `tick` is called, about."""
    sides = {"raw": 3 * rounds, "open-close": 1, "pods": 2 * rounds, "cpu": 1}
    return len(cases) * (4 * rounds + 1) + sum(sides[name] for name in others) + 1


def _measure(rig: Rig, options: argparse.Namespace, report: Report) -> None:
    """Runs what was asked for; the report has every section that is there when it ends or is interrupted."""
    wanted = options.only or [case.name for case in CASES] + list(OTHERS)
    cases, others = [case for case in CASES if case.name in wanted], [name for name in OTHERS if name in wanted]
    with progress(Console(stderr=True), _steps(cases, others, options.rounds)) as tick:
        bench = Bench(rig, options.rounds, options.scale, tick)
        tick(f"writing models of {options.size_mib} MiB, locally and into JuiceFS")
        rig.make_models([*LAYOUTS, RAW] if "raw" in others else LAYOUTS)
        if cases:
            _measure_loads(bench, cases, options, report)
        for name in others:
            report.sections.append(OTHERS[name](bench))
            report.write(options.json, options.markdown)


def _measure_loads(bench: Bench, cases: Sequence[Case], options: argparse.Namespace, report: Report) -> None:
    matrix = LoadMatrix(bench, cases)
    matrix.prepare()
    for round_ in range(bench.rounds):
        matrix.run_round(round_)
        report.sections = matrix.sections()
        report.write(options.json, options.markdown)
    if options.plot is not None:
        from bench.load_plot import draw  # half a second, and not everybody draws

        draw(matrix.panels(), f"Seconds to load a model of {options.size_mib} MiB, {bench.rounds} rounds", options.plot)


def main() -> int:
    """Runs what the command line asks for; 1 when something did not finish, 130 after Ctrl-C."""
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.list:
        _list(console)
        return 0
    settings = {"size_mib": options.size_mib, "rounds": options.rounds, "scale": options.scale}
    report = Report("How long a model takes to load", settings)
    loaders.reuse_memory()
    code = 0
    try:
        with mounts.work_directory(options.work_dir) as work, Rig(work, options.size_mib * MIB) as rig:
            rig.check_room()
            _measure(rig, options, report)
    except KeyboardInterrupt:
        console.print("interrupted; everything is unmounted and removed", style="bold")
        code = 130
    except (OSError, RuntimeError, psutil.Error) as error:
        console.print(f"{type(error).__name__}: {error}", style="bold red", markup=False)
        code = 1
    report.show(console)
    return code or int(any(section.error for section in report.sections))


if __name__ == "__main__":
    sys.exit(main())
