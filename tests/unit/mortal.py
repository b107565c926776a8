"""An overlay whose daemon dies: at any record of its ledger, and at any moment between a request and its answer.

The kernel's side stays: what it was told, what it has open, which backings it holds. The seam's part is played here:
what a reply tells is logged before it is given, and what was not answered is sent again to the next daemon.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.unit.conftest import Bench, Reads
from tests.unit.kernel import FakeKernel
from tierd.node.backings import Backings
from tierd.node.cold_source import ColdSource
from tierd.node.estate import Estate, Said, read
from tierd.node.heir import Heir, inherit, intents_of
from tierd.node.hot import HotFiles
from tierd.node.journal import Journal
from tierd.node.ledger import RESENT, Ledger
from tierd.node.once import Once
from tierd.node.opens import OpenedFile
from tierd.node.overlay import Overlay
from tierd.node.reach import Caller, Entry

_ONCE = frozenset(
    {"setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "removexattr", "create"}
)
_REQUESTS = _ONCE | {
    "lookup", "getattr", "readlink", "open", "read", "write", "flush", "release", "fsync", "opendir", "list_some",
    "releasedir", "statfs", "getxattr", "listxattr", "setxattr",
}  # fmt: skip


class Killed(BaseException):
    """The daemon died at this instruction."""


class Death(NamedTuple):
    """How a daemon ends: with which record of its ledger, before or after it is there; what the next one does first."""

    after_records: int
    written: bool
    compacted: bool = False
    taken_back_first: bool = True


class MortalLedger(Ledger):
    """Dies with one of its records; nothing is heard of whoever goes on with it after that."""

    death: Death | None = None
    dead = False
    written = 0

    def append(self, kind: int, payload: bytes) -> None:
        """See Ledger. Raises Killed."""
        if self.dead:
            raise Killed
        last = self.death is not None and self.written >= self.death.after_records
        if last and self.death is not None and not self.death.written:
            self.die()
        super().append(kind, payload)
        self.written += 1
        if last:
            self.die()

    def die(self) -> None:
        """Now. Raises Killed."""
        self.dead = True
        raise Killed


class Keep:
    """A keeper: descriptors by key. Deaf to daemons that are dead."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def holder(self, ledger: MortalLedger) -> KeepFor:
        """For one daemon."""
        return KeepFor(self, ledger)


class KeepFor:
    """See Keep."""

    def __init__(self, keep: Keep, ledger: MortalLedger) -> None:
        self._keep = keep
        self._ledger = ledger

    def hold(self, key: int, fd: int) -> None:
        """Keep a duplicate."""
        if not self._ledger.dead:
            assert key not in self._keep.held, "a handle is used once"
            self._keep.held[key] = os.dup(fd)

    def drop(self, key: int) -> None:
        """Let go of it."""
        if not self._ledger.dead and key in self._keep.held:
            os.close(self._keep.held.pop(key))


class KernelBackings:
    """The kernel's backings: IDs in order, none closed under an open. `opens` are the handles it has, with theirs."""

    def __init__(self) -> None:
        self.last = 0
        self.live: set[int] = set()
        self.opens: dict[int, int] = {}

    def open(self) -> int:
        """FUSE_DEV_IOC_BACKING_OPEN."""
        self.last += 1
        self.live.add(self.last)
        return self.last

    def close(self, backing_id: int) -> None:
        """FUSE_DEV_IOC_BACKING_CLOSE."""
        assert backing_id not in self.opens.values(), "closed under an open: later opens are EIO"
        if backing_id not in self.live:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.live.discard(backing_id)


class MortalBackings(Backings):
    """See Backings, with `KernelBackings` for a device."""

    def __init__(self, ledger: Ledger, kernel: KernelBackings) -> None:
        super().__init__(-1, ledger)
        self._kernel = kernel

    def _open(self, fd: int) -> int | None:
        os.fstat(fd)
        return self._kernel.open()

    def _close(self, backing_id: int) -> None:
        self._kernel.close(backing_id)

    def users(self) -> Counter[int]:
        """How many opens use the backing of each node."""
        return Counter({node_id: users for node_id, (_, users) in self._held.items()})


class MortalReads(Reads):
    """See Reads; backings are those of a kernel that outlives it, and so are the modes of opens."""

    def __init__(self, backings: MortalBackings, passed_through: dict[int, int], *, offers: bool) -> None:
        self.backings = backings
        super().__init__()
        self.offers = offers
        self.passed_through = passed_through

    @property  # type: ignore[override]
    def backed(self) -> Counter[int]:
        return self.backings.users()

    @backed.setter
    def backed(self, value: Counter[int]) -> None:
        assert not value

    def back(self, node_id: int, fd: int) -> int | None:
        return self.backings.acquire(node_id, fd) if self.offers else None

    def unback(self, node_id: int) -> None:
        self.backings.release(node_id)


class Mortal:
    """What stands for the overlay: requests go to the daemon of the day, all else is that of its overlay."""

    def __init__(self, beneath: Path, deaths: Sequence[Death], *, passthrough: bool = False) -> None:
        self.beneath = beneath
        self.source = ColdSource(beneath)
        self.deaths = list(deaths)
        self.keep = Keep()
        self.kernel_backings = KernelBackings()
        self.passed_through: dict[int, int] = {}
        self.generation = 0
        self.passthrough = passthrough
        self._unique = 0
        self.doubtful: dict[int, Said] = {}
        self.known: set[int] = set()
        """Handles that the kernel has."""
        self._start(None)

    def __getattr__(self, name: str) -> Any:
        if name not in _REQUESTS:
            return getattr(self.overlay, name)

        def request(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            return self._ask(name, *args, **kwargs)

        return request

    # --- lives ---

    def _start(self, fd: int | None) -> None:
        """A daemon that goes on with a ledger."""
        estate = read(fd) if fd is not None else Estate()
        self.ledger = ledger = MortalLedger(fd)
        ledger.death = self.deaths.pop(0) if self.deaths else None
        once = Once(ledger, self.source.key, intents_of(estate))
        self.backings = MortalBackings(ledger, self.kernel_backings)
        self.reads = MortalReads(self.backings, self.passed_through, offers=self.passthrough)
        holder = self.keep.holder(ledger)
        self.overlay = Overlay(
            self.source, Journal(1000), self.reads, event_dropped=lambda: None, now_ns=lambda: 42, ledger=ledger,
            once=once, holder=holder,
        )  # fmt: skip
        if fd is not None:
            self._inherit(estate, holder)

    def _inherit(self, estate: Estate, holder: KeepFor) -> None:
        held = {key: os.dup(fd) for key, fd in self.keep.held.items()}
        self.hot = HotFiles(self.source.key, lambda: None, attr_timeout_s=1.0, entry_timeout_s=1.0, ledger=self.ledger)
        inherit(Heir(self.overlay, self.hot, self.backings, held, {}, holder.drop), estate, self.generation)
        self.doubtful = dict(estate.doubtful)

    def die(self) -> None:
        """The process ends with all its descriptors, and the next one takes over, until one lives to serve."""
        while True:
            death, self.ledger.dead = self.ledger.death, True
            self._close_all()
            fd = os.dup(self.ledger.fd)
            self.ledger.close()
            if death is not None and death.compacted:
                fd = _shortened(fd)
            self.generation += 1
            try:
                self._start(fd)
            except Killed:
                continue
            return

    def _close_all(self) -> None:
        """What the end of a process does. The keeper's descriptors are in this one, too."""
        join_closers()
        keep = {self.source.root_fd, *self.keep.held.values()}
        for fd in self.descriptors() - keep:
            os.close(fd)

    def descriptors(self) -> set[int]:
        """Those of the source that are open."""
        found, top = set(), os.fspath(self.beneath)
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
            if target == top or target.startswith(f"{top}/"):
                found.add(int(name))
        return found

    # --- requests ---

    async def _ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """One request, sent until it is answered."""
        self._unique += 2
        unique = self._unique
        while True:
            try:
                return await self._handled(name, unique, *args, **kwargs)
            except Killed:
                self.die()
                unique = self._unique | RESENT

    async def _handled(self, name: str, unique: int, *args: Any, **kwargs: Any) -> Any:
        overlay, death = self.overlay, self.ledger.death
        said = self.doubtful.pop(unique & ~RESENT, None) if unique & RESENT else None
        if said is not None:
            self.ledger.unsaid(unique)
            if death is None or death.taken_back_first:
                await overlay.take_back(said)
        if name in _ONCE:
            args, kwargs = _numbered(name, unique, args, kwargs)
        try:
            answer = await (self._list_some if name == "list_some" else getattr(overlay, name))(*args, **kwargs)
        except OSError:
            answer = None
            raise
        finally:
            if said is not None and death is not None and not death.taken_back_first and not self.ledger.dead:
                await overlay.take_back(said)
        self._say(unique, name, answer)
        self._heard(name, answer, *args)
        return answer

    def _say(self, unique: int, name: str, answer: Any) -> None:
        ids, fh = _told(name, answer)
        if ids or fh:
            self.ledger.said(unique, ids, fh)

    def _heard(self, name: str, answer: Any, *args: Any) -> None:
        """The answer has reached the kernel."""
        fh = _told(name, answer)[1]
        if fh:
            self.known.add(fh)
        if fh in self.passed_through:
            self.kernel_backings.opens[fh] = self.passed_through[fh]
        if name in ("release", "releasedir"):
            self.known.discard(args[0])

    async def _list_some(self, fh: int, start: int, room: int) -> list[tuple[bytes, os.stat_result, int, int]]:
        entries: list[tuple[bytes, os.stat_result, int, int]] = []

        def reply(name: bytes, st: os.stat_result, node_id: int, position: int) -> bool:
            if len(entries) == room:
                return False
            entries.append((name, st, node_id, position))
            return True

        await self.overlay.readdir(fh, start, reply)
        return entries

    async def release(self, fh: int) -> None:
        """The kernel has let go of the backing before it says so."""
        self.kernel_backings.opens.pop(fh, None)
        await self._ask("release", fh)

    def forget(self, node_id: int, count: int) -> None:
        """Never sent again: one that was read and not written down is lost, and its node with it."""
        death = self.ledger.death
        self.ledger.death = death._replace(written=True) if death is not None else None
        try:
            self.ledger.forgot([(node_id, count)])
            self.overlay.forget(node_id, count)
        except Killed:
            self.die()


class MortalKernel(FakeKernel):
    """See FakeKernel; listings come in whole replies, as they do."""

    async def list_some(self, fh: int, start: int, per_reply: int, names: list[bytes]) -> int:
        """See FakeKernel."""
        entries = await self.overlay.list_some(fh, start, per_reply)  # type: ignore[attr-defined]
        for name, st, node_id, _ in entries:
            if name not in (b".", b".."):
                self.counted(Entry(node_id, st))
                names.append(name)
        return entries[-1][3] if entries else start


class MortalBench(Bench):
    """See Bench."""

    def __init__(self, mortal: Mortal) -> None:
        self.mortal = mortal
        self.beneath = mortal.beneath
        self.overlay = mortal  # type: ignore[assignment]
        self.kernel = MortalKernel(mortal)  # type: ignore[arg-type]
        self.events_dropped = 0

    @property  # type: ignore[override]
    def reads(self) -> Reads:
        return self.mortal.reads


def make_mortal(beneath: Path, deaths: Sequence[Death], *, passthrough: bool = False) -> MortalBench:
    """An overlay over `beneath` whose daemons die so."""
    return MortalBench(Mortal(beneath, deaths, passthrough=passthrough))


def join_closers() -> None:
    """Descriptors that nobody inherits are closed by a thread."""
    for thread in threading.enumerate():
        if thread.name == "heir-close":
            thread.join()


def _shortened(fd: int) -> int:
    """A compacted ledger."""
    short = Ledger()
    read(fd).write(short)
    os.close(fd)
    short_fd = os.dup(short.fd)
    short.close()
    return short_fd


def _numbered(name: str, unique: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """With the number of the request, where the overlay wants it."""
    if any(isinstance(arg, Caller) for arg in args):
        return tuple(arg._replace(unique=unique) if isinstance(arg, Caller) else arg for arg in args), kwargs
    return args, {**kwargs, "unique": unique}


def _told(name: str, answer: Any) -> tuple[list[int], int]:
    """The nodes and the handle that an answer tells of."""
    if isinstance(answer, Entry):
        return ([answer.node_id] if name not in ("getattr", "setattr") else []), 0
    if isinstance(answer, OpenedFile):
        return [], answer.fh
    if name == "opendir":
        return [], answer
    if name == "create":
        return [answer[1].node_id], answer[0].fh
    if name == "list_some":
        return [node_id for entry, _, node_id, _ in answer if entry not in (b".", b"..")], 0
    return [], 0


Steps = Callable[[MortalBench], Awaitable[None]]
