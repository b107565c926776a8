"""What moves left at the top of the source that the database knows nothing of: told, and never taken for one's own.

A database that was lost, or restored from a backup, gives numbers of moves out again, and by its number a move finds
its trash. What is in a trash that nobody knows may be the last copy of what somebody wrote: it is not touched.
"""

from __future__ import annotations

import os
from typing import Final

import structlog

from tierd.controller.moves import sql
from tierd.controller.moves.workshop import Workshop
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.source.stubbing import DRAFTS, TRASH

log = structlog.get_logger(__name__)

_NAMED: Final = 10
_NUMBER_MAX: Final = (1 << 62) - 1


async def tell_leftovers(workshop: Workshop) -> list[int]:
    """Moves that are unknown. Raises NotLeaderError, DatabaseError, OSError."""
    numbers = await workshop.run(_numbers, workshop.tree)
    if not numbers:
        return []
    async with workshop.books.writing() as connection:
        known = {row["id"] for row in await connection.fetch(sql.KNOWN_MOVES, numbers)}
        unknown = [number for number in numbers if number not in known]
        if unknown:
            await connection.fetchval(sql.SKIP_NUMBERS, unknown[-1])
    if unknown:
        log.warning(
            "trash_of_unknown_moves",
            moves=unknown[:_NAMED],
            count=len(unknown),
            where=str(workshop.tree.root / os.fsdecode(TRASH)),
            hint="was the database restored? compare what is there with the models, then remove it",
        )
    return unknown


def _numbers(tree: HotTree) -> list[int]:
    """What directories of trash and drafts are called, in order."""
    found: set[int] = set()
    for directory in (TRASH, DRAFTS):
        with tree.directory_if_there(directory) as fd:
            names = os.listdir(fd) if fd is not None else []
            found |= {int(name) for name in names if name.isascii() and name.isdigit() and int(name) <= _NUMBER_MAX}
    return sorted(found)
