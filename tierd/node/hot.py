"""The short way for hot files: LOOKUP, OPEN and RELEASE answered where they are read from the device.

A request that goes through libfuse and the event loop wakes six threads one after the other; loading a model of 16
shards spends more time there than in copying its bytes. So once a copy was opened the long way, and the kernel
reads it by itself, its node is *published* here, and a pump that reads a request for it from the device answers it
after the same checks: the name still leads to that inode, the source's version (asked past every cache) is the node's,
the copy's seal is unbroken. Anything else goes the long way.

What was done here is told to the event loop by events, which the overlay takes (`take_events`) before it handles
anything: an event is there before the kernel can act on the answer, so nothing is ever seen out of order.

Contract: `publish`, `withdraw`, `take_events` belong to the trio thread, `lookup`, `open`, `release` to the pumps.
One lock; nothing is done under it that could wait. After `withdraw` no answer is given for the node, and all that were
are among the events.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from tierd.node.caller import pod_of
from tierd.node.inodes import Node, pack
from tierd.node.ledger import HANDLE, HandleRecord, Ledger
from tierd.node.sources import Key, version_of
from tierd.node.store import Copy, seal_of
from tierd.syscalls import forced_stat

HOT_MAX: Final = 1024
"""Files published at once, each with a descriptor of its copy; the one used least recently goes first."""
_NAMES_MAX: Final = 8192
_PODS_MAX: Final = 4096
_POD_SECONDS: Final = 1.0
FIRST_FH: Final = 1 << 48
"""Handles that are given out here begin there, the overlay's own at 1."""

_ENTRY_OUT = struct.Struct("=QQQQIIQQQQQQIIIIIIIIII")
"""struct fuse_entry_out of include/uapi/linux/fuse.h: node ID, generation, validity of entry and attributes; then
struct fuse_attr: ino, size, blocks, times, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags."""
NS: Final = 1_000_000_000
_U64: Final = (1 << 64) - 1
"""Times before 1970 are negative, and go as two's complement."""


class Event(NamedTuple):
    """What was answered: a lookup of the node, an open with handle `fh`, or its release."""

    what: Literal["lookup", "open", "release"]
    node: Node
    fh: int = 0
    uid: int = 0
    pod: str | None = None
    attributes: os.stat_result | None = None
    copy: Copy | None = None


class HotName:
    """A name that LOOKUP may be answered for: entry `name` of the directory behind `dir_fd`."""

    __slots__ = ("dir_fd", "key", "name", "node", "parent_id", "version")

    def __init__(self, node: Node, parent_id: int, dir_fd: int, version: int | None) -> None:
        self.node = node
        self.key: Key = node.key
        self.parent_id = parent_id
        self.name = node.name
        self.dir_fd = dir_fd
        self.version = version


class HotFile:
    """A published file. `copy_fd` is a descriptor of the copy, `backing_id` the kernel's; both live until withdrawn."""

    __slots__ = ("backing_id", "copy", "copy_fd", "name")

    def __init__(self, name: HotName, copy: Copy, copy_fd: int, backing_id: int) -> None:
        self.name = name
        self.copy = copy
        self.copy_fd = copy_fd
        self.backing_id = backing_id

    def record(self, fh: int) -> HandleRecord:
        """What a successor must know of an open of it."""
        copy = os.fsencode(self.copy.name)
        return HandleRecord(fh, self.name.node.id, False, False, False, True, copy, self.copy.model)


class HotFiles:
    """See the module. Timeouts are what the kernel may rely on, in seconds. `wake`, called with the
    lock held, makes the event loop take events soon."""

    def __init__(
        self,
        key_of: Callable[[os.stat_result], Key],
        wake: Callable[[], None],
        *,
        attr_timeout_s: float,
        entry_timeout_s: float,
        ledger: Ledger | None = None,
    ) -> None:
        self._ledger = ledger or Ledger()
        self._key_of = key_of
        self._wake = wake
        self._attr_valid = divmod(int(attr_timeout_s * NS), NS)
        self._entry_valid = divmod(int(entry_timeout_s * NS), NS)
        self._lock = threading.Lock()
        self._files: OrderedDict[int, HotFile] = OrderedDict()
        self._names: OrderedDict[tuple[int, bytes], HotName] = OrderedDict()
        self._name_of_node: dict[int, HotName] = {}
        self._opens: dict[int, HotFile] = {}
        self._events: deque[Event] = deque()
        self._next_fh = FIRST_FH
        self._pods: dict[int, tuple[float, str | None]] = {}
        self.long_way: set[int] = set()
        """Threads whose next open the event loop waits for. It alone changes this."""
        self.opens = 0
        self.lookups = 0

    def __len__(self) -> int:
        return len(self._files)

    # --- the event loop's side ---

    def publish_name(self, node: Node, parent: Node, dir_fd: int, *, directory: bool) -> HotName:
        """Answer LOOKUP of a node's latest name; `dir_fd`, of its parent, is duplicated. Attributes of others than
        directories must be those of the node's version."""
        known = self._name_of_node.get(node.id)
        if known is not None and (known.parent_id, known.name) == (parent.id, node.name):
            return known
        self.withdraw_name(node.id)
        made = HotName(node, parent.id, os.dup(dir_fd), None if directory else node.version)
        with self._lock:
            self._names[parent.id, node.name] = made
            self._name_of_node[node.id] = made
        if len(self._names) > _NAMES_MAX:
            self.withdraw_name(next(iter(self._names.values())).node.id)
        return made

    def publish(self, name: HotName, copy: Copy, copy_fd: int, backing_id: int) -> list[int]:
        """Answer OPEN of a file, too; `copy_fd` is ours from now on. Nodes that must be withdrawn to keep the bound."""
        with self._lock:
            self._files[name.node.id] = HotFile(name, copy, copy_fd, backing_id)
            surplus = len(self._files) - HOT_MAX
            return [node_id for node_id, _ in zip(self._files, range(surplus), strict=False)]

    def is_published(self, node_id: int) -> bool:
        """True if OPEN of the node is answered here."""
        return node_id in self._files

    def withdraw(self, node_id: int) -> bool:
        """Answer nothing more for a node; True if its file was published (then its backing has one user fewer)."""
        self.withdraw_name(node_id)
        with self._lock:
            hot = self._files.pop(node_id, None)
        if hot is not None:
            os.close(hot.copy_fd)
        return hot is not None

    def withdraw_name(self, node_id: int) -> None:
        """Answer no LOOKUP that leads to a node."""
        with self._lock:
            name = self._name_of_node.pop(node_id, None)
            if name is None:
                return
            if self._names.get((name.parent_id, name.name)) is name:
                del self._names[name.parent_id, name.name]
        os.close(name.dir_fd)

    def nodes_of(self, copy: Copy) -> list[int]:
        """The published nodes that read a copy."""
        with self._lock:
            return [node_id for node_id, hot in self._files.items() if hot.copy is copy]

    def number_from(self, first: int) -> None:
        """Give out no handle that a daemon before this one did."""
        self._next_fh += first

    def take_events(self) -> list[Event]:
        """What was answered since the last call, in order."""
        if not self._events:
            return []
        with self._lock:
            taken = list(self._events)
            self._events.clear()
        return taken

    def close(self) -> None:
        """Withdraw everything."""
        for node_id in [*self._files, *self._name_of_node]:
            self.withdraw(node_id)

    # --- the pumps' side ---

    def lookup(self, parent_id: int, name: bytes, claim: Callable[[], bool]) -> bytes | None:
        """The body of the answer to LOOKUP, None for the long way. `claim` is asked before anything is counted."""
        found = self._names.get((parent_id, name))
        if found is None:
            return None
        try:
            st = os.stat(name, dir_fd=found.dir_fd, follow_symlinks=False)
        except OSError:
            return None
        if self._key_of(st) != found.key or found.version not in (None, pack(version_of(st))):
            return None
        with self._lock:
            if self._names.get((parent_id, name)) is not found or not claim():
                return None
            self._tell(Event("lookup", found.node))
            self.lookups += 1
        return self._entry(found.node.id, st)

    def open(self, node_id: int, uid: int, pid: int, claim: Callable[[], bool]) -> tuple[int, int] | None:
        """A handle and the backing ID for an OPEN that reads, None for the long way."""
        hot = self._files.get(node_id)
        if hot is None or hot.copy.removed or pid in self.long_way:
            return None
        name = hot.name
        try:
            st = forced_stat(name.dir_fd, name.name)
            intact = seal_of(os.fstat(hot.copy_fd)) == hot.copy.seal
        except OSError:
            return None
        if not intact or self._key_of(st) != name.key or pack(version_of(st)) != name.version:
            return None
        pod = self._pod_of(pid)
        with self._lock:
            current = self._files.get(node_id) is hot and self._name_of_node.get(node_id) is name
            if not current or not claim():
                return None
            self._next_fh += 1
            fh = self._next_fh
            self._opens[fh] = hot
            self._files.move_to_end(node_id)
            self._ledger.append(HANDLE, hot.record(fh).pack())
            self._tell(Event("open", name.node, fh, uid, pod, st, hot.copy))
            self.opens += 1
        return fh, hot.backing_id

    def _pod_of(self, pid: int) -> str | None:
        """Asked of each process once a second: a loader opens many files. Two pumps may both ask; no harm is done."""
        now = time.monotonic()
        known = self._pods.get(pid)
        if known is None or now - known[0] > _POD_SECONDS:
            if len(self._pods) >= _PODS_MAX:
                self._pods.clear()
            known = self._pods[pid] = now, pod_of(pid)
        return known[1]

    def release(self, fh: int) -> bool:
        """True if the handle was given out here; it is gone now."""
        with self._lock:
            hot = self._opens.pop(fh, None)
            if hot is None:
                return False
            self._ledger.closed(fh)
            self._tell(Event("release", hot.name.node, fh))
        return True

    def _tell(self, event: Event) -> None:
        """The event loop is woken for the first of several events only; nothing depends on when it takes them."""
        first = not self._events
        self._events.append(event)
        if first:
            self._wake()

    def _entry(self, node_id: int, st: os.stat_result) -> bytes:
        (attr_s, attr_ns), (entry_s, entry_ns) = self._attr_valid, self._entry_valid
        return _ENTRY_OUT.pack(
            node_id, 0, entry_s, attr_s, entry_ns, attr_ns, node_id, st.st_size, st.st_blocks,
            st.st_atime_ns // NS & _U64, st.st_mtime_ns // NS & _U64, st.st_ctime_ns // NS & _U64,
            st.st_atime_ns % NS, st.st_mtime_ns % NS, st.st_ctime_ns % NS,
            st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0,
        )  # fmt: skip
