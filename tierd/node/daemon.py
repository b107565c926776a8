"""Composition root of the node daemon: builds the parts, starts them in order, stops them in the reverse."""

from __future__ import annotations

import gc
import os
import platform
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio
from prometheus_client import CollectorRegistry

from tierd import __version__
from tierd.config import MountSettings
from tierd.errors import DaemonError, TierdError, UsageError
from tierd.metrics import Metrics, TierMetrics
from tierd.node import admin, estate, fuse, preflight
from tierd.node.answers import answers, iso_time
from tierd.node.caller import keep_capabilities
from tierd.node.cold_setup import open_cold_bytes
from tierd.node.cold_source import ColdSource
from tierd.node.heir import Heir, inherit, intents_of
from tierd.node.hot import HotFiles
from tierd.node.index import Index
from tierd.node.journal import Journal
from tierd.node.keeping import Keeping
from tierd.node.ledger import Ledger
from tierd.node.once import Once
from tierd.node.overlay import Overlay
from tierd.node.packets import ADMIN_LISTENER, LEDGER, METRICS_LISTENER, SOURCE_ROOT, lives
from tierd.node.process import calm_garbage_collector, passthrough_ability, raise_priority, tune_mount
from tierd.node.recall_bounds import RecallBounds
from tierd.node.recorder import ModelDirs, Recorder
from tierd.node.seam import Inheritance, Seam
from tierd.node.sources import Root
from tierd.node.tier_setup import TierParts
from tierd.runtime import MountRecord, keeper_path, write_record

if TYPE_CHECKING:
    from tierd.node.publish import Publisher

log = structlog.get_logger(__name__)

_MOUNT_SECONDS = 30.0
_STOP_SECONDS = 10.0
_LEAVE_SECONDS = 1.0
_LOCK_SECONDS = 3.0
_LOCK_PAUSE_SECONDS = 0.1
_RESTART_SECONDS = 5.0
_ACCOUNT_SECONDS = 0.1


class Daemon:
    """One mount and everything that serves it.

    Start order: what the keeper holds, index, overlay, requests, recorder, admin, ready. Stop order: admin, mount,
    requests in work, recorder, index. `ready` is called once the mount answers. One that is `attached` leaves the mount
    to the next daemon when it is told to end.
    """

    def __init__(
        self, settings: MountSettings, keeping: Keeping, *, ready: Callable[[], None], attached: bool = False
    ) -> None:
        self._given = settings
        self._keeping = keeping
        self._ready = ready
        self._attached = attached
        self._started = time.time()
        self._stop = trio.Event()
        self._requests_done = trio.Event()
        self._hot_events = trio.Event()
        self._want_passthrough = settings.passthrough != "off" and os.geteuid() == 0

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or an unmount, or until a newer daemon takes over. Raises UsageError."""
        raise_priority()
        gc.disable()  # a third of the time that it takes to inherit 100,000 nodes
        with ExitStack() as self._kept, ExitStack() as stack:
            self._take_what_is_held()
            self._build(stack)
            if os.geteuid() == 0:
                keep_capabilities()
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

    def _take_what_is_held(self) -> None:
        """What was checked and locked when the mount was made, and what the daemon before this one left."""
        self._keeping.attach()
        told, held = self._keeping.told, self._keeping.held
        paths = {name: Path(told[name]) for name in ("source", "mountpoint", "state_dir")}
        self.settings = self._given.model_copy(update=paths)
        self.state_dir = paths["state_dir"]
        self._cache_dir = Path(told["cache_dir"]) if told["cache_dir"] is not None else None
        self.source = ColdSource(self.settings.source, Root(held[SOURCE_ROOT], *told["root"]))
        family = socket.AF_INET6 if self._given.metrics.startswith("[") else socket.AF_INET
        self._listener = self._keeping.listener(METRICS_LISTENER, family)
        self._admin = self._keeping.listener(ADMIN_LISTENER, socket.AF_UNIX)
        host, port = self._listener.getsockname()[:2]
        self._metrics_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._estate = estate.read(held[LEDGER]) if LEDGER in held else None
        end = self._estate.end if self._estate is not None else None
        self.ledger = Ledger(held.get(LEDGER), end, on_lost=lambda: self._keeping.ready(resend=False))
        if self._estate is None:
            self._keeping.keep_ledger(self.ledger.fd)
        else:
            self._keeping.shorten(self.ledger, self._estate)

    def _build(self, stack: ExitStack) -> None:
        settings = self.settings
        self.metrics = Metrics(CollectorRegistry(), models_max=settings.metrics_models, operations=fuse.OPERATIONS)
        stack.callback(self.source.close)
        self.index = Index(
            self.state_dir / "index.db",
            history_rows=settings.history_rows,
            max_files=settings.max_files_known,
            half_life_s=settings.heat_half_life,
            unsent=settings.redis is not None,
        )
        stack.callback(self.index.close)
        self.cold = open_cold_bytes(settings.objects, stack, settings.outputs_root_bytes)
        is_model_dir = ModelDirs(self.source)
        self.tier = self._build_tier(is_model_dir)
        self.publisher = self._build_publisher(is_model_dir)
        self.journal = Journal(settings.journal_capacity)
        self.recorder = Recorder(
            self.journal,
            self.index,
            self.metrics,
            models_roots=settings.models_roots_bytes,
            is_model_dir=is_model_dir,
            load_idle_gap_s=settings.load_idle_gap,
            outputs_root=self._outputs_root(),
            **({"noted": self.tier.usage.note} if self.tier else {}),
        )

    def _outputs_root(self) -> bytes | None:
        """None where nobody is told of outputs."""
        return self.settings.outputs_root_bytes if self.settings.redis is not None else None

    def _build_tier(self, is_model_dir: ModelDirs) -> TierParts | None:
        if self._cache_dir is None:
            return None
        tier_metrics = TierMetrics(self.metrics.registry)
        return TierParts(self._cache_dir, self.settings, self.source, self.index, tier_metrics, is_model_dir, self.cold)

    def _build_publisher(self, is_model_dir: ModelDirs) -> Publisher | None:
        if self.settings.redis is None:
            return None
        from tierd.node.publish_setup import publisher_of

        store = self.tier.store if self.tier is not None else None
        return publisher_of(
            *(self.settings, self.index, self.metrics.registry, lambda: self.overlay, is_model_dir),
            *(store, self.cold),
        )

    async def _serve(self) -> None:
        """Everything between mount and unmount."""
        settings = self.settings
        token = trio.lowlevel.current_trio_token()
        self.hot = self._short_way(token)
        self.seam = Seam(
            self._keeping.device,
            ended=lambda: token.run_sync_soon(self._unmounted),
            passthrough=self._want_passthrough,
            resend=settings.handover,
            short_way=self.hot,
            ledger=self.ledger,
            undelivered=lambda said: token.run_sync_soon(self._take_back, said),
        )
        try:
            self._connect()
            try:
                await self._serve_mount()
            finally:
                self.seam.close(settings.mountpoint)
                fuse.detach()
                self.overlay.end_records()
        finally:
            self.seam.close(settings.mountpoint)
            self.hot.close()
            if self.tier is not None:
                self.tier.stop()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _STOP_SECONDS):
                await self.recorder.flush()

    def _short_way(self, token: trio.lowlevel.TrioToken) -> HotFiles:
        def wake() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._hot_events.set)

        attr_timeout, entry_timeout = self.settings.attr_timeout, self.settings.entry_timeout
        return HotFiles(
            self.source.key, wake, attr_timeout_s=attr_timeout, entry_timeout_s=entry_timeout, ledger=self.ledger
        )

    def _take_back(self, said: estate.Said) -> None:
        trio.lowlevel.spawn_system_task(keep_running, "take_back", self.overlay.take_back, said)

    async def _follow_short_way(self) -> None:
        """Account for what the pumps answered, ten times a second at most: each time costs them the lock. Whoever needs
        it sooner takes the events itself."""
        while True:
            await self._hot_events.wait()
            await trio.sleep(_ACCOUNT_SECONDS)
            self._hot_events = trio.Event()
            self.overlay.take_events()

    def _recall_bounds(self) -> RecallBounds:
        return RecallBounds(
            self.settings.recalls_per_user,
            self.settings.recall_bytes_per_hour,
            is_coming=self.tier.tier.is_coming if self.tier else lambda model: False,
            refused=self.metrics.recall_bounded,
        )

    def _connect(self) -> None:
        """Build what stands between the seam and the source."""
        self.overlay = Overlay(
            self.source,
            self.journal,
            self.seam,
            event_dropped=self.metrics.event_dropped,
            read_ended=self.metrics.read_ended,
            tier=self.tier.tier if self.tier else None,
            hot=self.hot,
            ledger=self.ledger,
            once=Once(self.ledger, self.source.key, intents_of(self._estate) if self._estate else {}),
            holder=self._keeping,
            cold=self.cold,
            bounds=self._recall_bounds(),
            loaded=self.publisher.exchange.wishes.loaded if self.publisher else lambda path: None,
            outputs_root=self._outputs_root(),
        )
        operations = fuse.FuseOperations(
            self.overlay,
            self.metrics,
            congested=self.seam.congested,
            caller_of=self.seam.caller_of,
            attr_timeout_s=self.settings.attr_timeout,
            entry_timeout_s=self.settings.entry_timeout,
        )
        self._watch_depths()
        fuse.attach(operations, self.seam)

    def _inherit(self) -> Inheritance | None:
        """Become what the daemon before this one was; what the seam shall go on with."""
        left, self._estate = self._estate, None
        if left is None or left.init is None:
            return None
        held = self._keeping.held
        copies = {copy.name: copy for copy in self.tier.store.copies()} if self.tier else {}
        inherit(
            Heir(self.overlay, self.hot, self.seam.backings, held, copies, self._keeping.drop),
            left,
            self._keeping.restarts,
        )
        return Inheritance(left.init, left.doubtful)

    async def _serve_mount(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            left = self._inherit()
            calm_garbage_collector()
            await nursery.start(self._answer_requests, left)
            nursery.start_soon(keep_running, "short_way", self._follow_short_way)
            if left is None:
                await self._await_mount()
            self._check_passthrough()
            tune_mount(self.settings.mountpoint, self.settings.read_ahead_kib)
            nursery.start_soon(keep_running, "recorder", self.recorder.run)
            if self.tier is not None:
                for name, task in self.tier.tasks().items():
                    nursery.start_soon(keep_running, name, task)
            if self.publisher is not None:
                nursery.start_soon(keep_running, "publish", self.publisher.run)
            self._start_admin(nursery)
            heed = (self._stop.set, self._leave, self._publish, self._go_on_alone)
            nursery.start_soon(keep_running, "keeper", self._keeping.run, *heed)
            nursery.start_soon(keep_running, "ledger", self._keeping.compact, self.ledger)
            self._publish()
            log.info("mounted" if left is None else "serving", **self._record_for_log())
            self._keeping.ready(resend=bool(self.seam.resend_agreed) and not self.ledger.lost)
            self._ready()
            await self._stop.wait()
            nursery.cancel_scope.deadline = trio.current_time() + _STOP_SECONDS
            fuse.stop()
            await self._requests_done.wait()
            nursery.cancel_scope.cancel()

    def _start_admin(self, nursery: trio.Nursery) -> None:
        apps = (
            (admin.admin_app(answers(self)), self._admin),
            (admin.metrics_app(self.metrics, self.settings.mountpoint), self._listener),
        )
        for app, listener in apps:
            nursery.start_soon(keep_running, "admin", admin.serve, app, listener, self._stop.wait)

    async def _watch_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("stopping", signal=signal.Signals(number).name)
                if self._attached and not self._keeping.alone:
                    await self._leave()
                self._stop.set()

    async def _leave(self) -> None:
        """Another daemon takes over: what is recorded is written, all else is in the ledger."""
        self._keeping.leave()
        self.overlay.end_records()
        with trio.move_on_after(_LEAVE_SECONDS):
            await self.recorder.flush()
        log.info("left", mountpoint=str(self.settings.mountpoint))
        os._exit(0)

    async def _go_on_alone(self) -> None:
        """The keeper is gone, and its locks with it: take them, before somebody else does. The mount goes on without,
        but not beside another daemon that works in our directories.

        A keeper that lives has given this daemon up: nothing here is ours any more. One that is killed may hold its
        locks for a moment longer than its end of our socket.
        """
        if await trio.to_thread.run_sync(lives, str(keeper_path(self.settings.mountpoint))):
            log.error("given_up_by_keeper", consequence="this process ends", reason="it had been silent for too long")
            os._exit(1)
        directories = self.state_dir, self.settings.mountpoint, self._cache_dir
        wait_until = trio.current_time() + _LOCK_SECONDS
        while True:
            try:
                self._kept.enter_context(await trio.to_thread.run_sync(lambda: preflight.hold_locks_of(*directories)))
                break
            except UsageError as error:
                if trio.current_time() > wait_until:
                    log.error("keeper_gone", consequence="this daemon ends", reason=str(error))
                    return self._stop.set()
            await trio.sleep(_LOCK_PAUSE_SECONDS)
        log.error("keeper_gone", consequence="the mount ends with this daemon", hint="tierd umount, and mount anew")
        return self._publish()

    async def _answer_requests(
        self, left: Inheritance | None, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            if self.tier is not None:
                self.tier.start(self.overlay.copy_removed)
            self.seam.start(left)
            task_status.started()
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

    def _handover(self) -> str:
        """What happens when this daemon dies."""
        if self._keeping.alone:
            return "none"
        return "resend" if self.seam.resend_agreed and not self.ledger.lost else "remount"

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
            "waiting_reads": self.seam.reads.queued,
            "parked_reads": self.seam.reads.parked,
            "backings": lambda: len(self.seam.backings),
            "hot_files": lambda: len(self.hot),
        }

    @property
    def metrics_address(self) -> str:
        """`HOST:PORT` that metrics are served on."""
        return self._metrics_address

    def _publish(self) -> None:
        write_record(self._record())

    def _record(self) -> MountRecord:
        return MountRecord(
            mountpoint=str(self.settings.mountpoint),
            source=str(self.settings.source),
            state_dir=str(self.state_dir),
            pid=os.getpid(),
            metrics_address=self._metrics_address,
            keeper_pid=self._keeping.keeper_pid,
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
            "keeper_pid": self._keeping.keeper_pid,
            "restarts": self._keeping.restarts,
            "handover": self._handover(),
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
                "reads": self.seam.reads.count,
                "resent": self.seam.resent,
                "short_lookups": self.hot.lookups,
                "short_opens": self.hot.opens,
                "cold_opens": self.overlay.cold_opens,
                "cold_loads": self.overlay.loads_recognised,
                "cold_bytes": self.cold.fetched_bytes if self.cold is not None else 0,
                "recalls": self.cold.recalls if self.cold is not None else 0,
                "notices_dropped": self.seam.notices_dropped,
            },
            "node_tier": self.tier.status() if self.tier else None,
            "publish": self.publisher.status() if self.publisher else {"enabled": False},
            "queues": {what: int(depth()) for what, depth in self._depths().items()},
            "versions": {
                "tierd": __version__,
                "python": platform.python_version(),
                "trio": trio.__version__,
                **fuse.versions(),
            },
        }


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
