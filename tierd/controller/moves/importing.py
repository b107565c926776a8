"""Takes a model into the cold tier whose objects somebody else put into the bucket: the steps, each harmless to repeat.

Which objects can be its files is told in `models/imports.py`, how its names come into the source in
`source/import_tree.py`. Each object is read once, for its SHA-256 and the sums of its chunks; what was read is not read
again after a kill. Objects are never changed or moved, hot files never hidden or replaced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from tierd.controller.models.imports import Found, sort_out
from tierd.controller.moves import sql
from tierd.controller.moves.books import (
    FileNews,
    Move,
    add_files,
    add_move,
    lock_model,
    note,
    refuse_if_moving,
    set_files,
    set_state,
)
from tierd.controller.moves.steps import FileState, MoveKind, MoveState
from tierd.controller.moves.workshop import BATCH_FILES, Fence, Workshop
from tierd.controller.source.hot_tree import joined
from tierd.controller.source.import_tree import ImportTree, Making
from tierd.controller.source.moved_file import HotFile, MoveFile, MoveRefused
from tierd.objects.keys import IMPORTED, object_key, shown, validate_model_id
from tierd.objects.store import Stored
from tierd.postgres import Connection
from tierd.stubs import Origin

_FILE_MODE = 0o644


class Importing:
    """See the module. Each step takes the move as it was read, and returns False if there is nothing to do for now."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop
        self.steps = {
            MoveState.PLANNED: self.begin,
            MoveState.VERIFYING: self.adopt,
            MoveState.SWITCHING: self.make,
        }

    async def plan(self, model_id: str, prefix: str, reason: str) -> int:
        """A new move, with all its files; its ID. Raises MoveRefused, UsageError, ObjectError."""
        validate_model_id(model_id)
        validate_model_id(prefix)
        found = await self._shop.run(self._look, prefix)
        if not found.files:
            raise MoveRefused(
                f"no object below {shown(prefix + '/')} can be adopted: {found.refused_count} are refused,"
                f" {found.ours} are tierd's own",
                hint="`tierd import --dry-run` lists why",
            )
        source = await self._shop.source()
        async with self._shop.fenced("plan") as fence:
            await refuse_if_moving(fence.connection, model_id)
            await self._refuse_own(fence.connection, model_id)
            move_id = await add_move(
                fence.connection,
                self._shop.books,
                MoveKind.IMPORT,
                model_id,
                reason,
                size_bytes=found.size_bytes,
                by_hand=True,
                version=IMPORTED,
                detail={
                    "source": source,
                    "prefix": prefix,
                    "refused": [{"key": key, "reason": why} for key, why in found.refused],
                    "refused_count": found.refused_count,
                },
            )
            planned_ns: int = await fence.connection.fetchval(sql.PLANNED_NS, move_id)
            files = [HotFile(f.path, (), f.size, planned_ns, planned_ns, 0, _FILE_MODE) for f in found.files]
            await add_files(fence.connection, move_id, files)
        return move_id

    def _look(self, prefix: str) -> Found:
        return sort_out(prefix, self._shop.store.list(self._shop.settings.bucket, f"{prefix}/"))

    async def _refuse_own(self, connection: Connection, model_id: str) -> None:
        model = await lock_model(connection, model_id)
        if model is not None and model.version:
            raise MoveRefused(
                f"{shown(model_id)} has a cold copy of tierd's own", hint="import it under another name (--as)"
            )

    async def begin(self, move: Move) -> bool:
        """Nothing is to be prepared."""
        return await self._shop.go_on(move)

    # --- reading ---

    async def adopt(self, move: Move) -> bool:
        """Read each object once."""
        files = [moved for moved in await self._shop.books.files(move.id) if moved.state is FileState.PLANNED]
        await self._shop.each(partial(self._adopt, move), files, self._flush(move))
        return await self._shop.go_on(move)

    def _adopt(self, move: Move, moved: MoveFile) -> FileNews:
        bucket, key = self._shop.settings.bucket, self._key(move, moved)
        self._shop.at("adopt")
        stored: Stored = self._shop.store.adopt(bucket, key)
        self._shop.at("adopted")
        if stored.size != moved.file.size:
            raise MoveRefused(f"object {shown(key)} has {stored.size} bytes now, {moved.file.size} were listed")
        return FileNews(moved.file.path, FileState.VERIFIED, stored.sha256)

    def _key(self, move: Move, moved: MoveFile) -> str:
        return object_key(move.detail["prefix"], IMPORTED, moved.file.path)

    def _flush(self, move: Move) -> Callable[[list[FileNews]], Awaitable[None]]:
        async def flush(news: list[FileNews]) -> None:
            async with self._shop.fenced("adopted", move) as fence:
                await set_files(fence.connection, move.id, news)
                await fence.connection.execute(sql.SET_PROGRESS, move.id)

        return flush

    # --- the source ---

    async def make(self, move: Move) -> bool:
        """Names come into the source; then the model is cold."""
        files = [moved for moved in await self._shop.books.files(move.id) if moved.state is FileState.VERIFIED]
        for begin in range(0, len(files), BATCH_FILES):
            some = files[begin : begin + BATCH_FILES]
            async with self._shop.fenced("make stubs", move) as fence:
                left = await self._shop.run(self._tree(fence, move).make, [_making(move, moved) for moved in some])
                states = dict.fromkeys(left, FileState.KEPT)
                news = [FileNews(moved.file.path, states.get(moved.file.path, FileState.SWITCHED)) for moved in some]
                await set_files(fence.connection, move.id, news)
                for path, why in left.items():
                    await note(fence.connection, move.id, move.subject, "left alone", f"{shown(path)}: {why}")
        return await self._end(move)

    async def _end(self, move: Move) -> bool:
        made = [one for one in await self._shop.books.files(move.id) if one.state is FileState.SWITCHED]
        async with self._shop.fenced("become cold", move) as fence:
            await self._shop.run(self._tree(fence, move).clear)
            if made:
                size = sum(one.file.size for one in made)
                await fence.connection.execute(sql.ADD_IMPORTED, move.subject, size, len(made))
            await set_state(fence.connection, self._shop.books, move, MoveState.DONE)
        return True

    def _tree(self, fence: Fence, move: Move) -> ImportTree:
        return ImportTree(self._shop.tree, joined(b"", move.subject.encode()), move.id, fence.at)


def _making(move: Move, moved: MoveFile) -> Making:
    assert moved.sha256 is not None
    file = moved.file
    origin = Origin(move.detail["prefix"], IMPORTED, file.path, file.size, moved.sha256)
    return Making(file.path, origin, file.mtime_ns)
