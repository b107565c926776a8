"""What a leader does to outputs beside backup and cleanup: deletes them, and brings back what is read often."""

from __future__ import annotations

from typing import NamedTuple

from tierd.controller.moves.moves import Moves
from tierd.controller.outputs.deletion import OutputDeletion
from tierd.controller.outputs.erasure import ErasureSettings, OutputErasure
from tierd.controller.outputs.files import OutputFiles
from tierd.controller.outputs.promotion import OutputPromotion
from tierd.controller.settings import ControllerSettings

_DAY_SECONDS = 86_400.0


class OutputWork(NamedTuple):
    """See each. One task calls the `round` of each."""

    deletion: OutputDeletion
    erasure: OutputErasure
    promotion: OutputPromotion


def output_work_of(settings: ControllerSettings, moves: Moves, files: OutputFiles) -> OutputWork:
    """Of one leader."""
    shop = moves.workshop
    told = ErasureSettings(
        settings.outputs_root_bytes, settings.outputs_delete_wait, settings.outputs_tombstone_days * _DAY_SECONDS
    )
    return OutputWork(OutputDeletion(shop, files), OutputErasure(shop, told), OutputPromotion(shop, settings))
