"""What an upload in parts has done so far, in a local file, so that another process can go on. Makes no requests.

Lines of JSON: the first says what is uploaded where, each other one names a part that the server has taken. A line is
one write, so a kill leaves whole lines; a power cut may lose or tear the last ones: those parts are sent again.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_FORMAT: Final = 1
_BYTES_MAX: Final = 16 << 20
"""Ten thousand parts take a tenth of it."""


class Task(NamedTuple):
    """What is uploaded, to where; a record of anything else is of no use."""

    endpoint: str
    bucket: str
    key: str
    size: int
    part_bytes: int
    sha256: str | None


class SentPart(NamedTuple):
    """A part that the server acknowledged: its ETag there, the SHA-256 of what we sent."""

    etag: str
    sha256: str


class Progress(NamedTuple):
    """An upload that was begun: its ID, our own name for it, and its parts by number."""

    upload_id: str
    name: str
    parts: dict[int, SentPart]


class Journal:
    """See the module. Any thread may add parts. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._fd = -1
        self._lock = threading.Lock()

    @property
    def kept(self) -> bool:
        """True if another process could go on."""
        return self._path is not None

    def read(self) -> tuple[Task, Progress] | None:
        """What an earlier process left; None if there is nothing that can be understood. Raises OSError."""
        if self._path is None:
            return None
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            return _parsed(file.read(_BYTES_MAX))
        return None

    def begin(self, task: Task, upload_id: str, name: str) -> None:
        """A new upload, in place of what was recorded. On disk before a part is sent. Raises OSError."""
        self._put({"format": _FORMAT, "task": task._asdict(), "upload_id": upload_id, "name": name}, [])

    def resume(self, task: Task, progress: Progress) -> None:
        """Go on with what `read` returned; a line torn off at the end is gone then. Raises OSError."""
        head = {"format": _FORMAT, "task": task._asdict(), "upload_id": progress.upload_id, "name": progress.name}
        self._put(head, [_part_line(number, part) for number, part in sorted(progress.parts.items())])

    def _put(self, head: dict[str, object], lines: list[bytes]) -> None:
        if self._path is None:
            return
        self.close()
        beside = self._path.with_name(self._path.name + ".new")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"".join([_line(head), *lines]))
            os.fsync(fd)
            beside.replace(self._path)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def add(self, number: int, part: SentPart) -> None:
        """The server has it. Raises OSError."""
        with self._lock:
            if self._fd >= 0:
                os.write(self._fd, _part_line(number, part))

    def close(self) -> None:
        """The file stays."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def forget(self) -> None:
        """The upload is over. Raises OSError."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _line(content: dict[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _part_line(number: int, part: SentPart) -> bytes:
    return _line({"part": number, **part._asdict()})


def _parsed(content: bytes) -> tuple[Task, Progress] | None:
    first, *rest = content.split(b"\n")
    try:
        head = json.loads(first)
        if head["format"] != _FORMAT:
            return None
        task, progress = Task(**head["task"]), Progress(str(head["upload_id"]), str(head["name"]), {})
    except (ValueError, TypeError, KeyError):
        return None
    for line in rest:
        try:
            found = json.loads(line)
            progress.parts[int(found["part"])] = SentPart(str(found["etag"]), str(found["sha256"]))
        except (ValueError, TypeError, KeyError):
            continue  # torn: the part is sent again
    return task, progress
