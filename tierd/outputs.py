"""What is a generated output, by its path alone: `USER/YYYY/MM/DD/UUID.EXTENSION` below the outputs root. Pure.

Whatever else lies there is foreign, or would be an output but for a fault: nobody registers, copies, moves or deletes
it. Paths are bytes relative to the outputs root; the root itself is a setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Final
from uuid import UUID

from tierd.errors import UsageError
from tierd.objects.keys import MODEL_ID_CHARS_MAX, NAME_BYTES_MAX, object_key

KIND_OF_EXTENSION: Final = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "svg"), "image"),
    **dict.fromkeys(("mp3", "wav", "flac", "ogg", "opus", "m4a", "aac", "aiff"), "audio"),
    **dict.fromkeys(("mp4", "webm", "mov", "mkv", "avi"), "video"),
}
"""What an output is, by the ending of its name in lower case."""
USER_CHARS_MAX: Final = 200
"""So that a day's directory fits into what a move names (255 characters), with roots of up to 43."""
ROOT_CHARS_MAX: Final = MODEL_ID_CHARS_MAX - USER_CHARS_MAX - len("//YYYY/MM/DD")
_DATE: Final = re.compile(rb"[0-9]{4}/[0-9]{2}/[0-9]{2}")
_NAME: Final = re.compile(r"(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.(?P<extension>[a-z0-9]+)", re.I | re.A)
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\\\\]")
_PATH_PARTS: Final = 5


class Fault(StrEnum):
    """Why a file below the outputs root is no output; the value is for people."""

    PLACE = "not USER/YYYY/MM/DD/NAME"
    USER = "a user ID that cannot be one"
    DATE = "no date of the calendar"
    NAME = "no UUID for a name"
    KIND = "an ending that is neither image, audio nor video"


@dataclass(frozen=True, slots=True)
class Output:
    """What a path says of an output. `filename` is its path below its user's directory, as the catalogue has it."""

    output_id: UUID
    user: str
    day: date
    filename: str
    kind: str

    @property
    def path(self) -> bytes:
        """Relative to the outputs root."""
        return f"{self.user}/{self.filename}".encode()


def parse(path: bytes) -> Output | Fault:
    """The output at `path`, or what keeps it from being one."""
    parts = path.split(b"/")
    if len(parts) != _PATH_PARTS:
        return Fault.PLACE
    found = day_of(b"/".join(parts[:-1]))
    if isinstance(found, Fault):
        return found
    user, day = found
    match = _NAME.fullmatch(parts[-1].decode("ascii", "replace"))
    if match is None:
        return Fault.NAME
    kind = KIND_OF_EXTENSION.get(match["extension"].lower())
    if kind is None:
        return Fault.KIND
    filename = b"/".join(parts[1:]).decode("ascii")
    return Output(UUID(match["id"]), user, day, filename, kind)


def day_of(directory: bytes) -> tuple[str, date] | Fault:
    """Whose outputs of which day lie in `USER/YYYY/MM/DD`, or why none can."""
    name, _, told = directory.partition(b"/")
    if _DATE.fullmatch(told) is None:
        return Fault.DATE if told.count(b"/") == 2 else Fault.PLACE
    user = user_of(name)
    if user is None:
        return Fault.USER
    try:
        return user, date(*map(int, told.split(b"/")))
    except ValueError:
        return Fault.DATE


def user_of(name: bytes) -> str | None:
    """The user whose directory is called so; None if nobody can be."""
    try:
        user = name.decode()
    except UnicodeDecodeError:
        return None
    if not user or len(user) > USER_CHARS_MAX or user.startswith(".") or _UNPRINTABLE.search(user):
        return None
    try:
        key = object_key(user, 1, b"x")
    except UsageError:
        return None
    return user if all(len(part.encode()) <= NAME_BYTES_MAX for part in key.split("/")) else None


def below(path: bytes, root: bytes) -> bytes | None:
    """`path`, which is relative to the source, relative to the outputs root; None if it is not below that."""
    if not root:
        return path
    return path.removeprefix(root + b"/") if path.startswith(root + b"/") else None


def is_day(name: str, root: bytes) -> bool:
    """Whether `name`, as an origin or a move has it, is that of a day's directory below the outputs root."""
    directory = below(name.encode("utf-8", "surrogateescape"), root)
    return directory is not None and not isinstance(day_of(directory), Fault)
