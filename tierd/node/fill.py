"""Fills: source files on their way into the node tier, one per file however many opened it.

Workers read chunks of 4 MiB from the source and write them into a draft of the store. Each is a stream: it follows
a run of 64 MiB from start to end with an open file of its own, because network file systems read ahead for whoever
reads in order, and are slowed down by whoever does not (eight workers that took turns read JuiceFS at a quarter of the
speed of two streams; docs/BENCHMARKS.md). A reader
waits only for the chunks that its own READ needs, and those are fetched before all others; the READ is parked
here (`Fill.ready`) and no thread waits with it. When all chunks have landed and the source is still the version
that the fill began with, the draft becomes a copy. Whatever fails, readers go on from the source itself.

Order of work: chunks that readers wait for, the rest of files that readers have open, files asked for by name
(siblings of an opened shard, `tierd warm`), prefetch; the last only while no reader's file is being filled.

Contract: threads; one lock guards all fills. Callbacks (`resume`, `finished`) are called without it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Final, NamedTuple

import structlog
import xxhash

from tierd.node.chores import join_all
from tierd.node.copies import CHUNK_BYTES, Copy, Draft, Identity, chunk_count
from tierd.node.seam import ReadTarget
from tierd.node.store import Store
from tierd.units import display

log = structlog.get_logger(__name__)

WORKERS: Final = 4
_STREAMS_PER_FILE: Final = 2
_RUN_CHUNKS: Final = 16
_NEARLY_THERE_CHUNKS: Final = 2
"""A stream that is so close to a chunk will be there before another could."""
_FILES_AT_ONCE: Final = 4
"""Files that are filled at once beyond those that readers have open."""
_BLOCK_BYTES: Final = 1 << 20
"""One read of the source and one write of the draft: small enough for a processor's cache."""
QUEUE_MAX: Final = 100_000
_COOLING_SECONDS: Final = 30.0
_COOLING_MAX: Final = 1000
_TICK_SECONDS: Final = 0.02
"""Coarsest timestamp of a file system, with a margin (a kernel tick is at most 10 ms)."""


class Priority(IntEnum):
    """Why a file is wanted, the most urgent first."""

    READER = 0
    ASKED = 1
    PREFETCH = 2


class Outcome(Enum):
    """How a fill ended; the values are metric labels."""

    COMPLETE = "complete"
    CHANGED = "changed"
    NO_SPACE = "no_space"
    REFUSED = "refused"
    FAILED = "failed"


class Wanted(NamedTuple):
    """A file that shall be filled when its turn comes; `path` is relative to the source."""

    path: bytes
    model: bytes
    priority: Priority


class _Job(NamedTuple):
    """A chunk of a fill to fetch; without a chunk, a fill to start; without a fill, a wanted file to open."""

    fill: Fill | None
    chunk: int | None


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

    def detach(self, target: ReadTarget) -> None:
        """The handle was released. Blocking: it may close files of the source."""
        with self._change:
            if target in self._targets:
                target.fd = self._targets.pop(target)
                if not self._targets:
                    self.priority = Priority.ASKED  # nobody waits for it any longer
            unused = self.unused_fds()
        _close_all(unused)

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
        if self.in_work >= _STREAMS_PER_FILE:  # others came between this worker's two chunks
            return None
        return self._take(after) if inside and self.chunks[after] == _MISSING else None

    def take_run(self) -> int | None:
        """The first chunk of a run that no stream is in, from the one that readers are at on."""
        if self.in_work >= _STREAMS_PER_FILE:
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
        if len(self._idle) >= _STREAMS_PER_FILE:
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


class Changed(Exception):
    """The source file is not the version that the fill began with; `str()` says since when."""


class Refused(Exception):
    """The node tier does not want the file; `str()` says why."""


class Filler:
    """See the module.

    `open_source(path)` opens a source file; `identify(fd)` is its version past every cache. `make_room(model, size,
    priority)` evicts for a fill or raises Refused. `finished(fill, copy)` is called from a worker after each fill.
    `bandwidth` limits bytes per second read for others than waiting readers; 0 means no limit.
    """

    def __init__(
        self,
        store: Store,
        *,
        open_source: Callable[[bytes], int],
        identify: Callable[[int], Identity],
        make_room: Callable[[bytes, int, Priority], None],
        finished: Callable[[Fill, Copy | None, str], None],
        bandwidth: int = 0,
        workers: int = WORKERS,
    ) -> None:
        self._store = store
        self._open_source = open_source
        self._identify = identify
        self._make_room = make_room
        self._finished = finished
        self._bandwidth = bandwidth
        self._change = threading.Condition()
        self._reserving = threading.Lock()
        """Held from the judgement that there is room until it is reserved: no two fills count on the same bytes."""
        self._active: dict[int, Fill] = {}
        self._queues: dict[Priority, OrderedDict[bytes, Wanted]] = {
            Priority.ASKED: OrderedDict(),
            Priority.PREFETCH: OrderedDict(),
        }
        self._opening = 0
        self._taking: set[Wanted] = set()
        self._cooling: OrderedDict[int, float] = OrderedDict()
        self._not_before = 0.0
        self._stopped = False
        self.dropped = 0
        """Files that were wanted but did not fit into the queue."""
        self.source_bytes = 0
        """Bytes read from the source."""
        self._threads = [threading.Thread(target=self._work, name=f"fill-{i}", daemon=True) for i in range(workers)]

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the workers end after the block they are at; readers go on from the source."""
        with self._change:
            self._stopped = True
            fills = list(self._active.values())
            self._active.clear()
            freed = [wait for fill in fills for wait in fill.end(Outcome.FAILED)]
            for queue in self._queues.values():
                queue.clear()
            self._change.notify_all()
        for wait in freed:
            wait.resume()
        join_all(self._threads)
        for fill in fills:
            if fill.draft is not None:
                self._store.abandon(fill.draft)
            with self._change:
                unused = fill.unused_fds()
            _close_all(unused)

    # --- what is wanted ---

    def begin(self, identity: Identity, path: bytes, model: bytes, fd: int) -> Fill | None:
        """The fill of a file that a reader opened, begun if there is none. `fd` is duplicated if it is needed.

        None for a file whose fill failed a moment ago, and when descriptors run out: it is read from the source.
        """
        with self._change:
            fill = self._active.get(identity.inode)
            if fill is not None:
                return fill if fill.identity == identity else None
            if self._stopped or self._cooling.get(identity.inode, 0.0) > time.monotonic():
                return None
            try:
                own_fd = os.dup(fd)
            except OSError as error:
                log.warning("fill_not_begun", path=display(path), reason=error.strerror)
                return None
            fill = Fill(identity, path, model, own_fd, Priority.READER, self._change)
            self._active[identity.inode] = fill
            self._change.notify_all()
            return fill

    def want(self, wanted: Wanted) -> bool:
        """Queue a file; False if it is on its way already or the queue is full. It keeps the more urgent place."""
        with self._change:
            if any(fill.path == wanted.path for fill in self._active.values()):
                return False
            for priority, queue in self._queues.items():
                if wanted.path in queue:
                    if priority <= wanted.priority:
                        return False
                    del queue[wanted.path]
            queue = self._queues[wanted.priority]
            if len(queue) >= QUEUE_MAX:
                self.dropped += 1
                return False
            queue[wanted.path] = wanted
            self._change.notify_all()
            return True

    def forget(self, model: bytes) -> None:
        """Fill nothing more of a model but what readers have open."""
        with self._change:
            for queue in self._queues.values():
                for path in [path for path, wanted in queue.items() if wanted.model == model]:
                    del queue[path]

    def find(self, inode: int) -> Fill | None:
        """The fill of a source inode that runs now."""
        return self._active.get(inode)

    def active(self) -> list[Fill]:
        """Fills that run now."""
        with self._change:
            return list(self._active.values())

    def busy_for_readers(self) -> bool:
        """True if files that readers have open are on their way."""
        return any(fill.priority is Priority.READER for fill in self.active())

    def queued(self) -> list[Wanted]:
        """Files that wait for their turn, and those that are being opened: asked before `active`, none is missed."""
        with self._change:
            return [*self._taking, *(wanted for queue in self._queues.values() for wanted in queue.values())]

    # --- workers ---

    def _work(self) -> None:
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        job: _Job | None = None
        while (job := self._next_job(job)) is not None:
            self._do(job, buffer)

    def _do(self, job: _Job, buffer: memoryview) -> None:
        """Whatever fails ends the fill that it met, never the worker: readers go on from the source."""
        fill = job.fill
        if fill is None:
            self._open_wanted()
            return
        try:
            if job.chunk is None:
                self._start(fill)
            else:
                self._fill_chunk(fill, job.chunk, buffer)
        except Refused as refusal:
            self._end(fill, Outcome.REFUSED, str(refusal))
        except Changed as change:
            self._end(fill, Outcome.CHANGED, str(change))
        except OSError as error:
            outcome = Outcome.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Outcome.FAILED
            self._end(fill, outcome, str(error.strerror))
        except Exception as error:
            log.exception("fill_worker_failed", path=display(fill.path))
            self._end(fill, Outcome.FAILED, f"a defect in tierd: {error}")
        finally:
            self._leave(fill)

    def _next_job(self, last: _Job | None) -> _Job | None:
        """What a worker that has just done `last` does next; None to stop."""
        with self._change:
            while not self._stopped:
                job = self._choose(time.monotonic(), last)
                if job is not None:
                    return job
                pause = self._not_before - time.monotonic() if self._bandwidth else None
                self._change.wait(pause if pause is not None and pause > 0 else None)
            return None

    def _choose(self, now: float, last: _Job | None = None) -> _Job | None:
        fills = sorted(self._active.values(), key=lambda fill: fill.priority)
        for fill in fills:
            if fill.draft is None and not fill.starting and not fill.over:
                fill.starting = True
                fill.in_work += 1
                return _Job(fill, None)
        ready = [fill for fill in fills if fill.draft is not None and not fill.over]
        for fill in ready:
            chunk = fill.take_demanded()
            if chunk is not None:
                return _Job(fill, chunk)
        if self._bandwidth and now < self._not_before:
            return None
        reading = any(fill.priority is Priority.READER for fill in ready)
        allowed = [fill for fill in ready if not (reading and fill.priority is Priority.PREFETCH)]
        if last is not None and last.fill in allowed and last.chunk is not None:
            chunk = last.fill.take_after(last.chunk)
            if chunk is not None:
                return self._charged(last.fill, chunk, now)
        for fill in allowed:
            chunk = fill.take_run()
            if chunk is not None:
                return self._charged(fill, chunk, now)
        return self._choose_wanted(fills, reading)

    def _charged(self, fill: Fill, chunk: int, now: float) -> _Job:
        self._charge(fill, now)
        return _Job(fill, chunk)

    def _charge(self, fill: Fill, now: float) -> None:
        if self._bandwidth:
            size = min(CHUNK_BYTES, fill.identity.size)
            self._not_before = max(now, self._not_before) + size / self._bandwidth

    def _choose_wanted(self, fills: list[Fill], reading: bool) -> _Job | None:
        waiting = self._queues[Priority.ASKED] or (self._queues[Priority.PREFETCH] and not reading)
        others = sum(1 for fill in fills if fill.priority is not Priority.READER)
        if not waiting or others + self._opening >= _FILES_AT_ONCE:
            return None
        self._opening += 1
        return _Job(None, None)

    def _open_wanted(self) -> None:
        """Take the next wanted file up, if it is still there and not on the node yet."""
        with self._change:
            queue = self._queues[Priority.ASKED] or self._queues[Priority.PREFETCH]
            wanted = queue.popitem(last=False)[1] if queue else None
            if wanted is not None:
                self._taking.add(wanted)
        try:
            if wanted is not None:
                self._take_up(wanted)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ESTALE):
                log.warning("fill_not_begun", path=display(wanted.path) if wanted else "", reason=error.strerror)
        except Exception:
            log.exception("fill_worker_failed", path=display(wanted.path) if wanted else "")
        finally:
            with self._change:
                self._opening -= 1
                if wanted is not None:
                    self._taking.discard(wanted)
                self._change.notify_all()

    def _take_up(self, wanted: Wanted) -> None:
        fd = self._open_source(wanted.path)
        try:
            identity = self._identify(fd)
        except OSError:
            os.close(fd)
            raise
        copy = self._store.find(identity.inode)
        with self._change:
            useless = self._stopped or (copy is not None and copy.identity == identity) or identity.size == 0
            if useless or identity.inode in self._active or self._cooling.get(identity.inode, 0.0) > time.monotonic():
                os.close(fd)
                return
            fill = Fill(identity, wanted.path, wanted.model, fd, wanted.priority, self._change)
            self._active[identity.inode] = fill

    def _start(self, fill: Fill) -> None:
        """Reserve space and make sure that no write can go unnoticed."""
        self._settle(fill)
        with self._reserving:
            self._make_room(fill.model, fill.identity.size, fill.priority)
            draft = self._store.begin(fill.identity, fill.path, fill.model)
        with self._change:
            over = fill.over
            if not over:
                fill.set_draft(draft)
            self._change.notify_all()
        if over:  # stopped meanwhile: whoever reads it has gone back to the source
            self._store.abandon(draft)
            draft.close()

    def _settle(self, fill: Fill) -> None:
        """A write in the same clock tick as the last one leaves the same timestamp: let the tick pass first."""
        age = time.time() - fill.identity.ctime_ns / 1e9
        if 0 <= age < _TICK_SECONDS:
            time.sleep(_TICK_SECONDS - age)
        if self._identify(fill.source_fd) != fill.identity:
            raise Changed("it changed before the fill began")

    def _fill_chunk(self, fill: Fill, chunk: int, buffer: memoryview) -> None:
        self._copy_chunk(fill, chunk, buffer)
        with self._change:
            freed = fill.landed(chunk)
            complete = fill.missing == 0 and not fill.over
            self._change.notify_all()
        for wait in freed:
            wait.resume()
        if complete:
            self._commit(fill)

    def _copy_chunk(self, fill: Fill, chunk: int, buffer: memoryview) -> None:
        with self._change:
            fd = fill.lend_fd(chunk)
        if fd is None:
            fd = os.open(f"/proc/self/fd/{fill.source_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._copy_by(fill, fd, chunk, buffer)
        finally:
            with self._change:
                fill.take_back_fd(fd, chunk + 1)

    def _copy_by(self, fill: Fill, fd: int, chunk: int, buffer: memoryview) -> None:
        draft = fill.draft
        assert draft is not None
        start = chunk * CHUNK_BYTES
        end = min(start + CHUNK_BYTES, fill.identity.size)
        digest = xxhash.xxh3_128()
        for offset in range(start, end, _BLOCK_BYTES):
            block = buffer[: min(_BLOCK_BYTES, end - offset)]
            _read_block(fd, block, offset)
            digest.update(block)
            draft.write(block, offset)
            if fill.over:
                return
        draft.seal_chunk(chunk, digest.digest())
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
        self.source_bytes += end - start

    def _commit(self, fill: Fill) -> None:
        """All bytes are there: from the disk's and the source's point of view too?"""
        draft = fill.draft
        assert draft is not None
        if self._identify(fill.source_fd) != fill.identity:
            raise Changed("it changed while it was read")
        self._end(fill, Outcome.COMPLETE, "", self._store.commit(draft))

    def _end(self, fill: Fill, outcome: Outcome, reason: str, copy: Copy | None = None) -> None:
        with self._change:
            if fill.over:
                return
            freed = fill.end(outcome)
            self._active.pop(fill.identity.inode, None)
            if outcome in (Outcome.NO_SPACE, Outcome.FAILED, Outcome.REFUSED):
                self._cool(fill.identity.inode)
            draft = fill.draft
            self._change.notify_all()
        if draft is not None and outcome is not Outcome.COMPLETE:
            self._store.abandon(draft)
        for wait in freed:
            wait.resume()
        self._finished(fill, copy, reason)

    def _cool(self, inode: int) -> None:
        self._cooling[inode] = time.monotonic() + _COOLING_SECONDS
        self._cooling.move_to_end(inode)
        if len(self._cooling) > _COOLING_MAX:
            self._cooling.popitem(last=False)

    def _leave(self, fill: Fill) -> None:
        with self._change:
            fill.in_work -= 1
            unused = fill.unused_fds()
            self._change.notify_all()
        _close_all(unused)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read_block(fd: int, block: memoryview, offset: int) -> None:
    """Fill `block` from `offset`. Raises Changed if the file ends before."""
    have = 0
    while have < len(block):
        got = os.preadv(fd, [block[have:]], offset + have)
        if got == 0:
            raise Changed("it became shorter while it was read")
        have += got
