"""Draws the model load benchmark: one panel for each layout and loader, a bar for each case, PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.load_report import LoadRow
from bench.report import number

NAME = "model-load"
OURS, OTHERS = "#1b6ca8", "#b9bec6"
ROW_INCHES = 0.27


def draw(panels: Mapping[str, Sequence[LoadRow]], title: str, directory: Path) -> list[Path]:
    """Writes `model-load.png` and `.svg` into `directory`, which is made; the paths. Nothing without rows."""
    shown = {name: rows for name, rows in panels.items() if rows}
    if not shown:
        return []
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    height = ROW_INCHES * max(len(rows) for rows in shown.values()) + 1.1
    # Not through pyplot, which keeps figures of its own and looks for a display.
    figure = Figure(figsize=(6.5 * columns, height * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for position, (name, rows) in enumerate(shown.items(), start=1):
        _panel(figure.add_subplot(lines, columns, position), name, rows)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{NAME}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def _panel(axes: Axes, title: str, rows: Sequence[LoadRow]) -> None:
    medians = [row.seconds.median for row in rows]
    below = [row.seconds.median - row.seconds.min for row in rows]
    above = [row.seconds.max - row.seconds.median for row in rows]
    colours = [OURS if row.case.startswith("tierd") else OTHERS for row in rows]
    labels = [f"{row.case}, {row.state}" for row in rows]
    axes.barh(labels, medians, xerr=[below, above], color=colours, error_kw={"elinewidth": 0.8, "capsize": 2})
    for position, row in enumerate(rows):
        axes.annotate(
            number(row.seconds.median),
            (row.seconds.max, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("seconds to load, median [min .. max]", fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
