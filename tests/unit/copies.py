"""What the tests of the node tier share: contents, copies, damages, and threads that are waited for."""

from __future__ import annotations

import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.descriptors import open_descriptors
from tierd.node import copies as copies_module
from tierd.node import fetch as fetch_module
from tierd.node import fill as fill_module
from tierd.node import filler as filler_module
from tierd.node import store as store_module
from tierd.node.copies import Copy, Damaged, Draft, Identity, Seal, checksum
from tierd.node.fill import Fill, Outcome
from tierd.node.filler import Filler
from tierd.node.reads import ReadTarget
from tierd.node.sources import forced_version
from tierd.node.store import Store, opened

WAIT_SECONDS = 20.0
MODEL = b"models/llama"
PATH = b"models/llama/x.safetensors"


def content(seed: object, size: int) -> bytes:
    """Bytes that nothing else has."""
    return random.Random(repr(seed)).randbytes(size)


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Checksums cover so many bytes, that a test's file has several chunks."""
    for module in (copies_module, store_module, fill_module, fetch_module, filler_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)


def write_draft(draft: Draft, data: bytes) -> None:
    """All chunks of a draft, as a fill would write them."""
    view = memoryview(data)
    for chunk, start in enumerate(range(0, len(data), copies_module.CHUNK_BYTES)):
        block = view[start : start + copies_module.CHUNK_BYTES]
        draft.write(block, start)
        draft.seal_chunk(chunk, checksum(block))


def add_copy(
    store: Store,
    inode: int,
    data: bytes,
    *,
    path: bytes = PATH,
    model: bytes = MODEL,
    mtime_ns: int = 1,
    ctime_ns: int = 1,
) -> Copy:
    """A committed copy of a source file with this content."""
    draft = store.begin(Identity(inode, len(data), mtime_ns, ctime_ns), path, model)
    try:
        write_draft(draft, data)
        return store.commit(draft)
    except BaseException:
        store.abandon(draft)
        raise
    finally:
        draft.close()


def read_copy(store: Store, copy: Copy) -> bytes | None:
    """What a pod would get from a copy, None if that is a miss."""
    try:
        with opened(store, copy) as fd:
            return os.pread(fd, max(copy.identity.size, os.fstat(fd).st_size) + 1, 0)
    except Damaged:
        return None


@contextmanager
def own_store(directory: Path) -> Iterator[Store]:
    """A store whose books balance at the end, that leaves no file which is nobody's, and no descriptor."""
    directory.mkdir(exist_ok=True)
    before = open_descriptors()
    store = Store(directory)
    try:
        yield store
        store.check()
        assert store.reserved_bytes == 0
        assert store.leftovers() == []
    finally:
        store.close()
    assert sorted(open_descriptors() - before) == []


def recovered(directory: Path) -> tuple[dict[int, bytes | None], dict[str, int]]:
    """What a new daemon would find: contents by inode, and what it counted."""
    with own_store(directory) as store:
        ours = {entry for copy in store.copies() for entry in (copy.name, copy.name + ".meta")}
        assert set(os.listdir(directory)) == ours
        return {copy.identity.inode: read_copy(store, copy) for copy in store.copies()}, store.recovered


def fail_with(number: int) -> Callable[..., Any]:
    """A system call that fails."""

    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def seal_of(path: Path) -> Seal:
    """The seal that a data file would have as it is now."""
    st = os.lstat(path)
    return Seal(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def flip(path: Path, offset: int = 0, *, restore_mtime: bool = True) -> None:
    """Change one byte; mtime is as before."""
    st = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x40]))
    if restore_mtime:
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def forge_meta(path: Path, change: Callable[[dict[str, Any]], Any], sums: Callable[[bytes], bytes] = bytes) -> None:
    """Rewrite a `.meta` with its own checksum right; a header that `change` returns replaces the one it was given."""
    body = path.read_bytes()[:-16]
    line, _, rest = body[len(b"tierd copy ") :].partition(b"\n")
    header = json.loads(line)
    header = change(header) or header
    body = b"tierd copy " + json.dumps(header).encode("ascii") + b"\n" + sums(rest)
    path.write_bytes(body + checksum(memoryview(body)))


def forge_seal(store: Store, copy: Copy) -> None:
    """Have the store take the data file as it is for what was committed: damage from below the file system."""
    seal = seal_of(store.directory / copy.name)
    forge_meta(store.directory / f"{copy.name}.meta", lambda header: {**header, "seal": list(seal)})
    copy.seal = seal


def identity_of(path: Path) -> Identity:
    """The version of a source file now."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return identify(fd)
    finally:
        os.close(fd)


def identify(fd: int) -> Identity:
    """The version of an open source file now."""
    return Identity(os.fstat(fd).st_ino, *forced_version(fd))


class Reader:
    """A handle of a file that is on its way: reads as the seam does."""

    def __init__(self, path: Path) -> None:
        self.source_fd = os.open(path, os.O_RDONLY)
        self.target = ReadTarget(self.source_fd)
        self.fill: Fill | None = None

    def join(self, fill: Fill | None) -> Reader:
        """Be served from a fill."""
        assert fill is not None
        self.fill = fill
        fill.attach(self.target)
        return self

    def ask(self, offset: int, size: int) -> threading.Event:
        """An event that is set once these bytes can be read."""
        assert self.fill is not None
        ready = threading.Event()
        if self.fill.ready(offset, size, ready.set):
            ready.set()
        return ready

    def read(self, offset: int, size: int) -> bytes:
        """The bytes, once they are there."""
        assert self.ask(offset, size).wait(WAIT_SECONDS), "the READ stays parked"
        return os.pread(self.target.fd, size, offset)

    def close(self) -> None:
        """Release."""
        if self.fill is not None:
            self.fill.detach(self.target)
            assert self.target.fd == self.source_fd
        os.close(self.source_fd)


class Ended:
    """Collects what `finished` was told."""

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[Fill, Copy | None, str]] = queue.Queue()

    def __call__(self, fill: Fill, copy: Copy | None, reason: str) -> None:
        self.told.put((fill, copy, reason))

    def outcome(self) -> Outcome:
        """How the next fill ended."""
        outcome = self.next()[0].outcome
        assert outcome is not None
        return outcome

    def next(self) -> tuple[Fill, Copy | None, str]:
        """The next fill that ended."""
        return self.told.get(timeout=WAIT_SECONDS)


class ByHand(Filler):
    """A filler without threads: jobs are taken and done one at a time, in the order the test likes."""

    buffer = memoryview(bytearray(1 << 20))

    def take(self, now: float = 0.0, last: Any = None) -> Any:
        """What a worker would do next that has just done `last`."""
        with self._change:
            return self._choose(now, last)

    def do(self, job: Any) -> None:
        """Do it."""
        assert job is not None
        self._do(job, self.buffer)

    def finish(self) -> int:
        """Everything that is left; how many jobs."""
        count = 0
        while (job := self.take(float("inf"))) is not None:
            self.do(job)
            count += 1
        return count


def from_store(store: Store) -> Callable[[Fill], Draft]:
    """A filler's `reserve`: there is room, unless the disk has none."""
    return lambda fill: store.begin(fill.identity, fill.path, fill.model)
