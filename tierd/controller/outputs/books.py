"""What the database knows of generated outputs, and what nodes and scans tell it. Touches no file, decides nothing.

Everything here takes part in a transaction of its caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from tierd.controller.outputs import sql
from tierd.controller.statistics.plan import OutputSum
from tierd.output_metrics import TIERS
from tierd.outputs import Output, parse
from tierd.postgres import Connection

log = structlog.get_logger(__name__)

_BIGINT = 1 << 64
_SIGN = 1 << 63


class FileVersion(NamedTuple):
    """Which bytes a file has, as far as its attributes tell."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class Pending(NamedTuple):
    """An output that somebody must look at. `version` and `copied` are of its object, made or in the making."""

    output_id: UUID
    path: bytes
    version: int
    copied: FileVersion | None
    sha256: str | None
    cold: bool
    news: int


READS_WINDOW_SECONDS: Final = 7 * 86_400.0


async def tell(
    connection: Connection, outputs: Mapping[str, OutputSum], late_ns: int, window_s: float = READS_WINDOW_SECONDS
) -> None:
    """What nodes said, by path below the outputs root; `late_ns` is by how much now() is later than their ages say.
    Reads within `window_s` of the first of them are counted as recent ones."""
    found = [(one, told) for path, told in outputs.items() if isinstance(one := parse(path.encode()), Output)]
    if not found:
        return
    names = _columns([one for one, _ in found])
    ages = [
        [None if age is None else -(-(age + late_ns) // 1000) for age in column]
        for column in (
            [told.access_age_ns for _, told in found],
            [told.written_age_ns for _, told in found],
            [told.removed_age_ns for _, told in found],
        )
    ]
    values = (*names, [told.opens for _, told in found], *ages, [told.ended for _, told in found])
    await connection.execute(sql.ADD_TOLD, *values)
    await connection.execute(sql.FOLD_TOLD, *values, window_s)
    await connection.execute(sql.ADD_CONFLICTS, *names[:3])


async def add_found(connection: Connection, found: Sequence[tuple[Output, FileVersion]]) -> int:
    """Files that a scan came by; how many nobody knew."""
    names = _columns([one for one, _ in found])
    versions = [version for _, version in found]
    values = (
        *names,
        [one.size for one in versions],
        [signed(one.inode) for one in versions],
        [one.mtime_ns for one in versions],
        [one.ctime_ns for one in versions],
    )
    for row in await connection.fetch(sql.ERASE_AGAIN, *values):
        log.warning("deleted_output_came_back", erasure=row["id"], consequence="it is deleted again")
    new = await connection.fetch(sql.ADD_FOUND, *values)
    await connection.execute(sql.FOLD_FOUND, *values)
    await connection.execute(sql.ADD_CONFLICTS, *names[:3])
    return len(new)


async def take_pending(connection: Connection, most: int, but: Sequence[UUID] = ()) -> list[Pending]:
    """Some that wait, those first that waited longest."""
    return [_pending(row) for row in await connection.fetch(sql.TAKE_PENDING, most, list(but))]


def _pending(row: Any) -> Pending:
    copied = None
    if row["inode"] is not None:
        copied = FileVersion(row["size_bytes"], row["inode"] % _BIGINT, row["mtime_ns"], row["ctime_ns"])
    return Pending(
        row["output_id"],
        f"{row['user_id']}/{row['filename']}".encode(),
        row["version"],
        copied,
        row["sha256"].hex() if row["sha256"] else None,
        row["cold_storage"],
        row["news"],
    )


async def begin_copy(connection: Connection, one: Pending, found: FileVersion) -> int | None:
    """The version of the copy that may be made now; None if somebody told news of the output meanwhile."""
    values = found.size, signed(found.inode), found.mtime_ns, found.ctime_ns
    version: int | None = await connection.fetchval(sql.BEGIN_COPY, one.output_id, one.news, *values)
    return version


async def end_copy(connection: Connection, one: Pending, version: int, sha256: str) -> float | None:
    """Its object was read back and compared. Seconds since somebody told of it; None if the row has another version."""
    values = one.output_id, version, bytes.fromhex(sha256), one.news
    seconds: float | None = await connection.fetchval(sql.END_COPY, *values)
    return seconds


class Standing(NamedTuple):
    """Outputs and bytes by tier (`output_metrics.TIERS`), the age of the oldest without a compared copy, and how many
    files are left alone."""

    tiers: dict[str, tuple[int, int]]
    oldest_unbacked_s: float
    faults: int


async def standing(connection: Connection) -> Standing:
    """How all outputs stand now. Reads every row."""
    row = await connection.fetchrow(sql.STANDING)
    tiers = {tier: (row[tier], row[f"{tier}_bytes"]) for tier in TIERS}
    return Standing(tiers, max(0.0, row["oldest_s"]), row["faults"])


def _columns(outputs: Sequence[Output]) -> tuple[list[UUID], list[str], list[str], list[str]]:
    return (
        [one.output_id for one in outputs],
        [one.user for one in outputs],
        [one.filename for one in outputs],
        [one.kind for one in outputs],
    )


def signed(number: int) -> int:
    """PostgreSQL has no unsigned numbers."""
    return number - _BIGINT if number >= _SIGN else number
