"""A process that archives until it is ended: `python -m tests.contexts.archiver ROWS`. It prints a line a batch.

The database is in TIERDCTX_POSTGRES.
"""

from __future__ import annotations

import asyncio
import os
import sys

from tierd.contexts.settings import load
from tierd.controller.contexts.archive import ArchiveProgress, archive_old_contexts
from tierd.errors import DatabaseError
from tierd.postgres import Database


def _told(progress: ArchiveProgress) -> None:
    print(progress.moved, flush=True)


async def _archive(rows: int) -> None:
    async with Database(load({"postgres_connections": 2}, os.environ)) as database:
        while True:
            await archive_old_contexts(database, workers=1, batch_rows_max=rows, progress=_told)


def main() -> None:
    """Again and again, whatever goes away."""
    while True:
        try:
            asyncio.run(_archive(int(sys.argv[1])))
        except DatabaseError as error:
            print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
