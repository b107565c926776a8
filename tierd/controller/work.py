"""What whoever leads works with. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tierd.controller.db import Database
from tierd.controller.settings import ControllerSettings
from tierd.metrics import ControllerMetrics


class Mover(Protocol):
    """What jobs use of moves (`moves.py`). Each method may raise TierdError and OSError."""

    async def demote(self, model_id: str, reason: str) -> int:
        """Plan a demotion; the move. Raises MoveRefused with the reason for which it cannot be."""
        ...

    async def advance(self, move: int) -> str:
        """Take a move as far as it can go now; its state."""
        ...

    async def resume_all(self) -> None:
        """Take every unfinished move as far as it can go now, the oldest first."""
        ...


@dataclass(frozen=True)
class Work:
    """One leader's, for one epoch."""

    settings: ControllerSettings
    database: Database
    epoch: int
    source: Path
    moves: Mover
    metrics: ControllerMetrics
