"""One file on its way into the node tier: which chunks have landed, which streams are in it, which READs wait.

A reader waits only for the chunks that its own READ needs, and those are fetched before all others; the READ is parked
here (`Fill.ready`) and no thread waits with it. Whatever ends the fill, readers go on from the source itself or from
the whole copy. Who fetches the chunks, and of which fill first, is in `filler.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final

from tierd.node.copies import CHUNK_BYTES, Draft, Identity, chunk_count
from tierd.node.reads import ReadTarget
from tierd.node.wanted import Priority

STREAMS_PER_FILE: Final = 2
_RUN_CHUNKS: Final = 16
_NEARLY_THERE_CHUNKS: Final = 2
"""A stream that is so close to a chunk will be there before another could."""


class Outcome(Enum):
    """How a fill ended; the values are metric labels."""

    COMPLETE = "complete"
    CHANGED = "changed"
    NO_SPACE = "no_space"
    REFUSED = "refused"
    DROPPED = "dropped"
    FAILED = "failed"


class _Wait:
    """A READ that waits for chunks."""

    __slots__ = ("chunks", "resume")

    def __init__(self, chunks: set[int], resume: Callable[[], None]) -> None:
        self.chunks = chunks
        self.resume = resume


_MISSING, _IN_WORK, _LANDED = 0, 1, 2


class Fill:
    """One file. All state is guarded by the filler's lock, which `ready` takes too.

    Invariants: `missing` counts chunks that have not landed; `over` means that no read waits and none will;
    `source_fd` and the draft are closed once the fill is over, no worker is in it and no target attached.
    """

    def __init__(
        self,
        identity: Identity,
        path: bytes,
        model: bytes,
        source_fd: int,
        priority: Priority,
        change: threading.Condition,
        streams: int = STREAMS_PER_FILE,
    ) -> None:
        self.identity = identity
        self.path = path
        self.model = model
        self.priority = priority
        self.source_fd = source_fd
        self.draft: Draft | None = None
        self.over = False
        self.outcome: Outcome | None = None
        self.began = time.monotonic()
        self.chunks = bytearray(chunk_count(identity.size))
        self.missing = len(self.chunks)
        self._change = change
        self._streams = streams
        self.starting = False
        self.in_work = 0
        self.demanded: deque[int] = deque()
        self._front = 0
        self._idle: list[tuple[int, int]] = []
        self._waits: dict[int, list[_Wait]] = {}
        self._targets: dict[ReadTarget, int] = {}

    @property
    def bytes_landed(self) -> int:
        """How far it is."""
        return min(self.identity.size, (len(self.chunks) - self.missing) * CHUNK_BYTES)

    def age_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    # --- readers ---

    def attach(self, target: ReadTarget) -> None:
        """Serve a handle's READs from here; its descriptor so far, of the source, is what a failure falls back to."""
        with self._change:
            self._targets[target] = target.fd
            if self.over:
                target.fd = self.draft.fd if self.outcome is Outcome.COMPLETE and self.draft else target.fd
                return
            target.gate = self
            self.priority = Priority.READER
            if self.draft is not None:
                target.fd = self.draft.fd
            self._change.notify_all()

    def attached(self) -> int:
        """How many handles are served from here. With the lock held."""
        return len(self._targets)

    def detach(self, target: ReadTarget) -> None:
        """The handle was released. Blocking: it may close files of the source."""
        with self._change:
            if target in self._targets:
                target.fd = self._targets.pop(target)
                if not self._targets:
                    self.priority = Priority.ASKED  # nobody waits for it any longer
            unused = self.unused_fds()
        close_all(unused)

    def ready(self, offset: int, size: int, resume: Callable[[], None]) -> bool:
        """True if these bytes can be read now; else `resume` is called once they can."""
        with self._change:
            if self.over:
                return True
            first, last = offset // CHUNK_BYTES, (min(offset + size, self.identity.size) - 1) // CHUNK_BYTES
            lacking = {chunk for chunk in range(first, last + 1) if self.chunks[chunk] != _LANDED}
            if not lacking:  # also beyond the end: no chunk will ever land there
                return True
            wait = _Wait(lacking, resume)
            for chunk in sorted(lacking):
                self._waits.setdefault(chunk, []).append(wait)
                if self.chunks[chunk] == _MISSING:
                    self.demanded.append(chunk)
            self._front = last
            self._change.notify_all()
            return False

    # --- workers, with the lock held ---

    def take_demanded(self) -> int | None:
        """The next chunk that a reader waits for and that no stream is about to reach."""
        for _ in range(len(self.demanded)):
            chunk = self.demanded.popleft()
            if self.chunks[chunk] != _MISSING:
                continue
            if _IN_WORK not in self.chunks[max(0, chunk - _NEARLY_THERE_CHUNKS) : chunk]:
                return self._take(chunk)
            self.demanded.append(chunk)
        return None

    def take_after(self, chunk: int) -> int | None:
        """The next chunk of the run that a stream is in."""
        after = chunk + 1
        inside = after < len(self.chunks) and (after % _RUN_CHUNKS or self.in_work == 0)
        if self.in_work >= self._streams:  # others came between this worker's two chunks
            return None
        return self._take(after) if inside and self.chunks[after] == _MISSING else None

    def take_run(self) -> int | None:
        """The first chunk of a run that no stream is in, from the one that readers are at on."""
        if self.in_work >= self._streams:
            return None
        first = self._front // _RUN_CHUNKS
        runs = -(-len(self.chunks) // _RUN_CHUNKS)
        for run in (*range(first, runs), *range(first)):
            start, end = run * _RUN_CHUNKS, (run + 1) * _RUN_CHUNKS
            missing = self.chunks.find(_MISSING, start, end)
            if missing >= 0 and self.chunks.find(_IN_WORK, start, end) < 0:
                return self._take(missing)
        return None

    def lend_fd(self, chunk: int) -> int | None:
        """A descriptor to read a chunk by: the one that has just read what lies before, if it is free.

        None to open one, without the lock: the source may take its time, and the event loop needs the lock.
        """
        for place, (fd, position) in enumerate(self._idle):
            if position == chunk:
                del self._idle[place]
                return fd
        if len(self._idle) >= self._streams:
            return self._idle.pop(0)[0]
        return None

    def take_back_fd(self, fd: int, chunk: int) -> None:
        """It has read everything up to before `chunk`."""
        self._idle.append((fd, chunk))

    def _take(self, chunk: int) -> int:
        self.chunks[chunk] = _IN_WORK
        self.in_work += 1
        return chunk

    def landed(self, chunk: int) -> list[_Wait]:
        """The chunk is in the draft; the READs that can go on."""
        self.chunks[chunk] = _LANDED
        self.missing -= 1
        freed = []
        for wait in self._waits.pop(chunk, ()):
            wait.chunks.discard(chunk)
            if not wait.chunks:
                freed.append(wait)
        return freed

    def end(self, outcome: Outcome) -> list[_Wait]:
        """No READ waits from now on; all that did."""
        self.over = True
        self.outcome = outcome
        if outcome is not Outcome.COMPLETE:
            for target, fallback in self._targets.items():
                target.fd = fallback
        waits = {id(wait): wait for waiting in self._waits.values() for wait in waiting}
        self._waits.clear()
        return list(waits.values())

    def set_draft(self, draft: Draft) -> None:
        """Space is reserved: READs are served from the draft as chunks land."""
        self.draft = draft
        for target in self._targets:
            target.fd = draft.fd

    def unused_fds(self) -> list[int]:
        """What nobody needs any longer, for the caller to close without the lock: the source may hang."""
        if not self.over or self.in_work or self._targets or self.source_fd < 0:
            return []
        unused = [self.source_fd, *(fd for fd, _ in self._idle)]
        self._idle.clear()
        self.source_fd = -1
        if self.draft is not None:
            unused.append(self.draft.fd)
            self.draft = None
        return unused


def close_all(fds: Iterable[int]) -> None:
    """Close what `Fill.unused_fds` gave."""
    for fd in fds:
        os.close(fd)
