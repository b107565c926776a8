"""Takes a model from the hot tier to the cold one: the steps of a demotion, each harmless to repeat.

What is written into the object store is told in `cold_copy.py`, what is done to files of the source in
`source/stubbing.py`, how a demotion that must not go on is put back in `returning.py`. Which models leave is policy,
and not decided here; that nobody uses them is.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from tierd.controller.moves import sql
from tierd.controller.moves.books import (
    Catalogued,
    FileNews,
    Move,
    add_files,
    add_move,
    forget_files,
    note,
    refuse_if_moving,
    set_files,
    set_state,
)
from tierd.controller.moves.cold_copy import ColdCopy
from tierd.controller.moves.returning import Returning, compared, manifest_name
from tierd.controller.moves.steps import FileState, MoveKind, MoveState
from tierd.controller.moves.workshop import Fence, Workshop
from tierd.controller.source.hot_scan import scan
from tierd.controller.source.hot_tree import split
from tierd.controller.source.moved_file import ChangedMeanwhile, LeasesUnknown, MoveFile, MoveRefused
from tierd.controller.source.stubbing import Stubbing
from tierd.objects.keys import shown, validate_model_id
from tierd.objects.manifest import ManifestDamaged
from tierd.objects.store import ObjectDamaged, ObjectMissing
from tierd.postgres import Connection
from tierd.stubs import Origin

_GIVEN_UP = (ChangedMeanwhile, ManifestDamaged, ObjectDamaged, ObjectMissing, MoveRefused)
"""What ends a demotion before the switch: there is no use in trying again."""
_UNUSABLE = (FileNotFoundError, NotADirectoryError, PermissionError)
"""A directory of the model went, became something else, or is not ours to change."""
_ROUNDS_MAX = 3


class Demotion:
    """See the module. Each step takes the move as it was read, and returns False if there is nothing to do for now."""

    def __init__(self, workshop: Workshop, returning: Returning) -> None:
        self._shop = workshop
        self._returning = returning
        self.steps = {
            MoveState.PLANNED: self.begin,
            MoveState.COPYING: self.copy,
            MoveState.VERIFYING: self.verify,
            MoveState.SWITCHING: self.switch,
            MoveState.IN_GRACE: self.wait,
            MoveState.DELETING: self.delete,
        }

    # --- planned ---

    async def plan(self, model_id: str, reason: str, *, by_hand: bool) -> int:
        """A new move, with all its files; its ID. Raises MoveRefused, UsageError."""
        validate_model_id(model_id)
        async with self._shop.books.writing() as connection:  # before the model is walked
            await self._refuse(connection, model_id)
        found = await self._shop.run(scan, self._shop.tree, model_id)
        if not found.files:
            raise MoveRefused(f"{shown(model_id)} has no bytes in the source", hint="it is cold, or empty")
        source = await self._shop.source()
        async with self._shop.fenced("plan") as fence:
            model = await self._refuse(fence.connection, model_id)
            move_id = await add_move(
                fence.connection,
                self._shop.books,
                MoveKind.DEMOTE,
                model_id,
                reason,
                size_bytes=found.size_bytes,
                by_hand=by_hand,
                last_access=model.last_access,
                detail={"model_version": model.version, "single": found.subject.single, "source": source},
            )
            await add_files(fence.connection, move_id, found.files)
        return move_id

    async def _refuse(self, connection: Connection, model_id: str) -> Catalogued:
        model = await self._shop.models.may_leave(connection, model_id)
        await refuse_if_moving(connection, model_id)  # with the model locked: of two wishes one comes first
        return model

    async def begin(self, move: Move) -> bool:
        """Nothing lies where the objects will."""
        try:
            await self._shop.run(ColdCopy(self._shop, move).begin)
        except ChangedMeanwhile as error:
            return await self._returning.abandon(move, str(error))
        async with self._shop.fenced(MoveState.COPYING, move) as fence:
            await self._shop.note_detail(fence, move, began=True)  # what lies there from now on is ours
            await set_state(fence.connection, self._shop.books, move, MoveState.COPYING)
        return True

    # --- copying and verifying ---

    async def copy(self, move: Move) -> bool:
        """Store each file, and see that the model is still the one that was planned."""
        copy = ColdCopy(self._shop, move)
        files = await self._shop.books.files(move.id)
        try:
            await self._shop.each(copy.put, _in_state(files, FileState.PLANNED), self._flush(move, "copied"))
            await self._shop.run(copy.compare, files)
        except _GIVEN_UP as error:
            return await self._returning.abandon(move, str(error))
        return await self._shop.go_on(move)

    async def verify(self, move: Move) -> bool:
        """Read each object again, write the manifest, and switch if nobody uses the model."""
        copy = ColdCopy(self._shop, move)
        files = await self._shop.books.files(move.id)
        try:
            await self._shop.each(copy.verify, _in_state(files, FileState.COPIED), self._flush(move, "verified"))
            await self._shop.run(copy.manifest, files)
            await self._shop.run(copy.compare, files)
            async with self._shop.fenced("switch", move) as fence:
                await self._shop.subjects(move).refuse_to_switch(fence.connection, move)
                # From now on stubs may stand for its objects, whatever becomes of the move.
                await self._shop.note_detail(fence, move, switched=True)
                await set_state(fence.connection, self._shop.books, move, MoveState.SWITCHING)
        except LeasesUnknown:
            raise
        except _GIVEN_UP as error:
            return await self._returning.abandon(move, str(error))
        return True

    def _flush(self, move: Move, what: str) -> Callable[[list[FileNews]], Awaitable[None]]:
        async def flush(news: list[FileNews]) -> None:
            async with self._shop.fenced(what, move) as fence:
                await set_files(fence.connection, move.id, news)
                await fence.connection.execute(sql.SET_PROGRESS, move.id)

        return flush

    # --- switching ---

    async def switch(self, move: Move) -> bool:
        """Stubs come, files go to the trash; then the model is cold."""
        if move.abandoning is not None:
            return await self._returning.give_up(move)
        try:
            await self._draft(move)
            await self._announce(move)
            await asyncio.sleep(self._shop.settings.settle)
            await self._take(move)
        except LeasesUnknown:
            raise
        except (*_GIVEN_UP, *_UNUSABLE) as error:
            return await self._returning.begin_giving_up(move, str(error))
        return await self._become_cold(move)

    async def _draft(self, move: Move) -> None:
        await self._shop.in_batches("make stubs", move, move, await self._verified(move), _draft, self._tell(move))

    async def _announce(self, move: Move) -> None:
        """What stubs stand for is known in their directories before they are there."""
        origins: dict[bytes, dict[int, Origin]] = defaultdict(dict)
        for moved in await self._verified(move):
            assert moved.stub is not None
            assert moved.sha256 is not None
            version = moved.version or move.version
            origin = Origin(move.subject, version, moved.file.path, moved.file.size, moved.sha256)
            for name in moved.file.names():
                origins[split(name)[0]][moved.stub] = origin
        if not origins:
            return
        await self._shop.in_batches("announce stubs", move, move, sorted(origins.items()), _announce, _tell_nothing)
        content = await self._shop.run(ColdCopy(self._shop, move).manifest, await self._shop.books.files(move.id))
        async with self._shop.fenced("copy manifest", move) as fence:
            stubbing = self._shop.stubbing(fence, move)
            await self._shop.effect(stubbing.write_manifest, manifest_name(move), content)

    async def _take(self, move: Move) -> None:
        changed = await compared(self._shop, move, FileState.VERIFIED)
        if changed:
            raise ChangedMeanwhile(f"{shown(min(changed))} changed")
        files = await self._verified(move)
        await self._shop.in_batches("take files", move, move, files, _take, self._tell(move), self._unused(move))

    async def _verified(self, move: Move) -> list[MoveFile]:
        return _in_state(await self._shop.books.files(move.id), FileState.VERIFIED)

    def _tell(self, move: Move) -> Callable[[Fence, list[FileNews]], Awaitable[None]]:
        async def tell(fence: Fence, news: list[FileNews]) -> None:
            await set_files(fence.connection, move.id, news)

        return tell

    def _unused(self, move: Move) -> Callable[[Fence], Awaitable[None]]:
        async def unused(fence: Fence) -> None:
            await self._shop.subjects(move).refuse_if_in_use(fence.connection, move.subject)

        return unused

    async def _become_cold(self, move: Move) -> bool:
        async with self._shop.fenced("become cold", move) as fence:
            stubbing = self._shop.stubbing(fence, move)
            await self._shop.effect(stubbing.clear, stubbing.drafts)
            subjects = self._shop.subjects(move)
            if await subjects.become_cold(fence.connection, move):
                await fence.connection.execute(sql.BEGIN_GRACE, move.id, subjects.grace)
                await set_state(fence.connection, self._shop.books, move, MoveState.IN_GRACE)
                return True
        return await self._returning.begin_giving_up(move, "the catalogue says something else of the model by now")

    # --- the end ---

    async def wait(self, move: Move) -> bool:
        """Nothing is deleted before the grace is over, and while somebody has the model open."""
        if not move.grace_is_over:
            return False
        async with self._shop.fenced("begin to delete", move) as fence:
            await self._shop.subjects(move).refuse_if_in_use(fence.connection, move.subject)
            await set_state(fence.connection, self._shop.books, move, MoveState.DELETING)
        return True

    async def delete(self, move: Move) -> bool:
        """Each file leaves the trash: for good if it is what was copied and its object is there, else for its place."""
        if move.abandoning is not None:
            return await self._returning.give_up(move)
        for _ in range(_ROUNDS_MAX):
            todo = await self._switched(move)
            if not todo:
                return await self._end(move)
            missing = await self._shop.run(ColdCopy(self._shop, move).missing, todo)
            if missing:
                return await self._returning.begin_giving_up(move, f"{missing} is no longer in the object store")
            changed = await compared(self._shop, move, FileState.SWITCHED)
            await self._shop.in_batches(
                "delete files",
                move,
                move,
                await self._switched(move),
                partial(_discard, changed),
                partial(_tell_discarded, move),
                self._unused(move),
            )
        raise MoveRefused(f"the trash of {shown(move.subject)} changes all the time", hint="who writes to it?")

    async def _switched(self, move: Move) -> list[MoveFile]:
        return _in_state(await self._shop.books.files(move.id), FileState.SWITCHED)

    async def _end(self, move: Move) -> bool:
        async with self._shop.fenced("end", move) as fence:
            stubbing = self._shop.stubbing(fence, move)
            await self._shop.effect(stubbing.clear, stubbing.drafts)
            await self._shop.effect(stubbing.clear, stubbing.trash)
            await self._shop.subjects(move).have_left(fence.connection, move)
            await forget_files(fence.connection, move.id)
            await set_state(fence.connection, self._shop.books, move, MoveState.DONE)
        return True


def _in_state(files: Sequence[MoveFile], state: FileState) -> list[MoveFile]:
    return [moved for moved in files if moved.state is state]


def _draft(stubbing: Stubbing, moved: MoveFile) -> FileNews:
    return FileNews(moved.file.path, stub=stubbing.draft(moved))


def _announce(stubbing: Stubbing, told: tuple[bytes, dict[int, Origin]]) -> None:
    stubbing.announce(*told)


async def _tell_nothing(fence: Fence, done: list[None]) -> None:
    """The source says it all."""


def _take(stubbing: Stubbing, moved: MoveFile) -> FileNews:
    return FileNews(moved.file.path, FileState.SWITCHED, trash_ctime_ns=stubbing.take(moved))


def _discard(changed: set[bytes], stubbing: Stubbing, moved: MoveFile) -> tuple[FileNews, str]:
    """What became of a file in the trash, and why it is still there if it is. One that must be read first waits."""
    path = moved.file.path
    if stubbing.is_itself(moved):
        stubbing.discard(moved.file)
        return FileNews(path, FileState.DELETED), ""
    if path not in changed:
        return FileNews(path), ""
    why = stubbing.return_file(moved)
    return FileNews(path, FileState.KEPT if why else FileState.RESTORED), why


async def _tell_discarded(move: Move, fence: Fence, done: list[tuple[FileNews, str]]) -> None:
    await set_files(fence.connection, move.id, [news for news, _ in done])
    for news, why in done:
        if news.state in (FileState.KEPT, FileState.RESTORED):
            event = "kept in the trash" if why else "put back"
            reason = f"{shown(news.path)} was written to through an old descriptor" + (f"; {why}" if why else "")
            await note(fence.connection, move.id, move.subject, event, reason)
