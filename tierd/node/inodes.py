"""The inode table: which node ID means which source inode, under which names, and how often the kernel knows it.

No I/O here. A node ID is never used twice, and it is one *content version*: when the content changed
behind the overlay, the node is retired and the next lookup gets a new one (DESIGN.md, "The kernel's rule").

What a successor must know of a node is written to the ledger by whichever method changes it.

Contract: used from the trio thread only, and no method awaits, so each call is atomic.
"""

from __future__ import annotations

import errno
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tierd.node.attributes import differ, pack_attributes
from tierd.node.ledger import ATTRIBUTES, NODE, ROOT_ID, Ledger, NodeRecord
from tierd.node.sources import Key, Moved, Version

if TYPE_CHECKING:
    from tierd.node.handles import Handle
    from tierd.node.store import Copy

_OTHER_NAMES_MAX = 64
"""Hard links remembered per inode beyond the latest name; the oldest is forgotten first, and found again by lookup."""
_YOUNG_MAX = 1024
"""Retired inodes whose successor was not looked up yet; the oldest is forgotten first."""


class Node:
    """One inode as the kernel knows it.

    `parent` and `name` are where it was seen last (None once no name is known), `others` more hard
    links. `lookups` is the kernel's lookup count. `version` is the content that this node ID stands
    for, packed by `pack`; None until known. `handles` are the open ones; `dirty` counts those of
    them that wrote something, `backed` those that the kernel serves by itself (passthrough; it allows no
    others beside them), from the node tier's `copy` or, if that is None, from the source. Slots, because a walk
    over 100,000 files makes 100,000 of them. `attributes`, the last ones seen, are kept of directories and of files
    that the node tier has: they are told when the source does not answer. `moved_at` is when it was last found that
    a name no longer means it.
    """

    __slots__ = (
        "attributes", "backed", "copy", "dirty", "handles", "id", "key", "lookups", "moved_at", "name", "others",
        "parent", "retired", "version", "young_until",
    )  # fmt: skip

    def __init__(self, node_id: int, key: Key, parent: Node | None, name: bytes) -> None:
        self.id = node_id
        self.key = key
        self.parent = parent
        self.name = name
        self.others: list[tuple[Node, bytes]] | None = None
        self.lookups = 0
        self.version: int | None = None
        self.dirty = 0
        self.backed = 0
        self.copy: Copy | None = None
        self.attributes: os.stat_result | None = None
        self.handles: list[Handle] | None = None
        self.retired = False
        self.young_until = 0.0
        self.moved_at = -math.inf

    def names(self) -> Iterator[tuple[Node, bytes]]:
        """All names known, the latest first."""
        if self.parent is not None:
            yield self.parent, self.name
        yield from reversed(self.others or ())


def pack(version: Version) -> int:
    """A version as one integer: a third of the tuple's memory, equal exactly when the versions are."""
    return (version.size << 128) | ((version.mtime_ns & _U64) << 64) | (version.ctime_ns & _U64)


def unpack(packed: int) -> Version:
    """The version that `pack` made one integer of. Times before 1970 come out as they went in."""
    return Version(packed >> 128, _signed(packed >> 64 & _U64), _signed(packed & _U64))


def same_content(packed: int, other: int) -> bool:
    """Size and modification time are equal: what changed is at most the attributes, names included."""
    return packed >> 64 == other >> 64


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_U64 = (1 << 64) - 1


class InodeTable:
    """All nodes that the kernel knows, by node ID and by source inode.

    Invariants (`check`): `_by_id` holds the root and every node with `lookups > 0`; `_by_key` holds
    exactly those of them that are not retired; no node has one name twice; following `parent` always ends.
    """

    def __init__(self, root_key: Key, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self.root = Node(ROOT_ID, root_key, None, b"")
        self._by_id: dict[int, Node] = {ROOT_ID: self.root}
        self._by_key: dict[Key, Node] = {root_key: self.root}
        self._next_id = ROOT_ID + 1
        self._young: OrderedDict[Key, float] = OrderedDict()
        self._retired: Counter[Key] = Counter()
        """How many retired nodes of an inode the kernel still knows."""

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, node_id: int) -> Node:
        """The node of a request. Raises ESTALE if the kernel was told to forget it."""
        node = self._by_id.get(node_id)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def by_key(self, key: Key) -> Node | None:
        """The live node of a source inode, if the kernel knows it."""
        return self._by_key.get(key)

    def seen(self, parent: Node, name: bytes, key: Key, version: int | None = None) -> Node:
        """The node that `name` in `parent` means now; one lookup is counted, as each reply with an entry does. It
        stands for `version` if it is not known to stand for another."""
        node = self._by_key.get(key)
        if node is None:
            node = Node(self._next_id, key, parent, name)
            node.young_until = self._young.get(key, 0.0)
            node.version = version
            self._next_id += 1
            self._by_id[node.id] = node
            self._by_key[key] = node
            self._note(node)
        else:
            self.add_name(node, parent, name)
            if node.version is None:
                self.set_version(node, version)
        node.lookups += 1
        return node

    def _note(self, node: Node) -> None:
        names = tuple((parent.id, name) for parent, name in node.names())
        device, inode = (0, node.key) if isinstance(node.key, int) else node.key
        record = NodeRecord(node.id, (device, inode), node.version, node.retired, names)
        self._ledger.append(NODE, record.pack())

    def set_version(self, node: Node, version: int | None) -> None:
        """The content that a node stands for."""
        if node.version != version:
            node.version = version
            self._note(node)

    def remember(self, node: Node, attributes: os.stat_result) -> None:
        """What will be told of a node if its source does not answer."""
        if node.attributes is None or differ(node.attributes, attributes):
            self._ledger.append(ATTRIBUTES, pack_attributes(node.id, attributes))
        node.attributes = attributes

    def named(self, parent: Node, name: bytes) -> Node | None:
        """The live node that a name meant last. Looks at all of them: for a source that does not answer."""
        return next((node for node in self._by_key.values() if node.parent is parent and node.name == name), None)

    def forget(self, node_id: int, count: int) -> Node | None:
        """The kernel dropped `count` lookups; the node if those were the last. Total: unknown IDs are ignored."""
        node = self._by_id.get(node_id)
        if node is None or node is self.root:
            return None
        node.lookups = max(0, node.lookups - count)
        if node.lookups > 0:
            return None
        del self._by_id[node_id]
        if not node.retired:
            del self._by_key[node.key]
        else:
            self._retired[node.key] -= 1
            if not self._retired[node.key]:
                del self._retired[node.key]
        return node

    def has_retired(self, key: Key) -> bool:
        """The kernel still knows an inode, or some names of it, by a retired node."""
        return self._retired[key] > 0

    def retire(self, node: Node, young_until: float) -> None:
        """The content that this node stands for is gone: the next lookup of its inode gets a new node.

        That one is `young` until the time given, so that content which changes all the time settles.
        """
        node.retired = True
        self._retired[node.key] += 1
        self._note(node)
        del self._by_key[node.key]
        self.expect(node.key, young_until)

    def expect(self, key: Key, young_until: float) -> None:
        """The next node of an inode is young until then."""
        self._young[key] = young_until
        self._young.move_to_end(key)
        if len(self._young) > _YOUNG_MAX:
            self._young.popitem(last=False)

    def add_name(self, node: Node, parent: Node, name: bytes) -> None:
        """`name` in `parent` means `node`, as of now."""
        if node is self.root or (node.parent is parent and node.name == name):
            return
        self.drop_name(node, parent, name)
        if node.parent is not None and parent is not node:
            node.others = [*(node.others or ())[1 - _OTHER_NAMES_MAX :], (node.parent, node.name)]
        self._place(node, parent, name)
        self._note(node)

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        """Make this the latest name.

        A directory cannot lie below itself: if it seems to, the name that says so was renamed beneath the mount.
        """
        if parent is node:
            return
        above = parent
        while above.parent is not None and above.parent is not node:
            above = above.parent
        if above.parent is node:
            above.parent, above.name = None, b""
            self._note(above)
        node.parent, node.name = parent, name

    def drop_name(self, node: Node, parent: Node, name: bytes) -> None:
        """`name` in `parent` no longer means `node`."""
        before = node.parent, node.name, node.others
        if node.others:
            node.others = [other for other in node.others if other[0] is not parent or other[1] != name] or None
        if node.parent is parent and node.name == name:
            if node.others:
                last = node.others.pop()
                node.others = node.others or None
                node.parent, node.name = None, b""
                self._place(node, *last)
            else:
                node.parent, node.name = None, b""
        if before != (node.parent, node.name, node.others):
            self._note(node)

    def path(self, node: Node) -> bytes:
        """The latest path of a node, relative to the source. Raises Moved if none is known."""
        parts = []
        while node is not self.root:
            if node.parent is None:
                raise Moved
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    def number_from(self, first: int) -> None:
        """Give out no node ID that a daemon before this one did."""
        self._next_id += first

    def inherit(self, nodes: Mapping[int, bytes], lookups: Mapping[int, int], young_until: float) -> dict[int, Node]:
        """Take over the nodes of the daemon before this one, given as its last NODE records by ID, those included that
        are only open, or only named by others; all by ID. What replaces a retired node is young until the time given.

        100,000 of them are waited for by every caller: so records are unpacked one at a time, and none is kept.
        """
        made = {node_id: Node(node_id, 0, None, b"") for node_id in nodes}
        made[ROOT_ID] = self.root
        for node_id, payload in nodes.items():
            if node_id != ROOT_ID:
                self._inherit(made, made[node_id], NodeRecord.unpack(payload), lookups.get(node_id, 0))
        for key in {node.key for node in made.values() if node.retired}:
            self._young[key] = young_until
            if key in self._by_key:
                self._by_key[key].young_until = young_until
        return made

    def _inherit(self, made: Mapping[int, Node], node: Node, record: NodeRecord, lookups: int) -> None:
        device, inode = record.key
        node.key = (device, inode) if device else inode
        names = [(made[parent_id], name) for parent_id, name in record.names if parent_id in made]
        if names:
            node.parent, node.name = names[0]
            node.others = names[:0:-1] or None
        node.version, node.retired, node.lookups = record.version, record.retired, lookups
        if lookups:
            self._by_id[node.id] = node
        if lookups and not node.retired:
            self._by_key[node.key] = node
        elif lookups:
            self._retired[node.key] += 1

    def check(self) -> None:
        """Assert the invariants; for tests."""
        for node_id, node in self._by_id.items():
            assert node.id == node_id
            assert node is self.root or node.lookups > 0, f"node {node_id} without lookups"
            assert node.retired == (self._by_key.get(node.key) is not node), f"node {node_id} wrongly keyed"
            names = [(id(parent), name) for parent, name in node.names()]
            assert len(names) == len(set(names)), f"node {node_id} has a name twice"
        assert all(self._by_id.get(node.id) is node for node in self._by_key.values())
        assert self._retired == Counter(node.key for node in self._by_id.values() if node.retired)
