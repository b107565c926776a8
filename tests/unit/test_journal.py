"""The queue of accesses: bounded, never waiting, balanced."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tierd.node.journal import Closed, Event, Journal, Opened


def opened(fh: int) -> Opened:
    return Opened(fh, b"models/a/b", fh, 0, None)


def closed(fh: int) -> Closed:
    return Closed(fh, b"models/a/b", fh, 1)


def test_the_oldest_come_first() -> None:
    journal = Journal(10)
    events: list[Event] = [opened(1), opened(2), closed(1)]
    assert journal.opened(events[0])  # type: ignore[arg-type]
    assert journal.opened(events[1])  # type: ignore[arg-type]
    journal.closed(events[2])  # type: ignore[arg-type]
    assert len(journal) == 3
    assert journal.take(2) == events[:2]
    assert journal.take(2) == events[2:]
    assert journal.take(2) == []


def test_opens_that_do_not_fit_are_dropped_and_counted() -> None:
    journal = Journal(2)
    assert [journal.opened(opened(fh)) for fh in range(4)] == [True, True, False, False]
    assert journal.dropped == 2
    assert [event.fh for event in journal.take(10)] == [0, 1]
    assert journal.opened(opened(5))


def test_closes_always_fit() -> None:
    journal = Journal(2)
    for fh in range(2):
        journal.opened(opened(fh))
    for fh in range(2):
        journal.closed(closed(fh))
    assert len(journal) == 4
    assert journal.dropped == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.integers(1, 6))
def test_opens_and_closes_balance(history: list[tuple[bool, int]], capacity: int) -> None:
    """As the overlay uses it: a close follows only an open that was accepted."""
    journal = Journal(capacity)
    accepted: set[int] = set()
    taken: list[Event] = []
    refused = 0
    for number, (opens, what) in enumerate(history):
        if opens:
            if journal.opened(opened(number)):
                accepted.add(number)
            else:
                refused += 1
        elif accepted and what > 3:
            journal.closed(closed(accepted.pop()))
        else:
            taken += journal.take(what)
    for fh in accepted:
        journal.closed(closed(fh))
    taken += journal.take(1000)
    assert journal.dropped == refused
    opens_taken = [event.fh for event in taken if isinstance(event, Opened)]
    assert opens_taken == sorted(opens_taken)
    assert sorted(opens_taken) == sorted(event.fh for event in taken if isinstance(event, Closed))


async def test_wait_returns_at_once_if_there_is_something(autojump_clock: MockClock) -> None:
    journal = Journal(10)
    journal.opened(opened(1))
    with trio.fail_after(1):
        await journal.wait()
        await journal.wait()
    assert len(journal) == 1


async def test_wait_is_woken_by_an_open_and_by_a_close(autojump_clock: MockClock) -> None:
    journal = Journal(10)
    woken = 0

    async def consume() -> None:
        nonlocal woken
        while True:
            await journal.wait()
            woken += 1
            journal.take(100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await wait_all_tasks_blocked()
        journal.opened(opened(1))
        journal.opened(opened(2))
        await wait_all_tasks_blocked()
        assert woken == 1
        journal.closed(closed(1))
        await wait_all_tasks_blocked()
        assert woken == 2
        assert len(journal) == 0
        nursery.cancel_scope.cancel()
