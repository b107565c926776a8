"""What whoever leads works with. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tierd.controller.moves.carrier import Carrier
from tierd.controller.moves.moves import Moves
from tierd.controller.outputs.backup import OutputBackup
from tierd.controller.outputs.files import OutputFiles
from tierd.controller.outputs.work import OutputWork
from tierd.controller.settings import ControllerSettings
from tierd.metrics import ContextMetrics, ControllerMetrics
from tierd.objects.store import ObjectStore
from tierd.output_metrics import OutputMetrics
from tierd.postgres import Database


@dataclass(frozen=True)
class Work:
    """One leader's, for one epoch."""

    settings: ControllerSettings
    database: Database
    epoch: int
    source: Path
    moves: Moves
    carrier: Carrier
    metrics: ControllerMetrics
    store: ObjectStore
    context_metrics: ContextMetrics
    output_files: OutputFiles
    output_backup: OutputBackup
    output_metrics: OutputMetrics
    output_work: OutputWork
