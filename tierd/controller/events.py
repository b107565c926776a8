"""Keeps `move_events` bounded. What is in it is written by those who move."""

from __future__ import annotations

from tierd.postgres import Connection

# The oldest first, and no more at a time than a short transaction takes.
_PURGE = """
DELETE FROM move_events WHERE id IN (
    SELECT id FROM move_events WHERE id <= (SELECT max(id) FROM move_events) - $1 ORDER BY id LIMIT $2
)
"""
_ROWS_AT_ONCE = 10_000


async def purge_events(connection: Connection, keep: int) -> int:
    """Remove events but for about the latest `keep`, at most 10,000 in a call; how many were removed."""
    done = await connection.execute(_PURGE, keep, _ROWS_AT_ONCE)
    return int(done.removeprefix("DELETE "))
