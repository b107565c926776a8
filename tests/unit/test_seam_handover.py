"""What the seam writes down for the next daemon, and how it goes on from where another one ended."""

from __future__ import annotations

import os
import queue
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mounts import wait_until
from tests.unit.test_seam import IN_HEADER, INIT, LOOKUP, OPEN, SECONDS, Wire
from tests.unit.test_seam_short import Way
from tierd.node.device import RESEND
from tierd.node.estate import Said
from tierd.node.ledger import FORGOT, ID, PAIR, RESENT, SAID, SAID_HEAD, UNSAID, Ledger, records
from tierd.node.ledger import INIT as INIT_RECORD
from tierd.node.messages import BATCH_FORGET, FORGET, UNLINK
from tierd.node.seam import Inheritance, Seam
from tierd.node.short_answers import ShortAnswers

INIT_BODY = struct.pack("=IIIII44x", 7, 45, 1 << 17, 1 << 30, 1 << 7)
INIT_MESSAGE = IN_HEADER.pack(IN_HEADER.size + len(INIT_BODY), INIT, 2, 0, 0, 0, 0, 0, 0) + INIT_BODY
ENTRY = struct.pack("=Q", 9) + bytes(120)


class Line(NamedTuple):
    """A wire, the ledger of its seam, and what the seam said that it took back."""

    wire: Wire
    ledger: Ledger
    taken_back: queue.SimpleQueue[Said]

    def written(self) -> list[tuple[int, bytes]]:
        return list(records(self.ledger.fd))

    def written_soon(self, *expected: tuple[int, bytes]) -> None:
        """Requests that nobody answers leave no other trace."""
        wait_until(lambda: self.written() == list(expected), SECONDS, lambda: f"{expected} in {self.written()}")


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """Not started yet."""
    ledger, taken_back = Ledger(), queue.SimpleQueue[Said]()
    wire = Wire(tmp_path, start=False, ledger=ledger, undelivered=taken_back.put)
    yield Line(wire, ledger, taken_back)
    wire.close()
    ledger.close()


def inherit(line: Line, doubtful: dict[int, Said] | None = None) -> None:
    """Go on after another daemon: libfuse is told INIT, the kernel to send again."""
    line.wire.seam.start(Inheritance(INIT_MESSAGE, doubtful or {}))
    assert line.wire.libfuse.recv(1000) == INIT_MESSAGE
    assert line.wire.kernel.recv(1000) == RESEND


# --- the first daemon ---


def test_the_kernel_s_init_is_written_down_before_anybody_hears_of_it(line: Line) -> None:
    line.wire.seam.start()
    line.wire.kernel.send(INIT_MESSAGE)
    line.wire.libfuse.recv(1000)
    assert line.written() == [(INIT_RECORD, INIT_MESSAGE)]


def test_what_a_reply_tells_is_written_down_before_the_kernel_has_it(line: Line) -> None:
    line.wire.seam.start()
    line.wire.request(LOOKUP, 8, b"name\0")
    line.wire.request(OPEN, 10, struct.pack("=II", os.O_RDWR, 0))
    line.wire.libfuse.recv(1000)
    line.wire.libfuse.recv(1000)
    line.wire.reply(8, ENTRY)
    line.wire.answer()
    said = [(SAID, SAID_HEAD.pack(8, 0) + ID.pack(9))]
    assert line.written() == said
    line.wire.reply(10, struct.pack("=QIi", 77, 0, 0))
    line.wire.answer()
    assert line.written() == [*said, (SAID, SAID_HEAD.pack(10, 77))]


def test_what_the_short_way_tells_is_written_down_too(line: Line) -> None:
    line.wire.seam._short = ShortAnswers(Way(), 1)
    line.wire.seam.start()
    line.wire.request(LOOKUP, 8, b"name\0")
    assert line.wire.answer() == (8, 0, b"entry of name")
    line.wire.request(OPEN, 10, struct.pack("=II", os.O_RDONLY, 0))
    line.wire.answer()
    assert line.written() == [(SAID, SAID_HEAD.pack(8, 0) + b"entry of"), (SAID, SAID_HEAD.pack(10, 1 << 48))]


def test_an_error_tells_of_nothing(line: Line) -> None:
    line.wire.seam.start()
    line.wire.request(LOOKUP, 8, b"name\0")
    line.wire.libfuse.recv(1000)
    line.wire.reply(8, error=-2)
    line.wire.answer()
    assert line.written() == []


def test_what_the_kernel_forgets_is_written_down_at_once(line: Line) -> None:
    """libfuse has read it before it says so to anybody, and the kernel never says it again."""
    line.wire.seam.start()
    line.wire.request(FORGET, 0, struct.pack("=Q", 3))
    line.written_soon((FORGOT, PAIR.pack(1, 3)))
    line.wire.request(BATCH_FORGET, 0, struct.pack("=IIQQQQ", 2, 0, 9, 1, 10, 2))
    line.written_soon((FORGOT, PAIR.pack(1, 3)), (FORGOT, PAIR.pack(9, 1) + PAIR.pack(10, 2)))


def test_a_request_that_must_not_be_done_twice_comes_with_its_number(line: Line) -> None:
    line.wire.seam.start()
    line.wire.request(UNLINK, 8, b"name\0")
    *_, pid, _, _ = IN_HEADER.unpack_from(line.wire.libfuse.recv(1000))
    assert line.wire.seam.caller_of(pid) == (0, 8)
    assert line.wire.seam.caller_of(pid) == (pid, 0), "it is asked once"


# --- the next one ---


def test_libfuse_hears_of_the_init_of_then_and_the_kernel_of_no_second_answer(line: Line) -> None:
    inherit(line)
    assert line.wire.seam.resend_agreed
    line.wire.reply(2, bytes(64))
    line.wire.request(LOOKUP, 8, b"name\0")
    line.wire.libfuse.recv(1000)
    line.wire.reply(8, ENTRY)
    assert line.wire.answer()[0] == 8


def test_nothing_is_read_before_the_kernel_was_asked_to_send_again(line: Line) -> None:
    """It would be sent again, too, and done twice."""
    _fill_the_way_to_the_kernel(line.wire.seam)
    line.wire.request(LOOKUP, 8, b"name\0")
    starting = threading.Thread(target=line.wire.seam.start, args=(Inheritance(INIT_MESSAGE, {}),))
    starting.start()
    assert line.wire.libfuse.recv(1000) == INIT_MESSAGE
    line.wire.libfuse.settimeout(0.3)
    with pytest.raises(TimeoutError):
        line.wire.libfuse.recv(1000)
    while line.wire.kernel.recv(1 << 20) != RESEND:
        pass
    starting.join()
    line.wire.libfuse.settimeout(SECONDS)
    assert IN_HEADER.unpack_from(line.wire.libfuse.recv(1000))[1:3] == (LOOKUP, 8)


def _fill_the_way_to_the_kernel(seam: Seam) -> None:
    os.set_blocking(seam.device, False)
    try:
        while True:
            os.write(seam.device, b"x" * 1000)
    except BlockingIOError:
        os.set_blocking(seam.device, True)


def test_what_is_sent_again_was_not_delivered(line: Line) -> None:
    """Once: the second time it is what this daemon said."""
    inherit(line, {8: Said((9, 10), 0)})
    for _ in range(2):
        line.wire.request(LOOKUP, 8 | RESENT, b"name\0")
        line.wire.libfuse.recv(1000)
    assert line.taken_back.get(timeout=SECONDS) == Said((9, 10), 0)
    assert line.taken_back.empty()
    assert line.written() == [(UNSAID, ID.pack(8))]
    assert line.wire.seam.resent == 2


def test_what_is_new_takes_nothing_back(line: Line) -> None:
    """The kernel begins to count anew at some time."""
    inherit(line, {8: Said((9,), 0)})
    line.wire.request(LOOKUP, 8, b"name\0")
    line.wire.libfuse.recv(1000)
    assert line.written() == []
    assert line.taken_back.empty()
