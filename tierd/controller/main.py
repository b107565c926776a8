"""The controller process: leads or waits to, tells health and metrics, ends in time. Composition root; decides nothing.

Whatever is away, PostgreSQL, Redis, the object store, the process lives on and tries again; what it had begun is
resumed from the database. SIGTERM cancels the work between two of its steps. What a thread still does then has
`shutdown_timeout` to end; after that the process ends as if it had been killed, which every move survives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any, Final, cast

import structlog
from hypercorn.asyncio import serve as hypercorn_serve

from tierd import web
from tierd.controller import housekeeping
from tierd.controller.jobs.registry import JOBS
from tierd.controller.jobs.run import run_next
from tierd.controller.leading import Phase, Standing, lead
from tierd.controller.moves.requests import PromoteRequests
from tierd.controller.moves.wishes import Answers
from tierd.controller.outputs.erasure_news import ErasureNews
from tierd.controller.redis_client import redis_of
from tierd.controller.settings import ControllerSettings
from tierd.controller.statistics.fold import StatisticsFold
from tierd.controller.tasks import AWAY, reason_of, steadily, together
from tierd.controller.work import Work
from tierd.controller.workplace import Workplace, holder
from tierd.metrics import ControllerMetrics, FoldMetrics

log = structlog.get_logger(__name__)

_JOBS_SECONDS: Final = 2.0
"""How soon a request is heard; the schedule needs no better."""
_MOVES_SECONDS: Final = 5.0
_REQUESTS_SECONDS: Final = 2.0
_WISHES_SECONDS: Final = 1.0
_OUTPUTS_SECONDS: Final = 2.0
_PROMOTIONS_SECONDS: Final = 10.0
_NEWS_SECONDS: Final = 5.0
_METRICS_SECONDS: Final = 60.0
_PURGE_SECONDS: Final = 600.0


class Controller:
    """See the module. Raises UsageError for settings that cannot be."""

    def __init__(self, settings: ControllerSettings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        settings.database()  # says what is missing before anything is begun
        self._redis = redis_of(settings) if settings.redis is not None else None
        self._place = Workplace(settings, environ)
        self._listener = web.listen(settings.metrics, "metrics")
        self.metrics_address = _address(self._listener)
        self._fold_metrics = FoldMetrics(self._place.registry)
        self._standing = Standing(partial(_tell_standing, self._place.metrics))
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises SchemaError if the database is not of this version."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_tell_stray)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        log.info(
            "started",
            holder=holder(),
            source=str(self.settings.source),
            metrics=self.metrics_address,
            time_zone=self.settings.time_zone,
        )
        if self._redis is None:
            log.warning("no_redis", consequence="nobody hears of reads and open models: nothing is demoted by itself")
        try:
            await together(self._serve(), self._lead(), self._stopped())
        finally:
            if self._redis is not None:
                await self._redis.aclose()
        log.info("stopped")

    async def _lead(self) -> None:
        await lead(self.settings, holder(), self._standing, self._work)

    async def _work(self, epoch: int) -> None:
        async with self._place.work(epoch) as work:
            await together(*self._tasks(work))

    def _tasks(self, work: Work) -> list[Coroutine[Any, Any, None]]:
        """All that a leader does, side by side. Each job by itself: one that takes hours holds up no other one."""
        tasks = [
            steadily("moves", work.carrier.round, _MOVES_SECONDS),
            steadily("wishes", Answers(work.database, work.moves, work.epoch).round, _WISHES_SECONDS),
            steadily("outputs", work.output_backup.round, _OUTPUTS_SECONDS),
            steadily("output deletions", work.output_work.deletion.round, _OUTPUTS_SECONDS),
            steadily("output erasures", work.output_work.erasure.round, _OUTPUTS_SECONDS),
            steadily("output promotions", work.output_work.promotion.round, _PROMOTIONS_SECONDS),
            steadily("metrics", partial(housekeeping.tell_metrics, work), _METRICS_SECONDS),
            steadily("purge", partial(housekeeping.purge, work), _PURGE_SECONDS),
            steadily("wasted objects", partial(_clean_up, work), _PURGE_SECONDS),
            *(steadily(name, partial(_run_next, name, work), _JOBS_SECONDS) for name in JOBS),
        ]
        if self._redis is not None:
            requests = PromoteRequests(work.database, self._redis, work.moves, work.metrics)
            window_s = work.settings.outputs_promote_window
            fold = StatisticsFold(work.database, self._redis, self._fold_metrics, reads_window_s=window_s)
            tasks.append(fold.run())
            news = ErasureNews(work.database, self._redis, work.settings.outputs_root_bytes)
            tasks.append(steadily("erasure news", news.round, _NEWS_SECONDS))
            tasks.append(steadily("promote_requests", requests.round, _REQUESTS_SECONDS))
        return tasks

    # --- HTTP ---

    async def _serve(self) -> None:
        async def why_not_ready() -> str:
            return self._standing.why_not_ready()

        app = web.metrics_app(self._place.registry, why_not_ready, asyncio.to_thread)
        config = web.config_of(self._listener)
        await hypercorn_serve(cast(Any, app), config, shutdown_trigger=self._stopped, mode="asgi")

    # --- the end ---

    async def _stopped(self) -> None:
        await self._stop.wait()

    def _end(self, number: signal.Signals) -> None:
        seconds = self.settings.shutdown_timeout
        log.info("stopping", signal=number.name, within_seconds=seconds)
        deadline = threading.Timer(seconds, _give_up)
        deadline.daemon = True
        deadline.start()
        self._stop.set()


async def _clean_up(work: Work) -> bool:
    return bool(await work.moves.clean_up())


async def _run_next(name: str, work: Work) -> bool:
    return await run_next(JOBS[name], work) is not None


def _give_up() -> None:
    log.warning("stopped_in_the_middle", consequence="the next leader resumes what was begun")
    os._exit(1)


def _tell_standing(metrics: ControllerMetrics, phase: Phase, epoch: int) -> None:
    metrics.standing(leading=phase is Phase.LEADING, epoch=epoch, reached=phase not in (Phase.STARTING, Phase.AWAY))


def _tell_stray(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody waited for, such as connections that a server cut: one line each; a defect with its traceback."""
    error = context.get("exception")
    if isinstance(error, AWAY):
        log.debug("stray_error", what=context.get("message"), reason=reason_of(error))
    else:
        log.error("stray_defect", what=context.get("message"), exc_info=error)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
