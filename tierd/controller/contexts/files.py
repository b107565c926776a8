"""A month of the archive as an object: gzipped JSON Lines, and a manifest beside it. Decides nothing, deletes nothing.

`contexts/MONTH/ATTEMPT.jsonl.gz` has a line for each conversation, with all its columns; an object is written once, so
each attempt has keys of its own. The manifest is written after the lines have been read back and compared.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from tierd.errors import TierdError
from tierd.objects.store import FileRange, ObjectMissing, ObjectStore, Place, Stored

FORMAT: Final = 1
PAGE_BYTES: Final = 8 << 20
"""Of rows in memory at once, or one row."""
_LEVEL: Final = 6
_MANIFEST_BYTES_MAX: Final = 64 << 10
_COLUMNS: Final = ("user_id", "conversation_id", "messages", "created_at", "updated_at", "archived_at", "version")


class ExportDamaged(TierdError):
    """An export is not what it was when it was verified, or was never one."""


class Row(NamedTuple):
    """A conversation of the archive; `messages` is JSON."""

    user_id: str
    conversation_id: str
    messages: str
    created_at: datetime
    updated_at: datetime
    archived_at: datetime
    version: int


@dataclass(frozen=True)
class Manifest:
    """What an export holds."""

    month: str
    attempt: int
    rows: int
    size_bytes: int
    sha256: str
    format: int = FORMAT
    columns: tuple[str, ...] = _COLUMNS

    @property
    def stored(self) -> Stored:
        """The object with the lines."""
        return Stored(self.size_bytes, self.sha256)


def lines_key(month: str, attempt: int) -> str:
    """Where the lines are."""
    return f"contexts/{month}/{attempt}.jsonl.gz"


def manifest_key(month: str, attempt: int) -> str:
    """Where the manifest is."""
    return f"contexts/{month}/{attempt}.manifest.json"


async def write_lines(rows: AsyncIterator[list[Row]], path: Path) -> tuple[int, Stored]:
    """Write pages of rows to a file; how many, and what the file is."""
    count = 0
    with path.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", compresslevel=_LEVEL, mtime=0) as out:
        async for page in rows:
            await asyncio.to_thread(out.write, b"".join(map(_line, page)))
            count += len(page)
    return count, await asyncio.to_thread(_stored, path)


def store_verified(store: ObjectStore, bucket: str, manifest: Manifest, path: Path) -> None:
    """Store the lines, read them back from there, count them, then store the manifest. Blocks.

    Raises ObjectError, SourceChanged, ExportDamaged.
    """
    store.ensure_bucket(bucket)
    key = lines_key(manifest.month, manifest.attempt)
    store.put_file(bucket, key, path, manifest.size_bytes, manifest.sha256)
    with fetched(store, bucket, manifest) as again:
        rows = sum(len(page) for page in pages(again, 1000))
    if rows != manifest.rows:
        raise ExportDamaged(f"{key} has {rows} lines and not {manifest.rows}", hint="it is exported again")
    content = json.dumps(asdict(manifest), indent=1).encode()
    with tempfile.NamedTemporaryFile(prefix="tierd-manifest-") as file:
        file.write(content)
        file.flush()
        store.put_file(bucket, manifest_key(manifest.month, manifest.attempt), Path(file.name), len(content))


def read_manifest(store: ObjectStore, bucket: str, month: str, attempt: int) -> Manifest:
    """The manifest of an export. Raises ObjectError, ExportDamaged. Blocks."""
    key = manifest_key(month, attempt)
    found = store.stat(bucket, key)
    if found is None:
        raise ObjectMissing(Place("", bucket, key))
    if found.sha256 is None or found.size > _MANIFEST_BYTES_MAX:
        raise ExportDamaged(f"{key} is no manifest of ours", hint="was it copied without its metadata?")
    content = bytearray(found.size)
    store.get_range(bucket, key, Stored(found.size, found.sha256), 0, memoryview(content))
    try:
        told = json.loads(content)
        manifest = Manifest(**{**told, "columns": tuple(told["columns"])})
    except (ValueError, TypeError, KeyError):
        raise ExportDamaged(f"{key} is no manifest", hint="restore it from a backup") from None
    if (manifest.format, manifest.columns) != (FORMAT, _COLUMNS):
        raise ExportDamaged(f"{key} has format {manifest.format}", hint="a newer tierd can read it")
    if (manifest.month, manifest.attempt) != (month, attempt):
        raise ExportDamaged(f"{key} is that of {manifest.month}", hint="somebody moved it")
    return manifest


def latest_attempt(store: ObjectStore, bucket: str, month: str) -> int | None:
    """The last export of a month that has a manifest. Blocks."""
    prefix, end = f"contexts/{month}/", ".manifest.json"
    names = [listed.key.removeprefix(prefix) for listed in store.list(bucket, prefix)]
    numbers = [name.removesuffix(end) for name in names if name.endswith(end)]
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


@contextmanager
def fetched(store: ObjectStore, bucket: str, manifest: Manifest) -> Iterator[Path]:
    """The lines of an export in a file, compared byte by byte with what was stored. Blocks."""
    key = lines_key(manifest.month, manifest.attempt)
    with tempfile.TemporaryDirectory(prefix="tierd-export-") as directory:
        path = Path(directory) / "lines.gz"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(fd, manifest.size_bytes)
            if manifest.size_bytes:
                store.get_range(bucket, key, manifest.stored, 0, FileRange(fd, 0, manifest.size_bytes))
        finally:
            os.close(fd)
        if _stored(path) != manifest.stored:
            raise ExportDamaged(f"{key} is not what was exported", hint="restore the object from a backup")
        yield path


def pages(path: Path, rows: int) -> Iterator[list[Row]]:
    """The rows of a file, so many at a time, or PAGE_BYTES of them. Raises ExportDamaged. Blocks."""
    try:
        with gzip.open(path, "rb") as lines:
            page: list[Row] = []
            size = 0
            for line in lines:
                page.append(_row(line))
                size += len(line)
                if len(page) == rows or size >= PAGE_BYTES:
                    yield page
                    page, size = [], 0
            if page:
                yield page
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ExportDamaged(f"an export has a line that is none: {error}", hint="restore it from a backup") from None


def _line(row: Row) -> bytes:
    rest = {name: value for name, value in row._asdict().items() if name != "messages"}
    text = json.dumps(rest, ensure_ascii=False, default=_told)
    return f'{text[:-1]}, "messages": {row.messages}}}\n'.encode()


def _told(value: Any) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()


def _row(line: bytes) -> Row:
    told = json.loads(line)
    messages = json.dumps(told["messages"], ensure_ascii=False)
    created_at, updated_at, archived_at = (
        datetime.fromisoformat(told[name]) for name in ("created_at", "updated_at", "archived_at")
    )
    whose = (told["user_id"], told["conversation_id"])
    return Row(*whose, messages, created_at, updated_at, archived_at, told["version"])


def _stored(path: Path) -> Stored:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Stored(file.tell(), digest.hexdigest())
