"""Which objects of a bucket can be adopted as a model that tierd did not write, which cannot, and why. Reads a list.

Keys are derived, never read: the object of a file must be `PREFIX/PATH`, plainly, as `keys.object_key` makes it of
version 0. What is called otherwise is refused and told, not guessed at; what tierd wrote itself is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from tierd.errors import UsageError
from tierd.objects.keys import IMPORTED, is_ours, object_key, shown
from tierd.objects.manifest import PATH_BYTES_MAX
from tierd.objects.store import Listed

REFUSED_MAX: Final = 200
"""Told one by one; of more only the number is."""


class Adoptable(NamedTuple):
    """A file to be: its path in the model, and what its object is called and how large it is."""

    path: bytes
    key: str
    size: int


class Refused(NamedTuple):
    """An object that cannot be a file, and why."""

    key: str
    reason: str


class Found(NamedTuple):
    """What lies below a prefix. `ours`: objects that tierd wrote there; `refused_count` of all, `refused` the first."""

    files: tuple[Adoptable, ...]
    refused: tuple[Refused, ...]
    refused_count: int
    ours: int

    @property
    def size_bytes(self) -> int:
        """Of the files."""
        return sum(file.size for file in self.files)


def sort_out(prefix: str, listed: Iterable[Listed]) -> Found:
    """What can be adopted of the objects whose keys begin with `PREFIX/`."""
    files: dict[bytes, Adoptable] = {}
    refused: list[Refused] = []
    ours = 0
    for entry in listed:
        if is_ours(entry.key):
            ours += 1
            continue
        path = entry.key.removeprefix(f"{prefix}/").encode("utf-8", "surrogatepass")
        reason = _why_not(prefix, path, entry.key)
        if reason:
            refused.append(Refused(entry.key, reason))
        else:
            files[path] = Adoptable(path, entry.key, entry.size)
    for path in _below_files(files):
        refused.append(Refused(files.pop(path).key, "another object has the name of its directory"))
    refused.sort()
    in_order = tuple(files[path] for path in sorted(files))
    return Found(in_order, tuple(refused[:REFUSED_MAX]), len(refused), ours)


def _why_not(prefix: str, path: bytes, key: str) -> str:
    if key.endswith("/"):
        return "it stands for a directory"
    if len(path) > PATH_BYTES_MAX:
        return f"its path has {len(path)} bytes, {PATH_BYTES_MAX} are allowed"
    try:
        derived = object_key(prefix, IMPORTED, path)
    except UsageError as error:
        return str(error)
    return "" if derived == key else f"it would be called {shown(derived)}"


def _below_files(files: Iterable[bytes]) -> list[bytes]:
    known = set(files)
    return [path for path in known if any(above in known for above in _directories(path))]


def _directories(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]
