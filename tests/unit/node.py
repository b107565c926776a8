"""All parts of a node tier over a source, without a mount."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.unit.copies import WAIT_SECONDS, add_copy, content, identity_of
from tests.unit.descriptors import open_descriptors
from tierd.config import MountSettings
from tierd.errors import UsageError
from tierd.metrics import TierMetrics
from tierd.node import filler as filler_module
from tierd.node.catalog import walk
from tierd.node.cold_source import ColdSource
from tierd.node.index import Index
from tierd.node.store import Copy
from tierd.node.tier_control import TierControl
from tierd.node.tier_setup import TierParts

SIZE = 10_000


class Node:
    """All parts of a node tier over a source, without a mount."""

    def __init__(self, base: Path, **settings: Any) -> None:
        self.base = base
        self.source = base / "source"
        for path in (self.source / "models", base / "cache", base / "state"):
            path.mkdir(parents=True, exist_ok=True)
        self.index = Index(base / "state" / "index.db")
        self.posix = ColdSource(self.source)
        made = MountSettings(
            source=self.source, mountpoint=base / "mnt", free_space_ratio=0.0, free_space_target=0.001, **settings
        )  # type: ignore[arg-type]
        self.parts = TierParts(
            base / "cache", made, self.posix, self.index, TierMetrics(CollectorRegistry()), lambda _: True
        )
        self.control = TierControl(
            self.parts, self.index, self.source, lambda: walk(self.posix, made.models_roots_bytes).size_bytes
        )
        self.parts.tier.start()

    def write(self, name: str | bytes, size: int = SIZE) -> None:
        path = os.fsencode(self.source) + b"/models/" + os.fsencode(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content(name, size))

    def fill(self, name: str, size: int = SIZE) -> Copy:
        """A file that is on the node."""
        self.write(name, size)
        identity = identity_of(self.source / "models" / name)
        return add_copy(
            self.parts.store, identity.inode, content(name, size), path=f"models/{name}".encode(),
            model=f"models/{os.path.dirname(name)}".encode(), mtime_ns=identity.mtime_ns, ctime_ns=identity.ctime_ns,
        )  # fmt: skip

    def refusal(self, *names: str) -> tuple[str, str]:
        """What a person is told about names that cannot be meant."""
        with pytest.raises(UsageError) as raised:
            self.control.resolve(names)
        return str(raised.value), raised.value.hint

    def await_check(self) -> dict[str, Any]:
        thread = self.control._check._thread
        assert thread is not None
        thread.join(WAIT_SECONDS)
        told = self.control.tell_check()
        assert told["state"] == "done"
        return told

    def await_complete(self, name: str) -> None:
        """Every fill that is queued or runs has ended."""
        filler = self.parts.tier.filler
        with filler._change:
            assert filler._change.wait_for(
                lambda: not filler._active and not filler._opening and not filler.queued(), WAIT_SECONDS
            )
        (row,) = self.control.progress_of([name])["models"]
        assert row["state"] == "complete", row

    def close(self) -> None:
        self.parts.read_ahead.stop()
        self.parts.tier.stop()
        self.parts.store.check()
        assert self.parts.store.leftovers() == []
        self.parts.store.close()
        self.posix.close()
        self.index.close()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(filler_module, "_TICK_SECONDS", 0.0)
    before = open_descriptors()
    made = Node(tmp_path)
    yield made
    made.close()
    assert [line for line in open_descriptors() - before if str(tmp_path) in line] == []


def count_walks(node: Node, monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each model is walked from now on."""
    walks: Counter[bytes] = Counter()
    real = node.parts.tier.listings._files_of

    def files_of(model: bytes) -> Any:
        walks[model] += 1
        return real(model)

    monkeypatch.setattr(node.parts.tier.listings, "_files_of", files_of)
    return walks
