"""Packs one cold image anew: a new object takes the place of the one it was, which is deleted after a grace.

The steps, each harmless to repeat: a version is reserved; the image is packed anew, decoded, compared, stored and read
back (`making`); its stub and then its row say the new version (`switching`); the original stays for a grace
(`in_grace`), and goes only if the new object still reads right and the stub, under its one name, stands for that: one
that somebody renamed or linked elsewhere could stand for the original. The row of `output_compressions` stays: it says
which object took the place of which.

Contract: one leader's; each compression is advanced by one task at a time. `at` is told of each effect, before and
after it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller.moves.books import Books, StateChanged
from tierd.controller.moves.workshop import Fence
from tierd.controller.outputs import compress_sql as sql
from tierd.controller.outputs.backup import day_id, key_of
from tierd.controller.outputs.books import signed
from tierd.controller.outputs.recoding import CannotRecode, recoded
from tierd.controller.source.cold_stub import NoPlainStub, Swap, forget, stands_for
from tierd.controller.source.hot_tree import HotTree, joined
from tierd.objects.keys import shown
from tierd.objects.store import ObjectDamaged, ObjectMissing, ObjectStore, Place, Stored
from tierd.postgres import Connection, Database
from tierd.stubs import Origin

log = structlog.get_logger(__name__)

SIZE_MAX: Final = 64 << 20
"""Larger images stay as they are: they are held in memory, more than once."""
SAVING_MIN: Final = 0.03
"""What is not worth a second object."""
GRACE_SECONDS_MIN: Final = 10.0
"""However short the grace is: for so long nodes may know what a stub stood for before."""
_LOOK_AGAIN_SECONDS: Final = 3600.0


class Compression(NamedTuple):
    """A row of `output_compressions`."""

    id: int
    output_id: UUID
    user: str
    filename: str
    old_version: int
    old: Stored
    version: int
    new: Stored | None
    old_stub: int | None
    """The inode of the stub that stood for the original, as PostgreSQL has it."""
    state: str

    @property
    def path(self) -> bytes:
        """Below the outputs root."""
        return f"{self.user}/{self.filename}".encode()


class OutputCompressions:
    """See the module. `root` is the outputs root; `settle_s`: for so long nodes may know a directory as it was."""

    def __init__(
        self,
        database: Database,
        epoch: int,
        tree: HotTree,
        root: bytes,
        store: ObjectStore,
        bucket: str,
        grace_s: float,
        settle_s: float,
        at: Callable[[str], None] = lambda effect: None,
    ) -> None:
        self._database = database
        self._books = Books(database, epoch)
        self._tree = tree
        self._root = root
        self._store = store
        self._bucket = bucket
        self._grace_s = max(grace_s, GRACE_SECONDS_MIN)
        self._settle_s = settle_s
        self._at = at
        self._recoding = asyncio.Semaphore(1)
        self._steps: dict[str, Callable[[Compression], Awaitable[None]]] = {
            "making": self._make,
            "switching": self._switch,
            "in_grace": self._end_grace,
            "deleting": self._delete,
        }

    async def begin(self, output_id: UUID, days: float) -> int | None:
        """Reserve a version for an output of so many days; None if it may not be compressed (any more)."""
        values = SIZE_MAX, days, self._root.decode(), output_id
        async with self._fenced("begin compression") as fence:
            found: int | None = await fence.connection.fetchval(sql.BEGIN, *values)
        return found

    async def advance(self, compression_id: int) -> Compression:
        """Carry one on as far as it goes now; how it stands then. Raises NotLeaderError, TierdError, OSError."""
        one = await self._read(compression_id)
        while one.state in self._steps:
            with suppress(StateChanged):
                await self._steps[one.state](one)
            before, one = one, await self._read(compression_id, one)
            if one.state in (before.state, "in_grace"):
                break
        return one

    async def postpone(self, compression_id: int, reason: str, seconds: float = _LOOK_AGAIN_SECONDS) -> None:
        """Look again later."""
        told = reason.replace("\0", "").encode("utf-8", "replace").decode()
        async with self._books.writing() as connection:
            await connection.execute(sql.POSTPONE, compression_id, told, seconds)

    # --- steps ---

    async def _make(self, one: Compression) -> None:
        content = await asyncio.to_thread(self._fetch, one)
        try:
            async with self._recoding:
                packed = await recoded(content)
            if len(packed) > len(content) * (1 - SAVING_MIN):
                raise CannotRecode(f"it would save less than {SAVING_MIN:.0%}")
        except CannotRecode as error:
            await self._finish(one, "left", str(error))
            return
        stored = await asyncio.to_thread(self._put, one, packed)
        async with self._fenced("switch", one) as fence:
            if await self._is_still(fence.connection, one, one.old_version, one.old):
                await fence.connection.execute(sql.BEGIN_SWITCH, one.id, stored.size, bytes.fromhex(stored.sha256))
                await fence.connection.execute(sql.ADD_LOOSE, one.output_id, one.version)
                return
        await self._drop(one)

    async def _drop(self, one: Compression) -> None:
        """Nobody refers to the new object. Its version is not used again."""
        async with self._fenced("drop", one) as fence:
            fence.at("delete object")
            await asyncio.to_thread(self._store.delete, self._bucket, self._key(one, one.version))
            fence.at("deleted object")
            await fence.connection.execute(sql.FORGET, one.id)

    async def _switch(self, one: Compression) -> None:
        """A stub that stands for the new object takes the place of the one that is there; then the row says so."""
        assert one.new is not None
        swap = self._swap(one, self._origin(one, old=True), self._origin(one))
        why = "it was written to, or went, meanwhile"
        try:
            async with self._fenced("announce", one) as fence:
                still = await self._is_still(fence.connection, one, one.old_version, one.old)
                if still:
                    await asyncio.to_thread(swap(fence).announce)
            if still:
                await asyncio.sleep(self._settle_s)
                async with self._fenced("exchange", one) as fence:
                    if await self._is_still(fence.connection, one, one.old_version, one.old):
                        stubs = await asyncio.to_thread(swap(fence).exchange)
                        await self._set_version(
                            fence.connection, one, (one.version, one.new), one.old_version, stubs[0]
                        )
                        await fence.connection.execute(sql.BEGIN_GRACE, one.id, self._grace_s, stubs[1])
                        return
        except NoPlainStub as error:
            why = str(error)
        # A stub may stand for either: whoever renamed it took with him what it stood for.
        async with self._fenced("keep both", one) as fence:
            await asyncio.to_thread(swap(fence).discard)
            await fence.connection.execute(sql.FINISH, one.id, "kept", why)

    def _swap(self, one: Compression, old: Origin, new: Origin) -> Callable[[Fence], Swap]:
        """Within a fence."""
        return lambda fence: Swap(self._tree, self._place(one), old, new, b"%d" % one.id, fence.at)

    async def _end_grace(self, one: Compression) -> None:
        assert one.new is not None
        try:
            found = await asyncio.to_thread(self._store.hash, self._bucket, self._key(one, one.version))
        except (ObjectDamaged, ObjectMissing):
            found = None
        if found != one.new:
            await self._revert(one)
            return
        async with self._fenced("give the original up", one) as fence:
            reason = await self._needed(fence.connection, one)
            if reason:
                await fence.connection.execute(sql.FINISH, one.id, "kept", f"the original stays: {reason}")
            else:
                await fence.connection.execute(sql.SET_DELETING, one.id)

    async def _needed(self, connection: Connection, one: Compression) -> str:
        """Why somebody may still need the original; empty if nobody does."""
        assert one.new is not None
        if not await self._is_still(connection, one, one.version, one.new):
            return "the output is hot, was written to, or went"
        if await connection.fetchval(sql.IS_LOOSE, one.output_id, one.old_version):
            return "another cold file may stand for it"
        try:
            right = await asyncio.to_thread(stands_for, self._tree, self._place(one), self._origin(one))
        except NoPlainStub as error:
            return str(error)
        return "" if right else "its stub stands for something else"

    async def _revert(self, one: Compression) -> None:
        """The new object is lost: the original takes its place again, and both stay."""
        assert one.new is not None
        log.error("compressed_output_damaged", output=shown(one.path), consequence="the original takes its place")
        swap = self._swap(one, self._origin(one), self._origin(one, old=True))
        why = "the new object was damaged"
        try:
            async with self._fenced("announce the original", one) as fence:
                still = await self._is_still(fence.connection, one, one.version, one.new)
                if still:
                    await asyncio.to_thread(swap(fence).announce)
            if still:
                await asyncio.sleep(self._settle_s)
                async with self._fenced("revert", one) as fence:
                    if await self._is_still(fence.connection, one, one.version, one.new):
                        stub, _ = await asyncio.to_thread(swap(fence).exchange)
                        await self._set_version(fence.connection, one, (one.old_version, one.old), one.version, stub)
                        await fence.connection.execute(sql.FINISH, one.id, "kept", why)
                        return
        except NoPlainStub as error:
            why = f"{why}; {error}"
        await self._finish(one, "kept", why)

    async def _delete(self, one: Compression) -> None:
        async with self._fenced("delete the original", one) as fence:
            fence.at("delete object")
            await asyncio.to_thread(self._store.delete, self._bucket, self._key(one, one.old_version))
            fence.at("deleted object")
            if one.old_stub is not None:
                directory = self._place(one).rpartition(b"/")[0]
                await asyncio.to_thread(forget, self._tree, directory, one.old_stub % (1 << 64))
            await fence.connection.execute(sql.FINISH, one.id, "done", "")

    # --- objects ---

    def _fetch(self, one: Compression) -> bytes:
        content = bytearray(one.old.size)
        key = self._key(one, one.old_version)
        self._store.get_range(self._bucket, key, one.old, 0, memoryview(content))
        if hashlib.sha256(content).hexdigest() != one.old.sha256:
            raise ObjectDamaged(Place("the object store", self._bucket, key), "it has another SHA-256 than was stored")
        return bytes(content)

    def _put(self, one: Compression, content: bytes) -> Stored:
        """Store the new object and read it back: whoever was killed before left none, or one of other bytes."""
        key = self._key(one, one.version)
        fd = os.memfd_create("image", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            self._at("put object")
            self._store.delete(self._bucket, key)
            stored = self._store.put_file(self._bucket, key, fd, len(content), hashlib.sha256(content).hexdigest())
            self._at("object was put")
        finally:
            os.close(fd)
        found = self._store.hash(self._bucket, key)
        if found != stored:
            raise ObjectDamaged(Place("the object store", self._bucket, key), f"it has SHA-256 {found.sha256}")
        return stored

    def _key(self, one: Compression, version: int) -> str:
        return key_of(self._root, one.path, version)

    def _origin(self, one: Compression, *, old: bool = False) -> Origin:
        assert one.new is not None
        directory, _, name = one.path.rpartition(b"/")
        version, stored = (one.old_version, one.old) if old else (one.version, one.new)
        return Origin(day_id(self._root, directory), version, name, *stored)

    def _place(self, one: Compression) -> bytes:
        return joined(self._root, one.path)

    # --- books ---

    async def _is_still(self, connection: Connection, one: Compression, version: int, stored: Stored) -> bool:
        return bool(await connection.fetchval(sql.STILL, one.output_id, version, bytes.fromhex(stored.sha256)))

    async def _set_version(
        self, connection: Connection, one: Compression, now: tuple[int, Stored], before: int, stub: int
    ) -> None:
        version, stored = now
        values = version, stored.size, bytes.fromhex(stored.sha256), before, signed(stub)
        await connection.execute(sql.SET_VERSION, one.output_id, *values)

    async def _finish(self, one: Compression, state: str, reason: str) -> None:
        async with self._fenced("finish", one) as fence:
            await fence.connection.execute(sql.FINISH, one.id, state, reason)

    async def _read(self, compression_id: int, before: Compression | None = None) -> Compression:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(sql.ONE, compression_id)
        if row is None:
            assert before is not None, "nobody else forgets one that is not finished"
            return before._replace(state="left")
        return _compression(row)

    @asynccontextmanager
    async def _fenced(self, what: str, one: Compression | None = None) -> AsyncIterator[Fence]:
        """A transaction of the leader, and of whoever works on it. Raises NotLeaderError, StateChanged."""
        self._at(f"begin {what}")
        async with self._books.writing() as connection:
            if one is not None and await connection.fetchval(sql.HOLD, one.id) != one.state:
                raise StateChanged
            yield Fence(connection, self._at)
            self._at(f"commit {what}")
        self._at(f"committed {what}")


def _compression(row: Any) -> Compression:
    new = Stored(row["size_bytes"], row["sha256"].hex()) if row["sha256"] is not None else None
    return Compression(
        id=row["id"],
        output_id=row["output_id"],
        user=row["user_id"],
        filename=row["filename"],
        old_version=row["old_version"],
        old=Stored(row["old_size"], row["old_sha256"].hex()),
        version=row["version"],
        new=new,
        old_stub=row["old_stub"],
        state=row["state"],
    )
