"""Days of outputs as subjects of moves: the files of `USER/YYYY/MM/DD` that were planned, each with an object already.

A move of outputs has the steps of every other one (`demotion.py`). Its objects are the backups (`outputs/backup.py`),
each of a version of its own; nothing is stored but the manifest, everything is read back again. That nobody has an
output open is not asked for: whoever has reads on, from its descriptor; whoever writes through one is found out when
the trash is compared. Which outputs leave is policy (`outputs/cleanup.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from tierd.controller.moves.books import Books, Move, note, refuse_if_moving
from tierd.controller.source.moved_file import MoveRefused
from tierd.objects.keys import shown, validate_model_id
from tierd.postgres import Connection

_ADD_MOVE: Final = """
INSERT INTO moves (kind, subject, version, epoch, size_bytes, reason, detail)
VALUES ('demote', $1::text, 1 + coalesce((SELECT max(version) FROM moves WHERE subject = $1::text), 0), $2, $3, $4,
        $5::jsonb)
RETURNING id
"""

# With what is known of the objects: they are there. An output that anybody must look at first stays.
_ADD_FILES: Final = """
INSERT INTO move_files (move_id, path, size_bytes, mtime_ns, ctime_ns, inode, mode, sha256, state, version)
SELECT $1, convert_to(right(filename, -11), 'UTF8'), size_bytes, mtime_ns, ctime_ns, inode, 0, sha256, 'copied', version
FROM generated_outputs
WHERE user_id = $2 AND filename = ANY ($3::text[]) AND cold_storage AND hot_storage AND pending_since IS NULL
  AND vanished_at IS NULL AND size_bytes > 0 AND mtime_ns IS NOT NULL
ORDER BY filename
FOR UPDATE
RETURNING size_bytes
"""

_THOSE_OF: Final = """
    o.user_id = $2 AND o.filename = $3 || convert_from(f.path, 'UTF8') AND f.move_id = $1
"""

_LOCK_LEAVING: Final = f"""
SELECT o.version = f.version AND o.sha256 = f.sha256 AND o.cold_storage AND o.pending_since IS NULL AS still
FROM move_files f JOIN generated_outputs o ON {_THOSE_OF} ORDER BY o.output_id FOR UPDATE OF o
"""

# From now on there may be a stub for its object, wherever users take it. One that was made before, and that nobody has
# seen end, may be anywhere, too: also for the same object, if somebody wrote the same bytes again.
_MAY_HAVE_STUB: Final = f"""
UPDATE generated_outputs o
SET loose = CASE WHEN o.stub_version IS NULL THEN o.loose ELSE array_append(o.loose, o.stub_version) END,
    stub_version = f.version, stub_inode = NULL
FROM move_files f WHERE {_THOSE_OF}
"""

_COUNT_FILES: Final = "SELECT count(*) FROM move_files WHERE move_id = $1"

# One that was written again meanwhile has another version: it is hot.
_BECOME_COLD: Final = f"""
UPDATE generated_outputs o SET hot_storage = false, stub_inode = f.stub, reads_since = NULL, recent_reads = 0
FROM move_files f
WHERE {_THOSE_OF} AND f.state = 'switched' AND o.version = f.version AND o.sha256 = f.sha256 AND o.cold_storage
"""

# What is where, whoever looks finds out at the files.
_LOOK_AT: Final = f"""
UPDATE generated_outputs o
SET news = o.news + 1, pending_since = coalesce(o.pending_since, now()), try_at = least(o.try_at, now())
FROM move_files f
WHERE {_THOSE_OF}
"""


# Whoever has its number and time from now on is another file, such as a copy that kept the time. 0: no file has it.
_HAVE_LEFT: Final = f"""
UPDATE generated_outputs o SET inode = 0
FROM move_files f WHERE {_THOSE_OF} AND f.state = 'deleted' AND o.version = f.version AND NOT o.hot_storage
"""


class Day(NamedTuple):
    """A directory of outputs, and those in it that are to leave. `root` is the outputs root."""

    root: str
    user: str
    date: str
    """YYYY/MM/DD."""
    filenames: Sequence[str]

    @property
    def subject(self) -> str:
        """What moves call it."""
        return f"{self.root}/{self.user}/{self.date}"


def is_of_outputs(move: Move) -> bool:
    """Whether the subject of a demotion is a day of outputs."""
    return "outputs" in move.detail


async def plan(connection: Connection, books: Books, day: Day, reason: str) -> int:
    """A new move, with all its files; its ID. In a transaction of the leader. Raises MoveRefused."""
    validate_model_id(day.subject)
    await refuse_if_moving(connection, day.subject)
    detail = {"single": False, "outputs": {"user": day.user, "date": day.date}}
    move_id: int = await connection.fetchval(
        _ADD_MOVE, day.subject, books.epoch, 0, reason, json.dumps(detail, ensure_ascii=True)
    )
    await note(connection, move_id, day.subject, "planned", reason)
    sizes = await connection.fetch(_ADD_FILES, move_id, day.user, list(day.filenames))
    if not sizes:
        raise MoveRefused(f"{shown(day.subject)} has no outputs that may leave", hint="are they backed up?")
    size = sum(row["size_bytes"] for row in sizes)
    await connection.execute("UPDATE moves SET size_bytes = $2 WHERE id = $1", move_id, size)
    return move_id


class OutputDays:
    """See the module, and `subjects.Subjects`."""

    whole = False

    def __init__(self, bucket: str, grace: float) -> None:
        self.bucket = bucket
        self.grace = grace

    async def refuse_if_in_use(self, connection: Connection, subject: str) -> None:
        """Nobody is asked: see the module."""

    async def refuse_to_switch(self, connection: Connection, move: Move) -> None:
        """Each must be what it was when the move was planned, as far as the books say."""
        still = [row["still"] for row in await connection.fetch(_LOCK_LEAVING, *_of(move))]
        if not all(still) or len(still) != await connection.fetchval(_COUNT_FILES, move.id):
            raise MoveRefused(f"outputs of {shown(move.subject)} were written or deleted meanwhile")
        await connection.execute(_MAY_HAVE_STUB, *_of(move))

    async def become_cold(self, connection: Connection, move: Move) -> bool:
        """Those that are still what was copied."""
        await connection.execute(_BECOME_COLD, *_of(move))
        return True

    async def become_hot(self, connection: Connection, demotion: Move, *, was_cold: bool, whole: bool) -> None:
        """Have them looked at, each by itself."""
        await connection.execute(_LOOK_AT, *_of(demotion))

    async def have_left(self, connection: Connection, demotion: Move) -> None:
        """See Subjects."""
        await connection.execute(_HAVE_LEFT, *_of(demotion))


def _of(move: Move) -> tuple[int, str, str]:
    told = move.detail["outputs"]
    return move.id, told["user"], f"{told['date']}/"
