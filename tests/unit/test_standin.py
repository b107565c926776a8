"""Who answers while no daemon can be kept alive, with a socket pair for the device: every caller hears of it, and what
the kernel says once is written down for the next daemon."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tierd.node.device import RESEND
from tierd.node.estate import read
from tierd.node.ledger import CLOSED, FORGOT, HANDLE, ID, PAIR, RESENT, UNSAID, HandleRecord, Ledger, records
from tierd.node.standin import StandIn

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
LOOKUP, FORGET, OPEN, READ, WRITE, RELEASE, INTERRUPT, RELEASEDIR, BATCH_FORGET = 1, 2, 14, 15, 16, 18, 36, 29, 42


class Wire:
    """The kernel's end of a device, and a ledger that a daemon left."""

    def __init__(self, daemon: Callable[[Ledger], None] = lambda ledger: None) -> None:
        device, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ledger = Ledger()
        self.ledger.init(b"init")
        daemon(self.ledger)
        with device:
            self.stand_in = StandIn(device.fileno(), Ledger(os.dup(self.ledger.fd)))
        self.first = self.kernel.recv(100)

    def says(self, opcode: int, unique: int, body: bytes = b"", node_id: int = 7) -> None:
        """A request, and the stand-in's turn."""
        self.kernel.send(IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node_id, 0, 0, 0, 0, 0) + body)
        self.stand_in.answer()

    def hears(self) -> tuple[int, int] | None:
        """Request and error of an answer, None if there is none."""
        try:
            size, error, unique = OUT_HEADER.unpack(self.kernel.recv(100, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        assert size == OUT_HEADER.size
        return unique, error

    def close(self) -> None:
        """The end of it."""
        self.stand_in.close()
        self.kernel.close()
        self.ledger.close()

    def written(self) -> list[tuple[int, bytes]]:
        """What the ledger has been told since the daemon's end."""
        return list(records(self.ledger.fd))[1:]


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_it_has_everything_sent_again_that_a_daemon_left_unanswered(wire: Wire) -> None:
    assert wire.first == RESEND


@pytest.mark.parametrize("opcode", [LOOKUP, OPEN, READ, WRITE, 4711])
def test_callers_get_an_error(wire: Wire, opcode: int) -> None:
    wire.says(opcode, 8, b"x" * 100_000 if opcode == WRITE else b"body")
    assert wire.hears() == (8, -errno.EIO)
    assert wire.written() == []


@pytest.mark.parametrize("opcode", [RELEASE, RELEASEDIR])
def test_what_is_closed_is_written_down(wire: Wire, opcode: int) -> None:
    """The kernel does not say it again, whatever it is answered."""
    wire.says(opcode, 8, struct.pack("=QIIQ", 1 << 40, 0, 0, 0))
    assert wire.hears() == (8, 0)
    assert wire.written() == [(CLOSED, ID.pack(1 << 40))]


def test_what_is_forgotten_is_written_down_and_not_answered(wire: Wire) -> None:
    wire.says(FORGET, 0, struct.pack("=Q", 3), node_id=9)
    wire.says(BATCH_FORGET, 0, struct.pack("=IIQQQQ", 2, 0, 9, 1, 10, 4), node_id=0)
    assert wire.hears() is None
    assert wire.written() == [(FORGOT, PAIR.pack(9, 3)), (FORGOT, PAIR.pack(9, 1) + PAIR.pack(10, 4))]


def test_an_interrupt_is_not_answered(wire: Wire) -> None:
    """The request that it is about gets its error anyhow."""
    wire.says(INTERRUPT, 9, struct.pack("=Q", 8))
    assert wire.hears() is None


def test_what_is_sent_again_was_not_said(wire: Wire) -> None:
    wire.says(LOOKUP, 8 | RESENT, b"name\0")
    assert wire.hears() == (8 | RESENT, -errno.EIO)
    assert wire.written() == [(UNSAID, ID.pack(8))]


def test_the_next_daemon_finds_what_the_kernel_has_in_the_end() -> None:
    """Of two files that were open one is closed meanwhile, and of two lookups the second was not heard of."""
    wire = Wire(daemon=left_two_files_open)
    wire.says(RELEASE, 20, struct.pack("=QIIQ", 1, 0, 0, 0))
    wire.says(LOOKUP, 4 | RESENT, b"name\0")
    found = read(wire.ledger.fd)
    assert (found.given, set(found.handles), found.lookups) == ({2}, {2}, {9: 1})
    wire.close()


def left_two_files_open(ledger: Ledger) -> None:
    for fh in (1, 2):
        ledger.append(HANDLE, HandleRecord(fh, 9, False, False, False, False, b"", None).pack())
        ledger.said(10 + fh, [], fh)
    for unique in (2, 4):
        ledger.said(unique, [9])


def test_it_gives_the_device_back(wire: Wire) -> None:
    """Nothing of it stays open: the mount must be able to end."""
    before = set(os.listdir("/proc/self/fd"))
    ledger = Ledger(os.dup(wire.ledger.fd))
    stand_in = StandIn(wire.stand_in.fileno(), ledger)
    stand_in.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert read(wire.ledger.fd).init == b"init"
