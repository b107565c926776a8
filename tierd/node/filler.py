"""Fills the node tier: a queue of wanted files, the workers that fetch them chunk by chunk, and how fast they may.

There is one fill per file, however many opened it (`fill.py`).
Workers fetch chunks of 4 MiB (`fetch.py`). Each is a stream: it follows a run of 64 MiB from start to end, because
network file systems read ahead for whoever reads in order, and are slowed down by whoever does not (eight workers that
took turns read JuiceFS at a quarter of the speed of two streams; docs/BENCHMARKS.md). When all chunks have landed and
the source is still the version that the fill began with, the draft becomes a copy. Whatever fails, readers go on from
the source itself.

Order of work: chunks that readers wait for, the rest of files that readers have open, files asked for by name
(siblings of an opened shard, `tierd warm`), prefetch; the last only while no reader's file is being filled.

Contract: threads; one lock guards all fills. Callbacks (`resume`, `finished`) are called without it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from tierd.bandwidth import Bandwidth
from tierd.errors import TierdError
from tierd.node.chores import join_all
from tierd.node.copies import CHUNK_BYTES, Copy, Draft, Identity
from tierd.node.fetch import Changed, fetch_chunk
from tierd.node.fill import STREAMS_PER_FILE, Fill, Outcome, close_all
from tierd.node.store import Store
from tierd.node.wanted import Priority, Wanted, WantedFiles
from tierd.units import display

log = structlog.get_logger(__name__)

WORKERS: Final = 4
_FILES_AT_ONCE: Final = 4
"""Files that are filled at once beyond those that readers have open."""
_COOLING_SECONDS: Final = 30.0
_COOLING_MAX: Final = 1000
_TICK_SECONDS: Final = 0.02
"""Coarsest timestamp of a file system, with a margin (a kernel tick is at most 10 ms)."""


class _Job(NamedTuple):
    """A chunk of a fill to fetch; without a chunk, a fill to start; without a fill, a wanted file to open."""

    fill: Fill | None
    chunk: int | None


Fetch = Callable[[Fill, int, memoryview, threading.Condition], int]


class Refused(Exception):
    """The node tier does not want the file; `str()` says why."""


class Stopped(Exception):
    """The filler was stopped."""


class Filler:
    """See the module.

    `open_source(path)` opens a source file; `identify(fd)` is its version past every cache. `reserve(fill)` finds room
    for a fill or raises Refused. `finished(fill, copy, reason)` is called from a worker after each fill.
    `fetch` copies a chunk into a draft (`fetch.py`), and `streams_of` says how many may do so in one file at once.
    `bandwidth` limits bytes per second read for others than waiting readers, 0 means no limit; `await_turn` is for who
    reads the source beside fills.
    """

    def __init__(
        self,
        store: Store,
        *,
        open_source: Callable[[bytes], int],
        identify: Callable[[int], Identity],
        reserve: Callable[[Fill], Draft],
        finished: Callable[[Fill, Copy | None, str], None],
        fetch: Fetch = fetch_chunk,
        streams_of: Callable[[Identity], int] = lambda identity: STREAMS_PER_FILE,
        bandwidth: int = 0,
        workers: int = WORKERS,
    ) -> None:
        self._store = store
        self._fetch = fetch
        self._streams_of = streams_of
        self._open_source = open_source
        self._identify = identify
        self._reserve = reserve
        self._finished = finished
        self._bandwidth = Bandwidth(bandwidth)
        self._change = threading.Condition()
        self._active: dict[int, Fill] = {}
        self._wanted = WantedFiles()
        self._opening = 0
        self._cooling: OrderedDict[int, float] = OrderedDict()
        self._stopped = False
        self.source_bytes = 0
        """Bytes read from the source."""
        self._threads = [threading.Thread(target=self._work, name=f"fill-{i}", daemon=True) for i in range(workers)]

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """Let the workers end after the block they are at; readers go on from the source. False if one did not."""
        with self._change:
            self._stopped = True
            fills = list(self._active.values())
            self._active.clear()
            freed = [wait for fill in fills for wait in fill.end(Outcome.FAILED)]
            self._wanted.clear()
            self._change.notify_all()
        for wait in freed:
            wait.resume()
        all_ended = join_all(self._threads)
        for fill in fills:
            if fill.draft is not None:
                self._store.abandon(fill.draft)
            self._close_unused(fill)
        return all_ended

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
            fill = Fill(identity, path, model, own_fd, Priority.READER, self._change, self._streams_of(identity))
            self._active[identity.inode] = fill
            self._change.notify_all()
            return fill

    def want(self, wanted: Wanted) -> bool:
        """Queue a file; False if it is on its way already or the queue is full. It keeps the more urgent place."""
        with self._change:
            if any(fill.path == wanted.path for fill in self._active.values()):
                return False
            if not self._wanted.add(wanted):
                return False
            self._change.notify_all()
            return True

    def forget(self, model: bytes) -> None:
        """Fill nothing more of a model but what readers have open."""
        with self._change:
            self._wanted.forget(model)
            unread = [f for f in self._active.values() if f.model == model and f.priority is not Priority.READER]
        for fill in unread:
            self._end(fill, Outcome.DROPPED, "its model was evicted")
            self._close_unused(fill)

    def unread(self, fill: Fill) -> None:
        """Whoever a fill was begun for is gone."""
        with self._change:
            if not fill.attached():
                fill.priority = max(fill.priority, Priority.ASKED)

    @property
    def dropped(self) -> int:
        """Files that were wanted but did not fit into the queue."""
        return self._wanted.dropped

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
            return self._wanted.all()

    def await_turn(self, size: int) -> None:
        """Return once others may read `size` bytes of the source: they share the bandwidth of fills. Raises Stopped."""
        with self._change:
            while not self._stopped:
                now = time.monotonic()
                pause_s = self._bandwidth.pause_s(now)
                if not pause_s:
                    self._bandwidth.charge(size, now)
                    return
                self._change.wait(pause_s)
            raise Stopped

    # --- workers ---

    def _work(self) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
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
        except TierdError as error:
            self._end(fill, Outcome.FAILED, str(error))
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
                now = time.monotonic()
                job = self._choose(now, last)
                if job is not None:
                    return job
                self._change.wait(self._bandwidth.pause_s(now) or None)
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
        if self._bandwidth.pause_s(now):
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
        self._bandwidth.charge(min(CHUNK_BYTES, fill.identity.size), now)
        return _Job(fill, chunk)

    def _choose_wanted(self, fills: list[Fill], reading: bool) -> _Job | None:
        others = sum(1 for fill in fills if fill.priority is not Priority.READER)
        if not self._wanted.waits(prefetch=not reading) or others + self._opening >= _FILES_AT_ONCE:
            return None
        self._opening += 1
        return _Job(None, None)

    def _open_wanted(self) -> None:
        """Take the next wanted file up, if it is still there and not on the node yet."""
        with self._change:
            wanted = self._wanted.take()
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
                    self._wanted.taken_up(wanted)
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
            streams = self._streams_of(identity)
            fill = Fill(identity, wanted.path, wanted.model, fd, wanted.priority, self._change, streams)
            self._active[identity.inode] = fill

    def _start(self, fill: Fill) -> None:
        """Reserve space and make sure that no write can go unnoticed."""
        self._settle(fill)
        draft = self._reserve(fill)
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
        size = self._fetch(fill, chunk, buffer, self._change)
        with self._change:
            self.source_bytes += size
            freed = fill.landed(chunk)
            complete = fill.missing == 0 and not fill.over
            self._change.notify_all()
        for wait in freed:
            wait.resume()
        if complete:
            self._commit(fill)

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
            self._change.notify_all()
        self._close_unused(fill)

    def _close_unused(self, fill: Fill) -> None:
        with self._change:
            unused = fill.unused_fds()
        close_all(unused)
