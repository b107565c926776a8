"""What the controller counts of generated outputs: how they stand, how their backup goes. Measures nothing.

Labels are tiers; never a user, and never a name of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TIERS: Final = ("hot", "cold", "unbacked", "vanished")
"""With bytes in the source; with an object that was compared; with bytes in the source alone; with neither file nor
stub in the source. One output may count in two."""
DELETION_STATES: Final = ("planned", "hidden", "deleted")
"""With names still; without names in the source; without objects, remembered until every node has confirmed."""
_BACKUP_BUCKETS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 6 * 3600.0, 86_400.0)


class OutputMetrics:
    """See the module."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outputs = Gauge("tierd_outputs", "Generated outputs by tier.", ["tier"], registry=registry)
        self._bytes = Gauge("tierd_output_bytes", "Bytes of generated outputs by tier.", ["tier"], registry=registry)
        self._oldest = Gauge(
            "tierd_output_oldest_unbacked_seconds",
            "Age of the oldest output that has no compared copy in the object store; 0 if there is none.",
            registry=registry,
        )
        self._faults = Gauge(
            "tierd_output_faults", "Files below the outputs root that are left alone.", registry=registry
        )
        self._seconds = Histogram(
            "tierd_output_backup_seconds", "Time from the news of an output to its compared copy.",
            buckets=_BACKUP_BUCKETS, registry=registry,
        )  # fmt: skip
        self._failed = Counter(
            "tierd_output_backups_failed", "Copies that failed, to be tried again.", registry=registry
        )
        self._compressed = Counter(
            "tierd_output_compressions", "Images packed anew whose original was deleted.", registry=registry
        )
        self._saved = Counter(
            "tierd_output_compression_saved_bytes", "Bytes that are no longer stored since.", registry=registry
        )
        self._deletions = Gauge(
            "tierd_output_deletions", "Outputs that are being deleted, by how far.", ["state"], registry=registry
        )
        self._oldest_deletion = Gauge(
            "tierd_output_oldest_deletion_seconds",
            "Age of the oldest deletion that has not deleted everything; 0 if there is none.",
            registry=registry,
        )
        self._restored = Counter("tierd_outputs_restored", "Outputs put back from their backup.", registry=registry)

    def compressed(self, saved_bytes: int) -> None:
        """The original of a compressed image was deleted."""
        self._compressed.inc()
        self._saved.inc(saved_bytes)

    def restored(self) -> None:
        """An output was put back."""
        self._restored.inc()

    def backed_up(self, seconds: float) -> None:
        """A copy was compared, so long after its output was told of."""
        self._seconds.observe(seconds)

    def failed(self) -> None:
        """A copy failed."""
        self._failed.inc()

    def stand(self, tiers: Mapping[str, tuple[int, int]], oldest_unbacked_s: float, faults: int) -> None:
        """Outputs and bytes by tier, as they are now."""
        for tier in TIERS:
            outputs, size = tiers.get(tier, (0, 0))
            self._outputs.labels(tier).set(outputs)
            self._bytes.labels(tier).set(size)
        self._oldest.set(oldest_unbacked_s)
        self._faults.set(faults)

    def delete(self, outputs: Mapping[str, int], oldest_s: float) -> None:
        """Deletions, by `DELETION_STATES`, as they are now."""
        for state in DELETION_STATES:
            self._deletions.labels(state).set(outputs.get(state, 0))
        self._oldest_deletion.set(oldest_s)
