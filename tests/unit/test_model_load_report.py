"""The model load benchmark from samples to text: orders, ranges, ratios, bars, tables. Nothing is measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.load_report import (
    CACHED,
    COLD,
    DROPPED,
    FIGURE_COLUMNS,
    LOAD_COLUMNS,
    LOCAL,
    WARM,
    CaseFigures,
    Loads,
    at_least,
    at_most,
    below,
    cpu_bars,
    load_bars,
    load_notes,
    open_bars,
    pod_bars,
    raw_bars,
    rotated,
)
from bench.load_rig import SHARDED, DeviceSetting
from bench.loaders import Load
from bench.report import Bar, Report, Section
from bench.s3 import MIB, Piece, pieces

SIZE = 1_000_000_000


def loads_of(seconds: dict[tuple[str, str], list[float]], extras: dict[str, float] | None = None) -> Loads:
    """Loads of these seconds by case and state; each has its first byte after a tenth of its time."""
    loads = Loads(SIZE)
    for (case, state), samples in seconds.items():
        for sample in samples:
            loads.add(case, {state: Load(sample, sample / 10, SIZE, extras or {})})
    return loads


def verdicts(bars: list[Bar]) -> dict[str, bool | None]:
    """Met, missed or not measured, by the bar's text up to its limit."""
    return {bar.limit: bar.met for bar in bars}


def figures_of(samples: dict[tuple[str, str, str], list[float]]) -> CaseFigures:
    """Figures from (what, unit, case) to samples."""
    figures = CaseFigures()
    for (what, unit, case), values in samples.items():
        for value in values:
            figures.add(case, {(what, unit): value})
    return figures


GOOD = {
    ("download", COLD): [2.0, 2.2, 2.1],
    ("juicefs-cold", COLD): [3.0, 3.2, 3.1],
    (CACHED, DROPPED): [2.0, 2.0, 2.0],
    (CACHED, WARM): [1.0, 1.0, 1.0],
    ("tierd-first", COLD): [3.1, 3.2, 3.3],
    ("tierd-hot", DROPPED): [0.4, 0.5, 0.6],
    ("tierd-hot", WARM): [0.10, 0.10, 0.10],
    ("tierd-off", DROPPED): [1.0, 1.1, 1.2],
    (LOCAL, DROPPED): [0.9, 1.0, 1.1],
    (LOCAL, WARM): [0.1, 0.1, 0.1],
}
SEEN = {"reads": 0.0, "complete_s": 0.2, "source_ratio": 1.0}


def test_each_case_leads_once() -> None:
    orders = [rotated(["a", "b", "c"], round_) for round_ in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert rotated([], 3) == []


def test_one_object_is_fetched_in_as_many_ranges_as_streams() -> None:
    found = pieces({"model": 64 * MIB + 5}, streams=8)
    assert [piece.offset for piece in found] == [index * 9 * MIB for index in range(8)]
    assert sum(piece.length for piece in found) == 64 * MIB + 5
    assert found[-1] == Piece("model", 63 * MIB, MIB + 5)


def test_objects_smaller_than_their_share_stay_whole() -> None:
    sizes = {f"shard-{index}": 4 * MIB for index in range(16)} | {"config.json": 7}
    assert pieces(sizes, streams=8) == [Piece(key, 0, size) for key, size in sizes.items()]


def test_an_empty_object_needs_no_range() -> None:
    assert pieces({"empty": 0}) == []


def test_rows_compare_the_same_state_and_cold_with_dropped() -> None:
    rows = {(row.case, row.state): row for row in loads_of(GOOD).rows(["tierd-first", "tierd-hot", LOCAL])}
    assert list(rows) == [
        ("tierd-first", COLD), ("tierd-hot", DROPPED), ("tierd-hot", WARM), (LOCAL, DROPPED), (LOCAL, WARM),
    ]  # fmt: skip
    first, hot = rows["tierd-first", COLD].as_json(), rows["tierd-hot", WARM].as_json()
    assert first["to_local"]["ratio"] == pytest.approx(3.2)
    assert first["to_juicefs_cached"]["ratio"] == pytest.approx(1.6)
    assert hot["to_juicefs_cached"]["ratio"] == pytest.approx(0.1)
    assert rows["tierd-hot", DROPPED].gb_per_s == pytest.approx(2.0)


def test_ratios_by_round_show_how_far_they_moved() -> None:
    row = loads_of(GOOD).rows(["tierd-hot"])[0]
    found = row.as_json()["to_local"]["by_round"]
    assert (found["min"], found["max"]) == (pytest.approx(4 / 9), pytest.approx(6 / 11))


def test_a_row_without_its_baseline_has_no_ratio() -> None:
    loads = loads_of({("tierd-hot", WARM): [0.1]})
    (row,) = loads.rows(["tierd-hot", LOCAL])
    assert row.cells() == ("tierd-hot", WARM, "0.100", "10", "10", "-", "-")
    assert row.as_json()["to_local"] == {"ratio": None, "by_round": None}


def test_all_bars_of_a_good_load_are_met() -> None:
    loads = loads_of(GOOD, SEEN)
    for loader, count in (("safetensors", 7), ("reads", 5)):
        bars = load_bars("one file", loader, loads)
        assert len(bars) == count
        assert all(bar.met for bar in bars), [str(bar) for bar in bars]


@pytest.mark.parametrize(
    ("loader", "key", "samples", "missed"),
    [
        ("reads", ("tierd-first", COLD), [3.42], "first load / JuiceFS cold: <= 1.10 x"),
        ("safetensors", ("tierd-hot", DROPPED), [0.8], "hot, dropped: speed / local, disk as found: >= 1.30 x"),
        ("safetensors", (LOCAL, WARM), [0.095], "hot, warm: time / local: <= 1.05 x"),
        ("safetensors", (CACHED, WARM), [0.29], "hot, warm: speed / JuiceFS cached, warm: >= 3 x"),
        ("safetensors", ("download", COLD), [0.99], "hot, warm: speed / download, then load: >= 10 x"),
        ("reads", ("tierd-off", DROPPED), [1.26], "hot, dropped, passthrough off: >= 0.800 GB/s"),
        ("reads", (CACHED, DROPPED), [1.6], "hot, dropped, passthrough off: speed / JuiceFS cached: >= 1.50 x"),
    ],
)
def test_one_bad_figure_misses_one_bar(loader: str, key: tuple[str, str], samples: list[float], missed: str) -> None:
    bars = load_bars("one file", loader, loads_of({**GOOD, key: samples}, SEEN))
    (bar,) = (bar for bar in bars if not bar.met)
    assert bar.limit.endswith(missed)


@pytest.mark.parametrize(("name", "value"), [("reads", 1.0), ("complete_s", 1.5)])
def test_what_must_hold_in_every_round_is_judged_by_the_worst(name: str, value: float) -> None:
    loads = loads_of(GOOD, SEEN)
    worst = Load(3.2, 0.1, SIZE, {**SEEN, name: value})
    loads.add("tierd-first", {COLD: worst})
    loads.add("tierd-hot", {WARM: Load(0.1, 0.1, SIZE, {**SEEN, name: value})})
    assert sum(bar.met is False for bar in load_bars("one file", "reads", loads)) == 1


def test_nothing_measured_meets_nothing_and_misses_nothing() -> None:
    empty = CaseFigures()
    bars = [*load_bars("x", "reads", Loads(SIZE)), *load_bars("x", "safetensors", Loads(SIZE))]
    bars += [*raw_bars(empty), *open_bars(empty), *pod_bars(empty), *cpu_bars(empty)]
    assert {bar.met for bar in bars} == {None}
    assert str(bars[0]).startswith("NOT MEASURED: ")
    assert "found" not in str(bars[0])


def test_limits_themselves() -> None:
    assert [at_most("a", 1.05, 1.05).met, at_least("a", 0.95, 0.95).met, below("a", 1, 1).met] == [True, True, False]
    assert str(at_most("CPU", 3, 2, "%")) == "MISSED: CPU: <= 2 %; found 3 %"


def test_bars_of_raw_reads_compare_speeds() -> None:
    names = ("sequential, warm", "4 KiB random, warm", "mmap, warm", "sequential, dropped")
    samples = {(name, "GB/s", LOCAL): [10.0] for name in names} | {(name, "GB/s", "tierd-hot"): [9.6] for name in names}
    samples["mmap, warm", "GB/s", "tierd-hot"] = [9.4]
    found = verdicts(raw_bars(figures_of(samples)))
    assert [met for limit, met in found.items() if "mmap" in limit] == [False]
    assert sum(met is True for met in found.values()) == 3


def test_bars_of_opens_pods_and_cpu() -> None:
    what = "open+close p50"
    opens = figures_of({(what, "us", "tierd-hot"): [250.0, 350.0], (what, "us", CACHED): [300.0]})
    assert [bar.met for bar in open_bars(opens)] == [True, False]
    what = "bytes of the source"
    assert not pod_bars(figures_of({(what, "x size", "tierd-first"): [1.0, 1.06]}))[0].met
    assert cpu_bars(figures_of({("daemon", "% of a core", "tierd-hot"): [1.9]}))[0].met


def test_notes_tell_what_was_seen() -> None:
    assert load_notes(Loads(SIZE)) == []
    assert len(load_notes(loads_of(GOOD, SEEN))) == 3


def test_markdown_and_json_have_every_column_and_escape_bars() -> None:
    loads = loads_of(GOOD, SEEN)
    section = Section("Load | one file", "how", loads.rows(["tierd-hot"]), [], [], None, LOAD_COLUMNS)
    lines = section.as_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| " + " | ".join(LOAD_COLUMNS) + " |"
    assert {line.count("|") for line in table} == {len(LOAD_COLUMNS) + 1}
    report = Report("title", {"rounds": 3}, [section])
    row = json.loads(json.dumps(report.as_json()))["sections"][0]["rows"][0]
    assert row["seconds"]["samples"] == [0.4, 0.5, 0.6]
    assert row["extras"]["reads"]["median"] == 0


def test_figures_are_shown_quantity_by_quantity_beside_both_baselines() -> None:
    figures = figures_of(
        {("p50", "us", LOCAL): [4.0], ("p50", "us", CACHED): [400.0], ("p50", "us", "tierd-hot"): [200.0]}
    )
    rows = figures.rows()
    assert [row.cells() for row in rows] == [
        ("p50", LOCAL, "us", "4", "1", "0.0100"),
        ("p50", CACHED, "us", "400", "100", "1"),
        ("p50", "tierd-hot", "us", "200", "50", "0.500"),
    ]
    assert rows[2].as_json()["to_juicefs_cached"]["ratio"] == 0.5
    console = Console(file=io.StringIO(), width=160)
    Section("Opens", "how", rows, open_bars(figures), columns=FIGURE_COLUMNS).show(console)


def test_device_settings_of_a_status_without_them() -> None:
    assert DeviceSetting.of_status({}) == DeviceSetting.of_status({"device_settings": []}) == []
    entry = {"path": "/sys/class/bdi/8:0/read_ahead_kb", "found": 128, "set": 4096}
    (setting,) = DeviceSetting.of_status({"device_settings": [entry]})
    assert (setting.found, setting.tuned) == ("128", "4096")


def test_files_of_a_layout_are_named_as_the_writer_names_them() -> None:
    files = SHARDED.files(Path("/root"))
    assert len(files) == 16
    assert str(files[15]) == "/root/models/sharded/model-00016-of-00016.safetensors"
