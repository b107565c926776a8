"""Opens the object store of cold files, by the settings of a mount. Its client is imported only if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tierd.node.cold_bytes import ColdBytes
from tierd.outputs import is_day
from tierd.stubs import Origin


def open_cold_bytes(settings: Mapping[str, Any] | None, stack: ExitStack, outputs_root: bytes) -> ColdBytes | None:
    """Who has the bytes of cold files, None if nobody was named; closed with `stack`. Raises UsageError."""
    if settings is None:
        return None
    from tierd.objects.settings import describe, open_store

    described = describe(settings)
    store = open_store(described, os.environ)
    stack.callback(store.close)

    def bucket_of(origin: Origin) -> str:
        return described.outputs_bucket if is_day(origin.model_id, outputs_root) else described.models_bucket

    return ColdBytes(store, bucket_of)
