"""Loads: first open to last close plus an idle gap, in virtual nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.policy import NS, LoadGrouper

GAP_S = 30.0
A, B, C, D, E = b"a", b"b", b"c", b"d", b"e"


def at(seconds: float) -> int:
    """Seconds of a long-running clock as nanoseconds."""
    return 1_700_000_000 * NS + int(seconds * NS)


def test_opens_within_the_gap_are_one_load() -> None:
    grouper = LoadGrouper(GAP_S)
    assert grouper.opened(A, at(0))
    grouper.closed(A, at(1))
    assert not grouper.opened(A, at(31))
    grouper.closed(A, at(32))
    assert not grouper.opened(A, at(62)), "exactly the gap still belongs to the load"
    grouper.closed(A, at(62))
    assert grouper.opened(A, at(92) + 1), "a nanosecond more does not"


def test_an_open_file_keeps_the_load_alive_however_long() -> None:
    grouper = LoadGrouper(GAP_S)
    assert grouper.opened(A, at(0))
    assert not grouper.opened(A, at(100_000))
    grouper.closed(A, at(100_001))
    assert not grouper.opened(A, at(200_000)), "the first descriptor is still open"
    assert grouper.active(A) == 2


def test_overlapping_opens_end_with_the_last_close() -> None:
    grouper = LoadGrouper(GAP_S)
    assert grouper.opened(A, at(0))
    assert not grouper.opened(A, at(10))
    grouper.closed(A, at(20))
    grouper.closed(A, at(100))
    assert grouper.active(A) == 0
    assert not grouper.opened(A, at(130))
    grouper.closed(A, at(130))
    assert grouper.opened(A, at(161))


def test_models_do_not_share_loads() -> None:
    grouper = LoadGrouper(GAP_S)
    assert grouper.opened(A, at(0))
    assert grouper.opened(B, at(1))
    assert grouper.active(A) == grouper.active(B) == 1


def test_times_out_of_order() -> None:
    """Events of two threads may come in the wrong order: an earlier time neither begins a load nor ends one early."""
    grouper = LoadGrouper(GAP_S)
    assert grouper.opened(A, at(100))
    grouper.closed(A, at(90))
    assert not grouper.opened(A, at(50))
    grouper.closed(A, at(40))
    assert not grouper.opened(A, at(130)), "the latest time seen counts"


def test_close_without_open_is_ignored() -> None:
    grouper = LoadGrouper(GAP_S)
    grouper.closed(A, at(0))
    assert len(grouper) == 0
    assert grouper.opened(A, at(1))
    grouper.closed(A, at(2))
    grouper.closed(A, at(3))
    assert grouper.active(A) == 0
    assert not grouper.opened(A, at(4))
    assert grouper.active(A) == 1, "a surplus close does not eat the next open"


def test_idle_runs_are_forgotten_the_least_recently_used_first() -> None:
    grouper = LoadGrouper(GAP_S, capacity=2)
    for second, model in enumerate((A, B, C)):
        grouper.opened(model, at(second))
        grouper.closed(model, at(second))
    assert len(grouper) == 2
    assert not grouper.opened(B, at(3))
    assert not grouper.opened(C, at(3))
    assert grouper.opened(A, at(3)), "forgotten, so its next open counts as a new load"


def test_a_run_that_just_ended_outlives_one_that_ended_before() -> None:
    grouper = LoadGrouper(GAP_S, capacity=2)
    grouper.opened(A, at(0))
    grouper.opened(B, at(1))
    grouper.closed(B, at(2))
    grouper.closed(A, at(50))
    grouper.opened(C, at(51))
    grouper.closed(C, at(51))
    assert not grouper.opened(A, at(52)), "A was used two seconds ago, B fifty"


def test_active_runs_are_never_forgotten() -> None:
    grouper = LoadGrouper(GAP_S, capacity=2)
    models = [b"%d" % number for number in range(100)]
    for model in models:
        assert grouper.opened(model, at(0))
    assert len(grouper) == 100
    assert not any(grouper.opened(model, at(10_000)) for model in models)


def test_idle_runs_shrink_to_the_capacity_after_many_were_active() -> None:
    grouper = LoadGrouper(GAP_S, capacity=2)
    models = [b"%d" % number for number in range(100)]
    for model in models:
        grouper.opened(model, at(0))
    for model in models:
        grouper.closed(model, at(1))
    grouper.opened(A, at(2))
    grouper.closed(A, at(2))
    assert len(grouper) <= 2


def test_a_load_is_a_hit_while_every_open_is_from_the_node() -> None:
    grouper = LoadGrouper(GAP_S)

    def load(second: float, *from_node: bool) -> list[int]:
        deltas = []
        for each in from_node:
            grouper.opened(A, at(second))
            deltas.append(grouper.served(A, from_node=each))
            grouper.closed(A, at(second))
        return deltas

    assert load(0, True, True, True) == [1, 0, 0]
    assert load(100, True, False, False, True) == [1, -1, 0, 0], "taken back once"
    assert load(200, False, True, False) == [0, 0, 0], "nothing to take back"
    assert load(300, True) == [1]
    assert load(310, False) == [-1], "within the gap it is still the same load"
    assert load(400, True) == [1], "each load is judged anew"
    assert grouper.served(B, from_node=True) == 0, "no open was noted"


def test_hits_are_forgotten_with_their_load() -> None:
    grouper = LoadGrouper(GAP_S, capacity=1)
    for model in (A, B):
        grouper.opened(model, at(0))
        assert grouper.served(model, from_node=True) == 1
        grouper.closed(model, at(0))
    assert len(grouper) == 1
    assert grouper.opened(A, at(1)), "forgotten, so a new load"
    assert grouper.served(A, from_node=False) == 0, "of which no hit was counted"


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans(), st.integers(0, 60), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_hits_add_up_to_the_loads_without_a_miss(history: list[tuple[bytes, bool, int, bool]], capacity: int) -> None:
    """However often a load is interrupted by others, and whatever had to be forgotten."""
    grouper = LoadGrouper(GAP_S, capacity)
    loads: dict[bytes, list[list[bool]]] = {A: [], B: [], C: []}
    hits, second = 0, 0
    for model, from_node, wait, closes in history:
        second += wait
        if grouper.opened(model, at(second)):
            loads[model].append([])
        loads[model][-1].append(from_node)
        delta = grouper.served(model, from_node=from_node)
        assert delta in (-1, 0, 1)
        hits += delta
        if closes:
            grouper.closed(model, at(second))
        assert hits == sum(all(load) for run in loads.values() for load in run)


@dataclass
class NaiveRun:
    """Every event of a load, as a list."""

    active: int = 0
    times: list[int] = field(default_factory=list)


class NaiveGrouper:
    """The definition, written down without regard to memory."""

    def __init__(self) -> None:
        self.runs: dict[bytes, NaiveRun] = {}

    def opened(self, model: bytes, now: int) -> bool:
        run = self.runs.get(model)
        begins = run is None or (run.active == 0 and now > max(run.times) + int(GAP_S * NS))
        if run is None or begins:
            run = self.runs[model] = NaiveRun()
        run.active += 1
        run.times.append(now)
        return begins

    def closed(self, model: bytes, now: int) -> None:
        run = self.runs.get(model)
        if run is not None:
            run.active = max(0, run.active - 1)
            run.times.append(now)


events = st.lists(
    st.tuples(st.sampled_from([True, True, False]), st.sampled_from([A, B, C, D, E]), st.integers(0, 200)), max_size=60
)


@settings(max_examples=100)
@given(events)
def test_against_the_definition(history: list[tuple[bool, bytes, int]]) -> None:
    """Opens, closes and surplus closes at any time, in any order, while nothing must be forgotten."""
    grouper, naive = LoadGrouper(GAP_S), NaiveGrouper()
    for opens, model, second in history:
        if opens:
            assert grouper.opened(model, at(second)) == naive.opened(model, at(second))
        else:
            grouper.closed(model, at(second))
            naive.closed(model, at(second))
        assert grouper.active(model) == (naive.runs[model].active if model in naive.runs else 0)


@settings(max_examples=100)
@given(events, st.integers(1, 4))
def test_forgetting_can_only_begin_loads(history: list[tuple[bool, bytes, int]], capacity: int) -> None:
    """With little memory, active runs are as without a limit, and idle ones stay within it."""
    grouper, naive = LoadGrouper(GAP_S, capacity), NaiveGrouper()
    for opens, model, second in history:
        if opens:
            begins, expected = grouper.opened(model, at(second)), naive.opened(model, at(second))
            assert begins or not expected
            if begins:
                naive.runs[model].times = [at(second)]
        elif grouper.active(model):
            grouper.closed(model, at(second))
            naive.closed(model, at(second))
        active = {known: run.active for known, run in naive.runs.items() if run.active}
        assert {known: grouper.active(known) for known in naive.runs if grouper.active(known)} == active
        assert len(grouper) - len(active) <= capacity
