"""Rounds, statistics, tables and files for benchmark results; it measures nothing itself.

A `Report` holds `Section`s, one per measurement; a section holds `Row`s (the same quantity on the source and
on the overlay, one sample per round) and `Bar`s (a limit, and whether the figures meet it).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = ("what", "unit", "source", "overlay", "overlay / source")
BAR_STYLES = {True: "green", False: "bold red", None: "dim"}

Figures = dict[tuple[str, str], float]
"""What one side gave in one round: (what, unit) to value."""


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile: the smallest sample that `fraction` (0 to 1) of all do not exceed."""
    if not samples:
        raise ValueError("percentile of no samples")
    rank = -(-len(samples) * fraction // 1)  # ceil
    return sorted(samples)[max(0, int(rank) - 1)]


@dataclass(frozen=True)
class Spread:
    """Samples of one quantity in the order they were taken, one per round; shown as median [min .. max]."""

    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Builds one from any samples; ValueError when there are none."""
        kept = tuple(samples)
        if not kept:
            raise ValueError("a spread needs at least one sample")
        return cls(kept)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def max(self) -> float:
        return max(self.samples)

    def __str__(self) -> str:
        if len(self.samples) == 1:
            return number(self.samples[0])
        return f"{number(self.median)} [{number(self.min)} .. {number(self.max)}]"

    def as_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": self.min, "max": self.max, "samples": list(self.samples)}


@dataclass(frozen=True)
class Row:
    """One quantity in `unit`. `source` and `overlay` samples with the same index come from the same round."""

    what: str
    unit: str
    source: Spread | None
    overlay: Spread | None

    @property
    def source_median(self) -> float:
        """NaN where the source was not measured."""
        return self.source.median if self.source is not None else math.nan

    @property
    def overlay_median(self) -> float:
        """NaN where the overlay was not measured."""
        return self.overlay.median if self.overlay is not None else math.nan

    @property
    def ratio(self) -> float | None:
        """Median of the overlay divided by the median of the source; None where one side was not measured."""
        if self.source is None or self.overlay is None or self.source.median == 0:
            return None
        return self.overlay.median / self.source.median

    @property
    def ratio_by_round(self) -> Spread | None:
        """Overlay divided by source, round by round: how far the ratio moved while the machine did."""
        if self.source is None or self.overlay is None or 0 in self.source.samples:
            return None
        if len(self.source.samples) != len(self.overlay.samples):
            return None
        pairs = zip(self.overlay.samples, self.source.samples, strict=True)
        return Spread.of(overlay / source for overlay, source in pairs)

    def cells(self) -> tuple[str, str, str, str, str]:
        """The row as text, in the order of `COLUMNS`."""
        ratio, by_round = self.ratio, self.ratio_by_round
        text = "-" if ratio is None else number(ratio)
        if by_round is not None and len(by_round.samples) > 1:
            text += f" [{number(by_round.min)} .. {number(by_round.max)}]"
        source = "-" if self.source is None else str(self.source)
        return self.what, self.unit, source, "-" if self.overlay is None else str(self.overlay), text

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "source": self.source and self.source.as_json(),
            "overlay": self.overlay and self.overlay.as_json(),
            "ratio": self.ratio,
            "ratio_by_round": self.ratio_by_round and self.ratio_by_round.as_json(),
        }


def alone(what: str, unit: str, *samples: float) -> Row:
    """A row of the overlay that has no counterpart on the source."""
    return Row(what, unit, None, Spread.of(samples))


def interleave(rounds: int, source: Path, overlay: Path, measure: Callable[[Path, int], Figures]) -> list[Row]:
    """Calls `measure(root, round)` for both sides in each round, the overlay first in every second one."""
    found: dict[Path, dict[tuple[str, str], list[float]]] = {
        source: defaultdict(list),
        overlay: defaultdict(list),
    }
    for index in range(rounds):
        for root in (source, overlay) if index % 2 == 0 else (overlay, source):
            for key, value in measure(root, index).items():
                found[root][key].append(value)
    return [
        Row(what, unit, Spread.of(samples), Spread.of(found[overlay][what, unit]))
        for (what, unit), samples in found[source].items()
    ]


@dataclass(frozen=True)
class Bar:
    """A limit in words, the figure that was held against it in words, and whether it is met; None: not measured."""

    limit: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "MET", False: "MISSED", None: "NOT MEASURED"}[self.met]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.limit}" + ("" if self.met is None else f"; found {self.found}")


class Line(Protocol):
    """What a section needs of a row: its cells, in the order of the section's columns."""

    def cells(self) -> tuple[str, ...]: ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass
class Section:
    """One measurement: its name, how it was taken, its figures. `error` is set when it did not finish."""

    name: str
    how: str
    rows: Sequence[Line] = ()
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    columns: Sequence[str] = COLUMNS

    def as_json(self) -> dict[str, Any]:
        bars = [{"limit": bar.limit, "found": bar.found, "met": bar.met} for bar in self.bars]
        rows = [row.as_json() for row in self.rows]
        return {
            "name": self.name,
            "how": self.how,
            "rows": rows,
            "bars": bars,
            "notes": self.notes,
            "error": self.error,
        }

    def as_markdown(self) -> str:
        lines = [f"## {self.name}", "", self.how, ""]
        if self.rows:
            lines += [_markdown_row(self.columns), _markdown_row(("---",) * len(self.columns))]
            lines += [_markdown_row(row.cells()) for row in self.rows]
            lines.append("")
        remarks = [str(bar) for bar in self.bars] + self.notes
        if self.error is not None:
            remarks.append(f"NOT FINISHED: {self.error}")
        lines += [f"- {remark}" for remark in remarks]
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        """Prints the table, how it was taken, then a line per bar, note and error."""
        table = Table(*self.columns, title=self.name, title_justify="left")
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row.cells()))
        console.print(table)
        console.print(self.how, style="dim", markup=False, highlight=False)
        for bar in self.bars:
            console.print(str(bar), style=BAR_STYLES[bar.met], markup=False, highlight=False)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False)
        if self.error is not None:
            console.print(f"NOT FINISHED: {self.error}", style="bold red", markup=False)


def _machine() -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the machine."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


FAILURES = (OSError, RuntimeError, KeyError, ValueError, subprocess.SubprocessError, psutil.Error)
"""What a measurement may end with; any other error is a defect of the benchmark."""


def section_of(name: str, how: str, measure: Callable[[], Section], scale: float, what: str) -> Section:
    """What is measured; a failure becomes the section's `error`, so that the others still run. `scale` is by how much
    the numbers of `what` were multiplied."""
    try:
        section = measure()
    except FAILURES as error:
        section = Section(name, how, error=f"{type(error).__name__}: {error}")
    if scale != 1:
        section.notes.append(f"with {scale:g} x the number of {what}; the bars are meant for 1")
    return section


@dataclass
class Report:
    """Every section of one run, with the machine and the settings it was taken with."""

    title: str
    settings: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=_machine)
    taken_at: str = field(default_factory=_now)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "taken_at": self.taken_at,
            "machine": self.machine,
            "settings": self.settings,
            "sections": [section.as_json() for section in self.sections],
        }

    def as_markdown(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in {**self.machine, **self.settings}.items())
        head = f"# {self.title}\n\nTaken {self.taken_at}: {facts}.\n\nCells: median [min .. max].\n\n"
        return head + "\n".join(section.as_markdown() for section in self.sections)

    def show(self, console: Console) -> None:
        """Prints every section, then all bars together."""
        for section in self.sections:
            section.show(console)
        table = Table("bar", "found", "", title="Bars", title_justify="left")
        for bar in (bar for section in self.sections for bar in section.bars):
            table.add_row(bar.limit, bar.found, bar.verdict, style=BAR_STYLES[bar.met])
        if table.row_count:
            console.print(table)

    def write(self, json_file: Path | None, markdown_file: Path | None) -> None:
        """Writes the files asked for; call it after each section, so that an interrupted run keeps them."""
        if json_file is not None:
            _replace(json_file, json.dumps(self.as_json(), indent=2) + "\n")
        if markdown_file is not None:
            _replace(markdown_file, self.as_markdown())


@contextlib.contextmanager
def progress(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; elsewhere a line when ten seconds have passed since the last one."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=steps)
        told = time.monotonic()

        def tick(what: str) -> None:
            nonlocal told
            now = time.monotonic()
            bars.update(task, description=what, advance=1)
            if not console.is_terminal and now - told > 10:
                console.print(what, style="dim")
                told = now

        yield tick


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 12.3, 1234; integers as they are."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if float(value).is_integer() or size >= 1000:
        return f"{value:.0f}"
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if size >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _replace(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that Ctrl-C leaves the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
