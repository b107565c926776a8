"""What tests of moves start from: a source with a model in it, an object store, a catalogue, a leader."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.controller.house import connected, settings_for
from tierd.controller.leader import begin_epoch
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.steps import MoveState
from tierd.controller.moves.workshop import MoveSettings
from tierd.controller.source.hot_tree import HotTree
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key
from tierd.objects.store import ObjectStore, Stored
from tierd.postgres import Connection, Database
from tierd.stub_files import is_cold, read_origins
from tierd.stubs import ORIGINS, RESERVED, STUBS, Origin

MODEL = "models/llama-7b"
BUCKET = "cold-models"
BOOT = UUID("6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")
FILES = {
    "config.json": b"{}",
    "model-1.safetensors": bytes(range(256)) * 300,
    "model-2.safetensors": os.urandom(100_000),
    "unet/weights.bin": os.urandom(5_000),
    "empty": b"",
}


@dataclass
class Shared:
    """What all sites of one source use within `Site.connected`."""

    connection: Connection | None = None
    database: Database | None = None


@dataclass
class Site:
    """A source, an object store and a database of one test."""

    root: Path
    dsn: str
    store: ObjectStore
    settings: MoveSettings
    model_id: str = MODEL
    shared: Shared = field(default_factory=Shared)

    @property
    def source(self) -> Path:
        """The root of the hot tier."""
        return self.root / "source"

    @property
    def model(self) -> Path:
        """The model in it."""
        return self.source / self.model_id

    def make_model(self, files: dict[str, bytes] = FILES) -> None:
        """With a link, an empty directory, hard links, attributes and times."""
        for name, content in files.items():
            path = self.model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o640)
            os.setxattr(path, "user.origin", b"hub")
            os.utime(path, ns=(1_600_000_000_000_000_001, 1_500_000_000_000_000_007))
        (self.model / "void").mkdir()
        (self.model / "latest").symlink_to("model-1.safetensors")
        os.link(self.model / "model-2.safetensors", self.model / "unet/same.safetensors")

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """For the length of a `with` the connections that are not those of a leader are kept: each takes 20 ms."""
        if self.shared.connection is not None:
            yield
            return
        async with connected(self.dsn) as connection, Database(settings_for(self.dsn)) as database:
            self.shared.connection, self.shared.database = connection, database
            try:
                yield
            finally:
                self.shared.connection = self.shared.database = None

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection, for one task."""
        if self.shared.connection is not None:
            yield self.shared.connection
            return
        async with connected(self.dsn) as connection:
            yield connection

    async def register(self, *nodes: str, **columns: Any) -> None:
        """The model in the catalogue, and nodes that have just reported that nothing is open."""
        async with self.connection() as connection:
            await connection.execute(
                "INSERT INTO model_locations (model_id, tier, size_bytes, created_at, last_access)"
                " VALUES ($1, 'hot', 1, now() - interval '100 days', now() - interval '90 days')",
                self.model_id,
            )
            for node in nodes:
                await connection.execute(
                    "INSERT INTO nodes (node_id, boot, leases_at) VALUES ($1, $2, now())", node, BOOT
                )

    async def value(self, query: str, *values: object) -> Any:
        """What a query finds."""
        async with self.connection() as connection:
            return await connection.fetchval(query, *values)

    async def execute(self, query: str, *values: object) -> None:
        """A statement."""
        async with self.connection() as connection:
            await connection.execute(query, *values)

    @asynccontextmanager
    async def leading(self, at: Callable[[str], None] = lambda effect: None, **settings: Any) -> AsyncIterator[Moves]:
        """The work of a leader, with an epoch of its own."""
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(connected(self.dsn))
            epoch = await begin_epoch(session, "test")
            database = self.shared.database
            if database is None:
                database = await stack.enter_async_context(Database(settings_for(self.dsn)))
            tree = HotTree(self.source)
            stack.callback(tree.close)
            yield stack.enter_context(Moves(database, tree, self.store, replace(self.settings, **settings), epoch, at))

    def meanwhile(self, query: str, *values: object) -> None:
        """A statement of somebody else, from within whatever runs."""
        own = replace(self, shared=Shared())
        thread = threading.Thread(target=lambda: asyncio.run(own.execute(query, *values)))
        thread.start()
        thread.join()

    async def move(self) -> tuple[str, str | None, str | None]:
        """State, error and last reason of the latest move of the model."""
        query = "SELECT id, state, error FROM moves WHERE subject = $1 ORDER BY id DESC LIMIT 1"
        async with self.connection() as connection:
            row = await connection.fetchrow(query, self.model_id)
            reason = await connection.fetchval(
                "SELECT reason FROM move_events WHERE move_id = $1 ORDER BY id DESC LIMIT 1", row["id"]
            )
        return row["state"], row["error"], reason

    async def end_grace(self) -> None:
        """As if it were over."""
        await self.execute("UPDATE moves SET grace_until = now() WHERE state = 'in_grace'")

    # --- what is there ---

    def read(self, name: str) -> bytes | None:
        """A file as the overlay has it: hot wins, else what its stub stands for; None if it is not there."""
        path = self.model / name
        if path.is_file() and not path.is_symlink():
            return path.read_bytes()
        stub = stub_path(path)
        if not stub.exists():
            return None
        if not is_cold(stub.stat()):
            return stub.read_bytes()
        return self.fetch(self.origin(path))

    def snapshot(self) -> dict[str, tuple[object, ...]]:
        """What the model looks like through the overlay, and which of its files are cold."""
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.model.rglob("*")):
            name = path.relative_to(self.model)
            if ".tierd" in name.parts and (path.is_dir() or path.parent.name != "cold"):
                continue
            st = path.lstat()
            xattrs = tuple(
                (one, os.getxattr(path, one, follow_symlinks=False))
                for one in os.listxattr(path, follow_symlinks=False)
            )
            times = () if path.is_dir() or path.is_symlink() else (st.st_mtime_ns, st.st_nlink)
            found[str(name)] = (oct(st.st_mode), st.st_uid, st.st_gid, times, xattrs)
        return found

    def litter(self) -> list[str]:
        """What moves left at the top."""
        return sorted(str(path.relative_to(self.source)) for path in (self.source / ".tierd").glob("*/*"))

    def origin(self, path: Path) -> Origin:
        """What a stub stands for."""
        fd = os.open(path.parent / os.fsdecode(RESERVED + b"/" + ORIGINS), os.O_RDONLY)
        try:
            return read_origins(fd)[stub_path(path).stat().st_ino]
        finally:
            os.close(fd)

    def fetch(self, origin: Origin) -> bytes:
        """The bytes of an object, compared."""
        content = bytearray(origin.size)
        key = object_key(origin.model_id, origin.version, origin.path)
        self.store.get_range(BUCKET, key, Stored(origin.size, origin.sha256), 0, memoryview(content))
        assert hashlib.sha256(content).hexdigest() == origin.sha256
        return bytes(content)

    def hot_names(self) -> set[str]:
        """Files of the model that have their bytes in the source."""
        found = (path for path in self.model.rglob("*") if ".tierd" not in path.parts)
        return {str(path.relative_to(self.model)) for path in found if path.is_file() and not path.is_symlink()}

    def trash(self) -> list[str]:
        """Files in the trash."""
        top = self.source / ".tierd/trash"
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir())


def stub_path(path: Path) -> Path:
    """Where the stub of a file is."""
    return path.parent / os.fsdecode(RESERVED) / os.fsdecode(STUBS) / path.name


def site_of(root: Path, dsn: str, store: ObjectStore | None = None, **settings: Any) -> Site:
    """A new one with a model, over a plain directory."""
    (root / "source").mkdir(exist_ok=True)
    (root / "objects").mkdir()
    site = opened_site(root, dsn, store, **settings)
    site.make_model()
    return site


def opened_site(root: Path, dsn: str, store: ObjectStore | None = None, **settings: Any) -> Site:
    """One that is there."""
    made = MoveSettings(state_dir=root / "state", settle=0.0, parallel_files=2)
    return Site(root, dsn, store or DirectoryStore(root / "objects"), replace(made, **settings))


async def demote(site: Site, *, by_hand: bool = False) -> tuple[int, MoveState]:
    """As far as it goes."""
    async with site.leading() as moves:
        move = await moves.demote(site.model_id, "not read for 90 days", by_hand=by_hand)
        return move, await moves.advance(move)
