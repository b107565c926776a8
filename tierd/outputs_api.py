"""Deletes generated outputs everywhere, for programs: of a user, one or all. The controller's settings are needed.

    delete_outputs("user123", settings=load({}, os.environ))

What was asked for is carried out by the controller that leads, or by this process if none does and it has what is
needed (`source`, `objects`). It goes on, whatever becomes of whoever asked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from uuid import UUID

from prometheus_client import CollectorRegistry

from tierd.controller.leading import lead_once
from tierd.controller.migrate import require_current
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.outputs.deletion import Deletion
from tierd.controller.outputs.erasure_news import ErasureNews
from tierd.controller.redis_client import redis_of
from tierd.controller.settings import ControllerSettings
from tierd.controller.statistics.fold import StatisticsFold
from tierd.controller.workplace import Workplace, holder
from tierd.metrics import FoldMetrics
from tierd.postgres import Connection, connected

_POLL_SECONDS = 0.5

__all__ = ["Deletion", "delete_outputs", "delete_outputs_async"]


def delete_outputs(
    user: str, output_id: UUID | None = None, *, settings: ControllerSettings, timeout: float = 600.0
) -> Deletion:
    """Delete one output of a user, or all: how it stands at the end, or after `timeout` seconds.

    `deleted_everywhere` says whether source, object store and every node are known to have nothing of it. Raises
    UsageError for a user that cannot be one and for an output that he has not, DatabaseError.
    """
    return asyncio.run(delete_outputs_async(user, output_id, settings=settings, timeout=timeout))


async def delete_outputs_async(
    user: str,
    output_id: UUID | None = None,
    *,
    settings: ControllerSettings,
    timeout: float = 600.0,
    tell: Callable[[Deletion], None] = lambda _: None,
) -> Deletion:
    """`delete_outputs` for asyncio programs. `tell` hears of it every now and then."""
    place = Workplace(settings, os.environ) if settings.source is not None and settings.objects is not None else None
    until = time.monotonic() + timeout
    async with connected(settings) as connection:
        await require_current(connection)
        wish = await output_deletion.ask(connection, user, output_id, holder())
        look = partial(_look, connection, wish, tell)
        while not (found := await look()).deleted_everywhere and time.monotonic() < until:
            if place is None or not await lead_once(settings, holder(), partial(_work, place, look, until)):
                await asyncio.sleep(_POLL_SECONDS)
        return found


async def _look(connection: Connection, wish: int, tell: Callable[[Deletion], None]) -> Deletion:
    found = await output_deletion.standing(connection, wish)
    tell(found)
    return found


async def _work(place: Workplace, look: Callable[[], Awaitable[Deletion]], until: float, epoch: int) -> None:
    """As the leader, until it is done or the time is over."""
    async with AsyncExitStack() as stack:
        work = await stack.enter_async_context(place.work(epoch))
        steps = [work.output_work.deletion.round, work.output_work.erasure.round, work.carrier.round]
        if place.settings.redis is not None:
            redis = redis_of(place.settings)
            stack.push_async_callback(redis.aclose)
            steps.append(ErasureNews(work.database, redis, place.settings.outputs_root_bytes).round)
            steps.append(StatisticsFold(work.database, redis, FoldMetrics(CollectorRegistry())).fold)
        while True:
            for step in steps:
                await step()
            if (await look()).deleted_everywhere or time.monotonic() >= until:
                return
            await asyncio.sleep(_POLL_SECONDS)
