"""What states a move goes through, and which way. Pure: nothing is done here.

    demote  planned -> copying -> verifying -> switching -> in_grace -> deleting -> done
    undo    planned -> switching -> done
    promote planned -> copying -> switching -> done

Before `switching` a move may be abandoned at any time: nothing was changed in the source. From then on what was changed
is put back first (`moves.abandoning`), or the move goes on to its end.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class MoveKind(StrEnum):
    """What a move is for."""

    DEMOTE = "demote"
    PROMOTE = "promote"
    IMPORT = "import"
    UNDO = "undo"


class MoveState(StrEnum):
    """How far a move is."""

    PLANNED = "planned"
    COPYING = "copying"
    VERIFYING = "verifying"
    SWITCHING = "switching"
    IN_GRACE = "in_grace"
    DELETING = "deleting"
    DONE = "done"
    ABANDONED = "abandoned"
    FAILED = "failed"


class FileState(StrEnum):
    """How far one file of a move is."""

    PLANNED = "planned"
    COPIED = "copied"
    VERIFIED = "verified"
    SWITCHED = "switched"
    DELETED = "deleted"
    RESTORED = "restored"
    KEPT = "kept"


FINAL: Final = frozenset({MoveState.DONE, MoveState.ABANDONED, MoveState.FAILED})
UNTOUCHED: Final = frozenset({MoveState.PLANNED, MoveState.COPYING, MoveState.VERIFYING})
"""Nothing in the source was changed yet."""
_P, _C, _V, _S = MoveState.PLANNED, MoveState.COPYING, MoveState.VERIFYING, MoveState.SWITCHING
_G, _D = MoveState.IN_GRACE, MoveState.DELETING
_NEXT: Final = {
    MoveKind.DEMOTE: {_P: _C, _C: _V, _V: _S, _S: _G, _G: _D, _D: MoveState.DONE},
    MoveKind.UNDO: {_P: _S, _S: MoveState.DONE},
    MoveKind.PROMOTE: {_P: _C, _C: _S, _S: MoveState.DONE},
    MoveKind.IMPORT: {_P: _V, _V: _S, _S: MoveState.DONE},
}


def next_state(kind: MoveKind, state: MoveState) -> MoveState:
    """Where a move goes on to. KeyError for one that is at its end."""
    return _NEXT[kind][state]
