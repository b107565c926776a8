"""Work that comes round: its interval, what calls it early, and what fails, in virtual time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tierd.node.rounds import Rounds


@pytest.fixture(autouse=True)
def _no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual clock does not wait for threads."""

    async def run_sync(work: Callable[[], object]) -> object:
        await trio.lowlevel.checkpoint()
        return work()

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


async def run_for(rounds: Rounds, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await rounds.run()


async def test_rounds_come_by_the_clock_and_when_needed(autojump_clock: MockClock) -> None:
    ran: list[float] = []
    rounds = Rounds(lambda: ran.append(trio.current_time()), interval_s=5.0, failed="failed")

    async def need() -> None:
        await trio.sleep(7)
        rounds.needed()
        rounds.needed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(need)
        await run_for(rounds, 13)
    assert ran == pytest.approx([0, 5, 7, 12])


async def test_a_need_that_comes_up_while_it_works_is_not_lost(autojump_clock: MockClock) -> None:
    ran: list[float] = []

    def work() -> None:
        ran.append(trio.current_time())
        if len(ran) == 1:
            rounds.needed()

    rounds = Rounds(work, interval_s=5.0, failed="failed")
    await run_for(rounds, 6)
    assert ran == pytest.approx([0, 0, 5])


async def test_an_error_is_logged_and_the_next_round_comes(autojump_clock: MockClock) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with capture_logs() as logs:
        await run_for(Rounds(fail, interval_s=5.0, failed="eviction_failed"), 6)
    assert [(line["event"], line["reason"]) for line in logs] == [("eviction_failed", "Input/output error")] * 2
