"""What goes wrong in a faulty source, when, and how often it did. Knows nothing of files; see `faulty.py`.

Contract: one event loop. A stalled operation waits in `Faults.meet` until its rule is removed.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import trio

STALL_SECONDS_MAX = 120.0
Kind = Literal["stall", "fail", "short", "delay"]


@dataclass(frozen=True)
class Rule:
    """What happens to operations `ops` (none: to all) on paths like `path`, relative to the source.

    `probability` decides of each anew, by `seed`. `times_per_path` bounds how often it happens to one path.
    `number` is the errno of a failure, `seconds` the length of a delay, or at most of a stall: a test that hangs
    in its own stall must come to its end.
    """

    kind: Kind
    ops: tuple[str, ...] = ()
    path: str = "*"
    number: int = errno.EIO
    seconds: float = STALL_SECONDS_MAX
    probability: float = 1.0
    seed: int = 0
    times_per_path: int | None = None

    def meets(self, op: str, path: str) -> bool:
        """True if the rule is about such an operation."""
        return (not self.ops or op in self.ops) and fnmatchcase(path, self.path)


@dataclass
class _Active:
    """A rule in force."""

    rule: Rule
    random: random.Random
    over: trio.Event = field(default_factory=trio.Event)
    of_path: Counter[str] = field(default_factory=Counter)

    def strikes(self, op: str, path: str) -> bool:
        """Decide of one operation, and count it."""
        rule = self.rule
        if not rule.meets(op, path) or self.random.random() >= rule.probability:
            return False
        if rule.times_per_path is not None and self.of_path[path] >= rule.times_per_path:
            return False
        self.of_path[path] += 1
        return True


class Faults:
    """The rules in force, and what they did: `injected` by kind and operation, `failures` by path and errno."""

    def __init__(self) -> None:
        self._active: dict[int, _Active] = {}
        self._last = 0
        self.stalled: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def add(self, rule: Rule) -> int:
        """Put a rule in force; its number."""
        self._last += 1
        self._active[self._last] = _Active(rule, random.Random(rule.seed))
        return self._last

    def remove(self, number: int) -> None:
        """End a rule; what it stalled goes on."""
        active = self._active.pop(number, None)
        if active is not None:
            active.over.set()

    def release(self) -> None:
        """End all rules."""
        for number in list(self._active):
            self.remove(number)

    async def meet(self, op: str, path: str) -> None:
        """Called before each operation: returns when it may go on. Raises OSError if it shall fail."""
        for active in list(self._active.values()):
            if active.rule.kind != "short" and active.strikes(op, path):
                await self._inject(active, op, path)

    async def _inject(self, active: _Active, op: str, path: str) -> None:
        rule = active.rule
        self.injected[f"{rule.kind} {op}"] += 1
        if rule.kind == "stall":
            self.stalled[op] += 1
            with trio.move_on_after(rule.seconds):
                await active.over.wait()
            self.stalled[op] -= 1
        elif rule.kind == "delay":
            await trio.sleep(rule.seconds)
        else:
            self.failures[f"{errno.errorcode[rule.number]} {path}"] += 1
            raise OSError(rule.number, os.strerror(rule.number))

    def shortened(self, size: int, path: str) -> int:
        """How many of `size` bytes a read gives; never none."""
        for active in self._active.values():
            if active.rule.kind == "short" and size > 1 and active.strikes("read", path):
                self.injected["short read"] += 1
                return active.random.randrange(1, size)
        return size

    def tell(self) -> dict[str, Any]:
        """Everything that was counted."""
        return {"stalled": +self.stalled, "injected": self.injected, "failures": self.failures}
