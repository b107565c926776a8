"""The daemon's side of its keeper: what it is given at the start, what it gives to be held, and that it is alive."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog
import trio

from tierd.errors import DaemonError
from tierd.node import packets
from tierd.node.estate import Estate, compacted
from tierd.node.ledger import Ledger

log = structlog.get_logger(__name__)

_BEAT_SECONDS = 2.0
_UNDROPPED_MAX = 100_000
_LEDGER_BYTES_MAX = 4 << 20
"""A longer ledger is compacted, if it says more than twice what it must. A successor reads it while everybody waits:
4 MiB in a tenth of a second."""
_COMPACT_CHECK_SECONDS = 5.0
_INHERITED_BYTES_PER_NODE = 512
"""An inherited ledger that is longer than that, and this for each node, is made short before it is gone on with."""


class Keeping:
    """One connection to a keeper. `told` is what the daemons of this mount tell each other, `held` the descriptors that
    the keeper had; both from `attach` on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.told: dict[str, Any] = {}
        self.held: dict[int, int] = {}
        self.keeper_pid: int | None = None
        self.alone = False
        """The keeper is gone: there is nobody to hold anything for a successor."""
        self.restarts = 0
        self._undropped: deque[int] = deque(maxlen=_UNDROPPED_MAX)
        self.missed_sends = 0
        """Descriptors that the keeper could not be given: their files may not outlive this daemon."""

    def attach(self) -> None:
        """Ask for everything, and wait for it: until another daemon has left. Raises DaemonError."""
        try:
            packets.send(self._sock, b"P%d" % os.getpid())
            message, _ = packets.receive(self._sock)
            if message[:1] != b"J":
                raise EOFError("it wants no daemon any more" if message else "it is gone")
            found = json.loads(message[1:])
            self.held = packets.receive_held(self._sock)
        except (OSError, EOFError) as error:
            raise DaemonError(f"the keeper of the mount does not answer: {error}", hint="its log says more") from None
        self.told, self.restarts, self.keeper_pid = found["told"], found["restarts"], found["keeper_pid"]

    @property
    def device(self) -> int:
        """The FUSE device."""
        return self.held[packets.DEVICE]

    def listener(self, key: int, family: socket.AddressFamily) -> socket.socket:
        """A listening socket that the keeper holds."""
        return socket.socket(family, socket.SOCK_STREAM, fileno=self.held[key])

    # --- what it gives; any thread ---

    def _send(self, data: bytes, fd: int | None = None) -> bool:
        """False if the keeper is gone or does not listen: nothing waits for it."""
        try:
            packets.send(self._sock, data, () if fd is None else (fd,), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def hold(self, key: int, fd: int) -> None:
        """Keep a duplicate of `fd` for successors."""
        if not self._send(b"h%d" % key, fd) and not self.alone:
            self.missed_sends += 1

    def drop(self, key: int) -> None:
        """It is not needed any longer."""
        if not self._send(b"d%d" % key) and not self.alone:
            self._undropped.append(key)

    def _drop_again(self) -> None:
        for _ in range(len(self._undropped)):
            self.drop(self._undropped.popleft())

    def keep_ledger(self, fd: int) -> None:
        """This is the ledger from now on. Raises OSError."""
        if not self.alone:
            packets.send(self._sock, b"L", (fd,))

    def ready(self, *, resend: bool) -> None:
        """The mount answers; `resend`: a successor can go on from the ledger."""
        self._send(b"r%d" % resend)

    def leave(self) -> None:
        """This daemon ends for another one to go on."""
        self._send(b"l")

    def farewell(self, code: int) -> None:
        """This daemon ends for good, with this exit code."""
        self._send(b"q%d" % code)

    def shorten(self, ledger: Ledger, said: Estate) -> None:
        """Go on in a new log if the one that was left says much that is over. `said` is all that it says. Where daemons
        die every few seconds none of them would come to `compact`."""
        if ledger.lost or said.end <= _LEDGER_BYTES_MAX + _INHERITED_BYTES_PER_NODE * len(said.nodes):
            return
        fresh = Ledger()
        said.write(fresh)
        with suppress(OSError):  # the keeper has died; the long one will do
            ledger.replace(fresh, said.end, self.keep_ledger)

    # --- tasks ---

    async def run(
        self,
        stop: Callable[[], None],
        leave: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
        gone: Callable[[], Awaitable[None]],
    ) -> None:
        """Say that the event loop turns; do what the keeper says, until cancelled. `changed`: it is another one;
        `gone`: there is none any more, which ends this."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            await self._heed(stop, leave, changed)
            nursery.cancel_scope.cancel()
        await gone()

    async def _heed(
        self, stop: Callable[[], None], leave: Callable[[], Awaitable[None]], changed: Callable[[], None]
    ) -> None:
        while not self.alone:
            await trio.lowlevel.wait_readable(self._sock)
            message = self._hear()
            if message == b"s":
                stop()
            elif message == b"l":
                await leave()
            elif message[:1] == b"k":
                self.keeper_pid = int(message[1:])
                changed()
            elif not message:
                self.keeper_pid, self.alone = None, True

    def _hear(self) -> bytes:
        """What the keeper says, nothing if it is gone."""
        try:
            return packets.receive(self._sock)[0]
        except ConnectionResetError:  # before it heard all that we said
            return b""

    async def _beat(self) -> None:
        while True:
            self._send(b"b")
            self._drop_again()
            await trio.sleep(_BEAT_SECONDS)

    async def compact(self, ledger: Ledger) -> None:
        """Keep a ledger short, until cancelled."""
        short = 0
        while True:
            await trio.sleep(_COMPACT_CHECK_SECONDS)
            if ledger.end > max(_LEDGER_BYTES_MAX, 2 * short) and not ledger.lost:
                long = ledger.end
                short = await trio.to_thread.run_sync(self._compact_blocking, ledger)
                log.info("ledger_compacted", bytes_before=long, bytes_after=short)

    def _compact_blocking(self, ledger: Ledger) -> int:
        fresh, since = compacted(ledger)
        ledger.replace(fresh, since, self.keep_ledger)
        return ledger.end
