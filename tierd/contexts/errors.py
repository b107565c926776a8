"""How calls of the library fail, beside `tierd.errors.DatabaseError` for a database that is away."""

from __future__ import annotations

from tierd.errors import TierdError, UsageError


class InvalidContext(UsageError):
    """An ID, messages or a template that cannot be stored. Nothing was."""


class VersionConflict(TierdError):
    """Somebody else changed it meanwhile. Nothing was stored: get it again, and decide anew.

    `current` is the version that is there, 0 if there is none.
    """

    def __init__(self, what: str, expected: int, current: int) -> None:
        super().__init__(f"{what} is at version {current}, not {expected}", hint="get it again, then save what is new")
        self.current = current


class NotConfirmed(TierdError):
    """Done in the database, but not known to be done in Redis: repeat the call until it succeeds."""
