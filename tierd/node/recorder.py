"""Turns journal events into rows of the index: which model, which load, how many bytes.

Everything here runs in a worker thread, one batch at a time, so the read path never waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import structlog
import trio

from tierd.metrics import Metrics
from tierd.node.index import Batch, FileDelta, Index, ModelDelta, OpenRow, OutputDelta
from tierd.node.journal import Changed, Closed, Event, Journal, Opened
from tierd.node.sources import PosixSource
from tierd.outputs import Output, below, parse
from tierd.policy import LoadGrouper
from tierd.units import looks_like_model, model_of, split

log = structlog.get_logger(__name__)

_BATCH_EVENTS_MAX = 10_000
_BATCH_SECONDS = 0.2
_EVIDENCE_SECONDS = 60.0
_EVIDENCE_DIRS_MAX = 10_000
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ModelDirs:
    """Remembers for a minute which directories hold weights, so that a batch lists each at most once. Any thread."""

    def __init__(self, source: PosixSource, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[float, bool]] = OrderedDict()

    def __call__(self, directory: bytes) -> bool:
        """True if weights or a marker file lie directly in `directory` (relative to the source)."""
        now = self._clock()
        known = self._known.get(directory)
        if known is not None and now - known[0] < _EVIDENCE_SECONDS:
            return known[1]
        answer = self._look(directory)
        with self._lock:
            self._known[directory] = (now, answer)
            self._known.move_to_end(directory)
            if len(self._known) > _EVIDENCE_DIRS_MAX:
                self._known.popitem(last=False)
        return answer

    def _look(self, directory: bytes) -> bool:
        try:
            with contextlib.closing(self._open(directory)) as opened:
                return looks_like_model(self._source.list_names(opened.fd))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                log.warning("model_dir_unreadable", directory=os.fsdecode(directory), reason=error.strerror)
            return False

    def _open(self, directory: bytes) -> _Descriptor:
        """One component at a time and never through a link, so that nothing outside of the source is looked at."""
        found = _Descriptor(os.open(".", _DIR_FLAGS, dir_fd=self._source.root_fd))
        for name in split(directory):
            with contextlib.closing(found):
                found = _Descriptor(os.open(name, _DIR_FLAGS, dir_fd=found.fd))
        return found


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


class Recorder:
    """See the module. `record` is what a worker thread does; `run` feeds it.

    `noted` is told, from that thread, which model was accessed, how many loads of it began and when it was last.
    Reads of files below `outputs_root` are counted for the controller; without one they are not.
    """

    def __init__(
        self,
        journal: Journal,
        index: Index,
        metrics: Metrics,
        *,
        models_roots: Sequence[bytes],
        is_model_dir: Callable[[bytes], bool],
        load_idle_gap_s: float,
        outputs_root: bytes | None = None,
        noted: Callable[[bytes, int, int], None] = lambda model, loads, at_ns: None,
    ) -> None:
        self._journal = journal
        self._index = index
        self._metrics = metrics
        self._roots = tuple(models_roots)
        self._outputs_root = outputs_root
        self._is_model_dir = is_model_dir
        self._noted = noted
        self._loads = LoadGrouper(load_idle_gap_s)
        self._model_of_open: dict[int, bytes | None] = {}
        self._one_at_a_time = trio.Lock()

    async def run(self) -> None:
        """Record until cancelled."""
        while True:
            await self._journal.wait()
            await trio.sleep(_BATCH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Record all that is queued now. Never raises for a failing index: what is lost is counted."""
        async with self._one_at_a_time:
            while events := self._journal.take(_BATCH_EVENTS_MAX):
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self.record, events)

    def record(self, events: Sequence[Event]) -> None:
        """Group a batch and write it."""
        batch = Batch()
        for event in events:
            self._add(batch, event)
        for model, delta in batch.models.items():
            self._noted(model, delta.loads, delta.last_access_ns)
        try:
            pruned = self._index.apply(batch)
        except sqlite3.Error as error:
            self._metrics.events_lost(len(events))
            log.error("index_write_failed", path=str(self._index.path), events=len(events), reason=str(error))
            return
        self._metrics.index_rows_pruned(pruned)

    def _add(self, batch: Batch, event: Event) -> None:
        if isinstance(event, Changed):
            entry_of_output = batch.outputs.setdefault(event.path, OutputDelta())
            entry_of_output.changed(event.at_ns, removed=event.removed, ended=event.ended)
            return
        if isinstance(event, Opened):
            self._add_output(batch, event)
        model = self._model(event)
        file = batch.files.setdefault(event.path, FileDelta(model))
        file.last_access_ns = max(file.last_access_ns, event.at_ns)
        entry = batch.models.setdefault(model, ModelDelta()) if model is not None else None
        if entry is not None:
            entry.first_access_ns = (
                event.at_ns if entry.first_access_ns is None else min(entry.first_access_ns, event.at_ns)
            )
            entry.last_access_ns = max(entry.last_access_ns, event.at_ns)
        if isinstance(event, Opened):
            self._add_open(batch, event, model, file, entry)
        else:
            self._add_close(event, model, file, entry)

    def _add_output(self, batch: Batch, event: Opened) -> None:
        path = below(event.path, self._outputs_root) if self._outputs_root is not None else None
        if path is not None and isinstance(parse(path), Output):
            batch.outputs.setdefault(path, OutputDelta()).opened(event.at_ns)

    def _model(self, event: Opened | Closed) -> bytes | None:
        """A close belongs to the model that its open was counted for, whatever the directory holds by now."""
        if isinstance(event, Closed) and event.fh in self._model_of_open:
            return self._model_of_open.pop(event.fh)
        model = model_of(event.path, self._roots, self._is_model_dir)
        if isinstance(event, Opened):
            self._model_of_open[event.fh] = model
        return model

    def _add_open(
        self, batch: Batch, event: Opened, model: bytes | None, file: FileDelta, entry: ModelDelta | None
    ) -> None:
        file.opens += 1
        batch.opens.append(OpenRow(event.at_ns, event.path, model, event.uid, event.pod))
        begins = False
        if model is not None and entry is not None:
            entry.opens += 1
            begins = self._loads.opened(model, event.at_ns)
            entry.loads += begins
            entry.hits += self._loads.served(model, from_node=event.from_node)
        self._metrics.opened(model, load_begins=begins, from_node=event.from_node)

    def _add_close(self, event: Closed, model: bytes | None, file: FileDelta, entry: ModelDelta | None) -> None:
        file.bytes_read += event.bytes_read
        if model is not None and entry is not None:
            entry.bytes_read += event.bytes_read
            self._loads.closed(model, event.at_ns)
        self._metrics.closed(model, event.bytes_read)
