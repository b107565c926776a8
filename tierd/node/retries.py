"""Second tries: the kernel answers ESTALE to an open by looking the name up again and opening what that finds, once.

Whatever happens to the name in between, what it found is open to that thread: the name meant it during its open(2).
So the file is opened at the lookup already, and kept for the open that comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import trio

from tierd.node.handles import close_soon

TRIES_MAX = 1024
"""As many threads may read a file when it leaves the node tier. Each holds a descriptor, for a moment."""
TRY_SECONDS = 5.0
"""Far more than the kernel takes from the one request to the next, also on a machine with twenty times the work that it
can do. A file may be kept longer, until the next call."""
KEPT_SECONDS = 0.5
"""How old what was found may be when it is opened. An open that follows later is another one, of a thread that was not
allowed to open what it found."""


class _Try:
    __slots__ = ("fd", "kept_until", "node_id", "until")

    def __init__(self) -> None:
        self.until = trio.current_time() + TRY_SECONDS
        self.node_id = 0
        self.fd = -1
        self.kept_until = 0.0


class SecondTries:
    """By thread ID, as requests carry it (0, a thread of a PID namespace that is not ours, has none)."""

    def __init__(self, threads: set[int]) -> None:
        """`threads` is kept to those that have a second try: their opens must come here, however hot the file. One that
        did not would leave what was kept for it to a later open, which would see what is over."""
        self._tries: OrderedDict[int, _Try] = OrderedDict()
        self._threads = threads

    def __len__(self) -> int:
        return len(self._tries)

    def sent_back(self, pid: int) -> None:
        """An open of this thread is answered ESTALE."""
        if pid:
            self._drop_while(lambda oldest: oldest.until <= trio.current_time() or len(self) >= TRIES_MAX)
            self._end(pid)
            self._tries[pid] = _Try()
            self._threads.add(pid)

    def awaits(self, pid: int) -> bool:
        """A file that this thread looks up is to be kept."""
        return pid in self._tries

    def keep(self, pid: int, node_id: int, fd: int) -> None:
        """What the lookup found. `fd` is ours from now on."""
        found = self._tries.get(pid)
        if found is None:
            close_soon(fd)
            return
        if found.fd >= 0:
            close_soon(found.fd)
        found.node_id, found.fd = node_id, fd
        found.kept_until = trio.current_time() + KEPT_SECONDS

    def take(self, pid: int, node_id: int) -> int | None:
        """The thread opens: the descriptor kept for that, now the caller's to close."""
        if not self._tries:
            return None
        self._drop_while(lambda oldest: oldest.until <= trio.current_time())
        found = self._tries.get(pid)
        stale = found is not None and found.kept_until < trio.current_time()
        if found is None or found.fd < 0 or found.node_id != node_id or stale:
            self._end(pid)
            return None
        del self._tries[pid]
        self._threads.discard(pid)
        return found.fd

    def _drop_while(self, too_old: Callable[[_Try], bool]) -> None:
        while self._tries and too_old(next(iter(self._tries.values()))):
            self._end(next(iter(self._tries)))

    def _end(self, pid: int) -> None:
        ended = self._tries.pop(pid, None)
        self._threads.discard(pid)
        if ended is not None and ended.fd >= 0:
            close_soon(ended.fd)
