"""Requests that must take effect once, though the kernel sends them again after a daemon died at work on them.

Before such a call is made, what it found is written to the ledger under the request's unique number (its intent), and
after it that it is done, or was refused. A request that is sent again brings them back: one that is done is not done
again, one that was refused is tried anew; of one that may be done, the source is asked. Only what happens beneath the
mount within the same moment can be mistaken.

Everything here blocks and belongs into worker threads; a request is worked on by one thread.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from tierd.node.ledger import RESENT, Ledger
from tierd.node.sources import Key, Moved, Version, version_of

T = TypeVar("T")

_TIME = struct.Struct("=q")
_INODE = struct.Struct("=QQQqq")
"""Device (0: the source's own) and number of an inode, and its version: size, modification and change time."""
CLOCK_SLACK_NS = 50_000_000
"""A source's clock may be behind: change times are rounded down to a tick of some milliseconds."""


class Inode(NamedTuple):
    """What a call found under a name."""

    key: Key
    version: Version


class Intent(NamedTuple):
    """What was written of a request that is sent again: what it found, and whether it was done."""

    before: bytes
    done: bool


class Once:
    """See the module. `inherited` are the intents that the daemon before this one left, by unique number."""

    def __init__(
        self,
        ledger: Ledger,
        key_of: Callable[[os.stat_result], Key],
        inherited: Mapping[int, Intent] = {},
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._ledger = ledger
        self._key_of = key_of
        self._inherited = dict(inherited)
        self._clock_ns = clock_ns

    def _left_of(self, unique: int) -> Intent | None:
        return self._inherited.get(unique & ~RESENT) if unique & RESENT else None

    def _intend(self, unique: int, before: bytes) -> None:
        if unique:
            self._ledger.intent(unique, before)

    @contextmanager
    def _attempt(self, unique: int, left: Intent | None) -> Iterator[None]:
        """Write down how it ended; not that it was refused if an earlier attempt may be why."""
        try:
            yield
        except OSError:
            if unique and left is None:
                self._ledger.failed(unique)
            raise
        if unique:
            self._ledger.done(unique)

    def make(
        self,
        unique: int,
        look: Callable[[], os.stat_result],
        perform: Callable[[], T],
        adopt: Callable[[os.stat_result], T],
    ) -> T:
        """Make a name that must not exist. One that `look` finds is ours if it changed since we meant to make it:
        then it is `adopt`ed."""
        left = self._left_of(unique)
        ours = _made_since(left, look) if left is not None else None
        if ours is not None:
            return adopt(ours)
        self._intend(unique, left.before if left is not None else _TIME.pack(self._clock_ns()))
        try:
            with self._attempt(unique, left):
                return perform()
        except FileExistsError:
            ours = _made_since(left, look) if left is not None else None
            if ours is None:
                raise
            return adopt(ours)  # a thread of the dead daemon was still at it

    def remove(
        self,
        unique: int,
        look: Callable[[], os.stat_result],
        perform: Callable[[Callable[[os.stat_result], None]], T],
    ) -> T | Inode:
        """Remove a name. `perform` is given what to call with the attributes of what it found, before it removes it.
        The inode that had the name, if it was removed before."""
        left = self._left_of(unique)
        if left is not None:
            before, found = _unpack(left.before), _found(look)
            if left.done or found is None or self._key_of(found) != before.key:
                return before
        try:
            with self._attempt(unique, left):
                return perform(lambda st: self._intend(unique, _pack(self._inode(st))))
        except FileNotFoundError:
            if left is not None:  # a thread of the dead daemon was still at it
                return _unpack(left.before)
            raise

    def rename(
        self,
        unique: int,
        look: Callable[[], tuple[os.stat_result | None, os.stat_result | None]],
        perform: Callable[[Callable[[os.stat_result, os.stat_result | None], None]], T],
    ) -> T | tuple[Inode, Inode | None]:
        """Rename. `look` says what lies at the old and at the new name. What was moved and what was replaced, if it was
        done before."""
        left = self._left_of(unique)
        before = _unpack_pair(left.before) if left is not None else None
        if left is not None and before is not None and (left.done or self._was_renamed(before[0], *look())):
            return before
        try:
            with self._attempt(unique, left):
                return perform(lambda old, new: self._intend(unique, self._pack_pair(old, new)))
        except FileNotFoundError:
            if before is not None and self._was_renamed(before[0], *look()):
                return before  # a thread of the dead daemon was still at it
            raise

    def _was_renamed(self, moved: Inode, old: os.stat_result | None, new: os.stat_result | None) -> bool:
        """What was at the old name is at the new one, and no longer at the old one."""
        if new is None or self._key_of(new) != moved.key:
            return False
        return old is None or self._key_of(old) != moved.key

    def _pack_pair(self, old: os.stat_result, new: os.stat_result | None) -> bytes:
        return _pack(self._inode(old)) + (_pack(self._inode(new)) if new is not None else b"")

    def truncate(self, unique: int, size: int, look: Callable[[], os.stat_result], perform: Callable[[bool], T]) -> T:
        """Set a file's size, unless it was; `perform` is told whether to."""
        left = self._left_of(unique)
        if left is not None and (left.done or look().st_size == size):
            return perform(False)
        self._intend(unique, b"")
        with self._attempt(unique, left):
            return perform(True)

    def unset(self, unique: int, perform: Callable[[], T], gone: Callable[[], T]) -> T:
        """Remove an attribute; `gone` if it was removed before."""
        left = self._left_of(unique)
        if left is not None and left.done:
            return gone()
        self._intend(unique, b"")
        try:
            with self._attempt(unique, left):
                return perform()
        except OSError as error:
            if left is not None and error.errno == errno.ENODATA:
                return gone()
            raise

    def _inode(self, st: os.stat_result) -> Inode:
        return Inode(self._key_of(st), version_of(st))


def _found(look: Callable[[], os.stat_result]) -> os.stat_result | None:
    try:
        return look()
    except (FileNotFoundError, NotADirectoryError, Moved):
        return None


def _made_since(left: Intent, look: Callable[[], os.stat_result]) -> os.stat_result | None:
    """What has the name, if it was made, or changed, since it was meant to be made."""
    found = _found(look)
    (since,) = _TIME.unpack(left.before)
    return found if found is not None and (left.done or found.st_ctime_ns >= since - CLOCK_SLACK_NS) else None


def _pack(inode: Inode) -> bytes:
    device, number = (0, inode.key) if isinstance(inode.key, int) else inode.key
    return _INODE.pack(device, number, *inode.version)


def _unpack(data: bytes) -> Inode:
    device, number, *version = _INODE.unpack_from(data)
    return Inode((device, number) if device else number, Version(*version))


def _unpack_pair(data: bytes) -> tuple[Inode, Inode | None]:
    return _unpack(data), _unpack(data[_INODE.size :]) if len(data) > _INODE.size else None
