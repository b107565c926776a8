"""Which models have open files now: what the controller must not demote. Looks at handles, remembers nothing.

Contract: trio thread. The event loop is left to others every thousand handles, and paths are sorted into models in a
thread, because that may list directories of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Final

import trio

from tierd.node.handles import FileHandle
from tierd.node.inodes import Node
from tierd.node.sources import Moved

_HANDLES_AT_ONCE: Final = 1000


class OpenModels:
    """See the module. `files` are the handles by number, `path_of` is a node's path, `model_of` (blocking) a path's
    model."""

    def __init__(
        self,
        files: Callable[[], Mapping[int, FileHandle]],
        path_of: Callable[[Node], bytes],
        model_of: Callable[[bytes], bytes | None],
    ) -> None:
        self._files = files
        self._path_of = path_of
        self._model_of = model_of
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def __call__(self) -> frozenset[bytes]:
        """The models with a file that is open at the time of the call; one that is closed meanwhile may be among them.

        May be cancelled while the source hangs.
        """
        models: set[bytes] = set()
        nodes: dict[Node, bytes | None] = {}
        for count, handle in enumerate(list(self._files().values())):
            if handle.model is not None:
                models.add(handle.model)
            else:
                nodes.setdefault(handle.node, handle.recorded_path)
            if count % _HANDLES_AT_ONCE == _HANDLES_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
        if nodes:
            paths = {path for node, recorded in nodes.items() if (path := self._where(node, recorded)) is not None}
            models |= await trio.to_thread.run_sync(
                self._models_of, paths, limiter=self._one_at_a_time, abandon_on_cancel=True
            )
        return frozenset(models)

    def _where(self, node: Node, recorded: bytes | None) -> bytes | None:
        with suppress(Moved):
            return self._path_of(node)
        return recorded

    def _models_of(self, paths: Iterable[bytes]) -> set[bytes]:
        return {model for path in paths if (model := self._model_of(path)) is not None}
