"""Puts back what a demotion switched: because it must not go on, or because somebody undoes it within the grace.

A file returns to its place if its stub is there and still cold, with the attributes that the stub has by now. What
users removed, renamed or wrote to meanwhile is left as they left it; the bytes of such a file are deleted from the
trash only if its object was read again and is right, because a stub elsewhere may stand for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from tierd.controller.moves import sql
from tierd.controller.moves.books import (
    FileNews,
    Move,
    StateChanged,
    forget_files,
    note,
    read_files,
    set_files,
    set_state,
)
from tierd.controller.moves.cold_copy import ColdCopy, sha256_of
from tierd.controller.moves.steps import FileState, MoveState
from tierd.controller.moves.workshop import Fence, Workshop, subject_of
from tierd.controller.source import cold_tree
from tierd.controller.source.file_calls import same
from tierd.controller.source.hot_tree import joined, split
from tierd.controller.source.moved_file import MoveFile
from tierd.controller.source.stubbing import Stubbing
from tierd.objects.keys import shown
from tierd.syscalls import forced_stat

_NAME_BYTES_MAX: Final = 200
_RETURNING: Final = (FileState.VERIFIED, FileState.SWITCHED)


class Returning:
    """See the module."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop
        self.undo_steps = {MoveState.PLANNED: self.undo, MoveState.SWITCHING: self.undo}

    # --- a demotion that must not go on ---

    async def abandon(self, move: Move, reason: str) -> bool:
        """One that changed nothing in the source is over."""
        async with self._shop.fenced("abandon", move) as fence:
            subjects = self._shop.subjects(move)
            await subjects.become_hot(fence.connection, move, was_cold=False, whole=True)
            await forget_files(fence.connection, move.id)
            await set_state(fence.connection, self._shop.books, move, MoveState.ABANDONED, reason)
        return True

    async def begin_giving_up(self, move: Move, reason: str) -> bool:
        """From now on what it changed in the source is put back, whoever goes on."""
        async with self._shop.fenced("give up", move) as fence:
            await begin_abandoning(fence, self._shop, move, reason)
        return True

    async def give_up(self, move: Move) -> bool:
        """Put everything back; then it is abandoned."""
        await self._return_files(move, move)
        async with self._shop.fenced("abandon", move) as fence:
            await self._tidy(fence, move)
            was_cold = move.state is MoveState.DELETING
            whole = _all_are_back(await read_files(fence.connection, move.id))
            subjects = self._shop.subjects(move)
            await subjects.become_hot(fence.connection, move, was_cold=was_cold, whole=whole)
            await forget_files(fence.connection, move.id)
            await set_state(fence.connection, self._shop.books, move, MoveState.ABANDONED, move.abandoning or "")
        return True

    # --- an undo ---

    async def undo(self, move: Move) -> bool:
        """Put back what the demotion `of` switched; then the model is hot."""
        demotion = await self._shop.books.move(move.detail["of"])
        if move.state is MoveState.PLANNED:
            async with self._shop.fenced("begin to undo", move) as fence:
                await set_state(fence.connection, self._shop.books, move, MoveState.SWITCHING)
            return True
        await self._return_files(move, demotion)
        async with self._shop.fenced("become hot", move) as fence:
            await self._tidy(fence, demotion)
            subjects = self._shop.subjects(demotion)
            await subjects.become_hot(fence.connection, demotion, was_cold=True, whole=True)
            await forget_files(fence.connection, demotion.id)
            await set_state(fence.connection, self._shop.books, move, MoveState.DONE)
        return True

    # --- files ---

    async def _return_files(self, move: Move, demotion: Move) -> None:
        """`move` is who works; the files are those of the demotion."""
        todo = [one for one in await self._shop.books.files(demotion.id) if one.state in _RETURNING]
        tell = partial(_tell_returned, move, demotion)
        await self._shop.in_batches("return files", move, demotion, todo, _return, tell)
        for moved in await self._shop.books.files(demotion.id):
            if moved.state is FileState.KEPT:
                await self._end_one_left(move, demotion, moved)

    async def _end_one_left(self, move: Move, demotion: Move, moved: MoveFile) -> None:
        """What nobody wants back leaves the trash, if its object is right: a stub elsewhere may stand for it."""
        shop = self._shop
        if not await shop.run(ColdCopy(shop, demotion).is_right, moved):
            return
        compared_ns = await shop.run(compare, Stubbing(shop.tree, subject_of(demotion), demotion.id, shop.at), moved)
        if compared_ns is None:
            return
        async with shop.fenced("delete what is left", move) as fence:
            stubbing = shop.stubbing(fence, demotion)
            if await shop.effect(stubbing.is_itself, replace(moved, trash_ctime_ns=compared_ns)):
                await shop.effect(stubbing.discard, moved.file)
                await set_files(fence.connection, demotion.id, [FileNews(moved.file.path, FileState.DELETED)])

    async def _tidy(self, fence: Fence, demotion: Move) -> None:
        stubbing = self._shop.stubbing(fence, demotion)
        files = await read_files(fence.connection, demotion.id)
        if _all_are_back(files):
            await self._shop.effect(stubbing.remove_manifest, manifest_name(demotion))
            await self._shop.effect(_clear_layers, self._shop, fence, demotion, files)
        await self._shop.effect(stubbing.clear, stubbing.drafts)
        await self._shop.effect(stubbing.clear, stubbing.trash)


def _all_are_back(files: Sequence[MoveFile]) -> bool:
    return all(moved.state is FileState.RESTORED for moved in files)


def _clear_layers(workshop: Workshop, fence: Fence, demotion: Move, files: Sequence[MoveFile]) -> None:
    """That directories had stubs is forgotten where there are none any more: users may have made links to some."""
    base = subject_of(demotion).base
    for directory in sorted({split(name)[0] for moved in files for name in moved.file.names()} | {b""}):
        fence.at("clear layer")
        with suppress(FileNotFoundError):
            cold_tree.forget(workshop.tree, joined(base, directory), ())
        fence.at("cleared layer")


def _return(stubbing: Stubbing, moved: MoveFile) -> tuple[bytes, str]:
    return moved.file.path, stubbing.return_file(moved)


async def _tell_returned(move: Move, demotion: Move, fence: Fence, done: list[tuple[bytes, str]]) -> None:
    news = [FileNews(path, FileState.KEPT if why else FileState.RESTORED) for path, why in done]
    await set_files(fence.connection, demotion.id, news)
    for path, why in done:
        if why:
            await note(fence.connection, move.id, move.subject, "left alone", f"{shown(path)}: {why}")


def manifest_name(demotion: Move) -> bytes:
    """How the copy of its manifest is called in the source."""
    return b"%s.v%d.manifest" % (split(demotion.subject.encode())[1][:_NAME_BYTES_MAX], demotion.version)


async def begin_abandoning(fence: Fence, workshop: Workshop, move: Move, reason: str) -> None:
    """Raises StateChanged."""
    begun = await fence.connection.fetchval(sql.BEGIN_ABANDONING, move.id, move.state, reason, workshop.books.epoch)
    if begun is None:
        raise StateChanged
    await note(fence.connection, move.id, move.subject, "put back", reason)


async def compared(workshop: Workshop, move: Move, state: FileState) -> set[bytes]:
    """Compare the bytes of files in the trash of which nobody noted that they are what was copied; those that are not.

    Not within a transaction: it may take long. Whoever relies on it compares times within one.
    """
    changed: set[bytes] = set()
    stubbing = Stubbing(workshop.tree, subject_of(move), move.id, workshop.at)
    for moved in await workshop.books.files(move.id):
        if moved.state is not state or not await workshop.effect(stubbing.in_trash, moved.file):
            continue
        if moved.trash_ctime_ns is not None and await workshop.effect(stubbing.is_itself, moved):
            continue
        ctime_ns = await workshop.run(compare, stubbing, moved)
        if ctime_ns is None:
            changed.add(moved.file.path)
            continue
        async with workshop.fenced("compared", move) as fence:
            await set_files(fence.connection, move.id, [FileNews(moved.file.path, trash_ctime_ns=ctime_ns)])
    return changed


def compare(stubbing: Stubbing, moved: MoveFile) -> int | None:
    """The time of change of a file in the trash whose bytes are those that were copied; None of one that has others."""
    with stubbing.opened_in_trash(moved.file) as fd:
        if fd is None:
            return 0
        before = forced_stat(fd)
        if not same(before, moved.file) or sha256_of(fd) != moved.sha256:
            return None
        after = forced_stat(fd)
        return after.st_ctime_ns if after.st_ctime_ns == before.st_ctime_ns and same(after, moved.file) else None
