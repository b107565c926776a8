"""The controller's way to the database: `tierd.postgres`, which it shares with the contexts. Has nothing of its own."""

from __future__ import annotations

from tierd.postgres import Connection, Database, connected

__all__ = ["Connection", "Database", "connected"]
