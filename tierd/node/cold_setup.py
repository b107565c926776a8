"""Opens the object store of cold files, by the settings of a mount. Its client is imported only if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tierd.node.cold_bytes import ColdBytes


def open_cold_bytes(settings: Mapping[str, Any] | None, stack: ExitStack) -> ColdBytes | None:
    """Who has the bytes of cold files, None if nobody was named; closed with `stack`. Raises UsageError."""
    if settings is None:
        return None
    from tierd.objects.settings import describe, open_store

    described = describe(settings)
    store = open_store(described, os.environ)
    stack.callback(store.close)
    return ColdBytes(store, described.models_bucket)
