"""Puts the node tier together for the daemon: from settings to running parts, and what they tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from tierd.config import MountSettings
from tierd.metrics import TierMetrics
from tierd.node.catalog import files_of
from tierd.node.cold_bytes import ColdBytes
from tierd.node.cold_source import ColdSource
from tierd.node.copies import Copy
from tierd.node.evict import Evictor
from tierd.node.index import Index
from tierd.node.prefetch import Prefetcher
from tierd.node.readahead import ReadAhead
from tierd.node.store import Store
from tierd.node.tier import NodeTier, TierSettings
from tierd.node.usage import Usage
from tierd.units import model_of

log = structlog.get_logger(__name__)


class TierParts:
    """The node tier of one daemon. `start` begins threads and returns at once; `stop` ends them."""

    def __init__(
        self,
        directory: Path,
        settings: MountSettings,
        source: ColdSource,
        index: Index,
        metrics: TierMetrics,
        is_model_dir: Callable[[bytes], bool],
        cold: ColdBytes | None = None,
    ) -> None:
        roots = settings.models_roots_bytes

        def model_of_path(path: bytes) -> bytes | None:
            return model_of(path, roots, is_model_dir)

        self.metrics = metrics
        self._copy_removed: Callable[[Copy], None] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self.store = Store(directory, removed=self._removed)
        self.usage = Usage(
            ((row.model, row.heat, row.heat_at_ns, row.last_access_ns) for row in index.models()),
            index.pins(),
            half_life_s=settings.heat_half_life,
        )
        self.read_ahead = ReadAhead(self.store, settings.read_ahead_memory)
        self.tier = NodeTier(
            self.store,
            source,
            self.usage,
            TierSettings(
                settings.cache_size,
                settings.watermarks,
                settings.fill_bandwidth,
                settings.fill_workers,
                settings.source_timeout,
                settings.stale_if_unreachable,
            ),
            metrics,
            model_of=model_of_path,
            files_of=lambda model: files_of(source, model, model_of_path),
            read_ahead=self.read_ahead,
            space_needed=self._space_needed,
            cold=cold,
        )
        self.evictor = Evictor(self.tier)
        self.prefetcher = Prefetcher(self.tier)
        self._prefetch = settings.prefetch
        self._watch()

    def start(self, copy_removed: Callable[[Copy], None]) -> None:
        """Start the workers; from the trio thread, in which `copy_removed` is told of each removal."""
        self._token = trio.lowlevel.current_trio_token()
        self._copy_removed = copy_removed
        log.info("node_tier", directory=str(self.store.directory), **self.store.recovered, bytes=self.store.held_bytes)
        self.tier.start()
        self.read_ahead.start()

    def stop(self) -> None:
        """End the workers. Blocking, for some seconds at most."""
        self.read_ahead.stop()
        if self.tier.stop():
            self.store.close()  # or it ends with the process: who still waits for the source must not meet other files

    def tasks(self) -> dict[str, Callable[[], Any]]:
        """What shall run for as long as the mount does."""
        return {"evict": self.evictor.run, **({"prefetch": self.prefetcher.run} if self._prefetch else {})}

    def _removed(self, copy: Copy) -> None:
        if self._token is not None and self._copy_removed is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._copy_removed, copy)

    def _space_needed(self) -> None:
        if self._token is not None:
            self._token.run_sync_soon(self.evictor.needed)

    def free_ratio(self) -> float:
        """Free share of the cache's file system."""
        space = self.tier.space()
        return space.free_bytes / max(1, space.total_bytes)

    def _watch(self) -> None:
        for name, (text, value) in GAUGES.items():
            self.metrics.watch(name, text, partial(value, self))

    def status(self) -> dict[str, Any]:
        """The `node_tier` part of `tierd status --json`."""
        space = self.tier.space()
        return {
            "cache_dir": str(self.store.directory),
            "read_only_backings": self.store.read_only_view,
            "limit_bytes": space.limit_bytes,
            "held_bytes": space.held_bytes,
            "reserved_bytes": space.reserved_bytes,
            "copies": len(self.store),
            "free_bytes": space.free_bytes,
            "free_ratio": round(space.free_bytes / max(1, space.total_bytes), 4),
            "watermarks": [self.tier.settings.marks.start, self.tier.settings.marks.stop],
            "fills_active": len(self.tier.filler.active()),
            "fills_queued": len(self.tier.filler.queued()),
            "fill_source_bytes": self.tier.filler.source_bytes,
            "read_ahead_bytes": self.read_ahead.requested_bytes,
            "leases": len(self.tier.leases),
            "pins": len(self.usage.pins()),
            **self.metrics.totals(),
        }


GAUGES: Final[dict[str, tuple[str, Callable[[TierParts], float]]]] = {
    "node_tier_bytes": ("Bytes of whole copies on this node.", lambda p: p.store.held_bytes),
    "node_tier_reserved_bytes": ("Bytes reserved for fills that run.", lambda p: p.store.reserved_bytes),
    "node_tier_copies": ("Whole copies on this node.", lambda p: len(p.store)),
    "node_tier_limit_bytes": ("The most that the node tier may hold.", lambda p: p.tier.settings.limit_bytes),
    "node_tier_damaged": ("Copies found changed by hand, and dropped.", lambda p: p.store.damaged),
    "free_ratio": ("Free share of the cache's file system.", lambda p: p.free_ratio()),
    "leases": ("Models with an open file.", lambda p: len(p.tier.leases)),
    "pins": ("Models that somebody wants kept.", lambda p: len(p.usage.pins())),
    "fills_active": ("Files on their way to the node.", lambda p: len(p.tier.filler.active())),
    "fills_queued": ("Files that wait for their turn.", lambda p: len(p.tier.filler.queued())),
    "fills_dropped": ("Files that did not fit into the queue.", lambda p: p.tier.filler.dropped),
    "chores_dropped": ("Comparisons, renames and looks for siblings that found no room.", lambda p: p.tier.dropped),
    "fill_source_bytes": ("Bytes that fills read from the source.", lambda p: p.tier.filler.source_bytes),
    "read_ahead_bytes": ("Bytes brought into memory ahead of readers.", lambda p: p.read_ahead.requested_bytes),
    "read_ahead_skipped": ("Files left out for want of memory.", lambda p: p.read_ahead.skipped),
}
"""What is exported as `tierd_NAME` at each scrape."""
