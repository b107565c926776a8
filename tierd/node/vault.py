"""What a keeper holds: descriptors by key, the mount among them. Standard library only.

Nothing here waits for a file system: what is let go of is closed by a thread of its own, because closing a file asks
the file system it lies on, which may hang.
"""

from __future__ import annotations

import os
import queue
import threading
from contextlib import suppress

from tierd.node.device import open_device, unmount
from tierd.node.ledger import Ledger
from tierd.node.packets import DEVICE, FIRST_HANDLE, LEDGER, LOCKS
from tierd.node.standin import StandIn


class Vault:
    """See the module. `stand_in` answers the kernel while no daemon does."""

    def __init__(self, held: dict[int, int], mountpoint: str, *, allow_other: bool) -> None:
        """Go on with what another keeper held; mount if there is no device among it. Raises MountError."""
        self.held = held
        self.stand_in: StandIn | None = None
        self._mountpoint = mountpoint
        self._allow_other = allow_other
        self._closing: queue.SimpleQueue[int] = queue.SimpleQueue()
        if DEVICE not in held:
            held[DEVICE] = open_device(mountpoint, allow_other=allow_other)
        threading.Thread(target=self._close_slowly, daemon=True).start()

    @property
    def device(self) -> int:
        """The FUSE device."""
        return self.held[DEVICE]

    def hold(self, key: int, fd: int) -> None:
        """Keep a descriptor, in the place of the one that had its key."""
        self.drop(key)
        self.held[key] = fd

    def drop(self, key: int) -> None:
        """Let go of a descriptor."""
        if key in self.held:
            self._closing.put(self.held.pop(key))

    def _close_slowly(self) -> None:
        while True:
            with suppress(OSError):  # what was written late is lost, close(2); the others are to be closed nevertheless
                os.close(self._closing.get())

    def for_daemons(self) -> dict[int, int]:
        """What every daemon gets. Not the locks: one that cannot die would hold them for ever."""
        return {key: fd for key, fd in self.held.items() if key not in LOCKS}

    def remount(self) -> None:
        """Begin anew: requests in work fail, open files are lost. Raises MountError."""
        unmount(self._mountpoint)
        for key in [key for key in self.held if key in (DEVICE, LEDGER) or key >= FIRST_HANDLE]:
            self.drop(key)
        self.held[DEVICE] = open_device(self._mountpoint, allow_other=self._allow_other)

    def stand_by(self) -> StandIn:
        """Nobody else answers the kernel for now."""
        self.stand_in = StandIn(self.device, Ledger(os.dup(self.held[LEDGER])))
        return self.stand_in

    def relieve(self) -> None:
        """A daemon answers again."""
        if self.stand_in is not None:
            self.stand_in.close()
            self.stand_in = None

    def unmount(self) -> None:
        """The end."""
        unmount(self._mountpoint)
