"""Tasks of a leader: they end together, are tried again, and never overlook that they were cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from tests.servers import run
from tierd.controller.leader import NotLeaderError
from tierd.controller.tasks import each, steadily, together
from tierd.errors import DatabaseError


async def for_ever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise NotLeaderError("over")


def test_one_that_fails_takes_the_others_along() -> None:
    ended = []

    async def other() -> None:
        try:
            await for_ever()
        finally:
            ended.append("other")

    with pytest.raises(NotLeaderError):
        run(together(other(), other(), fail()))
    assert ended == ["other", "other"]


def test_one_that_ends_ends_the_others() -> None:
    async def end() -> None: ...

    run(together(for_ever(), end()))


def test_work_that_does_not_end_is_told_and_waited_for() -> None:
    seen = []

    async def main() -> None:
        free = asyncio.Event()

        async def in_a_thread() -> None:
            try:
                await for_ever()
            except asyncio.CancelledError:
                await free.wait()
                seen.append("ended")
                raise

        def late() -> None:
            seen.append("late")
            free.set()

        await together(in_a_thread(), fail(), late_s=0, late=late)

    with capture_logs() as logs, pytest.raises(NotLeaderError):
        run(main())
    assert seen == ["late", "ended"]
    assert [line["event"] for line in logs] == ["work_does_not_end"]


def rounds(*errors: Exception | None) -> tuple[Callable[[], Awaitable[bool | None]], list[float]]:
    """A step that raises these, one after another."""
    left, paused = list(errors), []

    async def step() -> None:
        error = left.pop(0) if left else NotLeaderError("enough")
        if error is not None:
            raise error

    return step, paused


def test_what_is_away_is_said_once_and_tried_again() -> None:
    step, paused = rounds(None, DatabaseError("away"), OSError("away"), None, KeyError("x"), KeyError("x"), None)

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    with capture_logs() as logs, pytest.raises(NotLeaderError):
        run(steadily("name", step, 3.0, pause))
    assert [line["event"] for line in logs] == ["task_failing", "task_resumed", "task_defect", "task_resumed"]
    assert paused == [3.0] * 7


def test_a_cancellation_that_an_error_hides_is_not_overlooked() -> None:
    """As where giving a connection back fails, or in a wait that ends just then."""

    async def main() -> None:
        begun = asyncio.Event()

        async def step() -> None:
            hides = not begun.is_set()
            begun.set()
            try:
                await for_ever()
            except asyncio.CancelledError:
                if hides:
                    raise TimeoutError from None
                raise

        task = asyncio.create_task(steadily("name", step, 0.0))
        await begun.wait()
        task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled()

    with capture_logs() as logs:
        run(main())
    assert logs == []


def test_a_cancellation_that_a_step_hid_ends_it() -> None:
    """As a wait that ends just then may hide it: the step seems to have succeeded."""
    steps = []

    async def step() -> bool:
        steps.append("step")
        if len(steps) == 1:
            with suppress(asyncio.CancelledError):
                await for_ever()
        return False

    async def main() -> bool:
        task = asyncio.create_task(steadily("step", step, 0))
        while not steps:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        return task.cancelled()

    assert run(main())
    assert steps == ["step"]


def test_the_first_failure_of_several_is_told_by_itself() -> None:
    """In a group it would go by those who wait for the end of our leadership."""
    with pytest.raises(NotLeaderError):
        run(each([for_ever(), fail(), fail()]))
