"""Heat, leases and pins in memory, and the chores that nobody waits for."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from tierd.node import usage as usage_module
from tierd.node.chores import Chores
from tierd.node.usage import Leases, Usage
from tierd.policy import NS

WAIT_SECONDS = 20.0


class Clock:
    """Nanoseconds that the test moves."""

    def __init__(self) -> None:
        self.ns = 1_000 * NS

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, *rows: tuple[bytes, float, int, int], pins: tuple[bytes, ...] = ()) -> Usage:
    return Usage(rows, pins, half_life_s=100.0, now_ns=clock)


# --- heat ---


def test_heat_halves_and_loads_add_up(clock: Clock) -> None:
    usage = make(clock)
    assert (usage.heat(b"a"), usage.last_access_ns(b"a")) == (0.0, 0)
    usage.note(b"a", 2, clock.ns)
    assert usage.heat(b"a") == 2.0
    clock.ns += 100 * NS
    assert usage.heat(b"a") == 1.0
    usage.note(b"a", 1, clock.ns)
    assert usage.heat(b"a") == 2.0
    assert usage.last_access_ns(b"a") == clock.ns


def test_an_access_that_begins_no_load_leaves_the_heat(clock: Clock) -> None:
    usage = make(clock)
    usage.note(b"a", 1, clock.ns)
    clock.ns += 50 * NS
    usage.note(b"a", 0, clock.ns)
    clock.ns += 50 * NS
    assert usage.heat(b"a") == 0.5
    assert usage.last_access_ns(b"a") == clock.ns - 50 * NS


def test_what_arrives_was_accessed_but_is_no_hotter(clock: Clock) -> None:
    usage = make(clock)
    usage.arrived(b"a")
    assert (usage.heat(b"a"), usage.last_access_ns(b"a")) == (0.0, clock.ns)


def test_news_that_come_late_turn_no_time_back(clock: Clock) -> None:
    usage = make(clock)
    usage.note(b"a", 1, clock.ns)
    usage.note(b"a", 1, clock.ns - 500 * NS)
    assert (usage.heat(b"a"), usage.last_access_ns(b"a")) == (2.0, clock.ns)
    clock.ns -= 1000 * NS
    assert usage.heat(b"a") == 2.0, "a clock that was set back changes nothing"


def test_it_begins_with_what_the_index_knows(clock: Clock) -> None:
    usage = make(clock, (b"old", 4.0, clock.ns - 200 * NS, 5), (b"new", 1.0, clock.ns, clock.ns), pins=(b"pin",))
    assert (usage.heat(b"old"), usage.heat(b"new"), usage.heat(b"pin")) == (1.0, 1.0, 0.0)
    assert usage.last_access_ns(b"old") == 5
    assert (usage.pinned(b"pin"), usage.pinned(b"old"), usage.pins()) == (True, False, {b"pin"})


def test_the_hottest_and_all_that_are_pinned(clock: Clock) -> None:
    usage = make(clock, *((b"%d" % n, float(n), clock.ns, n) for n in range(10)), pins=(b"z", b"9", b"0"))
    assert usage.hottest(3) == [b"0", b"9", b"z", b"8", b"7"]
    assert usage.hottest(0) == [b"0", b"9", b"z"]
    usage.pin(b"9", False)
    usage.pin(b"9", False)
    assert usage.hottest(1) == [b"0", b"z", b"9"]


def test_the_least_recently_accessed_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "_MODELS_MAX", 3)
    usage = make(clock, *((b"%d" % n, 1.0, clock.ns, 10 - n) for n in range(5)))
    assert [usage.heat(b"%d" % n) > 0 for n in range(5)] == [True, True, True, False, False]
    usage.note(b"2", 0, clock.ns)
    usage.note(b"new", 1, clock.ns)
    assert [usage.heat(name) > 0 for name in (b"0", b"1", b"2", b"new")] == [True, False, True, True]


# --- leases ---


def test_leases_count() -> None:
    leases = Leases()
    for model in (b"a", b"a", b"b"):
        leases.take(model)
    assert (len(leases), leases.holds(b"a")) == (2, True)
    leases.give_back(b"a")
    assert leases.holds(b"a")
    leases.give_back(b"a")
    assert (len(leases), leases.holds(b"a"), leases.holds(b"b")) == (1, False, True)
    with pytest.raises(KeyError):
        leases.give_back(b"a")


def test_leases_of_many_threads_balance() -> None:
    leases = Leases()
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(WAIT_SECONDS)
        for _ in range(2000):
            leases.take(b"a")
            leases.take(b"b")
            leases.give_back(b"a")
            leases.give_back(b"b")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert len(leases) == 0


# --- chores ---


@pytest.fixture
def chores() -> Iterator[Chores]:
    made = Chores("test", threads=2, capacity=5)
    yield made
    made.stop()


class Step:
    """A job that tells when it began and ends when it may."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        self.began.set()
        assert self.go_on.wait(WAIT_SECONDS)


def test_one_of_a_kind_runs_at_a_time_and_one_waits(chores: Chores) -> None:
    step, again, other = Step(), Step(), threading.Event()
    chores.start()
    chores.add("a", step)
    assert step.began.wait(WAIT_SECONDS)
    for _ in range(3):
        chores.add("a", again)
    chores.add("b", other.set)
    assert other.wait(WAIT_SECONDS), "another kind does not wait for it"
    assert not again.began.is_set()
    step.go_on.set()
    assert again.began.wait(WAIT_SECONDS), "what came while it ran is done afterwards"
    again.go_on.set()
    done = threading.Event()
    chores.add("a", done.set)
    assert done.wait(WAIT_SECONDS)
    assert (step.runs, again.runs) == (1, 1)


def test_they_run_in_the_order_in_which_they_came() -> None:
    chores = Chores("test")
    order: list[int] = []
    done = threading.Event()
    for number in range(5):
        chores.add(number, lambda number=number: order.append(number))  # type: ignore[misc]
    chores.add("last", done.set)
    assert len(chores) == 6
    chores.start()
    assert done.wait(WAIT_SECONDS)
    chores.stop()
    assert order == [0, 1, 2, 3, 4]


def test_they_are_bounded_and_what_is_dropped_is_counted(chores: Chores) -> None:
    for number in range(8):
        chores.add(number, lambda: None)
    chores.add(0, lambda: None)
    assert (len(chores), chores.dropped) == (5, 3)


def test_a_defect_ends_no_thread(chores: Chores) -> None:
    chores.start()
    with capture_logs() as logs:
        for number in range(5):
            done = threading.Event()
            chores.add(("broken", number), lambda: 1 // 0)  # type: ignore[arg-type, return-value]
            chores.add(number, done.set)
            assert done.wait(WAIT_SECONDS)
        chores.stop()
    assert [line["event"] for line in logs] == ["chore_failed"] * 5


def test_a_file_that_is_gone_is_no_defect() -> None:
    chores = Chores("test")

    def fail() -> None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    chores.start()
    with capture_logs() as logs:
        chores.add("gone", fail)
        done = threading.Event()
        chores.add("done", done.set)
        assert done.wait(WAIT_SECONDS)
        chores.stop()
    assert [(line["log_level"], line["reason"], "exc_info" in line) for line in logs] == [
        ("warning", "No such file or directory", False)
    ]


def test_after_the_stop_nothing_runs() -> None:
    chores = Chores("test")
    ran = threading.Event()
    chores.add("before", ran.set)
    chores.stop()
    chores.add("after", ran.set)
    chores.start()
    chores.stop()
    assert (len(chores), ran.is_set()) == (0, False)
