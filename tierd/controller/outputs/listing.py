"""What people ask of generated outputs: which there are, how they stand, the bytes of one. Changes nothing.

`fetch` is blocking; it takes the bytes from the object store alone, so it also works where there is no source.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

from tierd.controller.moves.cold_copy import sha256_of
from tierd.controller.outputs.backup import key_of
from tierd.errors import UsageError
from tierd.objects.store import FileRange, ObjectDamaged, ObjectStore, Place, Stored
from tierd.postgres import Connection

FAULTS_MAX: Final = 1000
_TIER: Final = """
    CASE $2::text WHEN 'hot' THEN hot_storage AND vanished_at IS NULL WHEN 'cold' THEN cold_storage
                  WHEN 'unbacked' THEN NOT cold_storage AND vanished_at IS NULL
                  WHEN 'vanished' THEN vanished_at IS NOT NULL ELSE true END
"""
_LIST: Final = f"""
SELECT output_id::text AS output_id, user_id, filename, output_type, size_bytes, hot_storage, cold_storage,
       access_count, created_at, last_accessed, vanished_at, error
FROM generated_outputs
WHERE ($1::text IS NULL OR user_id = $1) AND {_TIER}
ORDER BY created_at DESC, output_id LIMIT $3
"""
_FAULTS: Final = "SELECT path, reason, seen_at FROM output_faults ORDER BY path LIMIT $1"
_ONE: Final = """
SELECT user_id, filename, version, size_bytes, sha256, cold_storage FROM generated_outputs WHERE output_id = $1
"""


class Backup(NamedTuple):
    """Where the compared object of an output is, and what it holds."""

    name: str
    key: str
    stored: Stored


async def rows(connection: Connection, user: str | None, tier: str | None, limit: int) -> list[Mapping[str, Any]]:
    """The latest outputs, of a user, of a tier (`output_metrics.TIERS`), or all."""
    return [dict(row) for row in await connection.fetch(_LIST, user, tier, limit)]


async def faults(connection: Connection, limit: int = FAULTS_MAX) -> list[Mapping[str, Any]]:
    """What is left alone below the outputs root, by path."""
    found = await connection.fetch(_FAULTS, limit)
    return [dict(row) | {"path": row["path"].decode("utf-8", "surrogateescape")} for row in found]


async def backup_of(connection: Connection, output_id: UUID, root: bytes) -> Backup:
    """Raises UsageError if there is no such output, or no compared object of it yet."""
    row = await connection.fetchrow(_ONE, output_id)
    if row is None:
        raise UsageError(f"there is no output {output_id}", hint="`tierd outputs list` shows all")
    if not row["cold_storage"]:
        raise UsageError(f"output {output_id} is not backed up yet", hint="it is in the source; try again later")
    path = f"{row['user_id']}/{row['filename']}".encode()
    stored = Stored(row["size_bytes"], row["sha256"].hex())
    return Backup(row["filename"].rpartition("/")[2], key_of(root, path, row["version"]), stored)


def fetch(store: ObjectStore, bucket: str, backup: Backup, target: Path) -> None:
    """Write an output to a new file, compared. Raises UsageError if that is there or cannot be made, ObjectError."""
    try:
        fd, draft = tempfile.mkstemp(prefix=".tierd-", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot write to {target.parent}: {error.strerror}", hint="name another file") from None
    try:
        _fill(store, bucket, backup, fd)
        os.link(draft, target)
    except FileExistsError:
        raise UsageError(f"{target} is there already", hint="name another file") from None
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", hint="name another file") from None
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(draft)


def _fill(store: ObjectStore, bucket: str, backup: Backup, fd: int) -> None:
    if backup.stored.size:
        store.get_range(bucket, backup.key, backup.stored, 0, FileRange(fd, 0, backup.stored.size))
    if sha256_of(fd) != backup.stored.sha256:
        raise ObjectDamaged(Place("the object store", bucket, backup.key), "it has another SHA-256 than was stored")
    os.fchmod(fd, 0o644)
    os.fsync(fd)
