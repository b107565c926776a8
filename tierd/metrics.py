"""Every metric of tierd, on one registry that is passed in. Labels come from fixed sets; models within a limit.

Reference: https://prometheus.io/docs/practices/naming/ (base units, `_total`, no unbounded labels).
"""

from __future__ import annotations

import errno as _errno
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

OTHER = "other"
_ERRNO_NAMES = (
    "ENOENT", "EEXIST", "ENOTEMPTY", "EISDIR", "ENOTDIR", "EACCES", "EPERM", "EIO", "ENOSPC", "EDQUOT", "EROFS",
    "ESTALE", "EINVAL", "ENODATA", "ENOSYS", "EOPNOTSUPP", "ENAMETOOLONG", "EXDEV", "EBUSY", "EMFILE", "ENFILE",
    "ELOOP", "EMLINK", "EFBIG", "EINTR", "ETIMEDOUT", "ENXIO", "ERANGE", "E2BIG", "EBADF",
)  # fmt: skip
ERRNO_LABELS = {getattr(_errno, name): name for name in _ERRNO_NAMES}
"""errno values that get a series of their own, by number; all others count as `other`."""

DATA_SOURCES = ("node_tier", "fill", "source", "objects")
"""Whence a reader's bytes come: a whole copy, a file on its way to the node, the source itself, the object
of a cold file."""
_LATENCY_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
)  # fmt: skip

RECALL_BOUNDS = ("at_once", "bytes")
"""Models that one user brings at a time, and bytes an hour."""


class Metrics:
    """What a node daemon counts. Safe to call from any thread; no method waits or raises."""

    def __init__(self, registry: CollectorRegistry, *, models_max: int = 50, operations: Iterable[str] = ()) -> None:
        self.registry = registry
        self._models_max = models_max
        self._models: dict[bytes, str] = {}
        ProcessCollector(registry=registry)
        self._opens = Counter("tierd_opens", "Files opened for reading.", ["model"], registry=registry)
        self._loads = Counter("tierd_loads", "Loads begun: runs of opens of one model.", ["model"], registry=registry)
        self._node_tier_opens = Counter(
            "tierd_node_tier_opens", "Opens of models' files: a hit reads from the node tier alone.", ["result"],
            registry=registry,
        )  # fmt: skip
        self._from_node = {True: self._node_tier_opens.labels("hit"), False: self._node_tier_opens.labels("miss")}
        self._read_bytes = Counter(
            "tierd_read_bytes",
            "Bytes that the daemon itself served, counted at close.",
            ["model"],
            registry=registry,
        )
        self._path_opens = Counter(
            "tierd_path_opens", "Files opened for reading and closed again, by whence and by whom their bytes came.",
            ["source", "mover"], registry=registry,
        )  # fmt: skip
        self._path_bytes = Counter(
            "tierd_path_bytes", "Bytes that the daemon moved, by whence; what the kernel moves is not observable.",
            ["source"], registry=registry,
        )  # fmt: skip
        self._opens_of_path = {
            (source, by_kernel): self._path_opens.labels(source, "kernel" if by_kernel else "daemon")
            for source in DATA_SOURCES
            for by_kernel in (True, False)
        }
        self._bytes_of_path = {source: self._path_bytes.labels(source) for source in DATA_SOURCES}
        self.written_bytes = Counter("tierd_written_bytes", "Bytes written to the source.", registry=registry)
        self._errors = Counter(
            "tierd_request_errors", "Requests answered with an error, by errno.", ["errno"], registry=registry
        )
        for name in (*ERRNO_LABELS.values(), OTHER):
            self._errors.labels(name)
        self.handler_failures = Counter(
            "tierd_handler_failures", "Requests answered EIO because of a defect in tierd; see the log.",
            registry=registry,
        )  # fmt: skip
        self._latency = Histogram(
            "tierd_request_seconds", "Time from a request's arrival to its answer.", ["operation"],
            buckets=_LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self.latency = {name: self._latency.labels(name) for name in operations}
        self._dropped = Counter(
            "tierd_dropped",
            "Bookkeeping that did not fit: journal events, index rows.",
            ["what"],
            registry=registry,
        )
        self._dropped_journal = self._dropped.labels("journal_event")
        self._dropped_index = self._dropped.labels("index_write")
        self._dropped_rows = self._dropped.labels("index_row")
        bounded = Counter(
            "tierd_recalls_bounded", "Recalls beyond a user's bounds, by which.", ["bound"], registry=registry
        )
        self._recalls_bounded = {bound: bounded.labels(bound) for bound in RECALL_BOUNDS}
        self._depth = Gauge("tierd_depth", "How much is queued or held now.", ["what"], registry=registry)
        for counter in (self._opens, self._loads, self._read_bytes):
            counter.labels(OTHER)

    def watch_depth(self, what: str, depth: Callable[[], float]) -> None:
        """Export `depth()` at each scrape."""
        self._depth.labels(what).set_function(depth)

    def recall_bounded(self, bound: str) -> None:
        """A user is beyond one of RECALL_BOUNDS."""
        self._recalls_bounded[bound].inc()

    def error(self, number: int) -> None:
        """A request was answered with errno `number`."""
        self._errors.labels(ERRNO_LABELS.get(number, OTHER)).inc()

    def opened(self, model: bytes | None, *, load_begins: bool, from_node: bool = False) -> None:
        """A file was opened for reading; `from_node`: all its bytes come from the node tier."""
        label = self._count_model(model)
        self._opens.labels(label).inc()
        if model is not None:
            self._from_node[from_node].inc()
        if load_begins:
            self._loads.labels(label).inc()

    def closed(self, model: bytes | None, bytes_read: int) -> None:
        """A file was closed."""
        self._read_bytes.labels(self._count_model(model)).inc(bytes_read)

    def read_ended(self, source: str, by_kernel: bool, bytes_read: int) -> None:
        """A file opened for reading was closed: one of DATA_SOURCES, who moved its bytes, how many the daemon moved."""
        self._opens_of_path[source, by_kernel].inc()
        self._bytes_of_path[source].inc(bytes_read)

    def event_dropped(self) -> None:
        """The journal was full."""
        self._dropped_journal.inc()

    def events_lost(self, count: int) -> None:
        """The index could not be written."""
        self._dropped_index.inc(count)

    def index_rows_pruned(self, count: int) -> None:
        """Old rows made room."""
        if count:
            self._dropped_rows.inc(count)

    def totals(self) -> dict[str, int]:
        """The counters that `tierd status` shows, summed over their labels."""
        counters = {
            "opens": self._opens, "loads": self._loads, "read_bytes": self._read_bytes,
            "written_bytes": self.written_bytes, "request_errors": self._errors,
            "handler_failures": self.handler_failures, "dropped": self._dropped,
        }  # fmt: skip
        return {name: int(_sum(counter)) for name, counter in counters.items()}

    def _count_model(self, model: bytes | None) -> str:
        """The label of a model: its own for the first `models_max` models, `other` for the rest and for no model."""
        if model is None:
            return OTHER
        label = self._models.get(model)
        if label is not None:
            return label
        if len(self._models) >= self._models_max:
            return OTHER
        label = self._models[model] = model.decode("utf-8", "backslashreplace")
        return label


class TierMetrics:
    """What the node tier counts. Bytes that the kernel moves by itself are not observable: opens by path are."""

    _OUTCOMES = ("complete", "changed", "no_space", "refused", "failed")
    _REASONS = ("room", "watermark", "asked", "stale", "damaged")
    _FILL_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0)

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._fills = Counter("tierd_fills", "Fills ended, by outcome.", ["outcome"], registry=registry)
        self._fill_seconds = Histogram(
            "tierd_fill_seconds", "Time from the first wish for a file to its verified copy.",
            buckets=self._FILL_BUCKETS, registry=registry,
        )  # fmt: skip
        self._filled_bytes = Counter("tierd_filled_bytes", "Bytes that became copies.", registry=registry)
        self._evictions = Counter("tierd_evictions", "Copies removed, by reason.", ["reason"], registry=registry)
        self._evicted_bytes = Counter("tierd_evicted_bytes", "Bytes removed, by reason.", ["reason"], registry=registry)
        self._stale = Counter(
            "tierd_stale_serves", "Opens served by a copy because the source did not answer.", registry=registry
        )
        self._refused = Counter("tierd_fills_refused", "Files that were not wanted on the node.", registry=registry)
        for outcome in self._OUTCOMES:
            self._fills.labels(outcome)
        for reason in self._REASONS:
            self._evictions.labels(reason)
            self._evicted_bytes.labels(reason)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Export `value()` at each scrape."""
        Gauge(f"tierd_{name}", text, registry=self.registry).set_function(value)

    def fill_ended(self, outcome: str, seconds: float, size: int) -> None:
        """A fill ended; `size` bytes became a copy."""
        self._fills.labels(outcome).inc()
        if outcome == "complete":
            self._fill_seconds.observe(seconds)
            self._filled_bytes.inc(size)

    def evicted(self, reason: str, size: int) -> None:
        """A copy was removed."""
        self._evictions.labels(reason).inc()
        self._evicted_bytes.labels(reason).inc(size)

    def stale_served(self) -> None:
        """A copy was served though the source did not answer."""
        self._stale.inc()

    def refused(self) -> None:
        """A file was not wanted on the node."""
        self._refused.inc()

    def totals(self) -> dict[str, int]:
        """The counters that `tierd status` shows."""
        counters = {
            "fills": self._fills, "filled_bytes": self._filled_bytes, "evictions": self._evictions,
            "evicted_bytes": self._evicted_bytes, "stale_serves": self._stale, "fills_refused": self._refused,
        }  # fmt: skip
        return {name: int(_sum(counter)) for name, counter in counters.items()}


class PublishMetrics:
    """What a node daemon counts of telling the controller."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        rounds = Counter("tierd_publish_rounds", "Rounds of telling the controller.", ["result"], registry=registry)
        self._ok, self._failed = rounds.labels("ok"), rounds.labels("failed")
        self._last_success = Gauge(
            "tierd_publish_last_success_timestamp_seconds", "When a round succeeded last, 0 if none did.",
            registry=registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Export `value()` at each scrape."""
        Gauge(f"tierd_{name}", text, registry=self.registry).set_function(value)

    def failed(self) -> None:
        """Redis or the index could not be used."""
        self._failed.inc()

    def succeeded(self, at_s: float) -> None:
        """A round succeeded at `at_s` seconds since the epoch."""
        self._ok.inc()
        self._last_success.set(at_s)


class FoldMetrics:
    """What the controller counts of folding statistics into the database."""

    RESULTS = ("applied", "duplicate", "gap", "report", "bad")
    _FOLD_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)

    def __init__(self, registry: CollectorRegistry) -> None:
        self._messages = Counter(
            "tierd_statistics_messages", "Messages of nodes, by what became of them.", ["result"], registry=registry
        )
        for result in self.RESULTS:
            self._messages.labels(result)
        self._seconds = Histogram(
            "tierd_statistics_fold_seconds", "Time that one fold takes, from the stream to the acknowledgement.",
            buckets=self._FOLD_BUCKETS, registry=registry,
        )  # fmt: skip
        self._failed = Counter(
            "tierd_statistics_folds_failed", "Folds that failed, to be tried again.", registry=registry
        )
        self._waiting = Gauge("tierd_statistics_waiting", "Messages in the stream at the last fold.", registry=registry)
        self._contested = Gauge(
            "tierd_statistics_contested_nodes",
            "Names that two daemons used at once in the last fold.",
            registry=registry,
        )

    def folded(self, results: Mapping[str, int], *, seconds: float, waiting: int, contested: int) -> None:
        """A fold was committed and acknowledged: how many messages had which of RESULTS."""
        for result, count in results.items():
            self._messages.labels(result).inc(count)
        self._seconds.observe(seconds)
        self._waiting.set(waiting)
        self._contested.set(contested)

    def failed(self) -> None:
        """A fold failed."""
        self._failed.inc()


class ControllerMetrics:
    """What the controller counts of itself and its jobs; how the tiers stand, as it saw them last."""

    ENDINGS = ("done", "failed", "refused", "interrupted")
    TIERS = ("hot", "cold")
    WISHES = ("planned", "refused", "ignored", "old", "bad")
    _JOB_BUCKETS = (1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 28_800.0)

    def __init__(self, registry: CollectorRegistry, jobs: Iterable[str] = ()) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        self._leading = Gauge("tierd_controller_leading", "1 if this process leads.", registry=registry)
        self._epoch = Gauge("tierd_controller_epoch", "Its epoch, 0 if it does not lead.", registry=registry)
        self._database = Gauge(
            "tierd_controller_database_reached", "1 if the database answered last.", registry=registry
        )
        self._runs = Counter("tierd_job_runs", "Runs of jobs, by how they ended.", ["job", "result"], registry=registry)
        self._seconds = Histogram(
            "tierd_job_seconds", "Time that a run takes.", ["job"], buckets=self._JOB_BUCKETS, registry=registry
        )
        self._success = Gauge(
            "tierd_job_last_success_timestamp_seconds", "When a run was done last, 0 if none was since the start.",
            ["job"], registry=registry,
        )  # fmt: skip
        for job in jobs:
            self._seconds.labels(job), self._success.labels(job)
            for ending in self.ENDINGS:
                self._runs.labels(job, ending)
        self._models = Gauge("tierd_models", "Models in the catalogue.", ["tier"], registry=registry)
        self._bytes = Gauge("tierd_models_bytes", "Their bytes.", ["tier"], registry=registry)
        for tier in self.TIERS:
            self._models.labels(tier), self._bytes.labels(tier)
        self._oldest = Gauge("tierd_moves_oldest_seconds", "Age of the oldest unfinished move.", registry=registry)
        self._failing = Gauge("tierd_moves_failing", "Unfinished moves whose last try failed.", registry=registry)
        self._unfinished = Gauge("tierd_moves_unfinished", "Moves that have not ended.", ["state"], registry=registry)
        self._wishes = Counter(
            "tierd_promote_wishes_heard", "Cold models that nodes load, by what came of it.", ["result"],
            registry=registry,
        )  # fmt: skip
        for result in self.WISHES:
            self._wishes.labels(result)
        self._silent = Gauge(
            "tierd_nodes_silent", "Registered nodes whose report of open models is too old to demote by.",
            registry=registry,
        )  # fmt: skip

    def promote_wishes_heard(self, results: Mapping[str, int]) -> None:
        """Nodes asked for cold models: how many came to which of WISHES."""
        for result, count in results.items():
            self._wishes.labels(result).inc(count)

    def standing(self, *, leading: bool, epoch: int, reached: bool) -> None:
        """What this process is at."""
        self._leading.set(leading)
        self._epoch.set(epoch)
        self._database.set(reached)

    def job_ended(self, job: str, result: str, seconds: float) -> None:
        """A run ended, one of ENDINGS."""
        self._runs.labels(job, result).inc()
        self._seconds.labels(job).observe(seconds)
        if result == "done":
            self._success.labels(job).set(time.time())

    def late(self, oldest_s: float, failing: int) -> None:
        """How long the oldest unfinished move has been under way, and how many wait or fail."""
        self._oldest.set(oldest_s)
        self._failing.set(failing)

    def stand(self, tiers: Mapping[str, tuple[int, int]], moves: Mapping[str, int], silent_nodes: int) -> None:
        """Models and bytes by tier, moves by state, and nodes that are silent, as they are now."""
        for tier in self.TIERS:
            models, size = tiers.get(tier, (0, 0))
            self._models.labels(tier).set(models)
            self._bytes.labels(tier).set(size)
        self._unfinished.clear()
        for state, count in moves.items():
            self._unfinished.labels(state).set(count)
        self._silent.set(silent_nodes)


class ContextMetrics:
    """What applications and the controller count of chat contexts. Without a registry nobody sees it."""

    TIERS = ("redis", "warm", "archive", "none")
    OPERATIONS = ("get", "list", "save", "append", "delete", "delete_user")
    MOVES = ("archived", "superseded", "promoted", "purged", "restored")
    _BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._reads = Counter(
            "tierd_context_reads", "Conversations read, by the tier that had them.", ["tier"], registry=registry
        )
        self._read_seconds = Histogram(
            "tierd_context_read_seconds", "Time that a `get` takes, by the tier that had it.", ["tier"],
            buckets=self._BUCKETS, registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "tierd_context_seconds", "Time that a call of the library takes.", ["operation"],
            buckets=self._BUCKETS, registry=registry,
        )  # fmt: skip
        self._conflicts = Counter("tierd_context_conflicts", "Writes of stale versions, refused.", registry=registry)
        self._cache_failures = Counter(
            "tierd_context_cache_failures", "Calls that Redis was to help with and did not.", registry=registry
        )
        self._moves = Counter(
            "tierd_context_moves", "Conversations that went from one tier to another.", ["move"], registry=registry
        )
        self._oldest = Gauge(
            "tierd_context_oldest_seconds", "Age of the oldest conversation, by tier.", ["tier"], registry=registry
        )
        self._rows = Gauge("tierd_context_rows", "Conversations, by tier.", ["tier"], registry=registry)
        self._readers = {tier: (self._reads.labels(tier), self._read_seconds.labels(tier)) for tier in self.TIERS}
        for move in self.MOVES:
            self._moves.labels(move)
        self._timers = {name: self._seconds.labels(name) for name in self.OPERATIONS}

    def timed(self, operation: str) -> AbstractContextManager[object]:
        """Around a call: one of OPERATIONS."""
        return self._timers[operation].time()

    def read(self, tier: str, seconds: float) -> None:
        """A conversation was found in one of TIERS, in that time."""
        count, times = self._readers[tier]
        count.inc()
        times.observe(seconds)

    def conflict(self) -> None:
        """A stale writer was refused."""
        self._conflicts.inc()

    def cache_failed(self) -> None:
        """Redis did not help."""
        self._cache_failures.inc()

    def moved(self, move: str, count: int) -> None:
        """Conversations took one of MOVES."""
        self._moves.labels(move).inc(count)

    def seen(self, tier: str, *, rows: int, oldest_s: float) -> None:
        """What somebody who looked found in a tier."""
        self._rows.labels(tier).set(rows)
        self._oldest.labels(tier).set(oldest_s)


def _sum(counter: Counter) -> float:
    return sum(
        sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total")
    )
