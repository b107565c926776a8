"""What whoever leads works with. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tierd.controller.carrier import Carrier
from tierd.controller.moves import Moves
from tierd.controller.settings import ControllerSettings
from tierd.metrics import ContextMetrics, ControllerMetrics
from tierd.objects.store import ObjectStore
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
