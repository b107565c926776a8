"""How a leader's tasks run beside each other: one that ends takes the others along, one that fails is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

import asyncpg  # type: ignore[import-untyped]
import structlog
from redis.exceptions import RedisError

from tierd.controller.leader import NotLeaderError
from tierd.errors import TierdError
from tierd.postgres import heed_cancellation

log = structlog.get_logger(__name__)

AWAY: Final = (TierdError, RedisError, OSError, asyncpg.PostgresError)
"""What a server or a file system that is away raises, and what one refuses."""
Pause = Callable[[float], Awaitable[None]]


async def together(
    *coroutines: Coroutine[Any, Any, None], late_s: float | None = None, late: Callable[[], None] = lambda: None
) -> None:
    """Run all until one ends or fails; the others are cancelled, and have ended, when this returns or raises.

    If they have not ended `late_s` after that, `late` is called once.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        endings = await _ended(tasks, late_s, late)
    for task, ending in zip(tasks, endings, strict=True):
        if task not in done and isinstance(ending, Exception):
            log.warning("task_ended_badly", reason=reason_of(ending))
    for task in done:
        task.result()


async def _ended(
    tasks: Sequence[asyncio.Task[None]], late_s: float | None, late: Callable[[], None]
) -> list[BaseException | None]:
    """Cancel them, once: who is cancelled again while he waits for a thread would leave it behind."""
    for task in tasks:
        task.cancel()
    ending = asyncio.gather(*tasks, return_exceptions=True)
    if late_s is not None and (await asyncio.wait(tasks, timeout=late_s))[1]:
        log.warning("work_does_not_end", after_seconds=late_s, reason="a thread is at work: does the source hang?")
        late()
    return await ending


async def each(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all to their ends. The first that fails ends the others, and what it raised is raised, in no group."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def steadily(
    name: str, step: Callable[[], Awaitable[bool | None]], seconds: float, pause: Pause = asyncio.sleep
) -> None:
    """Do `step` every `seconds`, at once again if it returned True, until cancelled.

    What is away is logged once and tried again. A defect, too: the other tasks shall not suffer from it. Only the end
    of our leadership ends it.
    """
    failing = False
    while True:
        again: bool | None = False
        try:
            again = await step()
        except NotLeaderError:
            raise
        except AWAY as error:
            heed_cancellation(error)
            if not failing:
                hint = error.hint if isinstance(error, TierdError) else ""
                log.warning("task_failing", task=name, reason=reason_of(error), hint=hint)
            failing = True
        except Exception as error:
            heed_cancellation(error)
            if not failing:
                log.exception("task_defect", task=name)
            failing = True
        else:
            if failing:
                log.info("task_resumed", task=name)
            failing = False
        if not again:
            await pause(seconds)
        heed_cancellation()


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
