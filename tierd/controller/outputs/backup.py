"""Copies outputs into the object store: each as soon as somebody told of it, verified, and called cold only then.

Whoever told of it (a node, a scan) only marked its row as pending; what is true is found out here, at the file. A copy
is made of one state of the file under a version of its own, read back and compared; it can be killed anywhere and goes
on with the same version while the file is the same. What fails is tried again, less and less often, for ever.

Contract: one leader's, one task calls `round`. Close the store first, then this.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple, ParamSpec, TypeVar

import structlog

from tierd.controller.leader import NotLeaderError
from tierd.controller.moves.books import Books
from tierd.controller.moves.cold_copy import sha256_of
from tierd.controller.outputs import books, sql
from tierd.controller.outputs.books import FileVersion, Pending, signed
from tierd.controller.outputs.files import OutputFiles, version_of
from tierd.controller.tasks import reason_of
from tierd.errors import DatabaseError, TierdError
from tierd.objects.keys import object_key, shown
from tierd.objects.store import ObjectDamaged, ObjectStore, Place
from tierd.output_metrics import OutputMetrics
from tierd.outputs import Fault, parse
from tierd.postgres import Database
from tierd.syscalls import forced_stat

log = structlog.get_logger(__name__)

AT_ONCE: Final = 4
_TAKEN_MAX: Final = 64
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class OutputChanged(TierdError):
    """A file changed while it was copied: somebody writes to it."""


class BackupSettings(NamedTuple):
    """Where copies go. `state_dir` is for records of uploads in parts, so that they go on after a kill."""

    bucket: str
    state_dir: Path


class OutputBackup:
    """See the module. `at` is told of each effect, before and after it."""

    def __init__(
        self,
        database: Database,
        epoch: int,
        files: OutputFiles,
        store: ObjectStore,
        settings: BackupSettings,
        metrics: OutputMetrics,
        at: Callable[[str], None] = lambda effect: None,
    ) -> None:
        self._books = Books(database, epoch)
        self._files = files
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._at = at
        self._bucket_is_there = False
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="output")

    @property
    def bucket(self) -> str:
        """Where copies go."""
        return self._settings.bucket

    def close(self) -> None:
        """Waits for what runs."""
        self._pool.shutdown()

    async def round(self) -> bool:
        """Look at some outputs that wait; True if there may be more. Raises NotLeaderError, DatabaseError."""
        async with self._books.writing() as connection:
            waiting = await books.take_pending(connection, _TAKEN_MAX)
        if waiting and not self._bucket_is_there:
            await self._run(self._store.ensure_bucket, self._settings.bucket)
            self._bucket_is_there = True
        slots = asyncio.Semaphore(AT_ONCE)

        async def look(one: Pending) -> None:
            async with slots:
                await self._look(one)

        tasks = [asyncio.create_task(look(one)) for one in waiting]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return len(waiting) == _TAKEN_MAX

    async def _run(self, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """Call it in a thread, which may go on for a while behind the back of a cancelled task: what it does there is
        to read, and to store bytes that whoever goes on will store again."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    # --- one output ---

    async def _look(self, one: Pending) -> None:
        try:
            await self._settle(one)
        except (NotLeaderError, DatabaseError):
            raise
        except (TierdError, OSError) as error:
            self._metrics.failed()
            log.warning("output_not_backed_up", output=shown(one.path), reason=reason_of(error))
            await self._execute(sql.FAILED, one.output_id, reason_of(error).encode("utf-8", "replace").decode())

    async def _settle(self, one: Pending) -> None:
        """Find out what is true of it, and make that so in the books. Raises TierdError, OSError: it is tried again."""
        if isinstance(parse(one.path), Fault):
            raise TierdError("its row names no output", hint="who wrote it?")
        found = await self._run(self._files.find, one.path)
        if found.hot is None and not found.stub and one.cold and await self._run(self._is_lost, one):
            await self._execute(sql.LOST, one.output_id, one.news)
        elif found.hot is None:
            await self._execute(sql.NOT_HOT, one.output_id, one.news, found.stub)
        elif one.cold and await self._run(self._is_copied, one, found.hot):
            times = found.hot.mtime_ns, found.hot.ctime_ns
            await self._execute(sql.STILL_COPIED, one.output_id, one.news, signed(found.hot.inode), *times)
        else:
            await self._copy(one, found.hot)

    def _is_lost(self, one: Pending) -> bool:
        """Whether its object is not there. Raises ObjectError, also if there is no such bucket."""
        next(
            iter(self._store.list(self._settings.bucket, key := key_of(self._files.root, one.path, one.version))), None
        )
        return self._store.stat(self._settings.bucket, key) is None

    def _is_copied(self, one: Pending, found: FileVersion) -> bool:
        """Whether the file has the bytes of the object. If anything else of it changed, they are compared."""
        if one.copied is None or one.copied.size != found.size:
            return False
        if one.copied == found:
            return True
        fd = self._files.open(one.path)
        try:
            return sha256_of(fd) == one.sha256 and version_of(forced_stat(fd)) == found
        finally:
            os.close(fd)

    async def _copy(self, one: Pending, found: FileVersion) -> None:
        version: int | None = one.version
        if one.cold or not one.version or one.copied != found:
            self._at("begin copy")
            async with self._books.writing() as connection:
                version = await books.begin_copy(connection, one, found)
            self._at("began copy")
        if version is None:
            return  # there are news of it: the next round looks
        try:
            sha256 = await self._run(self._put, one.path, version, found)
        except (TierdError, OSError):
            await self._drop_if_deleted(one, version)
            raise
        self._at("end copy")
        async with self._books.writing() as connection:
            seconds = await books.end_copy(connection, one, version, sha256)
        self._at("ended copy")
        if seconds is not None:
            self._metrics.backed_up(seconds)
        else:
            await self._drop_if_deleted(one, version)

    async def _drop_if_deleted(self, one: Pending, version: int) -> None:
        """Of an output that was deleted while it was copied there shall be no object, either."""
        async with self._books.writing() as connection:
            known: bool = await connection.fetchval(sql.IS_KNOWN, one.output_id)
        if not known:
            await self._run(self._store.delete, self._settings.bucket, key_of(self._files.root, one.path, version))

    def _put(self, path: bytes, version: int, expected: FileVersion) -> str:
        """Store the file, read the object to its end; its SHA-256. Raises OutputChanged, ObjectError, OSError."""
        key = key_of(self._files.root, path, version)
        uploads = self._settings.state_dir / "output-uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        journal = uploads / hashlib.sha256(key.encode()).hexdigest()[:32]
        fd = self._files.open(path)
        try:
            _expect(fd, path, expected)
            self._at("put object")
            stored = self._store.put_file(self._settings.bucket, key, fd, expected.size, journal=journal)
            self._at("object was put")
            _expect(fd, path, expected)
        finally:
            os.close(fd)
        found = self._store.hash(self._settings.bucket, key)
        if found != stored:
            place = Place("the object store", self._settings.bucket, key)
            raise ObjectDamaged(place, f"it has SHA-256 {found.sha256}, {stored.sha256} was stored")
        return stored.sha256

    async def _execute(self, statement: str, *values: object) -> None:
        async with self._books.writing() as connection:
            await connection.execute(statement, *values)


def key_of(root: bytes, path: bytes, version: int) -> str:
    """The object of an output: that of the file of its day's directory in this version."""
    directory, _, name = path.rpartition(b"/")
    return object_key(day_id(root, directory), version, name)


def day_id(root: bytes, directory: bytes) -> str:
    """What a move calls a day's directory."""
    return (root + b"/" + directory if root else directory).decode()


def _expect(fd: int, path: bytes, expected: FileVersion) -> None:
    if version_of(forced_stat(fd)) != expected:
        raise OutputChanged(f"{shown(path)} changed while it was copied", hint="it is tried again")
