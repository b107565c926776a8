"""What a successor must know if this daemon dies at this instruction: an append-only log in memory that outlives it.

The log is a memfd that the keeper holds, too. A record is written by stores into a mapping, its header last, so a kill
between any two instructions leaves either the whole record or none of it. Nothing is synced: the kernel's side of the
mount does not outlive the machine either. `estate.py` reads it, and makes it short again once it is long.

What is known of a node, a handle, a backing or the attributes of a node is written whole each time; the last record
counts. Lookups are counted by what was *said*: a reply with entries is logged right before it is written to the device,
under the request's unique number. If the kernel sends that request again (FUSE_NOTIFY_RESEND), the reply was not
delivered, and what it said is taken back. Only the last few can be in doubt.

Contract: any thread may append.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

WINDOW_BYTES: Final = 1 << 20
"""Part of the log that is mapped at a time; no record crosses from one to the next."""
_HEADER = struct.Struct("=I")
"""Length of the payload << 8 | kind; 0 is the end of the log."""
IDS_MAX = 8192

INIT, NODE, ATTRIBUTES, SAID, FORGOT, HANDLE, CLOSED, BACKING, INTENT, DONE, LISTED, COUNT, UNSAID = range(1, 14)
_SKIP, FAILED = range(14, 16)

ID = struct.Struct("=Q")
PAIR = struct.Struct("=QQ")
COUNTED = struct.Struct("=Qq")
"""node ID, and lookups; negative where a doubtful reply that follows makes up for it."""
SAID_HEAD = struct.Struct("=QQ")
"""unique, and the handle that the reply carries (0: none); node IDs follow."""


ROOT_ID: Final = 1
RESENT: Final = 1 << 63
"""Set in the unique number of a request that the kernel sends again; nothing here is told under such a number."""


class NodeRecord(NamedTuple):
    """One node: its ID, its source inode as (device, number) with device 0 for the source's own, the version it stands
    for (an integer of 192 bits), whether it is retired, and the names it was seen under, as (parent ID, name), the
    latest first."""

    node_id: int
    key: tuple[int, int]
    version: int | None
    retired: bool
    names: tuple[tuple[int, bytes], ...]

    def pack(self) -> bytes:
        """The payload of a NODE record."""
        flags = (self.version is not None) | self.retired << 1
        head = _NODE.pack(self.node_id, *self.key, flags, (self.version or 0).to_bytes(_VERSION_BYTES, "little"))
        return head + b"".join(_NAME.pack(parent_id, len(name)) + name for parent_id, name in self.names)

    @staticmethod
    def unpack(payload: bytes) -> NodeRecord:
        """The record that a payload holds."""
        node_id, device, inode, flags, version = _NODE.unpack_from(payload)
        names, at, end = [], _NODE.size, len(payload)
        while at < end:
            parent_id, length = _NAME.unpack_from(payload, at)
            at += _NAME.size + length
            names.append((parent_id, payload[at - length : at]))
        known = int.from_bytes(version, "little") if flags & 1 else None
        return NodeRecord(node_id, (device, inode), known, bool(flags & 2), tuple(names))

    @staticmethod
    def parents_in(payload: bytes) -> list[int]:
        """The node IDs of the directories that a payload names; nothing else of it is looked at."""
        parents, at = [], _NODE.size
        while at < len(payload):
            parent_id, length = _NAME.unpack_from(payload, at)
            at += _NAME.size + length
            parents.append(parent_id)
        return parents


_VERSION_BYTES = 24
_NODE = struct.Struct(f"=QQQB{_VERSION_BYTES}s")
_NAME = struct.Struct("=QH")


class HandleRecord(NamedTuple):
    """One handle: of a directory or a file, how it was opened, what it holds a lease on, and the file name of the copy
    that it reads (empty: none)."""

    fh: int
    node_id: int
    is_dir: bool
    writable: bool
    dirty: bool
    backed: bool
    copy: bytes
    model: bytes | None

    def pack(self) -> bytes:
        """The payload of a HANDLE record."""
        flags = self.is_dir | self.writable << 1 | self.dirty << 2 | self.backed << 3 | (self.model is not None) << 4
        return _HANDLE.pack(self.fh, self.node_id, flags, len(self.copy)) + self.copy + (self.model or b"")

    @staticmethod
    def unpack(payload: bytes) -> HandleRecord:
        """The record that a payload holds."""
        fh, node_id, flags, length = _HANDLE.unpack_from(payload)
        copy, model = payload[_HANDLE.size : _HANDLE.size + length], payload[_HANDLE.size + length :]
        is_dir, writable, dirty, backed, leased = (bool(flags >> bit & 1) for bit in range(5))
        return HandleRecord(fh, node_id, is_dir, writable, dirty, backed, copy, model if leased else None)


COLD_PREFIX: Final = b"cold:"
"""Before the origin of a cold file, where other handles have the name of their copy."""
_HANDLE = struct.Struct("=QQBH")


class Ledger:
    """The log of one daemon. `fd` is its memfd."""

    def __init__(
        self, fd: int | None = None, end: int | None = None, *, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        """Go on with an existing log, at its `end` (None: it is looked for), or begin one. `on_lost` is called, from
        any thread, once `lost` is."""
        self.fd = os.memfd_create("tierd-ledger") if fd is None else fd
        self._lock = threading.Lock()
        self._on_lost = on_lost
        self._mapping: mmap.mmap | None = None
        if end is None:
            end = 0 if fd is None else _end_of(fd)
        self._window, self._at = divmod(end, WINDOW_BYTES)
        self.lost = False
        """No memory was left for a record: there can be no successor that knows everything."""

    def append(self, kind: int, payload: bytes) -> None:
        """Add a record; it is there when this returns."""
        with self._lock:
            self._append(kind, payload)

    def _append(self, kind: int, payload: bytes) -> None:
        size = len(payload)
        while (mapping := self._mapping) is None or self._at + _HEADER.size + size > WINDOW_BYTES:
            if not self._turn():
                return
        body = self._at + _HEADER.size
        mapping[body : body + size] = payload
        _HEADER.pack_into(mapping, self._at, size << 8 | kind)
        self._at = body + size

    def _turn(self) -> bool:
        """Map the window that the next record goes to; False if there is no memory for it."""
        if self.lost:
            return False
        if self._mapping is not None:
            if WINDOW_BYTES - self._at >= _HEADER.size:
                _HEADER.pack_into(self._mapping, self._at, _SKIP)
            self._mapping.close()
            self._mapping, self._at = None, 0
            self._window += 1
        try:
            os.posix_fallocate(self.fd, self._window * WINDOW_BYTES, WINDOW_BYTES)
            self._mapping = mmap.mmap(self.fd, WINDOW_BYTES, offset=self._window * WINDOW_BYTES)
        except (OSError, ValueError):
            self.lost = True
            self._on_lost()
            return False
        # A record that a kill cut short has no header, but what there is of it must not be taken for one.
        self._mapping[self._at :] = bytes(WINDOW_BYTES - self._at)
        return True

    @property
    def end(self) -> int:
        """How many bytes it has."""
        with self._lock:
            return self._window * WINDOW_BYTES + self._at

    def close(self) -> None:
        """Let go of the mapping and the descriptor; the keeper's remains."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        os.close(self.fd)
        self.lost = True

    def replace(self, other: Ledger, since: int, tell: Callable[[int], None]) -> None:
        """Go on in `other`, which says what this log said up to `since`; `tell(fd)` is called before more is said."""
        with self._lock:
            for kind, payload in records(self.fd, since):
                other._append(kind, payload)
            if other.lost:
                other.close()
                return
            try:
                tell(other.fd)
            except BaseException:
                other.close()
                raise
            if self._mapping is not None:
                self._mapping.close()
            os.close(self.fd)
            self.fd, self._mapping = other.fd, other._mapping
            self._window, self._at = other._window, other._at

    # --- what is written ---

    def init(self, request: bytes) -> None:
        """The kernel's INIT request, as it came."""
        self.append(INIT, request)

    def said(self, unique: int, node_ids: Iterable[int], fh: int = 0) -> None:
        """The reply to `unique` is about to give the kernel a lookup of each node, and a handle."""
        ids = list(node_ids)
        self.append(SAID, SAID_HEAD.pack(unique & ~RESENT, fh) + struct.pack(f"={len(ids)}Q", *ids))

    def unsaid(self, unique: int) -> None:
        """The reply to `unique` was not delivered: the kernel sends the request again."""
        self.append(UNSAID, ID.pack(unique & ~RESENT))

    def forgot(self, pairs: Iterable[tuple[int, int]]) -> None:
        """The kernel gave back lookups: node IDs and counts."""
        flat = [number for pair in pairs for number in pair]
        for start in range(0, len(flat), IDS_MAX):
            part = flat[start : start + IDS_MAX]
            self.append(FORGOT, struct.pack(f"={len(part)}Q", *part))

    def closed(self, fh: int) -> None:
        """A handle is gone."""
        self.append(CLOSED, ID.pack(fh))

    def backing(self, node_id: int, backing_id: int) -> None:
        """The backing ID of a node, 0 once it has none; of node 0, the last ID that was given out."""
        self.append(BACKING, PAIR.pack(node_id, backing_id))

    def intent(self, unique: int, before: bytes) -> None:
        """A request that must not be done twice is about to be done; `before` says what it found."""
        self.append(INTENT, ID.pack(unique & ~RESENT) + before)

    def done(self, unique: int) -> None:
        """It was done."""
        self.append(DONE, ID.pack(unique & ~RESENT))

    def failed(self, unique: int) -> None:
        """It was refused, and changed nothing."""
        self.append(FAILED, ID.pack(unique & ~RESENT))

    def listed(self, fh: int, position: int, name: bytes) -> None:
        """A listing was told up to `position`, after entry `name`."""
        self.append(LISTED, PAIR.pack(fh, position) + name)


def records(fd: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The records of a log from one position to another, or to its end."""
    for kind, payload, _ in positioned(fd, start, end):
        yield kind, payload


def positioned(fd: int, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """The same, each with the position after it."""
    window = start // WINDOW_BYTES
    at = start % WINDOW_BYTES
    while True:
        data = os.pread(fd, WINDOW_BYTES, window * WINDOW_BYTES)
        limit = len(data) if end is None else min(len(data), end - window * WINDOW_BYTES)
        while at + _HEADER.size <= limit:
            (header,) = _HEADER.unpack_from(data, at)
            if header == 0:
                return
            at += _HEADER.size
            if header & 0xFF == _SKIP:
                break
            at += header >> 8
            yield header & 0xFF, data[at - (header >> 8) : at], window * WINDOW_BYTES + at
        else:
            if limit < WINDOW_BYTES:
                return
        window, at = window + 1, 0


def _end_of(fd: int) -> int:
    return max((end for _, _, end in positioned(fd)), default=0)
