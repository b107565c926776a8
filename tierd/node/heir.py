"""Takes over what the daemon before this one left: nodes, handles, backings, leases, and what may not have been said.

Done once, before the first request is read, on the trio thread and without a question to the source, which may hang.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import structlog
import trio

from tierd.node.attributes import unpack_attributes
from tierd.node.backings import Backings
from tierd.node.estate import Estate
from tierd.node.handles import DirHandle, FileHandle
from tierd.node.hot import HotFiles
from tierd.node.inodes import Node
from tierd.node.ledger import COLD_PREFIX, HandleRecord
from tierd.node.once import Intent
from tierd.node.overlay import Overlay
from tierd.node.packets import FIRST_HANDLE
from tierd.node.reach import YOUNG_SECONDS
from tierd.node.reads import ReadTarget
from tierd.node.recall_bounds import UNKNOWN_USER
from tierd.node.store import Copy
from tierd.stubs import decode

_GENERATION_BITS = 32
"""How many nodes, and how many handles, a daemon may make."""

log = structlog.get_logger(__name__)


class Heir(NamedTuple):
    """Who inherits. `held` are the descriptors that the keeper kept, by handle; `copies` those of the node tier, by the
    names of their files; `let_go` tells the keeper that one is not needed."""

    overlay: Overlay
    hot: HotFiles
    backings: Backings
    held: Mapping[int, int]
    copies: Mapping[str, Copy]
    let_go: Callable[[int], None]


def intents_of(estate: Estate) -> dict[int, Intent]:
    """What is known of requests that may come again."""
    return {unique: Intent(payload[8:], unique in estate.done) for unique, payload in estate.intents.items()}


def inherit(heir: Heir, estate: Estate, generation: int) -> None:
    """Make the heir what the daemon was that wrote the ledger. What it numbers itself has numbers of its generation."""
    heir.overlay.number_from(generation << _GENERATION_BITS)
    heir.hot.number_from(generation << _GENERATION_BITS)
    known = {fh: HandleRecord.unpack(payload) for fh, payload in estate.handles.items()}
    handles = {fh: record for fh, record in known.items() if fh in estate.given and record.node_id in estate.nodes}
    handles |= {fh: record for fh, record in known.items() if fh in estate.given and record.node_id == 1}
    for fh in known.keys() - handles.keys():
        heir.overlay.ledger.closed(fh)  # the kernel was never told of it
    estate.handles = {fh: estate.handles[fh] for fh in handles}
    estate.drop_the_forgotten()
    nodes = heir.overlay.inodes.inherit(estate.nodes, estate.lookups, trio.current_time() + YOUNG_SECONDS)
    for node_id, payload in estate.attributes.items():
        nodes[node_id].attributes = unpack_attributes(payload)
    users = Counter[int]()
    for record in handles.values():
        users[record.node_id] += record.backed
        _inherit_handle(heir, record, nodes[record.node_id], estate)
    heir.backings.inherit(estate.backings, users, estate.backing_max)
    _let_go(heir, [fh for fh in heir.held if fh >= FIRST_HANDLE and fh not in handles])
    log.info("took_over", nodes=len(nodes), handles=len(handles), backings=len(heir.backings))


def _let_go(heir: Heir, handles: Sequence[int]) -> None:
    """Descriptors of handles that the kernel does not have. To close one may take as long as the source likes."""

    def close() -> None:
        for fh in handles:
            with suppress(OSError):
                os.close(heir.held[fh])

    for fh in handles:
        heir.let_go(fh)
    threading.Thread(target=close, name="heir-close", daemon=True).start()


def _inherit_handle(heir: Heir, record: HandleRecord, node: Node, estate: Estate) -> None:
    fd = heir.held.get(record.fh, -1)
    if record.is_dir:
        listing = DirHandle(record.fh, node, fd)
        listing.told = estate.listed.get(record.fh, {})
        heir.overlay.listings[record.fh] = listing
        return
    if record.copy.startswith(COLD_PREFIX):
        _inherit_cold(heir, record, node)
        return
    copy = heir.copies.get(os.fsdecode(record.copy)) if record.copy else None
    handle = FileHandle(record.fh, node, -1 if record.copy else fd, record.writable)
    handle.target = ReadTarget(fd, local=bool(record.copy))
    handle.copy, handle.backed, handle.dirty = copy, record.backed, record.dirty
    heir.overlay.inherit_handle(handle, record.model)


def _inherit_cold(heir: Heir, record: HandleRecord, node: Node) -> None:
    """Who reads a cold file goes on from its object; which process that is, is not known any longer."""
    handle = FileHandle(record.fh, node, -1, False)
    (origin,) = decode(record.copy.removeprefix(COLD_PREFIX)).values()
    handle.origin = origin
    handle.target = heir.overlay.cold_target(handle, origin, 0, UNKNOWN_USER)
    heir.overlay.inherit_handle(handle, record.model)
