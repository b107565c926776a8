"""Rows, ratios and bars of the model load benchmark, from samples to text; it measures and draws nothing.

A case is compared with the bare local file and with JuiceFS and its blocks cached, in the same state of the
page cache; what starts cold is compared with their figures after dropped caches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.loaders import Load
from bench.report import Bar, Row, Spread, number

COLD, DROPPED, WARM = "cold", "dropped", "warm"
LOCAL, CACHED = "local", "juicefs-cached"
LOAD_COLUMNS = ("case", "page cache", "load, s", "GB/s", "first byte, ms", "/ local", "/ JuiceFS cached")
FIGURE_COLUMNS = ("what", "case", "unit", "figure", "/ local", "/ JuiceFS cached")
HOT_STATES = (DROPPED, WARM)

Item = TypeVar("Item")
Quantity = tuple[str, str]
"""(what, unit)"""


def rotated(items: Sequence[Item], round_: int) -> list[Item]:
    """The order of a round: each item leads once in as many rounds as there are items."""
    start = round_ % len(items) if items else 0
    return [*items[start:], *items[:start]]


class Loads:
    """The loads of one layout by one loader, by case and state, in the order of their rounds."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._loads: dict[tuple[str, str], list[Load]] = defaultdict(list)

    def add(self, case: str, states: Mapping[str, Load]) -> None:
        for state, load in states.items():
            self._loads[case, state].append(load)

    def seconds(self, case: str, state: str) -> Spread | None:
        """Seconds of a load; None when it was not measured."""
        loads = self._loads.get((case, state))
        return Spread.of(load.seconds for load in loads) if loads else None

    def extra(self, case: str, state: str, name: str) -> Spread | None:
        """What else was seen at these loads."""
        values = [load.extras[name] for load in self._loads.get((case, state), []) if name in load.extras]
        return Spread.of(values) if values else None

    def rows(self, cases: Iterable[str]) -> list[LoadRow]:
        """A row for each case and state that was measured, in the order of `cases`."""
        return [self._row(case, state) for case in cases for state in (COLD, *HOT_STATES) if (case, state) in self]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._loads

    def _row(self, case: str, state: str) -> LoadRow:
        loads, alike = self._loads[case, state], DROPPED if state == COLD else state
        return LoadRow(
            case,
            state,
            Spread.of(load.seconds for load in loads),
            Spread.of(load.first_byte_s * 1e3 for load in loads),
            self.size_bytes,
            {name: spread for name in loads[0].extras if (spread := self.extra(case, state, name))},
            self.seconds(LOCAL, alike),
            self.seconds(CACHED, alike),
        )


@dataclass(frozen=True)
class LoadRow:
    """One case in one state of the page cache; `local` and `cached` are the seconds it is compared with."""

    case: str
    state: str
    seconds: Spread
    first_byte_ms: Spread
    size_bytes: int
    extras: dict[str, Spread]
    local: Spread | None
    cached: Spread | None

    @property
    def gb_per_s(self) -> float:
        """Of the median load, 10^9 bytes."""
        return self.size_bytes / self.seconds.median / 1e9

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `LOAD_COLUMNS`."""
        figures = str(self.seconds), number(self.gb_per_s), str(self.first_byte_ms)
        return self.case, self.state, *figures, *_ratio_cells(self.seconds, self.local, self.cached)

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "page_cache": self.state,
            "seconds": self.seconds.as_json(),
            "gb_per_s": self.gb_per_s,
            "first_byte_ms": self.first_byte_ms.as_json(),
            "extras": {name: spread.as_json() for name, spread in self.extras.items()},
            **_ratio_json(self.seconds, self.local, self.cached),
        }


@dataclass(frozen=True)
class FigureRow:
    """One quantity of one case, beside the same quantity of the bare local file and of JuiceFS."""

    what: str
    unit: str
    case: str
    figure: Spread
    local: Spread | None
    cached: Spread | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `FIGURE_COLUMNS`."""
        ratios = _ratio_cells(self.figure, self.local, self.cached)
        return self.what, self.case, self.unit, str(self.figure), *ratios

    def as_json(self) -> dict[str, Any]:
        labels = {"what": self.what, "unit": self.unit, "case": self.case}
        return {**labels, "figure": self.figure.as_json(), **_ratio_json(self.figure, self.local, self.cached)}


class CaseFigures:
    """Samples of several quantities of several cases."""

    def __init__(self) -> None:
        self._samples: dict[Quantity, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, case: str, figures: Mapping[Quantity, float]) -> None:
        for quantity, value in figures.items():
            self._samples[quantity][case].append(value)

    def spread(self, what: str, case: str) -> Spread | None:
        """The samples of a quantity, by its name alone; None when it was not measured."""
        for (name, _), by_case in self._samples.items():
            if name == what and case in by_case:
                return Spread.of(by_case[case])
        return None

    def rows(self) -> list[FigureRow]:
        """All of them, quantity by quantity."""
        return [
            FigureRow(what, unit, case, Spread.of(samples), self.spread(what, LOCAL), self.spread(what, CACHED))
            for (what, unit), by_case in self._samples.items()
            for case, samples in by_case.items()
        ]


def load_bars(layout: str, loader: str, loads: Loads) -> list[Bar]:
    """The bars that one layout and one loader have to meet."""
    hot, first = "tierd-hot", "tierd-first"
    what = f"{layout}, {loader}"
    slower_first = _times(loads.seconds(first, COLD), loads.seconds("juicefs-cold", COLD))
    bars = [
        at_most(f"{what}: READ requests at the daemon on a hot load", _max(loads.extra(hot, WARM, "reads")), 0),
        at_most(f"{what}: first load / JuiceFS cold", slower_first, 1.1, "x"),
        at_most(
            f"{what}: node tier complete after the first load", _max(loads.extra(first, COLD, "complete_s")), 1, "s"
        ),
    ]
    return bars + (_mmap_bars(what, loads) if loader == "safetensors" else _daemon_bars(what, loads))


def raw_bars(figures: CaseFigures) -> list[Bar]:
    """Reading a hot file against reading a local one."""
    names = ("sequential, warm", "4 KiB random, warm", "mmap, warm", "sequential, dropped")
    ratios = {name: _times(figures.spread(name, "tierd-hot"), figures.spread(name, LOCAL)) for name in names}
    return [at_least(f"hot file, {name}: speed / local", ratio, 0.95, "x") for name, ratio in ratios.items()]


def open_bars(figures: CaseFigures) -> list[Bar]:
    """Opening a hot file."""
    hot, juicefs = figures.spread("open+close p50", "tierd-hot"), figures.spread("open+close p50", CACHED)
    return [
        at_most("open+close p50 of a hot file", _median(hot), 300, "us"),
        below("open+close p50 of a hot file / JuiceFS's own", _times(hot, juicefs), 1, "x"),
    ]


def pod_bars(figures: CaseFigures) -> list[Bar]:
    """Many pods, one cold model."""
    ratio = _max(figures.spread("bytes of the source", "tierd-first"))
    return [at_most("8 pods open one cold model: bytes of the source / its size", ratio, 1.05, "x")]


def cpu_bars(figures: CaseFigures) -> list[Bar]:
    """A daemon that the bytes do not pass."""
    used = _max(figures.spread("daemon", "tierd-hot"))
    return [at_most("CPU of the daemon while 4 readers stream a hot file", used, 2, "% of a core")]


def load_notes(loads: Loads) -> list[str]:
    """What was seen at the loads beside their time, where it was seen."""
    told = {
        "of a download case, the download took {} s": loads.extra("download", COLD, "download_s"),
        "after the first load the node tier was complete within {} s": loads.extra("tierd-first", COLD, "complete_s"),
        "the first load with its fill read {} x its size from JuiceFS": loads.extra(
            "tierd-first", COLD, "source_ratio"
        ),
        "READ requests at the daemon, two hot loads: {}": loads.extra("tierd-hot", WARM, "reads"),
        "READ requests at the daemon, two hot loads, passthrough off: {}": loads.extra("tierd-off", WARM, "reads"),
    }
    return [text.format(spread) for text, spread in told.items() if spread is not None]


def at_most(what: str, value: float | None, limit: float, unit: str = "") -> Bar:
    """A bar that is met by `limit` and everything below; not measured without a value."""
    return _bar(what, "<=", value, limit, unit, lambda found: found <= limit)


def below(what: str, value: float | None, limit: float, unit: str = "") -> Bar:
    """A bar that `limit` itself misses."""
    return _bar(what, "<", value, limit, unit, lambda found: found < limit)


def at_least(what: str, value: float | None, limit: float, unit: str = "") -> Bar:
    """A bar that is met by `limit` and everything above; not measured without a value."""
    return _bar(what, ">=", value, limit, unit, lambda found: found >= limit)


def _bar(what: str, sign: str, value: float | None, limit: float, unit: str, holds: Callable[[float], bool]) -> Bar:
    text = f"{what}: {sign} {number(limit)} {unit}".rstrip()
    if value is None:
        return Bar(text, "", None)
    return Bar(text, f"{number(value)} {unit}".rstrip(), holds(value))


def _mmap_bars(what: str, loads: Loads) -> list[Bar]:
    dropped, warm = loads.seconds("tierd-hot", DROPPED), loads.seconds("tierd-hot", WARM)
    local, cached = loads.seconds(LOCAL, WARM), loads.seconds(CACHED, WARM)
    download = loads.seconds("download", COLD)
    return [
        at_least(
            f"{what}, hot, dropped: speed / local, disk as found",
            _times(loads.seconds(LOCAL, DROPPED), dropped),
            1.3,
            "x",
        ),
        at_most(f"{what}, hot, warm: time / local", _times(warm, local), 1.05, "x"),
        at_least(f"{what}, hot, warm: speed / JuiceFS cached, warm", _times(cached, warm), 3, "x"),
        at_least(f"{what}, hot, warm: speed / download, then load", _times(download, warm), 10, "x"),
    ]


def _daemon_bars(what: str, loads: Loads) -> list[Bar]:
    seconds, cached = loads.seconds("tierd-off", DROPPED), loads.seconds(CACHED, DROPPED)
    speed = None if seconds is None else loads.size_bytes / seconds.median / 1e9
    return [
        at_least(f"{what}, hot, dropped, passthrough off", speed, 0.8, "GB/s"),
        at_least(f"{what}, hot, dropped, passthrough off: speed / JuiceFS cached", _times(cached, seconds), 1.5, "x"),
    ]


def _times(one: Spread | None, other: Spread | None) -> float | None:
    """Median by median; None where one was not measured."""
    return None if one is None or other is None or other.median == 0 else one.median / other.median


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _max(spread: Spread | None) -> float | None:
    """The worst round: for what must hold in each of them."""
    return None if spread is None else spread.max


def _ratio_cells(mine: Spread, *others: Spread | None) -> tuple[str, ...]:
    return tuple("1" if other == mine else Row("", "", other, mine).cells()[-1] for other in others)


def _ratio_json(mine: Spread, local: Spread | None, cached: Spread | None) -> dict[str, Any]:
    rows = {"to_local": Row("", "", local, mine), "to_juicefs_cached": Row("", "", cached, mine)}
    by_round = {name: row.ratio_by_round for name, row in rows.items()}
    return {
        name: {"ratio": row.ratio, "by_round": (spread := by_round[name]) and spread.as_json()}
        for name, row in rows.items()
    }
