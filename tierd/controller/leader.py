"""Who may change tiers: one controller at a time, and what it destroys is fenced by its epoch.

The leader is the session that holds an advisory lock; each one that gets it commits an epoch, one above the last. The
lock alone would not do: its session can be gone, unnoticed, while another connection of the same process deletes on. So
each transaction that destroys something calls `assert_leader` first. It says no when a later epoch began or the session
with the lock is gone, and keeps a later epoch from beginning until the transaction has ended.
"""

from __future__ import annotations

from tierd.controller.migrate import LOCKS
from tierd.errors import DatabaseError
from tierd.postgres import Connection

_LEADER_LOCK = 2

_BEGIN = """
UPDATE leader SET epoch = epoch + 1, holder = $1, backend_pid = pg_backend_pid(), since = now() RETURNING epoch
"""
# A row lock that lets others look, but makes the UPDATE above wait.
_WHO = "SELECT epoch, holder, backend_pid FROM leader FOR SHARE"
_HOLDS_LOCK = """
SELECT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND pid = $1
      AND classid = $2::int::oid AND objid = $3::int::oid AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""


class NotLeaderError(DatabaseError):
    """Another controller leads, or this one does no longer."""


async def begin_epoch(connection: Connection, holder: str) -> int:
    """Become the leader for as long as `connection` lives; the new epoch. `holder` names the process for people.

    The connection must be one of its own, outside of a pool and without a transaction; closing it ends the leadership.
    Raises NotLeaderError if somebody else leads.
    """
    assert not connection.is_in_transaction(), "the epoch must be committed before anything is done in it"
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", LOCKS, _LEADER_LOCK):
        row = await connection.fetchrow("SELECT holder, since FROM leader")
        assert row is not None
        raise NotLeaderError(
            f"{row['holder'] or 'another controller'} leads since {row['since']:%Y-%m-%d %H:%M:%S %Z}",
            hint="only one controller works at a time; this one can take over when that one ends",
        )
    try:
        epoch: int = await connection.fetchval(_BEGIN, holder)
    except BaseException:
        connection.terminate()  # nobody shall hold the lock without an epoch
        raise
    return epoch


async def assert_leader(connection: Connection, epoch: int) -> None:
    """To be called first in each transaction that destroys something, on whichever connection.

    Raises NotLeaderError unless `epoch` is the latest and the session that began it still holds the lock.
    """
    assert connection.is_in_transaction(), "the row lock would be gone at once"
    row = await connection.fetchrow(_WHO)
    assert row is not None
    if row["epoch"] != epoch:
        raise NotLeaderError(f"epoch {epoch} is over: {row['holder']} began epoch {row['epoch']}", hint="start again")
    if not await connection.fetchval(_HOLDS_LOCK, row["backend_pid"], LOCKS, _LEADER_LOCK):
        raise NotLeaderError(f"epoch {epoch} is over: its database session ended", hint="start again")
