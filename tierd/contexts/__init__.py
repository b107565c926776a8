"""Chat contexts: the library that applications import. `docs/CONTEXTS.md` has an example that runs."""

from tierd.contexts.errors import InvalidContext, NotConfirmed, VersionConflict
from tierd.contexts.library import Context, Contexts, Saved, open_contexts
from tierd.contexts.settings import ContextSettings, load
from tierd.contexts.templates import Template, Templates
from tierd.contexts.tiers import Erased, Listed

__all__ = [
    "Context",
    "ContextSettings",
    "Contexts",
    "Erased",
    "InvalidContext",
    "Listed",
    "NotConfirmed",
    "Saved",
    "Template",
    "Templates",
    "VersionConflict",
    "load",
    "open_contexts",
]
