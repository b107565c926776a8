"""The seam's short way and its parked READs: who answers, who gives up, and that a pump is always free."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.test_seam import INTERRUPT, LOOKUP, NOFLUSH, OPEN, PASSTHROUGH, RELEASE, SECONDS, Wire
from tierd.node import seam as seam_module
from tierd.node import short_answers as short_module
from tierd.node.reads import ReadTarget
from tierd.node.seam import _PUMPS_IN
from tierd.node.short_answers import ShortAnswers

GETATTR = 3


class Way:
    """Answers what it is told to; `hold` has its answers wait."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)
        self.claims: list[bool] = []
        self.knows = True
        self.done = threading.Semaphore(0)

    def _answer(self, claim: Callable[[], bool]) -> bool:
        self.entered.release()
        assert self.go.wait(SECONDS)
        try:
            if not self.knows:
                return False
            self.claims.append(claim())
            return self.claims[-1]
        finally:
            self.done.release()

    def lookup(self, parent_id: int, name: bytes, claim: Callable[[], bool]) -> bytes | None:
        return b"entry of " + name if self._answer(claim) else None

    def open(self, node_id: int, uid: int, pid: int, claim: Callable[[], bool]) -> tuple[int, int] | None:
        return (1 << 48, 77) if self._answer(claim) else None

    def release(self, fh: int) -> bool:
        return fh >= 1 << 48


class Gate:
    """Bytes that land when told."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.asked = threading.Semaphore(0)

    def ready(self, offset: int, size: int, resume: Callable[[], None]) -> bool:
        self.waiting.append(resume)
        self.asked.release()
        return False


@pytest.fixture
def way() -> Iterator[Way]:
    made = Way()
    yield made
    made.go.set()


@pytest.fixture
def wire(tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    made = Wire(tmp_path / "nowhere")
    made.seam._short = ShortAnswers(way, _PUMPS_IN - 1)
    yield made
    way.go.set()
    made.close()
    assert_idle(made)


def assert_idle(wire: Wire) -> None:
    """No pump is at a request."""
    short = wire.seam._short
    assert short is not None
    assert (short._now, short._begun) == (0, {})


def nothing_comes(end: object) -> None:
    end.settimeout(0.1)  # type: ignore[attr-defined]
    with pytest.raises(TimeoutError):
        end.recv(1 << 20)  # type: ignore[attr-defined]
    end.settimeout(SECONDS)  # type: ignore[attr-defined]


def test_hot_requests_are_answered_here(wire: Wire) -> None:
    wire.request(LOOKUP, 1, b"x\0")
    assert wire.answer() == (1, 0, b"entry of x")
    wire.request(OPEN, 2, struct.pack("=II", os.O_RDONLY, 0))
    assert wire.answer() == (2, 0, struct.pack("=QIi", 1 << 48, PASSTHROUGH | NOFLUSH, 77))
    wire.request(RELEASE, 3, struct.pack("=QIIQ", 1 << 48, 0, 0, 0))
    assert wire.answer() == (3, 0, b"")
    nothing_comes(wire.libfuse)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
def test_opens_that_write_go_the_long_way(wire: Wire, way: Way, flags: int) -> None:
    message = wire.request(OPEN, 2, struct.pack("=II", flags, 0))
    assert wire.libfuse.recv(1 << 20) == message
    assert way.claims == []


def test_what_the_short_way_does_not_know_goes_the_long_way(wire: Wire, way: Way) -> None:
    way.knows = False
    for unique, (opcode, body) in enumerate(
        [
            (LOOKUP, b"x\0"),
            (OPEN, struct.pack("=II", os.O_RDONLY, 0)),
            (RELEASE, struct.pack("=QIIQ", 5, 0, 0, 0)),
            (GETATTR, b"\0" * 16),
        ],
        1,
    ):
        message = wire.request(opcode, unique, body)
        assert wire.libfuse.recv(1 << 20) == message
    wire.reply(2, struct.pack("=QII", 9, 0, 0))
    assert wire.answer() == (2, 0, struct.pack("=QII", 9, NOFLUSH, 0)), "remembered as one that reads"


@pytest.mark.parametrize("opcode", [LOOKUP, OPEN])
@pytest.mark.parametrize("knows", [True, False])
def test_a_request_that_hangs_goes_the_long_way_once(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, opcode: int, knows: bool
) -> None:
    for module in (seam_module, short_module):
        monkeypatch.setattr(module, "LATE_SECONDS", 0.05)
    wire = Wire(tmp_path / "nowhere")
    wire.seam._short = ShortAnswers(way, _PUMPS_IN - 1)
    try:
        way.go.clear()
        way.knows = knows
        message = wire.request(opcode, 1, struct.pack("=II", os.O_RDONLY, 0) if opcode == OPEN else b"x\0")
        assert wire.libfuse.recv(1 << 20) == message
        wire.reply(1, struct.pack("=QII", 9, 0, 0))
        unique, error, body = wire.answer()
        assert (unique, error) == (1, 0)
        if opcode == OPEN:
            assert body == struct.pack("=QII", 9, NOFLUSH, 0)
        way.go.set()
        assert way.done.acquire(timeout=SECONDS)
        nothing_comes(wire.kernel)
        nothing_comes(wire.libfuse)
        assert way.claims == ([False] if knows else []), "its late answer counts nothing"
    finally:
        wire.close()
    assert_idle(wire)


def test_one_pump_always_stays_free(wire: Wire, way: Way, tmp_path: Path) -> None:
    way.go.clear()
    for unique in range(1, _PUMPS_IN):
        wire.request(LOOKUP, unique, b"x\0")
        assert way.entered.acquire(timeout=SECONDS)
    for unique in range(10, 20):  # before any of those is late
        message = wire.request(LOOKUP, unique, b"y\0")
        assert wire.libfuse.recv(1 << 20) == message
    (tmp_path / "data").write_bytes(b"bytes")
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    wire.seam.serve_reads(5, ReadTarget(fd))
    wire.read(30, 5, 0, 10)
    assert wire.answer() == (30, 0, b"bytes")
    os.close(fd)
    assert not way.entered.acquire(blocking=False)
    way.go.set()
    assert {wire.answer()[0] for _ in range(1, _PUMPS_IN)} == set(range(1, _PUMPS_IN))
    wire.request(LOOKUP, 40, b"x\0")
    assert wire.answer() == (40, 0, b"entry of x"), "and they come back"


# --- parked READs ---


@pytest.fixture
def parked(wire: Wire, tmp_path: Path) -> Iterator[tuple[Wire, Gate]]:
    (tmp_path / "data").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    target = ReadTarget(fd, local=True)
    gate = target.gate = Gate()
    wire.seam.serve_reads(5, target)
    yield wire, gate
    os.close(fd)


def test_a_parked_read_is_answered_when_its_bytes_land(parked: tuple[Wire, Gate]) -> None:
    wire, gate = parked
    wire.read(1, 5, 2, 4)
    assert gate.asked.acquire(timeout=SECONDS)
    nothing_comes(wire.kernel)
    assert (wire.seam.reads.parked(), wire.seam.reads.queued()) == (1, 0)
    gate.waiting[0]()
    assert wire.answer() == (1, 0, b"2345")
    assert wire.seam.reads.parked() == 0


def test_an_interrupt_ends_a_parked_read_and_no_other(parked: tuple[Wire, Gate]) -> None:
    wire, gate = parked
    for unique in (1, 2):
        wire.read(unique, 5, 0, 4)
        assert gate.asked.acquire(timeout=SECONDS)
    wire.request(INTERRUPT, 8, struct.pack("=Q", 1))
    assert wire.answer() == (1, -errno.EINTR, b"")
    wire.request(INTERRUPT, 9, struct.pack("=Q", 99))
    for resume in gate.waiting:
        resume()
    assert wire.answer() == (2, 0, b"0123")
    nothing_comes(wire.kernel)


def test_bytes_that_land_while_the_gate_is_asked(parked: tuple[Wire, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    """`ready` may call `resume` before it returns: one answer."""
    wire, _ = parked

    def ready(self: Gate, offset: int, size: int, resume: Callable[[], None]) -> bool:
        resume()
        return True

    monkeypatch.setattr(Gate, "ready", ready)
    wire.read(1, 5, 0, 4)
    assert wire.answer() == (1, 0, b"0123")
    nothing_comes(wire.kernel)
