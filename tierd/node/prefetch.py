"""Prefetch: hot models come to the node by themselves, on start and continuously. `policy.py` decides."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from tierd.node.rounds import Rounds
from tierd.node.tier import NodeTier
from tierd.node.wanted import Priority
from tierd.policy import Candidate, Choice, prefetch_order
from tierd.units import display

log = structlog.get_logger(__name__)

_INTERVAL_SECONDS = 30.0
_CANDIDATES_MAX = 100
_REMEMBER_SECONDS = 300.0
"""Models that lack nothing are walked again after this time; files that came to them since are seen then."""
MIN_HEAT = 0.1
"""A model loaded once is prefetched until it was idle for a bit more than three half-lives."""


class Prefetcher(Rounds):
    """Queues what is missing of the hottest and of the pinned models, at most `_CANDIDATES_MAX` beyond the pinned."""

    def __init__(self, tier: NodeTier) -> None:
        super().__init__(self._look, interval_s=_INTERVAL_SECONDS, failed="prefetch_failed")
        self._tier = tier

    def _look(self) -> None:
        if self._tier.filler.busy_for_readers():
            return
        for choice in self.plan(age_s=_REMEMBER_SECONDS):
            if choice.take:
                queued = self._tier.want_model(choice.model, Priority.PREFETCH)
                if queued:
                    log.info("prefetch", model=display(choice.model), bytes=queued, why=choice.reason)

    def plan(self, *, age_s: float = 0.0) -> Sequence[Choice]:
        """What prefetch would do now, each line with its reason, by listings of at most this age. Blocking."""
        tier, usage = self._tier, self._tier.usage
        candidates = [
            Candidate(model, missing, usage.heat(model), usage.pinned(model))
            for model in usage.hottest(_CANDIDATES_MAX)
            if (missing := self._missing_bytes(model, age_s)) is not None
        ]
        return prefetch_order(candidates, tier.residents(), tier.space(), tier.settings.marks, MIN_HEAT)

    def _missing_bytes(self, model: bytes, age_s: float) -> int | None:
        """None for a model that left the source."""
        files = self._tier.listings.recent(model, age_s)
        return sum(file.identity.size for file in files if not self._tier.has(file)) if files else None
