"""What the models roots of the source hold: each model's bytes and files, and how many of these are cold. Reads only.

Blocking, for worker threads. Memory is bounded by the number of models, not of files; the tree may change under it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from tierd.model_walk import FILES_MAX, ModelWalk
from tierd.objects.keys import IMPORTED
from tierd.statistics import model_id_of
from tierd.stub_files import is_cold, read_origins
from tierd.stubs import ORIGINS, RESERVED, STUBS, Origin
from tierd.units import looks_like_model, model_of

MODELS_MAX: Final = 100_000
_REFUSED_NAMED: Final = 10
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Stub(NamedTuple):
    """A file in `.tierd/cold`. It has its own bytes again if `cold` is False."""

    attributes: os.stat_result
    cold: bool
    origin: Origin | None


@dataclass(slots=True)
class Seen:
    """One model. `files` have bytes, each counted once whatever its names; `cold_files` of them have theirs in the
    object store. `version` is the latest that one of these is of, None if nobody knows of any; `imported`: some are of
    objects that tierd did not write; `archived_as`: the model that the objects of `version` are called after, another
    one if it was renamed since."""

    size_bytes: int = 0
    files: int = 0
    cold_files: int = 0
    version: int | None = None
    imported: bool = False
    archived_as: str = ""

    @property
    def cold(self) -> bool:
        """Nothing of it is hot."""
        return self.files > 0 and self.cold_files == self.files


@dataclass(slots=True)
class Scan:
    """`roots` are those that are there. `complete` is False if it met a bound or what it could not read. `refused` are
    some of the models that no catalogue can name, `refused_total` how many there are."""

    models: dict[str, Seen] = field(default_factory=dict)
    roots: int = 0
    complete: bool = True
    refused: list[str] = field(default_factory=list)
    refused_total: int = 0


def scan(source: Path, roots: Sequence[bytes], *, files_max: int = FILES_MAX, models_max: int = MODELS_MAX) -> Scan:
    """Walk the models roots."""
    base = os.fsencode(source)
    found = Scan(roots=sum(os.path.isdir(os.path.join(base, root)) for root in set(roots)))
    refused: set[bytes] = set()
    links: set[tuple[int, int]] = set()
    walk = ModelWalk(base, roots, _stubs_in, files_max)
    for model, path, stub in walk:
        model_id = model_id_of(model)
        if model_id is None:
            if len(refused) < models_max:
                refused.add(model)
            continue
        if model_id not in found.models and len(found.models) >= models_max:
            found.complete = False
            continue
        _count(found.models.setdefault(model_id, Seen()), path, stub, links)
    found.complete &= walk.complete
    found.refused = [os.fsdecode(name) for name in sorted(refused)[:_REFUSED_NAMED]]
    found.refused_total = len(refused)
    return found


def look(source: Path, roots: Sequence[bytes], model_id: str, *, files_max: int = FILES_MAX) -> Seen | None:
    """One model; None if no model is called so, or it has more files than are looked at. Raises OSError."""
    base, model = os.fsencode(source), model_id.encode()
    top = os.path.join(base, model)
    if os.path.realpath(top) != os.path.join(os.path.realpath(base), model):
        return None  # a link leads there: what it leads to has a name of its own

    @cache
    def is_model(directory: bytes) -> bool:
        path = os.path.join(base, directory)
        try:
            return looks_like_model([*os.listdir(path), *_stubs_in(path)])
        except (FileNotFoundError, NotADirectoryError):
            return False

    seen, links = Seen(), set[tuple[int, int]]()
    for number, (path, stub) in enumerate(_files_of(top)):
        if number >= files_max:
            return None
        if model_of(os.path.relpath(path, base), roots, is_model) == model:
            _count(seen, path, stub, links)
    return seen if seen.files else None


def _files_of(top: bytes) -> Iterator[tuple[bytes, _Stub | None]]:
    """Of a model: of a directory all below it, else the one file."""
    if not os.path.isdir(top):
        stub = _stubs_in(os.path.dirname(top)).get(os.path.basename(top))
        if stub is not None or os.path.lexists(top):
            yield top, stub
        return

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for directory, below, names in os.walk(top, onerror=fail):
        stubs = _stubs_in(directory) if RESERVED in below else {}
        below[:] = [name for name in below if name != RESERVED]
        for name in (*names, *stubs):
            yield os.path.join(directory, name), stubs.get(name)


def is_there(source: Path, model_id: str) -> bool:
    """Whether any file, hot or cold, is left of a model. Raises OSError if that cannot be told."""
    top = os.path.join(os.fsencode(source), model_id.encode())
    try:
        st = os.lstat(top)
    except (FileNotFoundError, NotADirectoryError):
        return bool(_stubs_in(os.path.dirname(top)).get(os.path.basename(top)))
    if not stat.S_ISDIR(st.st_mode):
        return True

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for directory, below, names in os.walk(top, onerror=fail):
        if RESERVED in below:
            if _stubs_in(directory):
                return True
            below.remove(RESERVED)
        if names:
            return True
    return False


def _count(seen: Seen, path: bytes, stub: _Stub | None, links: set[tuple[int, int]]) -> None:
    try:
        st = stub.attributes if stub is not None else os.lstat(path)
    except FileNotFoundError:
        return  # gone since it was listed
    if not stat.S_ISREG(st.st_mode) or (st.st_nlink > 1 and (st.st_dev, st.st_ino) in links):
        return
    if st.st_nlink > 1:
        links.add((st.st_dev, st.st_ino))
    cold = stub is not None and stub.cold
    origin = stub.origin if stub is not None else None
    size = origin.size if cold and origin is not None else st.st_size
    if not size and not cold:
        return
    seen.size_bytes += size
    seen.files += 1
    if cold:
        seen.cold_files += 1
        if origin is not None:
            _note_origin(seen, origin)


def _note_origin(seen: Seen, origin: Origin) -> None:
    seen.imported |= origin.version == IMPORTED
    if seen.version is None or origin.version > seen.version:
        seen.version, seen.archived_as = origin.version, origin.model_id


def _stubs_in(directory: bytes) -> dict[bytes, _Stub]:
    """The stubs of a directory that no file hides."""
    try:
        base = os.open(os.path.join(directory, RESERVED), _READ)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        return _stubs_of(directory, base)
    finally:
        os.close(base)


def _stubs_of(directory: bytes, base: int) -> dict[bytes, _Stub]:
    try:
        fd = os.open(STUBS, _READ, dir_fd=base)
    except FileNotFoundError:
        return {}
    try:
        names = [os.fsencode(name) for name in os.listdir(fd)]
        origins = _origins_of(base) if names else {}
        return {
            name: _Stub(st, is_cold(st), origins.get(st.st_ino))
            for name in names
            if not os.path.lexists(os.path.join(directory, name)) and (st := _lstat(name, fd)) is not None
        }
    finally:
        os.close(fd)


def _origins_of(base: int) -> dict[int, Origin]:
    try:
        fd = os.open(ORIGINS, _READ, dir_fd=base)
    except FileNotFoundError:
        return {}
    try:
        return read_origins(fd)
    finally:
        os.close(fd)


def _lstat(name: bytes, dir_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
