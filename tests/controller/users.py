"""Somebody who works on a model on another node, through the overlay's own code; only the kernel is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tests.controller.moving import Site
from tierd.node.cold_source import Cold, ColdSource
from tierd.node.sources import Changes, Creator, Moved, Ref
from tierd.recall import fetch_from, recall
from tierd.stubs import Origin

NAME = b"weights.bin"
OTHER = b"weights.old"
TRIES_MAX = 10


@dataclass
class User:
    """Somebody who works on the model through an overlay of their own."""

    site: Site
    directory: bytes = b""
    """In the model."""

    @contextmanager
    def _source(self) -> Iterator[tuple[ColdSource, int]]:
        source = ColdSource(self.site.source)
        fd = os.open(os.fsencode(self.site.model) + self.directory, os.O_RDONLY)
        try:
            yield source, fd
        finally:
            os.close(fd)
            source.close()

    def act(self, deed: Callable[[User], None]) -> None:
        """Do it; the kernel asks anew when a name means another inode by now."""
        for left in reversed(range(TRIES_MAX)):
            try:
                deed(self)
            except Moved:
                if not left:
                    raise
            else:
                return

    def unlink(self) -> None:
        with self._source() as (source, fd):
            source.unlink(fd, NAME)

    def rename(self) -> None:
        with self._source() as (source, fd):
            source.rename(fd, NAME, fd, OTHER, 0)

    def replace(self) -> None:
        (self.site.model / "new").write_bytes(b"new")
        with self._source() as (source, fd):
            source.rename(fd, b"new", fd, NAME, 0)

    def chmod(self) -> None:
        with self._source() as (source, fd):
            ref = Ref(fd, NAME, source.key(source.lstat(fd, NAME)))
            source.setattr(ref, Changes(mode=0o600), None)

    def append(self) -> None:
        """Write beyond the end."""
        with self._opened(os.O_RDWR) as opened:
            os.pwrite(opened, b"+", os.fstat(opened).st_size)

    def truncate(self) -> None:
        """Leave five bytes."""
        with self._opened(os.O_RDWR) as opened:
            os.ftruncate(opened, 5)

    def empty(self) -> None:
        """As `> file` does."""
        with self._opened(os.O_RDWR | os.O_TRUNC):
            """Nothing is written."""

    def link(self) -> None:
        """Another name, in the same directory."""
        with self._source() as (source, fd):
            source.link(Ref(fd, NAME, source.key(source.lstat(fd, NAME))), fd, OTHER)

    def recreate(self) -> None:
        """Another file of that name."""
        with self._source() as (source, fd):
            source.unlink(fd, NAME)
            opened, *_ = source.create(fd, NAME, os.O_WRONLY, 0o644, Creator(os.geteuid(), os.getegid()))
            os.write(opened, b"other")
            os.close(opened)

    def move_model(self) -> None:
        """The whole directory."""
        self.site.model.rename(f"{self.site.model}-moved")

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        """As the overlay does: where the bytes are elsewhere, they come back first."""
        with self._source() as (source, fd):
            for _ in range(TRIES_MAX):
                ref = Ref(fd, NAME, source.key(source.lstat(fd, NAME)))
                try:
                    opened, _ = source.open(ref, flags)
                except Moved:
                    continue
                except Cold as cold:
                    self._recall(source, cold)
                    continue
                try:
                    yield opened
                finally:
                    os.close(opened)
                return
        raise AssertionError("it moves all the time")

    def _recall(self, source: ColdSource, cold: Cold) -> None:
        with source.path_of(cold.ref) as path:
            recall(path, origin_of(cold), fetch_from(self.site.store, self.site.settings.bucket))
        source.settle(cold.ref)

    def read(self, name: bytes) -> bytes | None:
        """A file through the overlay."""
        with self._source() as (source, fd):
            try:
                st = source.lstat(fd, name)
            except FileNotFoundError:
                return None
            try:
                opened, _ = source.open(Ref(fd, name, source.key(st)), os.O_RDONLY)
            except Cold as cold:
                return self.site.fetch(origin_of(cold))
            with open(opened, "rb") as file:
                return file.read()

    def read_path(self, path: str) -> bytes | None:
        """The same in any directory of the model."""
        above, _, name = path.rpartition("/")
        return replace(self, directory=self.directory + os.fsencode(f"/{above}" if above else "")).read(name.encode())

    def mode(self, name: bytes) -> int:
        with self._source() as (source, fd):
            return source.lstat(fd, name).st_mode & 0o7777


def origin_of(cold: Cold) -> Origin:
    assert cold.stub.origin is not None
    return cold.stub.origin
