"""The seam between the kernel and libfuse, with a socket pair for the device: messages as the kernel writes them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tierd.node.messages import MAX_BACKGROUND
from tierd.node.reads import ReadTarget
from tierd.node.seam import Seam

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
LOOKUP, OPEN, READ, RELEASE, INIT, INTERRUPT = 1, 14, 15, 18, 26, 36
KEEP_CACHE, NOFLUSH, PASSTHROUGH = 1 << 1, 1 << 5, 1 << 7
INIT_EXT, INIT2_PASSTHROUGH = 1 << 30, 1 << 5
SECONDS = 10.0


class Wire:
    """The kernel's end of the device, libfuse's end of the seam, and what was heard of the end."""

    def __init__(self, nowhere: Path, *, passthrough: bool = False, start: bool = True, **options: Any) -> None:
        device, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (device, self.kernel):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self.ended = threading.Event()
        self.seam = Seam(device.detach(), self.ended.set, passthrough=passthrough, **options)
        self.libfuse = socket.socket(fileno=os.dup(self.seam.libfuse_fd))
        self.kernel.settimeout(SECONDS)
        self.libfuse.settimeout(SECONDS)
        self._nowhere = nowhere
        if start:
            self.seam.start()

    def request(self, opcode: int, unique: int, body: bytes = b"") -> bytes:
        """Send a request as the kernel does."""
        message = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body
        self.kernel.send(message)
        return message

    def read(self, unique: int, fh: int, offset: int, size: int) -> bytes:
        """struct fuse_read_in."""
        return self.request(READ, unique, struct.pack("=QQIIQII", fh, offset, size, 0, 0, 0, 0))

    def answer(self) -> tuple[int, int, bytes]:
        """What the kernel hears: request, error and payload."""
        message = self.kernel.recv(2 << 20)
        size, error, unique = OUT_HEADER.unpack_from(message)
        assert size == len(message)
        return unique, error, message[OUT_HEADER.size :]

    def reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        """What libfuse answers."""
        self.libfuse.send(OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body)

    def hang_up(self) -> None:
        """What an unmount does: reads of the device fail from now on. A closed socket alone would read as empty."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.seam.device)
        os.close(nothing)
        self.kernel.close()

    def close(self) -> None:
        """As the daemon does; libfuse closes its own end."""
        self.seam.close(self._nowhere)
        self.hang_up()
        self.libfuse.close()
        for thread in self.seam._threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), thread.name
        self.seam._ours.close()
        os.close(self.seam.libfuse_fd)
        os.close(self.seam.device)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path / "nowhere")
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 16)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_requests_and_replies_pass_unchanged(wire: Wire) -> None:
    message = wire.request(LOOKUP, 7, b"name\0")
    assert wire.libfuse.recv(1 << 20) == message
    wire.reply(7, b"an entry")
    assert wire.answer() == (7, 0, b"an entry")
    wire.reply(8, error=-errno.ENOENT)
    assert wire.answer() == (8, -errno.ENOENT, b"")


@pytest.mark.parametrize(("offset", "size", "have"), [(0, 4096, 4096), (100, 10, 10), (4000, 1000, 96), (4096, 10, 0)])
def test_reads_of_a_served_handle_are_answered_here(wire: Wire, file: int, offset: int, size: int, have: int) -> None:
    target = ReadTarget(file)
    wire.seam.serve_reads(5, target)
    wire.read(9, 5, offset, size)
    assert wire.answer() == (9, 0, (bytes(range(256)) * 16)[offset : offset + have])


def test_bytes_are_counted_before_the_reader_has_them(wire: Wire, file: int) -> None:
    """Else a file read and closed at once is recorded with fewer bytes than were read."""
    target = ReadTarget(file)
    wire.seam.serve_reads(5, target)
    for number in range(1, 300):
        wire.read(number, 5, 0, 64)
        wire.answer()
        assert target.bytes_read == number * 64


def test_bytes_of_reads_at_once_add_up(wire: Wire, file: int) -> None:
    target = ReadTarget(file)
    wire.seam.serve_reads(5, target)
    for _ in range(40):
        for unique in range(1, 51):
            wire.read(unique, 5, 0, 16)
        assert sorted(wire.answer()[0] for _ in range(50)) == list(range(1, 51))
    wire.request(LOOKUP, 99, b"x\0")
    wire.libfuse.recv(1 << 20)
    assert target.bytes_read == 40 * 50 * 16


def test_reads_of_other_handles_go_to_libfuse(wire: Wire, file: int) -> None:
    wire.seam.serve_reads(5, ReadTarget(file))
    message = wire.read(1, 6, 0, 10)
    assert wire.libfuse.recv(1 << 20) == message
    wire.seam.stop_reads(5)
    wire.seam.stop_reads(5)
    message = wire.read(2, 5, 0, 10)
    assert wire.libfuse.recv(1 << 20) == message


def test_a_failing_read_is_its_errno(wire: Wire, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    wire.seam.serve_reads(5, ReadTarget(directory))
    wire.read(3, 5, 0, 10)
    assert wire.answer() == (3, -errno.EISDIR, b"")
    os.close(directory)
    wire.read(4, 5, 0, 10)
    assert wire.answer() == (4, -errno.EBADF, b""), "and the thread lives on"


def test_reads_do_not_wait_for_each_other(wire: Wire, file: int) -> None:
    """One stalled source must not hold up the others: a pipe stands for it."""
    reader, writer = os.pipe()
    os.close(writer)
    wire.seam.serve_reads(5, ReadTarget(reader))
    wire.seam.serve_reads(6, ReadTarget(file))
    wire.read(1, 5, 0, 10)
    wire.read(2, 6, 0, 10)
    assert {wire.answer()[0], wire.answer()[0]} == {1, 2}
    os.close(reader)


def init(wire: Wire, flags: int, flags2: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Exchange INIT: the flags that libfuse was asked for, and the fields that the kernel was told."""
    wire.request(INIT, 1, struct.pack("=IIIIIIIIIIIIIIII", 7, 38, 1 << 17, flags, flags2, *[0] * 11))
    asked = struct.unpack_from("=II", wire.libfuse.recv(1 << 20), IN_HEADER.size + 12)
    wire.reply(1, INIT_OUT.pack(7, 38, 1 << 17, 1, 12, 9, 1 << 20, 1, 256, 0, 0, 0, *[0] * 6))
    unique, error, body = wire.answer()
    assert (unique, error) == (1, 0)
    return asked, INIT_OUT.unpack(body)


INIT_OUT = struct.Struct("=IIIIHHIIHHII6I")


def test_init_gets_our_limits_and_no_splice(wire: Wire) -> None:
    splice = (1 << 7) | (1 << 8) | (1 << 9)
    asked, told = init(wire, splice | INIT_EXT | 1, INIT2_PASSTHROUGH)
    assert asked == (INIT_EXT | 1, INIT2_PASSTHROUGH)
    assert told[:4] == (7, 38, 1 << 17, 1)
    assert told[4:6] == (MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4)
    assert 4096 <= told[6] <= 1 << 20
    assert told[6] % 4096 == 0
    assert told[8] == 256
    assert told[10:12] == (0, 0), "passthrough was not wanted"
    assert wire.seam.passthrough_agreed is False


@pytest.mark.parametrize(
    ("flags", "flags2", "agreed"),
    [(INIT_EXT, INIT2_PASSTHROUGH, True), (INIT_EXT, 0, False), (0, INIT2_PASSTHROUGH, False)],
)
def test_passthrough_if_the_kernel_offers_it(tmp_path: Path, flags: int, flags2: int, agreed: bool) -> None:
    wire = Wire(tmp_path / "nowhere", passthrough=True)
    try:
        assert wire.seam.passthrough_agreed is None
        _, told = init(wire, flags, flags2)
        assert wire.seam.passthrough_agreed is agreed
        assert bool(told[3] & INIT_EXT) == bool(told[10] & INIT2_PASSTHROUGH) == bool(told[11]) == agreed
    finally:
        wire.close()


def test_a_backing_goes_into_the_reply_of_its_own_open(wire: Wire) -> None:
    wire.seam.pass_through(77, 5)
    for unique, fh, flags, backing_id in (
        (1, 76, KEEP_CACHE | NOFLUSH, 0),
        (2, 77, PASSTHROUGH | NOFLUSH, 5),
        (3, 77, KEEP_CACHE | NOFLUSH, 0),
    ):
        wire.request(OPEN, unique, struct.pack("=II", os.O_RDONLY, 0))
        wire.libfuse.recv(1 << 20)
        wire.reply(unique, struct.pack("=QII", fh, KEEP_CACHE, 0))
        assert wire.answer() == (unique, 0, struct.pack("=QIi", fh, flags, backing_id))


def test_closes_of_read_only_opens_cost_no_request(wire: Wire) -> None:
    """FOPEN_NOFLUSH in the reply, for O_RDONLY alone, and not in a reply that is an error."""
    for unique, (flags, error, noflush) in enumerate(
        [(os.O_RDONLY, 0, NOFLUSH), (os.O_WRONLY, 0, 0), (os.O_RDWR, 0, 0), (os.O_RDONLY | os.O_TRUNC, 0, NOFLUSH)], 1
    ):
        wire.request(OPEN, unique, struct.pack("=II", flags, 0))
        wire.libfuse.recv(1 << 20)
        wire.reply(unique, struct.pack("=QII", 77, KEEP_CACHE, 0), error)
        assert wire.answer() == (unique, 0, struct.pack("=QII", 77, KEEP_CACHE | noflush, 0))
    wire.request(OPEN, 9, struct.pack("=II", os.O_RDONLY, 0))
    wire.libfuse.recv(1 << 20)
    wire.reply(9, error=-errno.ESTALE)
    assert wire.answer() == (9, -errno.ESTALE, b"")
    assert not wire.seam._read_only_opens, "nothing is remembered of what was answered"


def test_interrupts_stop_here(wire: Wire) -> None:
    wire.request(INTERRUPT, 2, struct.pack("=Q", 1))
    message = wire.request(LOOKUP, 3, b"x\0")
    assert wire.libfuse.recv(1 << 20) == message


@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_an_open_that_somebody_gave_up(wire: Wire, error: int) -> None:
    """Found by Ctrl-C of a reader whose file the source did not open: the process could not even be killed."""
    wire.request(OPEN, 6, struct.pack("=II", os.O_RDONLY, 0))
    wire.libfuse.recv(1 << 20)
    wire.request(INTERRUPT, 7, struct.pack("=Q", 6))
    assert wire.answer() == (6, -errno.EINTR, b"")
    wire.reply(6, struct.pack("=QII", 77, KEEP_CACHE, 0) if error == 0 else b"", error)
    if error == 0:
        message = wire.libfuse.recv(1 << 20)
        assert IN_HEADER.unpack_from(message)[1:4] == (RELEASE, 6, 1), "what was opened is released"
        assert struct.unpack_from("=Q", message, IN_HEADER.size) == (77,)
    wire.reply(8, b"another")
    assert wire.answer() == (8, 0, b"another"), "the late answer goes nowhere"
    assert not wire.seam._read_only_opens
    assert not wire.seam._opens


def test_a_signal_does_not_end_an_open_that_takes_a_moment(wire: Wire) -> None:
    wire.request(OPEN, 6, struct.pack("=II", os.O_RDONLY, 0))
    wire.libfuse.recv(1 << 20)
    wire.request(INTERRUPT, 7, struct.pack("=Q", 6))
    wire.reply(6, struct.pack("=QII", 77, KEEP_CACHE, 0))
    assert wire.answer()[:2] == (6, 0)
    assert not wire.seam._opens


def test_notification_that_content_changed(wire: Wire) -> None:
    wire.seam.content_changed(42)
    notification = wire.kernel.recv(1 << 20)
    assert OUT_HEADER.unpack_from(notification) == (40, 2, 0)
    assert struct.unpack_from("=Qqq", notification, OUT_HEADER.size) == (42, 0, 0), "all pages of the node"


def test_largest_messages_pass(wire: Wire, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "large").write_bytes(data)
    fd = os.open(tmp_path / "large", os.O_RDONLY)
    wire.seam.serve_reads(5, ReadTarget(fd))
    wire.read(1, 5, 0, 1 << 20)
    assert wire.answer() == (1, 0, data)
    os.close(fd)
    assert not wire.seam.congested()


def test_the_end_of_the_connection_is_told_once_started(wire: Wire) -> None:
    with capture_logs() as logs:
        wire.hang_up()
        assert wire.ended.wait(SECONDS)
    assert [line for line in logs if line["log_level"] != "info"] == []


def test_closing_is_not_an_end_by_somebody_else(tmp_path: Path) -> None:
    wire = Wire(tmp_path / "nowhere")
    wire.seam.close(tmp_path / "nowhere")
    wire.seam.close(tmp_path / "nowhere")
    assert not wire.ended.is_set()
    wire.close()
