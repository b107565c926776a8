"""Opens what a leader works with, from the settings: source, object store, database, moves. Decides nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from tierd.controller.jobs import runs as job_runs
from tierd.controller.jobs.names import JOB_HELP
from tierd.controller.moves.carrier import Carrier
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.workshop import MoveSettings
from tierd.controller.outputs.backup import BackupSettings, OutputBackup
from tierd.controller.outputs.files import OutputFiles
from tierd.controller.outputs.work import output_work_of
from tierd.controller.settings import ControllerSettings
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.work import Work
from tierd.errors import UsageError
from tierd.metrics import ContextMetrics, ControllerMetrics
from tierd.objects.settings import describe, open_store
from tierd.output_metrics import OutputMetrics
from tierd.postgres import Database

log = structlog.get_logger(__name__)


class Workplace:
    """Of one process. Raises UsageError for what is missing in the settings or on this machine."""

    def __init__(self, settings: ControllerSettings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.source = _source_of(settings)
        self._state_dir = _made(settings.state_dir)
        if settings.objects is None:
            raise UsageError("no object store is named", hint="set objects to its URL or a directory")
        self._objects = describe(settings.objects)
        self._environ = environ
        open_store(self._objects, environ).close()  # says now what is wrong with it
        self.registry = CollectorRegistry()
        self.metrics = ControllerMetrics(self.registry, JOB_HELP)
        self.output_metrics = OutputMetrics(self.registry)
        self.context_metrics = ContextMetrics(self.registry)

    @asynccontextmanager
    async def work(self, epoch: int) -> AsyncIterator[Work]:
        """What to work with in an epoch that has begun. Raises DatabaseError."""
        async with Database(self.settings) as database:
            async with database.transaction() as connection:
                for job in await job_runs.interrupt_others(connection, epoch):
                    log.warning("job_interrupted", job=job, consequence="what it had begun goes on, the rest waits")
            tree, store = HotTree(self.source), open_store(self._objects, self._environ)
            moves = Moves(database, tree, store, self._moves(), epoch)
            carrier = Carrier(database, moves)
            files = OutputFiles(tree, self.settings.outputs_root_bytes)
            backup = OutputBackup(database, epoch, files, store, self._backup(), self.output_metrics)
            try:
                await _look_around(moves)
                yield Work(
                    *(self.settings, database, epoch, self.source, moves, carrier, self.metrics),
                    *(store, self.context_metrics, files, backup, self.output_metrics),
                    output_work_of(self.settings, moves, files),
                )
            finally:
                store.close()  # first: then what its threads do ends soon
                await carrier.close()
                await asyncio.to_thread(moves.__exit__)
                await asyncio.to_thread(backup.close)
                tree.close()

    def _backup(self) -> BackupSettings:
        return BackupSettings(self._objects.outputs_bucket, self._state_dir)

    def _moves(self) -> MoveSettings:
        settings = self.settings
        return MoveSettings(
            state_dir=self._state_dir,
            models_roots=settings.models_roots_bytes,
            bucket=self._objects.models_bucket,
            outputs_bucket=self._objects.outputs_bucket,
            outputs_grace=settings.outputs_grace,
            grace=settings.grace,
            settle=settings.move_settle,
            parallel_files=settings.move_files_at_once,
            lease_report_max_age=settings.lease_report_max_age,
            lease_reports=settings.nodes_report,
        )


async def _look_around(moves: Moves) -> None:
    try:
        await moves.look_around()
    except OSError as error:  # moves that need the source will tell, and wait for it
        log.warning("source_unreadable", reason=str(error), hint="is the source mounted?")


def holder() -> str:
    """This process, for people."""
    return f"{socket.gethostname()} (process {os.getpid()})"


def _source_of(settings: ControllerSettings) -> Path:
    if settings.source is None:
        raise UsageError("no source is named", hint="set source to the JuiceFS mount that the nodes lay tierd over")
    if not settings.source.is_dir():
        raise UsageError(f"source {settings.source} is no directory", hint="is it mounted?")
    return settings.source


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"state_dir {directory}: {error.strerror}", hint="set it to a writable directory") from None
    return directory
