"""A source with models and a tier over it, whose clock the test moves, and what it reported."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.copies import WAIT_SECONDS, Reader, add_copy, content, identity_of
from tests.unit.descriptors import open_descriptors
from tierd.node import filler as filler_module
from tierd.node.catalog import files_of
from tierd.node.cold_source import ColdSource
from tierd.node.fill import Fill
from tierd.node.store import Copy, Store
from tierd.node.tier import NodeTier, TierSettings
from tierd.node.usage import Usage
from tierd.policy import NS, Watermarks
from tierd.units import model_of

ROOTS = (b"models",)
MIB = 1 << 20


class Counts:
    """What the tier reported."""

    def __init__(self) -> None:
        self.fills: list[tuple[str, int]] = []
        self.evictions: Counter[str] = Counter()
        self.evicted_bytes = 0
        self.stale = 0
        self.refusals = 0
        self.change = threading.Condition()

    def fill_ended(self, outcome: str, seconds: float, size: int) -> None:
        assert seconds >= 0
        with self.change:
            self.fills.append((outcome, size))
            self.change.notify_all()

    def evicted(self, reason: str, size: int) -> None:
        with self.change:
            self.evictions[reason] += 1
            self.evicted_bytes += size
            self.change.notify_all()

    def stale_served(self) -> None:
        self.stale += 1

    def refused(self) -> None:
        self.refusals += 1

    def wait_for_fills(self, count: int) -> list[tuple[str, int]]:
        with self.change:
            assert self.change.wait_for(lambda: len(self.fills) >= count, WAIT_SECONDS), self.fills
            return sorted(self.fills)


class Tiered:
    """A source with models, and a tier over it whose clock the test moves."""

    def __init__(self, base: Path, store: Store, **settings: object) -> None:
        self.source = base / "source"
        self.source.mkdir(exist_ok=True)
        self.store = store
        self.now_ns = 1_000_000 * NS
        self.counts = Counts()
        self.opened: list[Copy] = []
        self.space_needed = threading.Event()
        self.usage = Usage(half_life_s=1000.0, now_ns=lambda: self.now_ns)
        self.posix = ColdSource(self.source)
        self.readers: list[Reader] = []
        arguments = {"limit_bytes": 1 << 40, "marks": Watermarks(0.0, 0.001), **settings}
        self.tier = NodeTier(
            store,
            self.posix,
            self.usage,
            TierSettings(**arguments),  # type: ignore[arg-type]
            self.counts,
            model_of=lambda path: model_of(path, ROOTS, lambda _: True),
            files_of=lambda model: files_of(self.posix, model, lambda path: model_of(path, ROOTS, lambda _: True)),
            read_ahead=self.opened.append,
            space_needed=self.space_needed.set,
        )

    def start(self) -> NodeTier:
        self.tier.start()
        return self.tier

    def write(self, name: str, size: int = 10_000, seed: object = 0) -> bytes:
        path = self.source / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content((name, seed), size)
        path.write_bytes(data)
        return data

    def path(self, name: str) -> Path:
        return self.source / "models" / name

    def open(self, name: str) -> tuple[bytes | None, Fill | None]:
        """As a pod's open does that finds no current copy."""
        reader = Reader(self.path(name))
        self.readers.append(reader)
        found = self.tier.begin(identity_of(self.path(name)), b"models/" + os.fsencode(name), reader.source_fd)
        if found[1] is not None:
            reader.join(found[1])
        return found

    def fill(self, name: str, size: int = 10_000) -> Copy:
        """A file that is on the node."""
        data = self.write(name, size)
        path = b"models/" + os.fsencode(name)
        identity = identity_of(self.path(name))
        model = model_of(path, ROOTS, lambda _: True)
        assert model is not None
        copy = add_copy(
            self.store, identity.inode, data, path=path, model=model, mtime_ns=identity.mtime_ns,
            ctime_ns=identity.ctime_ns,
        )  # fmt: skip
        self.now_ns += NS
        self.usage.arrived(model)
        return copy

    def current(self, name: str) -> Copy | None:
        """The copy that an open would be served from."""
        identity = identity_of(self.path(name))
        copy = self.tier.find(identity.inode)
        return copy if copy is not None and self.tier.is_current(copy, identity) else None

    def models(self) -> set[bytes]:
        return set(self.store.held_by_model())

    def settle(self) -> None:
        """The chores that were asked for are done."""
        for chores in (self.tier.chores, self.tier.rechecks):
            with chores._change:
                assert chores._change.wait_for(lambda chores=chores: len(chores) == 0, WAIT_SECONDS)  # type: ignore[misc]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.tier.stop()
        self.posix.close()


@pytest.fixture
def tiered(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiered]:
    monkeypatch.setattr(filler_module, "_TICK_SECONDS", 0.0)
    before = open_descriptors()
    made = Tiered(tmp_path, store)
    yield made
    made.close()
    assert [line for line in open_descriptors() - before if str(tmp_path) in line] == []
