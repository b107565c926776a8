"""Where a model is, for programs on a node: its path below the overlay, and a word to the daemon to bring it here.

The path can be opened at once, wherever the bytes are: what is not on the node is read from the source or from the
object store meanwhile. Talks to the daemon's admin socket, which belongs to whoever runs the daemon: a pod that cannot
see it opens the path, which brings the model, too.

    path = get_model_path("meta-llama/Llama-3-8B", wait=True)
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from tierd import client
from tierd.errors import DaemonError, TierdError
from tierd.objects.keys import shown, validate_model_id
from tierd.runtime import MountRecord

_POLL_SECONDS: Final = 0.2


class ModelNotFoundError(TierdError):
    """There is no such model below the overlay."""


class ModelNotLocalError(TierdError):
    """A model did not come to the node, or not in time. It can be read nevertheless, only slower."""


def get_model_path(
    model_id: str, *, root: Path | None = None, wait: bool = False, timeout: float | None = None
) -> Path:
    """The path of a model below the overlay, which the daemon is asked to bring to this node.

    `model_id` is a path below the overlay or one of its models roots, such as `models/llama-7b` or `llama-7b`. `root`
    is the mountpoint; it may be left out if there is one mount only. With `wait` it returns once all of the model is on
    the node, `timeout` is how many seconds that may take. A cold model is also asked for to become hot again.

    Raises UsageError for what can be no model, ModelNotFoundError, ModelNotLocalError (only with `wait`), DaemonError.
    """
    record, path, told = _begin(model_id, root)
    if wait:
        for _ in _until_here(record, told, timeout):
            time.sleep(_POLL_SECONDS)
    return path


async def get_model_path_async(
    model_id: str, *, root: Path | None = None, wait: bool = False, timeout: float | None = None
) -> Path:
    """`get_model_path` for asyncio programs."""
    record, path, told = await asyncio.to_thread(_begin, model_id, root)
    if wait:
        steps = _until_here(record, told, timeout)
        while await asyncio.to_thread(next, steps, _HERE) is not _HERE:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(_POLL_SECONDS)
    return path


_HERE: Final = object()


def _begin(model_id: str, root: Path | None) -> tuple[MountRecord, Path, Any]:
    validate_model_id(model_id)
    record = client.find(root)
    name, path = _find(record, model_id)
    return record, path, client.post(record, "/v1/warm", {"models": [name]})


def _find(record: MountRecord, model_id: str) -> tuple[str, Path]:
    """Its name below the mountpoint, and its path."""
    roots: list[str] = client.get(record, "/v1/status")["models_roots"]
    for above in ("", *roots):
        name = f"{above}/{model_id}" if above else model_id
        path = Path(record.mountpoint) / name
        try:
            os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise DaemonError(f"{path}: {error.strerror}", hint="does the mount answer?") from None
        return name, path
    raise ModelNotFoundError(
        f"model {shown(model_id)} is not below {record.mountpoint}",
        hint="`tierd models` lists what is there",
        errno=errno.ENOENT,
    )


def _until_here(record: MountRecord, told: Any, timeout: float | None) -> Iterator[None]:
    """Yields until the model is on the node. Raises ModelNotLocalError."""
    started = time.monotonic()
    query = urlencode([("model", row["model"]) for row in told["models"]], errors="surrogateescape")
    while True:
        row = told["models"][0]
        if row["state"] == "complete":
            return
        if row["state"] != "filling":
            raise ModelNotLocalError(
                f"model {shown(row['model'])} is not on the node: {row['reason'] or row['state']}",
                hint="`tierd plan` shows what is kept and why; the log says what failed",
            )
        if timeout is not None and time.monotonic() - started >= timeout:
            raise ModelNotLocalError(
                f"model {shown(row['model'])} is not on the node after {timeout:g} s:"
                f" {row['bytes_done']} of {row['bytes_total']} bytes",
                hint="it goes on coming; wait longer",
                errno=errno.ETIMEDOUT,
            )
        yield
        told = client.get(record, f"/v1/warm?{query}")
