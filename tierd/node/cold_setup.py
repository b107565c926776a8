"""Opens the object store of cold files, by the settings of a mount. Its client is imported only if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from pydantic import ValidationError

from tierd.errors import UsageError
from tierd.node.cold_bytes import ColdBytes


def open_cold_bytes(settings: Mapping[str, Any] | None, stack: ExitStack) -> ColdBytes | None:
    """Who has the bytes of cold files, None if nobody was named; closed with `stack`. Raises UsageError."""
    if settings is None:
        return None
    from tierd.objects.settings import ObjectsSettings, open_store

    try:
        described = ObjectsSettings.model_validate(settings)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        reason = fault["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in ("objects", *fault["loc"]))
        raise UsageError(f"{where}: {reason}", hint="docs/OPERATIONS.md lists its settings") from None
    store = open_store(described, os.environ)
    stack.callback(store.close)
    return ColdBytes(store, described.models_bucket)
