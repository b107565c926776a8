"""The comparer: does the same random calls on the overlay and on a plain directory, and compares all there is.

Runs in processes of its own (`compare_part` is their whole work), because it becomes another user for some calls. A
difference is tried again with fewer and fewer of the calls before it, and told with the fewest that still show it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns.calls_on_a_side import MTIME, Call, Side, whole
from tests.campaigns.random_calls import Calls

TOLD_MAX = 40
"""Calls that a failure tells at most."""
TEXT_MAX = 300
TIMING = {"fstat", "futimens", "lstat", "stat", "utimens"}
"""Calls that tell times. A store through a mapping moves these by msync(2) at the latest (POSIX, mmap): through the
overlay not before, in a plain directory at once."""
SHRINK_SECONDS = 60.0
ASKING = {"access", "fstat", "getxattr", "listdir", "lstat", "map_read", "pread", "readlink", "stat", "statvfs"}
"""Calls that change nothing: the first to go."""
GROUP = 2000


class Part(NamedTuple):
    """Some of the calls of a campaign: each part has directories, files and a seed of its own.

    `through` and `beneath` are one directory, by the overlay and in its source; `model` is the plain one. A source is
    `faithful` if it does what Linux says with the flags of rename and setxattr; JuiceFS 0.14 ignores some.
    """

    through: Path
    beneath: Path
    model: Path
    seed: int
    number: int
    calls: int
    calls_per_look: int
    faithful: bool


class Difference(AssertionError):
    """The two sides disagree."""


class TreesDiffer(Difference):
    """A look at the trees found them different."""


class Pair:
    """Two trees that get the same calls, from empty to removed."""

    def __init__(self, part: Part, name: str) -> None:
        self.faithful = part.faithful
        self.through, self.beneath, self.model = (base / name for base in (part.through, part.beneath, part.model))
        for base in (self.through, self.model):
            base.mkdir()
            base.chmod(0o777)
        self.overlay, self.plain = Side(self.through), Side(self.model)

    def do(self, call: Call) -> Any:
        """Do it twice; the answers must be equal."""
        if call.name in TIMING:
            self.sync()
        expected, found = self.plain.do(call), self.overlay.do(call)
        if self.timeless(found) != self.timeless(expected):
            raise Difference(f"{call}: {short(found)}, not {short(expected)}")
        return expected

    def look(self) -> dict[str, tuple[Any, ...]]:
        """Compare the trees as they are: through the overlay, beside it, and beneath it once all is written."""
        expected = self.told(self.model)
        compare_trees("through the overlay", self.told(self.through), expected)
        self.sync()
        compare_trees("beneath the overlay", self.told(self.beneath), expected)
        return expected

    def told(self, base: Path) -> dict[str, tuple[Any, ...]]:
        """What lies below."""
        return {name: self.timeless(facts) for name, facts in whole(base).items()}

    def timeless(self, told: Any) -> Any:
        """JuiceFS 0.14 sets the time of a file anew when it stores what was written before: some time after
        utimensat(2). So there the times in what a call tells are not compared."""
        attributes = not self.faithful and isinstance(told, tuple) and len(told) > MTIME
        return told[:MTIME] + told[MTIME + 1 :] if attributes else told

    def sync(self) -> None:
        """What was written through mappings reaches the source. (syncfs(2) does not wait for FUSE since Linux 6.16:
        AS_WRITEBACK_INDETERMINATE, fs/fs-writeback.c.)"""
        for mapped in self.overlay.maps.values():
            mapped.flush()

    def end(self) -> None:
        """Close and remove everything."""
        self.overlay.close_all()
        self.plain.close_all()
        for base in (self.through, self.model):
            shutil.rmtree(base, ignore_errors=not self.faithful)  # JuiceFS 0.14 keeps directories for full, at times
        if self.faithful and self.beneath.exists():
            raise Difference(f"{self.beneath} is still there")


def compare_trees(where: str, found: dict[str, tuple[Any, ...]], expected: dict[str, tuple[Any, ...]]) -> None:
    """Difference that names the entries which are not equal."""
    if found == expected:
        return
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    lines = [f"{name!r}: {differing(found.get(name), expected.get(name))}" for name in names[:5]]
    raise TreesDiffer(f"{where} {len(names)} entries differ\n" + "\n".join(lines))


def differing(found: tuple[Any, ...] | None, expected: tuple[Any, ...] | None) -> str:
    """Those facts of an entry that are not equal."""
    if found is None or expected is None:
        return f"{short(found)}, not {short(expected)}"
    pairs = list(zip(found, expected, strict=False))
    return "; ".join(f"fact {place}: {apart(*pair)}" for place, pair in enumerate(pairs) if pair[0] != pair[1])


def apart(found: Any, expected: Any) -> str:
    """Where two values part, for bytes."""
    if not (isinstance(found, bytes) and isinstance(expected, bytes)):
        return f"{short(found)}, not {short(expected)}"
    both = enumerate(zip(found, expected, strict=False))
    at = next((place for place, (one, other) in both if one != other), min(len(found), len(expected)))
    return f"{len(found)} bytes, not {len(expected)}; from {at} on {short(found[at:])}, not {short(expected[at:])}"


def short(value: Any) -> str:
    """A value as a line of text."""
    text = f"{len(value)} bytes {value[:16]!r}..." if isinstance(value, bytes) and len(value) > 16 else repr(value)
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..."


def compare_part(part: Part) -> Counter[str]:
    """Do one part; how its calls ended. AssertionError with seed and history if the two sides disagree."""
    os.setgroups([GROUP])
    os.umask(0o022)
    pair, history, answers = Pair(part, f"{part.number}"), list[Call](), Counter[str]()
    calls = Calls(part.seed + part.number, pair.model, faithful=part.faithful)
    try:
        while len(history) < part.calls:
            call = calls.next()
            history.append(call)
            answer = pair.do(call)
            answers["failed as they must" if isinstance(answer, str) and answer.isupper() else "done"] += 1
            calls.learn(call)
            if len(history) % part.calls_per_look == 0:
                calls.know(pair.look())
        pair.look()
        pair.end()
    except Difference as difference:
        raise AssertionError(explain(part, history, difference)) from None
    return answers


# --- telling what went wrong ---


def explain(part: Part, history: Sequence[Call], difference: Difference) -> str:
    """The seed, what differs, and the fewest calls found that lead there."""
    fewest = shrink(part, history, look=isinstance(difference, TreesDiffer))
    note = "the fewest calls that show it, from an empty tree" if fewest else "does not show again; the last calls were"
    lines = [f"  {call}" for call in (fewest or history)[-TOLD_MAX:]]
    head = f"seed {part.seed}, part {part.number}, call {len(history)}: {difference}"
    return "\n".join([head, f"{note}:", *lines])


def shrink(part: Part, history: Sequence[Call], *, look: bool) -> list[Call]:
    """Fewer calls that end in a difference, too; none if it does not come again in the time there is."""
    until, tries = time.monotonic() + SHRINK_SECONDS, iter(range(1 << 30))

    def differs(calls: Sequence[Call]) -> bool:
        return time.monotonic() < until and differs_again(part, calls, next(tries), look=look)

    last = 8
    while not differs(history[-last:]):
        if last >= len(history) or time.monotonic() >= until:
            return []
        last *= 4
    kept = [call for call in history[-last:-1] if call.name not in ASKING] + list(history[-1:])
    kept, size = kept if differs(kept) else list(history[-last:]), len(kept) // 2
    while size:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if fewer and differs(fewer):
                kept = fewer
            else:
                start += size
        size //= 2
    return kept


def differs_again(part: Part, calls: Sequence[Call], attempt: int, *, look: bool) -> bool:
    """Whether these calls, on trees of their own, end in a difference, or a `look` after them does."""
    pair = Pair(part, f"again-{part.number}-{attempt}")
    try:
        for call in calls:
            pair.do(call)
        if look:
            pair.look()
    except Difference:
        return True
    finally:
        pair.end()
    return False
