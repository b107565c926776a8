"""Composition root of the node daemon: builds the parts, starts them in order, stops them in the reverse."""

from __future__ import annotations

import gc
import os
import platform
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio
from prometheus_client import CollectorRegistry

from tierd import __version__
from tierd.config import MountSettings
from tierd.errors import DaemonError, TierdError, UsageError
from tierd.metrics import Metrics
from tierd.node import admin, fuse, preflight
from tierd.node.caller import keep_capabilities
from tierd.node.catalog import walk
from tierd.node.index import Index, ModelRow, OpenRow
from tierd.node.journal import Journal
from tierd.node.overlay import Overlay
from tierd.node.recorder import ModelDirs, Recorder
from tierd.node.seam import Seam, open_device
from tierd.node.sources import PosixSource
from tierd.runtime import MountRecord, remove_record, socket_path, write_record
from tierd.units import display

if TYPE_CHECKING:
    from starlette.requests import Request

log = structlog.get_logger(__name__)

_PASSTHROUGH_KERNEL = (6, 9)
_MOUNT_SECONDS = 30.0
_STOP_SECONDS = 10.0
_RESTART_SECONDS = 5.0
_NICENESS = -10


class Daemon:
    """One mount and everything that serves it.

    Start order: locks, port, index, overlay, mount, requests, recorder, admin, ready. Stop order: admin,
    mount, requests in work, recorder, index, locks. `start_log` is called once nothing can be refused any
    longer, so that a refusal leaves no log behind; `ready` once the mount answers.
    """

    def __init__(self, settings: MountSettings, *, start_log: Callable[[], None], ready: Callable[[], None]) -> None:
        self.settings = preflight.check_paths(settings)
        assert self.settings.state_dir is not None
        self.state_dir = self.settings.state_dir
        self._start_log = start_log
        self._ready = ready
        self._started = time.time()
        self._stop = trio.Event()
        self._requests_done = trio.Event()
        self._slow = trio.CapacityLimiter(2)
        self._want_passthrough = settings.passthrough != "off" and os.geteuid() == 0
        self._allow_other = os.geteuid() == 0 if settings.allow_other is None else settings.allow_other

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or an unmount. Raises UsageError before anything was mounted."""
        preflight.check_fuse(allow_other=self._allow_other)
        with ExitStack() as stack:
            self._listener = stack.enter_context(preflight.listen(self.settings.metrics))
            stack.enter_context(preflight.exclusive(self.state_dir, self.settings.mountpoint))
            self._start_log()
            preflight.warn_if_hiding(self.settings.mountpoint)
            host, port = self._listener.getsockname()[:2]
            self._metrics_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._build(stack)
            if os.geteuid() == 0:
                keep_capabilities()
            raise_priority()
            calm_garbage_collector()
            os.umask(0)
            preflight.raise_descriptor_limit()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # what holds again once `_watch_signals` has ended
            try:
                trio.run(self._serve)
            except BaseExceptionGroup as group:
                cause = root_cause(group)
                if not isinstance(cause, TierdError):
                    log.exception("daemon_failed")
                raise cause from group
        log.info("stopped", mountpoint=str(self.settings.mountpoint))

    def _build(self, stack: ExitStack) -> None:
        settings = self.settings
        self.metrics = Metrics(CollectorRegistry(), models_max=settings.metrics_models, operations=fuse.OPERATIONS)
        self.source = PosixSource(settings.source)
        stack.callback(self.source.close)
        self.index = Index(
            self.state_dir / "index.db",
            history_rows=settings.history_rows,
            max_files=settings.max_files_known,
        )
        stack.callback(self.index.close)
        self.journal = Journal(settings.journal_capacity)
        self.recorder = Recorder(
            self.journal,
            self.index,
            self.metrics,
            models_roots=settings.models_roots_bytes,
            is_model_dir=ModelDirs(self.source.root_fd),
            load_idle_gap_s=settings.load_idle_gap,
        )
        self._admin = stack.enter_context(admin.unix_listener(socket_path(settings.mountpoint)))
        stack.callback(remove_record, settings.mountpoint)

    async def _serve(self) -> None:
        """Everything between mount and unmount."""
        settings = self.settings
        token = trio.lowlevel.current_trio_token()
        device = open_device(settings.mountpoint, allow_other=self._allow_other)
        self.seam = Seam(device, ended=lambda: token.run_sync_soon(self._unmounted), passthrough=self._want_passthrough)
        try:
            self._connect()
            try:
                await self._serve_mount()
            finally:
                self.seam.close(settings.mountpoint)
                fuse.detach()
        finally:
            self.seam.close(settings.mountpoint)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _STOP_SECONDS):
                await self.recorder.flush()

    def _connect(self) -> None:
        """Build what stands between the seam and the source."""
        self.overlay = Overlay(
            self.source,
            self.journal,
            self.seam,
            event_dropped=self.metrics.event_dropped,
        )
        operations = fuse.FuseOperations(
            self.overlay,
            self.metrics,
            congested=self.seam.congested,
            attr_timeout_s=self.settings.attr_timeout,
            entry_timeout_s=self.settings.entry_timeout,
        )
        self._watch_depths()
        fuse.attach(operations, self.seam)

    async def _serve_mount(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            nursery.start_soon(self._answer_requests)
            await self._await_mount()
            self._check_passthrough()
            tune_mount(self.settings.mountpoint, self.settings.read_ahead_kib)
            nursery.start_soon(keep_running, "recorder", self.recorder.run)
            self._start_admin(nursery)
            write_record(self._record())
            log.info("mounted", **self._record_for_log())
            self._ready()
            await self._stop.wait()
            nursery.cancel_scope.deadline = trio.current_time() + _STOP_SECONDS
            fuse.stop()
            await self._requests_done.wait()
            nursery.cancel_scope.cancel()

    def _start_admin(self, nursery: trio.Nursery) -> None:
        apps = (
            (admin.admin_app(self.status, self._models, self._opens), self._admin),
            (admin.metrics_app(self.metrics, self.settings.mountpoint), self._listener),
        )
        for app, listener in apps:
            nursery.start_soon(keep_running, "admin", admin.serve, app, listener, self._stop.wait)

    async def _watch_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("stopping", signal=signal.Signals(number).name)
                self._stop.set()

    async def _answer_requests(self) -> None:
        try:
            self.seam.start()
            await fuse.serve()
        finally:
            self._requests_done.set()

    def _unmounted(self) -> None:
        if not self._stop.is_set():
            log.info("unmounted_by_somebody", mountpoint=str(self.settings.mountpoint))
            self._stop.set()

    async def _await_mount(self) -> None:
        if not await admin.mount_answers(self.settings.mountpoint, _MOUNT_SECONDS):
            raise DaemonError(
                f"the mount at {self.settings.mountpoint} does not answer", hint="does the source answer?"
            )

    def _check_passthrough(self) -> None:
        if self.settings.passthrough == "on" and not self.seam.passthrough_agreed:
            raise UsageError(f"--passthrough on: {self._data_path()[1]}", hint="use --passthrough auto")

    def _data_path(self) -> tuple[str, str]:
        """Who moves the bytes of files opened for reading, and why."""
        if self.seam.passthrough_agreed:
            return "passthrough", "the kernel reads files by itself"
        if self.settings.passthrough == "off":
            return "daemon", "passthrough is switched off"
        if os.geteuid() != 0:
            return "daemon", "passthrough needs root"
        return "daemon", f"the kernel offers no passthrough (Linux 6.9 does, this is {platform.release()})"

    # --- what it tells ---

    def _watch_depths(self) -> None:
        for what, depth in self._depths().items():
            self.metrics.watch_depth(what, depth)

    def _depths(self) -> dict[str, Callable[[], float]]:
        overlay = self.overlay
        return {
            "journal": lambda: len(self.journal),
            "inodes": lambda: len(overlay.inodes),
            "open_files": lambda: len(overlay.files),
            "open_directories": lambda: len(overlay.listings),
            "directory_descriptors": lambda: len(overlay.dirs),
            "metadata_threads": lambda: overlay.metadata_limit.borrowed_tokens,
            "data_threads": lambda: overlay.data_limit.borrowed_tokens,
            "waiting_metadata": lambda: overlay.metadata_limit.statistics().tasks_waiting,
            "waiting_data": lambda: overlay.data_limit.statistics().tasks_waiting,
            "waiting_reads": self.seam.queued_reads,
            "backings": lambda: len(self.seam.backings),
        }

    @property
    def metrics_address(self) -> str:
        """`HOST:PORT` that metrics are served on."""
        return self._metrics_address

    def _record(self) -> MountRecord:
        return MountRecord(
            mountpoint=str(self.settings.mountpoint),
            source=str(self.settings.source),
            state_dir=str(self.state_dir),
            pid=os.getpid(),
            metrics_address=self._metrics_address,
        )

    def _record_for_log(self) -> dict[str, Any]:
        return {**asdict(self._record()), "data_path": self._data_path()[0], "version": __version__}

    def status(self) -> dict[str, Any]:
        """What `tierd status --json` prints; its keys are documented in docs/OPERATIONS.md and stay."""
        record = self._record()
        return {
            "mountpoint": record.mountpoint,
            "source": record.source,
            "state_dir": record.state_dir,
            "daemon_pid": record.pid,
            "started_at": iso_time(int(self._started * 1e9)),
            "uptime_seconds": round(time.time() - self._started, 3),
            "metrics_address": record.metrics_address,
            "models_roots": list(self.settings.models_root),
            "outputs_root": self.settings.outputs_root,
            "data_path": self._data_path()[0],
            "data_path_reason": self._data_path()[1],
            "kernel": platform.release(),
            "passthrough": passthrough_ability(enabled=bool(self.seam.passthrough_agreed)),
            "counters": {
                **self.metrics.totals(),
                "nodes_retired": self.overlay.retired,
                "backings_refused": self.seam.backings.refused,
            },
            "queues": {what: int(depth()) for what, depth in self._depths().items()},
            "versions": {
                "tierd": __version__,
                "python": platform.python_version(),
                "trio": trio.__version__,
                **fuse.versions(),
            },
        }

    async def _models(self, _: Request) -> list[Any]:
        roots = self.settings.models_roots_bytes
        catalog = await trio.to_thread.run_sync(walk, self.settings.source, roots, limiter=self._slow)
        await self.recorder.flush()
        rows = {row.model: row for row in await trio.to_thread.run_sync(self.index.models)}
        names = sorted(catalog.size_bytes.keys() | rows.keys())
        return [model_json(name, catalog.size_bytes.get(name), rows.get(name)) for name in names]

    async def _opens(self, request: Request) -> list[Any]:
        await self.recorder.flush()
        model = admin.query(request, "model")
        name = model.encode("utf-8", "surrogateescape") if model else None
        rows = await trio.to_thread.run_sync(self.index.opens, admin.opens_limit(request), name)
        return [open_json(row) for row in rows]


def root_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error that says something to a person, else the first of all."""
    known, others = group.split(TierdError)
    leaf: BaseException = known or others or group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf


async def keep_running(name: str, function: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run a background task; a defect in it is logged and never ends the mount. Restarted after a while."""
    while True:
        try:
            await function(*args)
        except Exception:
            log.exception("background_task_failed", task=name, restart_in_seconds=_RESTART_SECONDS)
            await trio.sleep(_RESTART_SECONDS)
        else:
            return


def raise_priority() -> None:
    """Answer before the processes that wait for the answer: on a busy node each hop between threads waits for a CPU."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    except PermissionError:
        log.debug("priority_unchanged", reason="needs root or CAP_SYS_NICE")


def calm_garbage_collector() -> None:
    """Collect rarely: a full pass over 100,000 nodes takes as long as a hundred requests, and finds nothing.

    Nodes and handles hold no cycles but (handle, node), which release takes apart.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def tune_mount(mountpoint: Path, read_ahead_kib: int) -> None:
    """Give the mount a larger read-ahead: the default of 128 KiB costs a request to the daemon per 128 KiB."""
    found = preflight.mount_at(mountpoint)
    knob = Path(f"/sys/class/bdi/{found.device}/read_ahead_kb") if found else None
    try:
        if knob is not None:
            knob.write_text(str(read_ahead_kib), encoding="ascii")
    except OSError as error:
        log.warning("read_ahead_not_set", knob=str(knob), reason=error.strerror, cost="slower sequential reads")


def passthrough_ability(*, enabled: bool) -> dict[str, Any]:
    """Whether this kernel and process could use FUSE passthrough (Linux 6.9, CAP_SYS_ADMIN)."""
    release = platform.release().split("-")[0].split(".")
    kernel = tuple(int(part) for part in release[:2] if part.isdigit()) >= _PASSTHROUGH_KERNEL
    return {"kernel": kernel, "privileged": os.geteuid() == 0, "enabled": enabled}


def iso_time(at_ns: int) -> str:
    """Nanoseconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def model_json(name: bytes, size: int | None, row: ModelRow | None) -> dict[str, Any]:
    """One model as `tierd models --json` prints it; `size_bytes` is None for a model that left the source."""
    return {
        "model": display(name),
        "size_bytes": size,
        "opens": row.opens if row else 0,
        "loads": row.loads if row else 0,
        "hits": row.hits if row else 0,
        "bytes_read": row.bytes_read if row else 0,
        "first_access": iso_time(row.first_access_ns) if row else None,
        "last_access": iso_time(row.last_access_ns) if row else None,
    }


def open_json(row: OpenRow) -> dict[str, Any]:
    """One open as `tierd opens --json` prints it."""
    return {
        "at": iso_time(row.at_ns),
        "path": display(row.path),
        "model": display(row.model) if row.model is not None else None,
        "uid": row.uid,
        "pod": row.pod,
    }
