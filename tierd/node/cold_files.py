"""Open cold files: read from their objects, and brought to where they are needed.

A reader is served ranges of the object as it asks. Once what it does looks like a load (`load_signs.py`), the whole
model comes to the node tier, and it is served from there as that lands. Whoever writes waits until the bytes are back
in the source.

Contract: as `reach.py`; `reader` of a target is called by the seam's threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import structlog
import trio

from tierd.errors import TierdError
from tierd.load_signs import LoadSigns
from tierd.node.cold_bytes import ColdBytes
from tierd.node.cold_source import Cold
from tierd.node.files import Files
from tierd.node.fill import Fill
from tierd.node.handles import FileHandle
from tierd.node.reads import Reader, ReadTarget
from tierd.node.recall_bounds import RecallBounds
from tierd.node.sources import Moved
from tierd.node.stub_layer import Stub
from tierd.stubs import Origin
from tierd.units import display, holds_weights

log = structlog.get_logger(__name__)

_RECALLS = 4
"""Files that come back into the source at once."""


class ColdFiles(Files):
    """See the module. Arguments are those of `Files`, and `cold`: who has the bytes, None if nobody was named;
    `bounds`: how much of them one user may bring; `loaded`: told of the path of a cold file that is being loaded, may
    block."""

    def __init__(
        self,
        *args: Any,
        cold: ColdBytes | None = None,
        bounds: RecallBounds | None = None,
        loaded: Callable[[bytes], None] = lambda path: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.cold = cold
        self._bounds = bounds or RecallBounds(0, 0)
        self._loaded = loaded
        self.recall_limit = trio.CapacityLimiter(_RECALLS)
        self.cold_opens = 0
        """Opens for reading of files whose bytes were in the object store."""
        self.loads_recognised = 0

    def who_has(self, stub: Stub) -> tuple[ColdBytes, Origin]:
        """Who has the bytes of a stub, and which they are. Raises OSError (EIO) if that cannot be said."""
        if stub.origin is None:
            raise OSError(errno.EIO, "nobody knows where its bytes are")
        if self.cold is None:
            reason, hint = "no object store is set", "start the mount with --objects"
            log.error("cold_file_unreadable", path=display(stub.origin.path), reason=reason, hint=hint)
            raise OSError(errno.EIO, reason)
        return self.cold, stub.origin

    # --- reading ---

    def cold_target(self, handle: FileHandle, origin: Origin, pid: int, uid: int) -> ReadTarget:
        """Serve a handle of a process and its user from the object."""
        target = ReadTarget(-1)
        signs = LoadSigns(origin.size, weights=holds_weights(origin.path), program=program_of(pid))
        target.reader = self._reader(origin, signs, self._teller(handle, uid))
        return target

    def _reader(self, origin: Origin, signs: LoadSigns, tell: Callable[[], None]) -> Reader:
        cold = self.cold

        def read(view: memoryview, offset: int) -> int:
            if cold is None:  # the daemon before this one had an object store
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            have = cold.read(origin, view, offset)
            if signs.read(have):
                tell()
            return have

        return read

    def _teller(self, handle: FileHandle, uid: int) -> Callable[[], None]:
        token = trio.lowlevel.current_trio_token()

        def tell() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(lambda: trio.lowlevel.spawn_system_task(self._load, handle, uid))

        return tell

    async def _load(self, handle: FileHandle, uid: int) -> None:
        """Whoever has the handle open, or had it this moment, loads the model: bring it to the node. Never raises."""
        tier = self._tier
        if handle.origin is None:
            return
        self.loads_recognised += 1
        try:
            path = self.inodes.path(handle.node)
            fill = await self._run_data(self._begin_load, path, handle.origin, uid)
        except (Moved, FileNotFoundError):  # it has no name any longer
            return
        except (OSError, TierdError) as error:
            log.warning("cold_fill_not_begun", path=display(handle.origin.path), reason=str(error))
            return
        if fill is None or tier is None:
            return
        if self.files.get(handle.fh) is handle and handle.fill is None:
            handle.fill = fill
            handle.target.local = True
            fill.attach(handle.target)
        else:
            tier.filler.unread(fill)

    def _begin_load(self, path: bytes, origin: Origin, uid: int) -> Fill | None:
        """The fill to be served from; None if there is no node tier, or the user has brought enough. Raises OSError."""
        self._loaded(path)
        tier = self._tier
        model = tier.model_of(path) if tier is not None else None
        if tier is None or model is None or not self._bounds.may_load(uid, model, lambda: tier.missing_bytes(model)):
            return None
        return tier.begin_cold(path, origin)

    # --- writing ---

    def _recall_blocking(self, cold: Cold) -> None:
        """Bring the bytes of a file back into the source. Raises OSError."""
        store, origin = self.who_has(cold.stub)
        try:
            with self.source.path_of(cold.ref) as path:
                store.recall(path, origin)
            self.source.settle(cold.ref)
        except TierdError as error:
            log.error("recall_failed", path=display(origin.path), reason=str(error), hint=error.hint)
            raise OSError(errno.EIO, str(error)) from None

    async def _brought(self, cold: Cold, uid: int) -> NoReturn:
        """Wait until the bytes are in the source, and have the kernel ask again. Raises Moved, OSError (EDQUOT)."""
        try:
            ref = cold.ref._replace(fd=os.dup(cold.ref.fd))
        except OSError:  # the directory went in between, and its descriptor with it
            raise Moved from None
        try:
            size = cold.stub.origin.size if cold.stub.origin is not None else 0
            async with self._bounds.turn(uid, size):
                await self._run(self._recall_blocking, Cold(ref, cold.stub), limiter=self.recall_limit)
        finally:
            os.close(ref.fd)
        raise Moved


def program_of(pid: int) -> str:
    """The name of a process, proc(5); empty if it is not in sight."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return ""
