"""READs that were taken before a fill took their handle over are answered from where their bytes were then."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.copies import MODEL, identity_of
from tierd.node.copies import Draft
from tierd.node.fill import Fill
from tierd.node.messages import OUT_HEADER
from tierd.node.reads import Gate, Reads, ReadTarget
from tierd.node.wanted import Priority

FH = 5
BYTES = b"of the object"


class Device:
    """What the kernel is answered."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.reads = Reads(lambda parts: self.answers.append(bytes(parts[0][OUT_HEADER.size :])))

    def serve(self) -> list[bytes]:
        """The threads come to what is queued, and end."""
        threads = [threading.Thread(target=body) for body in self.reads.workers().values()]
        for thread in threads:
            thread.start()
        self.reads.close()
        for thread in threads:
            thread.join()
        return self.answers


@pytest.fixture
def fill(tmp_path: Path) -> Iterator[Fill]:
    """With space that is reserved, and nothing in it."""
    path = tmp_path / "x"
    path.write_bytes(bytes(len(BYTES)))
    identity = identity_of(path)
    made = Fill(identity, b"x", MODEL, -1, Priority.READER, threading.Condition())
    draft = Draft("x", identity, b"x", MODEL, os.open(path, os.O_RDONLY))
    made.set_draft(draft)
    yield made
    draft.close()


def cold_target() -> ReadTarget:
    def read(view: memoryview, offset: int) -> int:
        view[:] = BYTES[offset : offset + len(view)]
        return len(view)

    return ReadTarget(-1, reader=read)


def test_a_read_that_waits_for_a_thread_while_a_fill_begins(fill: Fill) -> None:
    """It was read from the draft, where its bytes were still zeros (by a loader of a cold model, once)."""
    device, target = Device(), cold_target()
    device.reads.serve(FH, target)
    assert device.reads.take(1, FH, 0, len(BYTES))
    fill.attach(target)
    assert device.reads.take(2, FH, 0, len(BYTES)), "parked until it lands"
    assert device.serve() == [BYTES]
    assert device.reads.parked() == 1


def test_a_read_that_is_being_queued_while_a_fill_begins(fill: Fill) -> None:
    class Overtaken(ReadTarget):
        """The fill begins right after somebody looked for it."""

        __slots__ = ("_gate",)

        @property
        def gate(self) -> Gate | None:  # type: ignore[override]
            gate: Gate | None = getattr(self, "_gate", None)
            if gate is None:
                self._gate = fill
                fill.attach(self)
                return None
            return gate

        @gate.setter
        def gate(self, gate: Gate | None) -> None:
            if gate is not None:
                self._gate = gate

    device, target = Device(), Overtaken(-1, reader=cold_target().reader)
    device.reads.serve(FH, target)
    assert device.reads.take(1, FH, 0, len(BYTES))
    assert device.serve() == [BYTES]
