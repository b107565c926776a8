"""Eviction: keeps the node tier within its size limit and the disk above its watermarks. `policy.py` decides."""

from __future__ import annotations

from tierd.node.rounds import Rounds
from tierd.node.tier import NodeTier

_INTERVAL_SECONDS = 5.0


class Evictor(Rounds):
    """Looks every few seconds, and at once when space ran out."""

    def __init__(self, tier: NodeTier) -> None:
        super().__init__(tier.evict_surplus, interval_s=_INTERVAL_SECONDS, failed="eviction_failed")
