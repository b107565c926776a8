"""What tests of generated outputs start from: a source with outputs, an object store, a database, a leader."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry

from tests.controller.house import connected, settings_for
from tests.controller.moving import stub_path
from tierd.controller.jobs.names import JOB_HELP
from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.leader import begin_epoch
from tierd.controller.moves.carrier import Carrier
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.workshop import MoveSettings
from tierd.controller.outputs import books as output_books
from tierd.controller.outputs.backup import BackupSettings, OutputBackup, key_of
from tierd.controller.outputs.cleanup import cleanup_old_outputs
from tierd.controller.outputs.files import OutputFiles
from tierd.controller.outputs.scan import OutputScan, Scanned
from tierd.controller.outputs.work import output_work_of
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.statistics.plan import OutputSum
from tierd.controller.work import Work
from tierd.metrics import ContextMetrics, ControllerMetrics
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key
from tierd.objects.store import ObjectStore, Stored
from tierd.output_metrics import OutputMetrics
from tierd.postgres import Database
from tierd.stub_files import is_cold, read_origins

BUCKET = "generated-outputs"
DAY = "user123/2026/01/12"
OLD_NS = 1_700_000_000_000_000_000


class Killed(BaseException):
    """The process ended here."""


@dataclass
class House:
    """A source with outputs, an object store and a database."""

    root: Path
    dsn: str
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    objects: ObjectStore | None = None
    """A directory by default."""

    def __post_init__(self) -> None:
        (self.root / "source/outputs").mkdir(parents=True)
        (self.root / "objects").mkdir()
        self.store = self.objects or DirectoryStore(self.root / "objects")
        self.metrics = OutputMetrics(self.registry)

    @property
    def outputs(self) -> Path:
        return self.root / "source/outputs"

    def write(self, path: str, content: bytes = b"png") -> str:
        """A file below the outputs root, written long ago."""
        file = self.outputs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        for each in (file, file.parent):
            os.utime(each, ns=(OLD_NS, OLD_NS))
        return path

    def make(self, day: str = DAY, ending: str = "png", content: bytes = b"png", name: str | None = None) -> str:
        """An output; its path below the outputs root."""
        return self.write(f"{day}/{name or uuid4()}.{ending}", content)

    async def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async with connected(self.dsn) as connection:
            return [tuple(row) for row in await connection.fetch(query, *values)]

    def meanwhile(self, query: str) -> None:
        """A statement of somebody else, from within whatever runs."""
        thread = threading.Thread(target=lambda: asyncio.run(self.rows(f"{query} RETURNING 1")))
        thread.start()
        thread.join()

    @asynccontextmanager
    async def leading(
        self, at: Callable[[str], None] = lambda effect: None, settle: float = 0.0, **more: Any
    ) -> AsyncIterator[Leader]:
        """What a leader has."""
        async with connected(self.dsn) as session, Database(settings_for(self.dsn)) as database:
            epoch = await begin_epoch(session, "test")
            tree = HotTree(self.root / "source")
            files = OutputFiles(tree, b"outputs")
            settings = BackupSettings(BUCKET, self.root / "state")
            backup = OutputBackup(database, epoch, files, self.store, settings, self.metrics, at)
            moves = Moves(
                database,
                tree,
                self.store,
                MoveSettings(state_dir=self.root / "state", settle=settle, lease_reports=False, outputs_grace=3600.0),
                epoch,
                at,
            )
            carrier = Carrier(database, moves)
            told = settings_for(self.dsn, **more)
            metrics = ControllerMetrics(CollectorRegistry(), JOB_HELP)
            source = self.root / "source"
            work = Work(
                *(told, database, epoch, source, moves, carrier, metrics),
                *(self.store, ContextMetrics(CollectorRegistry()), files, backup, self.metrics),
                output_work_of(told, moves, files),
            )
            try:
                yield Leader(work)
            finally:
                await carrier.close()
                await asyncio.to_thread(moves.__exit__)
                await asyncio.to_thread(backup.close)
                tree.close()

    def object(self, path: str, version: int = 1) -> bytes | None:
        """The bytes of an object."""
        file = self.root / "objects" / BUCKET / key_of(b"outputs", path.encode(), version)
        return file.read_bytes() if file.is_file() else None

    async def told(self, path: str, **ages_ns: int) -> None:
        """A node told of it."""
        async with Database(settings_for(self.dsn)) as database, database.transaction() as connection:
            await output_books.tell(connection, {path: OutputSum(**ages_ns)}, 0)


@dataclass
class Leader:
    """What a leader does with outputs."""

    work: Work

    async def scan(self, gone_max: float = 0.5, **more: bool) -> Scanned:
        """Look for what no node told of."""
        return await OutputScan(
            self.work.database, self.work.output_files, gone_max=gone_max, tell=nobody, **more
        ).run()

    async def back_up(self) -> None:
        """All that waits for it."""
        while await self.work.output_backup.round():
            pass

    async def clean_up(self, *, dry_run: bool = False) -> Outcome:
        """The job cleanup-old-outputs."""
        return await cleanup_old_outputs(Context(self.work, dry_run, nobody))


async def nobody(_: str) -> None:
    """Listens to what a job is at."""


def sha(content: bytes) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def read(house: House, path: str) -> bytes | None:
    """An output as the overlay has it: hot wins, else what its stub stands for; None if it is not there."""
    file = house.outputs / path
    if file.exists():
        return file.read_bytes()
    stub = stub_path(file)
    if not stub.exists() or not is_cold(stub.stat()):
        return stub.read_bytes() if stub.exists() else None
    fd = os.open(file.parent / ".tierd/origins", os.O_RDONLY)
    try:
        origin = read_origins(fd)[stub.stat().st_ino]
    finally:
        os.close(fd)
    content = bytearray(origin.size)
    key = object_key(origin.model_id, origin.version, origin.path)
    house.store.get_range(BUCKET, key, Stored(origin.size, origin.sha256), 0, memoryview(content))
    return bytes(content)
