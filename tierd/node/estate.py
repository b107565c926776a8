"""Reads the ledger of a daemon: what it says in the end, and the shortest log that says the same.

Runs on the standard library alone: a long log is compacted in a process of its own (`tierd.node.estate IN OUT END`).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Final, NamedTuple

from tierd.node.ledger import (
    ATTRIBUTES,
    BACKING,
    CLOSED,
    COUNT,
    COUNTED,
    DONE,
    FAILED,
    FORGOT,
    HANDLE,
    ID,
    IDS_MAX,
    INIT,
    INTENT,
    LISTED,
    NODE,
    PAIR,
    ROOT_ID,
    SAID,
    SAID_HEAD,
    UNSAID,
    Ledger,
    NodeRecord,
    positioned,
)  # fmt: skip

DOUBTFUL_MAX: Final = 64
"""Replies that may have been logged and not yet written to the device: each of a few threads has one."""
INTENTS_MAX: Final = 1024
"""More than requests can be in work at once; what was done goes first, for that was answered soonest."""
_COMPACT_SECONDS = 60.0


class Said(NamedTuple):
    """What a reply told the kernel, if it got it."""

    node_ids: tuple[int, ...]
    fh: int


class Estate:
    """What a log says in the end. Payloads are kept as they were written."""

    def __init__(self) -> None:
        self.end = 0
        """Where in the log that is said."""
        self.init: bytes | None = None
        self.nodes: dict[int, bytes] = {}
        self.lookups: dict[int, int] = {}
        self.attributes: dict[int, bytes] = {}
        self.handles: dict[int, bytes] = {}
        self.given: set[int] = set()
        """Handles that a reply carried."""
        self.listed: dict[int, OrderedDict[int, bytes]] = {}
        self.backings: dict[int, int] = {}
        self.backing_max = 0
        self.intents: OrderedDict[int, bytes] = OrderedDict()
        self.done: set[int] = set()
        self.doubtful: OrderedDict[int, Said] = OrderedDict()

    def take(self, kind: int, payload: bytes) -> None:
        """One more record."""
        _TAKERS[kind](self, payload)

    def _init(self, payload: bytes) -> None:
        self.init = payload

    def _node(self, payload: bytes) -> None:
        self.nodes[ID.unpack_from(payload)[0]] = payload

    def _attributes(self, payload: bytes) -> None:
        self.attributes[ID.unpack_from(payload)[0]] = payload

    def _said(self, payload: bytes) -> None:
        unique, fh = SAID_HEAD.unpack_from(payload)
        ids = struct.unpack_from(f"={(len(payload) - SAID_HEAD.size) // 8}Q", payload, SAID_HEAD.size)
        for node_id in ids:
            self.lookups[node_id] = self.lookups.get(node_id, 0) + 1
        if fh:
            self.given.add(fh)
        if unique:
            self.doubtful[unique] = Said(ids, fh)
            self.doubtful.move_to_end(unique)
        if len(self.doubtful) > DOUBTFUL_MAX:
            self.doubtful.popitem(last=False)

    def _unsaid(self, payload: bytes) -> None:
        said = self.doubtful.pop(ID.unpack(payload)[0], None)
        if said is not None:
            self._forgot(b"".join(PAIR.pack(node_id, 1) for node_id in said.node_ids))
            self.given.discard(said.fh)

    def _forgot(self, payload: bytes) -> None:
        for node_id, count in PAIR.iter_unpack(payload):
            left = self.lookups.get(node_id, 0) - count
            if left > 0:
                self.lookups[node_id] = left
            else:
                self.lookups.pop(node_id, None)

    def _count(self, payload: bytes) -> None:
        self.lookups.update(COUNTED.iter_unpack(payload))

    def _handle(self, payload: bytes) -> None:
        self.handles[ID.unpack_from(payload)[0]] = payload

    def _closed(self, payload: bytes) -> None:
        (fh,) = ID.unpack(payload)
        self.handles.pop(fh, None)
        self.given.discard(fh)
        self.listed.pop(fh, None)

    def _backing(self, payload: bytes) -> None:
        node_id, backing_id = PAIR.unpack(payload)
        self.backing_max = max(self.backing_max, backing_id)
        if node_id and backing_id:
            self.backings[node_id] = backing_id
        else:
            self.backings.pop(node_id, None)

    def _intent(self, payload: bytes) -> None:
        (unique,) = ID.unpack_from(payload)
        self._failed(payload)
        self.intents[unique] = payload
        if len(self.intents) > INTENTS_MAX:
            self._drop_intent(next((old for old in self.intents if old in self.done), next(iter(self.intents))))

    def _failed(self, payload: bytes) -> None:
        self._drop_intent(ID.unpack_from(payload)[0])

    def _drop_intent(self, unique: int) -> None:
        self.intents.pop(unique, None)
        self.done.discard(unique)

    def _done(self, payload: bytes) -> None:
        (unique,) = ID.unpack(payload)
        if unique in self.intents:
            self.done.add(unique)

    def _listed(self, payload: bytes) -> None:
        fh, position = PAIR.unpack_from(payload)
        self.listed.setdefault(fh, OrderedDict())[position] = payload[PAIR.size :]

    def drop_the_forgotten(self) -> None:
        """Keep nodes that the kernel knows, that are open, or that such a node's name leads through."""
        wanted = {node_id for node_id, count in self.lookups.items() if count > 0}
        wanted |= {ROOT_ID, *(PAIR.unpack_from(payload)[1] for payload in self.handles.values())}
        todo = list(wanted)
        while todo:
            payload = self.nodes.get(todo.pop(), b"")
            for parent_id in NodeRecord.parents_in(payload):
                if parent_id not in wanted:
                    wanted.add(parent_id)
                    todo.append(parent_id)
        self.nodes = {node_id: payload for node_id, payload in self.nodes.items() if node_id in wanted}
        self.attributes = {
            node_id: payload
            for node_id, payload in self.attributes.items()
            if node_id in self.nodes or node_id == ROOT_ID  # which has no record
        }
        self.lookups = {node_id: self.lookups[node_id] for node_id in wanted if self.lookups.get(node_id, 0) > 0}

    def write(self, ledger: Ledger) -> None:
        """The shortest log that says the same."""
        self.drop_the_forgotten()
        if self.init is not None:
            ledger.init(self.init)
        for kind, payloads in ((NODE, self.nodes), (ATTRIBUTES, self.attributes), (HANDLE, self.handles)):
            for payload in payloads.values():
                ledger.append(kind, payload)
        self._write_counts(ledger)
        if self.backing_max:
            ledger.backing(0, self.backing_max)
        for node_id, backing_id in self.backings.items():
            ledger.backing(node_id, backing_id)
        for fh, positions in self.listed.items():
            for position, name in positions.items():
                ledger.listed(fh, position, name)
        for unique, payload in self.intents.items():
            ledger.append(INTENT, payload)
            if unique in self.done:
                ledger.done(unique)

    def _write_counts(self, ledger: Ledger) -> None:
        """What the doubtful replies said is written as theirs, all else as plain counts."""
        counts, given = dict(self.lookups), set(self.given)
        for said in self.doubtful.values():
            given.discard(said.fh)
            for node_id in said.node_ids:
                counts[node_id] = counts.get(node_id, 0) - 1
        told = [pair for pair in counts.items() if pair[1] != 0]
        for start in range(0, len(told), IDS_MAX):
            part = told[start : start + IDS_MAX]
            ledger.append(COUNT, b"".join(COUNTED.pack(*pair) for pair in part))
        for fh in given:
            ledger.said(0, (), fh)
        for unique, said in self.doubtful.items():
            ledger.said(unique, said.node_ids, said.fh)


_TAKERS = {
    INIT: Estate._init,
    NODE: Estate._node,
    ATTRIBUTES: Estate._attributes,
    SAID: Estate._said,
    FORGOT: Estate._forgot,
    UNSAID: Estate._unsaid,
    HANDLE: Estate._handle,
    CLOSED: Estate._closed,
    BACKING: Estate._backing,
    INTENT: Estate._intent,
    DONE: Estate._done,
    FAILED: Estate._failed,
    LISTED: Estate._listed,
    COUNT: Estate._count,
}


def read(fd: int, end: int | None = None) -> Estate:
    """What a log says."""
    estate = Estate()
    for kind, payload, estate.end in positioned(fd, 0, end):
        estate.take(kind, payload)
    return estate


def compact(source_fd: int, target_fd: int, end: int) -> None:
    """Write to an empty log what another one says up to `end`."""
    target = Ledger(target_fd)
    read(source_fd, end).write(target)
    if target.lost:
        raise MemoryError("no memory for the compacted log")


def compacted(ledger: Ledger) -> tuple[Ledger, int]:
    """A new log that says what `ledger` says, and up to where of it. Blocking. Raises OSError, subprocess errors.

    Done by another process: it takes seconds of an interpreter and as much memory as a daemon has.
    """
    end, fd = ledger.end, os.memfd_create("tierd-ledger")
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from tierd.node.estate import main; main()"
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(ledger.fd), str(fd), str(end)],
            pass_fds=(ledger.fd, fd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=_COMPACT_SECONDS,
        )
        return Ledger(fd), end
    except BaseException:
        os.close(fd)
        raise


def main() -> None:
    """Compact between the descriptors that the arguments name."""
    source_fd, target_fd, end = map(int, sys.argv[1:4])
    compact(source_fd, target_fd, end)
