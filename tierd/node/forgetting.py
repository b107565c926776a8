"""Makes a node forget deleted outputs: copies in its tier, chunks in memory, its history; says when nothing is left.

Whoever reads one that is cold has it open still: until he closes it, it is not said to be gone, so that its object
stays for him. What is deleted here are copies and history; the source and the object store are the controller's.

Contract: blocking, one worker thread (that of `publish.Exchange`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol

from tierd.erasures import ERASURES_MAX, WAITING, decode, key_of
from tierd.node.cold_bytes import ColdBytes
from tierd.node.index import Index
from tierd.node.store import Store
from tierd.stubs import Origin


class Client(Protocol):
    """What is asked of `redis.Redis`."""

    def zrange(self, name: str, start: int, end: int) -> list[bytes]:
        """Members of a sorted set."""

    def get(self, name: str) -> bytes | None:
        """A value."""


class Forgetting:
    """See the module. `cold_open` tells what stubs stand for that are open; `store`, `cold` may be None."""

    def __init__(
        self,
        index: Index,
        store: Store | None,
        cold: ColdBytes | None,
        cold_open: Callable[[], Iterable[Origin]],
    ) -> None:
        self._index = index
        self._store = store
        self._cold = cold
        self._cold_open = cold_open
        self._forgotten: dict[int, frozenset[bytes]] = {}
        """By the number of their erasure, paths of which nothing is left here but perhaps open files."""

    def round(self, client: Client) -> tuple[int, ...]:
        """Forget what the controller asks for; the erasures of which this node has nothing.

        Raises sqlite3.Error, OSError, and what the client raises.
        """
        waiting = [int(member) for member in client.zrange(WAITING, 0, ERASURES_MAX - 1) if member.isdigit()]
        self._forgotten = {number: self._forgotten[number] for number in waiting if number in self._forgotten}
        for number in waiting:
            paths = decode(client.get(key_of(number)) or b"") if number not in self._forgotten else None
            if paths is not None:
                self._forget(paths)
                self._forgotten[number] = paths
        if not self._forgotten:
            return ()
        self._drop_copies(frozenset().union(*self._forgotten.values()))  # each time: a fill may have ended meanwhile
        still_read = {os.fsencode(origin.model_id) + b"/" + origin.path for origin in self._cold_open()}
        return tuple(number for number, paths in sorted(self._forgotten.items()) if not paths & still_read)

    def _forget(self, paths: frozenset[bytes]) -> None:
        if self._cold is not None:
            self._cold.forget_chunks()
        self._index.forget_files(paths)

    def _drop_copies(self, paths: frozenset[bytes]) -> None:
        if self._store is not None:
            for copy in self._store.copies():
                if copy.path in paths:
                    self._store.remove(copy)
