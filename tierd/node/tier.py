"""The node tier: what comes in, what may be read from it, what leaves. Joins the store, the fills and the policy.

The read path asks `find`, `is_current` and `begin`; everything else happens in fill workers and chores, and a tier
that is full, broken or off means that files are read from the source.

Contract: any thread. `_room` is held from the judgement that there is room, or too little, until it is reserved or
made: no two count on the same bytes.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import structlog

from tierd.node.catalog import SourceFile
from tierd.node.chores import Chores
from tierd.node.cold_bytes import ColdBytes
from tierd.node.cold_source import ColdSource
from tierd.node.copies import CHUNK_BYTES, Copy, Draft, Identity, checksum
from tierd.node.fetch import fetch_chunk, fetch_cold_chunk
from tierd.node.fill import STREAMS_PER_FILE, Fill, Outcome
from tierd.node.filler import WORKERS, Filler, Refused, Stopped
from tierd.node.listings import Listings
from tierd.node.sources import version_of
from tierd.node.store import Store
from tierd.node.usage import Usage
from tierd.node.wanted import Priority, Wanted
from tierd.policy import Resident, Space, Watermarks, admit, next_victim, refusal, surplus_bytes
from tierd.stub_files import is_cold
from tierd.stubs import Origin
from tierd.syscalls import forced_stat
from tierd.units import display, holds_weights

log = structlog.get_logger(__name__)

_WEIGHTY_BYTES = 8 << 20
"""A file of this size is taken for weights whatever its name (a Hugging Face blob's is a hash)."""
_REASONS_MAX = 1000
_LISTING_SECONDS = 60.0
"""How old a listing may be that only tells how much there is to come."""


class TierMetrics(Protocol):
    """What the tier reports as it happens; see `metrics.py`."""

    def fill_ended(self, outcome: str, seconds: float, size: int) -> None:
        """A fill ended."""

    def evicted(self, reason: str, size: int) -> None:
        """Bytes left the node tier."""

    def stale_served(self) -> None:
        """A copy was served though the source did not answer."""

    def refused(self) -> None:
        """A file was not wanted in the node tier."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Sizes in bytes, times in seconds, ratios of the file system."""

    limit_bytes: int
    marks: Watermarks
    bandwidth: int = 0
    workers: int = WORKERS
    source_deadline_s: float = 2.0
    stale_if_unreachable: bool = True


class NodeTier:
    """See the module. `model_of(path)` names a file's model; `files_of(model)` lists its files. Both block."""

    def __init__(
        self,
        store: Store,
        source: ColdSource,
        usage: Usage,
        settings: TierSettings,
        metrics: TierMetrics,
        *,
        model_of: Callable[[bytes], bytes | None],
        files_of: Callable[[bytes], Sequence[SourceFile]],
        read_ahead: Callable[[Copy], None],
        space_needed: Callable[[], None],
        cold: ColdBytes | None = None,
    ) -> None:
        self.store = store
        self.source = source
        self.usage = usage
        self.leases = usage.leases
        self.settings = settings
        self.source_deadline_s = settings.source_deadline_s
        self._metrics = metrics
        self._cold = cold
        self.model_of = model_of
        self.listings = Listings(files_of)
        self.read_ahead = read_ahead
        self._space_needed = space_needed
        self._room = threading.Lock()
        self._stuck = False
        """The last eviction ended with nothing left to evict: said once, not every few seconds."""
        self._reasons: OrderedDict[bytes, str] = OrderedDict()
        self.chores = Chores("tier", threads=2)
        self.rechecks = Chores("recheck")
        """Apart from the others, which would wait for whole models that are read within the bandwidth."""
        self.filler = Filler(
            store,
            open_source=self._open_source,
            identify=self._identify,
            reserve=self._reserve,
            finished=self._finished,
            fetch=self._fetch,
            streams_of=lambda identity: settings.workers if self._origin_of(identity) else STREAMS_PER_FILE,
            bandwidth=settings.bandwidth,
            workers=settings.workers,
        )

    def start(self) -> None:
        """Start the workers."""
        self.filler.start()
        self.chores.start()
        self.rechecks.start()

    def stop(self) -> bool:
        """End the workers; fills that are not complete are lost. False if some still wait for the source."""
        all_ended = self.filler.stop()  # first: rechecks may wait for its bandwidth
        all_ended &= self.rechecks.stop()
        return self.chores.stop() and all_ended

    @property
    def dropped(self) -> int:
        """Chores that found no room: what they were about is seen to at the next open."""
        return self.chores.dropped + self.rechecks.dropped

    # --- the read path ---

    def find(self, key: object) -> Copy | None:
        """The copy of a source inode, of whatever version. Inodes beyond the source's own device have none."""
        return self.store.find(key) if isinstance(key, int) else None

    def is_current(self, copy: Copy, identity: Identity) -> bool:
        """True if the copy holds what the source holds."""
        return not copy.removed and copy.identity == identity

    def serve_stale(self, copy: Copy) -> bool:
        """Whether a copy is served though its source does not answer; counted if so."""
        if not self.settings.stale_if_unreachable or copy.removed:
            return False
        self._metrics.stale_served()
        return True

    def begin(self, identity: Identity, path: bytes, fd: int) -> tuple[bytes | None, Fill | None]:
        """A file was opened that has no current copy: its model, and the fill to be served from if there is one."""
        if identity.size == 0:
            return None, None
        model = self.model_of(path)
        if model is None:
            return None, None
        copy = self.store.find(identity.inode)
        if copy is not None and copy.identity == identity:
            return model, None
        if copy is not None and copy.identity.same_bytes_likely(identity):
            self._recheck_soon(copy, identity, path)
            return model, None
        if copy is not None:
            self._remove(copy, "stale")
        if self.filler.find(identity.inode) is None and not self._is_wanted(model, path, identity.size):
            return model, None
        fill = self.filler.begin(identity, path, model, fd)
        if fill is not None:
            self.chores.add(("siblings", model), lambda: self._want_siblings(model))
        return model, fill

    def begin_cold(self, path: bytes, origin: Origin) -> Fill | None:
        """Somebody loads a cold file: the fill to be served from, if it shall come to the node. Raises OSError."""
        fd = self._open_source(path)
        try:
            identity = self._identify(fd)
            if self._origin_of(identity) != origin:
                return None
            return self.begin(identity, path, fd)[1]
        finally:
            os.close(fd)

    def _origin_of(self, identity: Identity) -> Origin | None:
        """Whence the bytes of a cold file come."""
        origin = self._cold.origin_of(identity.inode) if self._cold is not None else None
        return origin if origin is not None and origin.size == identity.size else None

    def _fetch(self, fill: Fill, chunk: int, buffer: memoryview, lock: threading.Condition) -> int:
        """Copy a chunk into its draft, from the source or, as long as the file is cold, from its object."""
        origin = self._origin_of(fill.identity)
        if self._cold is None or origin is None or not is_cold(os.fstat(fill.source_fd)):
            return fetch_chunk(fill, chunk, buffer, lock)
        return fetch_cold_chunk(fill, chunk, buffer, origin, self._cold)

    def _is_wanted(self, model: bytes, path: bytes, size: int) -> bool:
        """Weights are, if there is room; a look at a `config.json` is no load, and it comes with the weights."""
        return (holds_weights(path) or size >= _WEIGHTY_BYTES) and self._admits(model, size)

    def moved(self, copy: Copy, path: bytes) -> None:
        """A copy was opened under another name than it is filed under."""
        self.chores.add(("relabel", copy.identity.inode), lambda: self._relabel(copy, path))

    # --- what is wanted ---

    def want_model(self, model: bytes, priority: Priority) -> int:
        """Walk a model, and queue what it lacks as `want_files` does; the bytes newly queued. Blocking."""
        return self.want_files(model, self.listings.walk(model), priority)

    def want_files(self, model: bytes, files: Sequence[SourceFile], priority: Priority) -> int:
        """Queue those files of a model that have no current copy, in load order; the bytes newly queued.

        Where only ctime differs, the copy is compared instead: a chmod of a tree must not fetch it anew.
        """
        queued = 0
        for path, identity in files:
            copy = self.store.find(identity.inode)
            if copy is not None and copy.identity.same_bytes_likely(identity):
                if copy.identity != identity:
                    self._recheck_soon(copy, identity, path)
            elif self.filler.want(Wanted(path, model, priority)):
                queued += identity.size
        return queued

    def want_file(self, file: SourceFile, model: bytes) -> None:
        """Queue one file again."""
        self.filler.want(Wanted(file.path, model, Priority.ASKED))

    def has(self, file: SourceFile) -> bool:
        """True if a source file, by its attributes as listed, has a current copy."""
        copy = self.store.find(file.identity.inode)
        return copy is not None and copy.identity == file.identity

    def is_coming(self, model: bytes) -> bool:
        """True if any of a model's files is being filled, or waits for it."""
        filling = any(fill.model == model for fill in self.filler.active())
        return filling or any(wanted.model == model for wanted in self.filler.queued())

    def missing_bytes(self, model: bytes) -> int:
        """What a model lacks here, as listed not long ago. Raises OSError."""
        files = self.listings.recent(model, _LISTING_SECONDS)
        return sum(file.identity.size for file in files if not self.has(file))

    def reason(self, model: bytes) -> str:
        """Why the last file of a model did not come in; empty if it did."""
        return self._reasons.get(model, "")

    # --- space ---

    def space(self) -> Space:
        """The cache's file system now, and the tier's books. Raises OSError."""
        disk, store = psutil.disk_usage(self.store.place), self.store
        limit = self.settings.limit_bytes
        return Space(disk.used + disk.free, disk.free, store.held_bytes, store.reserved_bytes, limit)

    def residents(self) -> list[Resident]:
        """What the tier holds of each model."""
        return list(self._each_resident())

    def _each_resident(self) -> Iterator[Resident]:
        """The same one by one: where there is room, a miss looks at none of them."""
        for model, size in self.store.held_by_model().items():
            yield self._resident(model, size)

    def _resident(self, model: bytes, held: int) -> Resident:
        usage = self.usage
        leased, pinned = self.leases.holds(model), usage.pinned(model)
        return Resident(model, held, usage.last_access_ns(model), usage.heat(model), leased, pinned)

    def _admits(self, model: bytes, size: int) -> bool:
        heat = self.usage.heat(model) + 1
        try:
            refused = refusal(size, model, heat, self._each_resident(), self.space(), self.settings.marks)
        except OSError as error:
            refused = f"cache directory: {error.strerror}"
        if refused is not None:
            self._note_reason(model, refused)
            self._metrics.refused()
        return refused is None

    def _reserve(self, fill: Fill) -> Draft:
        """Room for a fill, after what is colder has left for it. Raises Refused, OSError."""
        with self._room:
            self._make_room(fill.model, fill.identity.size, fill.priority)
            return self.store.begin(fill.identity, fill.path, fill.model)

    def _make_room(self, model: bytes, size: int, priority: Priority) -> None:
        marks, heat = self.settings.marks, self.usage.heat(model) + (priority is not Priority.PREFETCH)
        if priority is Priority.PREFETCH:
            marks = Watermarks(max(0.0, marks.stop - 1e-6), marks.stop)
        if self.usage.pinned(model):
            heat = float("inf")
        admission = admit(size, model, heat, self._each_resident(), self.space(), marks)
        if admission.refused is not None:
            raise Refused(admission.refused)
        for victim in admission.victims:
            self.evict(victim.model, f"room for {display(model)}", "room")

    def evict(self, model: bytes, why: str, reason: str) -> int:
        """Remove all copies of a model that nobody has open; how many bytes. `reason` is the metric's label."""
        if self.leases.holds(model):
            return 0
        freed = sum(self._remove(copy, reason) for copy in self.store.copies_of(model))
        if freed:
            log.info("evicted", model=display(model), bytes=freed, why=why, heat=round(self.usage.heat(model), 3))
        return freed

    def evict_surplus(self) -> int:
        """Evict until the watermarks and the size limit hold, judging anew after each model; how many bytes left."""
        freed, evicting, stuck = 0, False, False
        while (surplus := surplus_bytes(self.space(), self.settings.marks, evicting=evicting)) > 0:
            with self._room:
                victim = next_victim(self.residents())
                got = self.evict(victim.model, f"{surplus} bytes too many", "watermark") if victim is not None else 0
            if got == 0:
                stuck = True
                if not self._stuck:
                    log.warning("nothing_to_evict", surplus_bytes=surplus, note="all that is left is open or pinned")
                break
            freed, evicting = freed + got, True
        self._stuck = stuck
        return freed

    def _remove(self, copy: Copy, reason: str) -> int:
        size = self.store.remove(copy)
        if size:
            self._metrics.evicted(reason, size)
        return size

    # --- what workers call back ---

    def _open_source(self, path: bytes) -> int:
        fd = self.source.open_path(path)
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode) or (is_cold(st) and not self._knows(path, st.st_ino)):
            os.close(fd)
            raise OSError(errno.ENOENT, "no regular file")
        return fd

    def _knows(self, path: bytes, inode: int) -> bool:
        """Whence the bytes of a cold file come is known, and can be had."""
        origin = self.source.origin_of(path, inode)
        if self._cold is None or origin is None:
            return False
        self._cold.know(inode, origin)
        return True

    def _identify(self, fd: int) -> Identity:
        st = forced_stat(fd)
        cold = self._cold.identify(st) if self._cold is not None else None
        return cold or Identity(st.st_ino, *version_of(st))

    def _finished(self, fill: Fill, copy: Copy | None, reason: str) -> None:
        assert fill.outcome is not None
        seconds = fill.age_s()
        self._metrics.fill_ended(fill.outcome.value, seconds, fill.identity.size if copy else 0)
        if copy is not None:
            self.usage.arrived(fill.model)
            self._reasons.pop(fill.model, None)
            self._remove_replaced(copy)
            log.info("filled", path=display(fill.path), bytes=fill.identity.size, seconds=round(seconds, 3))
            return
        self._note_reason(fill.model, reason)
        tell = log.info if fill.outcome in (Outcome.REFUSED, Outcome.DROPPED) else log.warning
        tell("fill_ended", path=display(fill.path), outcome=fill.outcome.value, reason=reason)
        if fill.outcome is Outcome.NO_SPACE:
            self._space_needed()

    def _remove_replaced(self, copy: Copy) -> None:
        """What is filed under this path and is another inode's was replaced by rename(2): nobody will ask for it."""
        for other in self.store.copies_of(copy.model):
            if other.path == copy.path and other is not copy:
                self._remove(other, "stale")

    def _note_reason(self, model: bytes, reason: str) -> None:
        self._reasons[model] = reason
        self._reasons.move_to_end(model)
        while len(self._reasons) > _REASONS_MAX:
            self._reasons.popitem(last=False)

    # --- chores ---

    def _want_siblings(self, model: bytes) -> None:
        self.want_model(model, Priority.ASKED)

    def _recheck_soon(self, copy: Copy, identity: Identity, path: bytes) -> None:
        self.rechecks.add(identity.inode, lambda: self._recheck(copy, identity, path))

    def _recheck(self, copy: Copy, identity: Identity, path: bytes) -> None:
        """Only ctime changed: a chmod, or a write that set mtime back. The checksums tell, and save a refill."""
        fd = self._open_source(path)
        try:
            if self._identify(fd) == identity and self._same_bytes(copy, fd) and self._identify(fd) == identity:
                self.store.relabel(copy, identity, copy.path, copy.model)
                log.info("copy_rechecked", path=display(path))
            else:
                self._remove(copy, "stale")
        except Stopped:
            return
        finally:
            os.close(fd)

    def _same_bytes(self, copy: Copy, fd: int) -> bool:
        for index, expected in enumerate(self.store.sums(copy)):
            self.filler.await_turn(min(CHUNK_BYTES, copy.identity.size))
            data = os.pread(fd, CHUNK_BYTES, index * CHUNK_BYTES)
            if checksum(memoryview(data)) != expected:
                return False
        return True

    def _relabel(self, copy: Copy, path: bytes) -> None:
        """A model was renamed: file its copies under the new name, unless the old one still leads to the file."""
        model = self.model_of(path)
        if model is None or copy.removed or self._leads_to(copy.path, copy.identity.inode):
            return
        self.store.relabel(copy, copy.identity, path, model)

    def _leads_to(self, path: bytes, inode: int) -> bool:
        try:
            fd = self.source.open_path(path, os.O_PATH)
        except OSError:
            return False
        try:
            return os.fstat(fd).st_ino == inode
        finally:
            os.close(fd)
