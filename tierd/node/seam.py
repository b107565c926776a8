"""The seam between /dev/fuse and libfuse: pyfuse3 stays unmodified, and bytes bypass it.

libfuse takes a descriptor that is already open (`/dev/fd/N`) for its FUSE device, so it gets one end of
a socket pair, and two pumps copy messages between the other end and the device (FUSE-NOTES: "Passthrough
with an unmodified pyfuse3"). On the way the seam

- answers READ of files that the daemon serves itself, in threads of its own: one read of the source and
  one write to the device per request, no event loop, no copy in Python;
- raises `max_background` in the reply to INIT, whose default of 12 lets stalled reads block a mount;
- sets FOPEN_NOFLUSH in the reply to a read-only OPEN, so that its close costs no request;
- answers requests whose caller gave up (`giving_up.py`), which pyfuse3 does not;
- negotiates passthrough and puts the backing ID into the reply to an OPEN that shall use it.

Message formats: include/uapi/linux/fuse.h, protocol 7.38. Knows nothing of files or names.

Contract: `serve_reads` and `stop_reads` are called from the trio thread while the kernel cannot send a READ
for the handle (before the reply to OPEN, after RELEASE), so the pumps need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from tierd.node.backings import Backings
from tierd.node.device import RESEND, unmount
from tierd.node.estate import Said
from tierd.node.giving_up import WaitingOpens, release_message
from tierd.node.ledger import RESENT, Ledger
from tierd.node.messages import (
    BATCH_FORGET,
    FORGET,
    ID,
    IN_HEADER,
    INIT,
    INTERRUPT,
    ONCE,
    OPEN,
    OPEN_IN_FLAGS,
    OUT_HEADER,
    READ,
    READ_BYTES_MAX,
    READ_IN,
    TELLING,
    finish_open,
    forgotten,
    handle_in,
    invalidate,
    offered,
    set_limits,
    set_pid,
    told_by,
    without_splice,
)
from tierd.node.reads import Reads, ReadTarget
from tierd.node.short_answers import LATE_SECONDS, SHORT, ShortAnswers, ShortWay, TookTooLong

log = structlog.get_logger(__name__)

_HEADER_ROOM = 4096
_MESSAGE_BYTES_MAX = READ_BYTES_MAX + _HEADER_ROOM
_SOCKET_BYTES = 8 * _MESSAGE_BYTES_MAX
_SIOCOUTQ = 0x5411
_PUMPS_IN = 4
"""Threads that read the device. A request for a hot file is answered right there and may wait for the source; one of
them never does."""
_FIRST_TOKEN = 1 << 30
"""Process IDs are smaller (PID_MAX_LIMIT is 2^22)."""
_NOTICES_MAX = 10_000
_NOBUFS_PAUSE_SECONDS = 0.001


class Inheritance(NamedTuple):
    """What the daemon before this one left to the seam: the kernel's INIT request, replies that may not have been
    delivered, by unique."""

    init: bytes
    doubtful: Mapping[int, Said]


class Seam:
    """See the module.

    `ended` is called, from a pump, once the kernel has ended the connection (umount). `passthrough` and `resend` say
    whether to ask for them; `passthrough_agreed` and `resend_agreed` are None until the kernel has sent INIT, then
    whether it offered them. `undelivered` is told, from a pump, what a reply said that the kernel never got.
    """

    def __init__(
        self,
        device: int,
        ended: Callable[[], None],
        *,
        passthrough: bool,
        resend: bool = True,
        short_way: ShortWay | None = None,
        ledger: Ledger | None = None,
        undelivered: Callable[[Said], None] = lambda said: None,
    ) -> None:
        self.device = device
        self._ledger = ledger or Ledger()
        self._undelivered = undelivered
        self._doubtful: dict[int, Said] = {}
        self._callers: dict[int, tuple[int, int]] = {}
        self._tokens = itertools.count()
        self._awaited: dict[int, int] = {}
        """Opcodes of forwarded requests whose replies tell the kernel of nodes or handles, by unique."""
        self._resend = resend
        self.resend_agreed: bool | None = None
        self._short = ShortAnswers(short_way, _PUMPS_IN - 1) if short_way is not None else None
        self._ended = ended
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._room = min(_widen(ours), _widen(theirs))
        self._ours = ours
        self.libfuse_fd = theirs.detach()
        """libfuse's end; libfuse closes it."""
        self._passthrough = passthrough
        self.passthrough_agreed: bool | None = None
        self.backings = Backings(device, self._ledger)
        self._backing_of_open: dict[int, int] = {}
        self._read_only_opens: set[int] = set()
        self._opens = WaitingOpens()
        self._init_unique: int | None = None
        self._replayed = False
        self.resent = 0
        """Requests that the kernel sent again, because a daemon before this one did not answer them."""
        self._closed = False
        self.reads = Reads(self._answer)
        self._notices: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.notices_dropped = 0
        self._threads = [
            *(self._thread(f"seam-in-{i}", self._pump_in) for i in range(_PUMPS_IN)),
            self._thread("seam-out", self._pump_out),
            self._thread("seam-notify", self._notify),
            self._thread("seam-watch", self._watch),
            *(self._thread(name, body) for name, body in self.reads.workers().items()),
        ]

    def _thread(self, name: str, body: Callable[..., None], *args: Any) -> threading.Thread:
        return threading.Thread(target=self._guarded, args=(body, *args), name=name, daemon=True)

    @property
    def mountpoint(self) -> str:
        """What libfuse is told to mount on."""
        return f"/dev/fd/{self.libfuse_fd}"

    def start(self, left: Inheritance | None = None) -> None:
        """Start the pumps; go on from where another daemon ended, if there was one.

        libfuse gets the INIT of then first, and its answer goes nowhere: the kernel had one.
        """
        if left is not None:
            self._doubtful.update(left.doubtful)
            self._replayed = True
            self._forward(memoryview(self._take_init(bytearray(left.init))))
            os.write(self.device, RESEND)  # first of all: it would resend what was already read here, too
        for thread in self._threads:
            thread.start()

    def caller_of(self, pid: int) -> tuple[int, int]:
        """The process and the unique number of a request that came to pyfuse3 from process `pid`."""
        return self._callers.pop(pid, (pid, 0))

    def congested(self) -> bool:
        """True if replies fill half of the room on their way to the kernel.

        The event loop must then wait before it replies: libfuse's write would block with the interpreter
        lock held, and the pump that empties the socket needs that lock.
        """
        (unsent,) = struct.unpack("=i", fcntl.ioctl(self.libfuse_fd, _SIOCOUTQ, b"\0\0\0\0"))
        return bool(unsent > self._room // 2)

    def content_changed(self, node_id: int) -> None:
        """FUSE_NOTIFY_INVAL_INODE for attributes and pages. Waits for READs: not for the event loop or a pump."""
        self._answer([memoryview(invalidate(node_id, pages=True))])

    def attributes_changed(self, node_id: int) -> None:
        """The same for the attributes alone: waits for no READ. May block: not for the event loop or a pump."""
        self._answer([memoryview(invalidate(node_id, pages=False))])

    def drop_pages(self, node_id: int) -> None:
        """Have the kernel drop its cached pages of a node, some time soon and from a thread of its own."""
        if self._notices.qsize() < _NOTICES_MAX:
            self._notices.put(node_id)
        else:
            self.notices_dropped += 1

    def _notify(self) -> None:
        """FUSE_NOTIFY_INVAL_INODE waits for READs in work, so neither a pump nor the event loop may send it."""
        while (node_id := self._notices.get()) is not None:
            self.content_changed(node_id)

    def serve_reads(self, fh: int, target: ReadTarget) -> None:
        """From now on READs of handle `fh` are answered from `target`."""
        self.reads.serve(fh, target)

    def offers_passthrough(self) -> bool:
        """True once the kernel has agreed to it."""
        return bool(self.passthrough_agreed)

    def back(self, node_id: int, fd: int) -> int | None:
        """A backing ID for one more open of a node; None if the kernel offers no passthrough or refuses."""
        return self.backings.acquire(node_id, fd) if self.passthrough_agreed else None

    def unback(self, node_id: int) -> None:
        """One open of the node with a backing fewer."""
        self.backings.release(node_id)

    def pass_through(self, fh: int, backing_id: int) -> None:
        """The reply to the OPEN that returns handle `fh` shall carry this backing ID."""
        self._backing_of_open[fh] = backing_id

    def stop_reads(self, fh: int) -> None:
        """The handle was released."""
        self.reads.stop(fh)
        self._backing_of_open.pop(fh, None)

    def close(self, mountpoint: Path) -> None:
        """Unmount (lazily if busy) and end the pumps. May be called again."""
        if self._closed:
            return
        self._closed = True
        unmount(str(mountpoint))
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self.reads.close()
        self._notices.put(None)

    def _guarded(self, body: Callable[..., None], *args: Any) -> None:
        try:
            body(*args)
        except OSError as error:
            if error.errno not in _END_ERRORS:
                log.exception("seam_failed", thread=threading.current_thread().name)
        except Exception:
            log.exception("seam_failed", thread=threading.current_thread().name)
        if not self._closed:
            self._ended()

    # --- kernel to libfuse ---

    def _pump_in(self) -> None:
        # Written to, so that it is there: a kill while the kernel has to fault it in would fail the request.
        buffer = bytearray(b"\1") * _MESSAGE_BYTES_MAX
        view = memoryview(buffer)
        while True:
            try:
                size = os.readv(self.device, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            if size < IN_HEADER.size:  # no request: what the buffer holds is the one before
                continue
            _, opcode, unique, _, _, _, pid, _, _ = IN_HEADER.unpack_from(buffer)
            if unique & RESENT:
                self._take_back(unique)
            if opcode == READ and self.reads.take(unique, *READ_IN.unpack_from(buffer, IN_HEADER.size)):
                continue
            if opcode in SHORT and self._short is not None and self._answer_short(self._short, opcode, view[:size]):
                continue
            if opcode == INIT:
                self._take_init(buffer)
                self._ledger.init(bytes(view[:size]))
            elif opcode == INTERRUPT:
                self._interrupt(*ID.unpack_from(buffer, IN_HEADER.size))
                continue  # pyfuse3 has no use for it, and libfuse would keep those of our READs for ever
            elif opcode in (FORGET, BATCH_FORGET):  # at once: the kernel never says it again
                self._ledger.forgot(forgotten(opcode, view[:size]))
            else:
                self._note_request(view[:size], opcode, unique, pid)
            self._forward(view[:size])

    def _take_init(self, init: bytearray) -> bytearray:
        """Hear what the kernel offers; what libfuse shall hear of it."""
        _, _, self._init_unique, *_ = IN_HEADER.unpack_from(init)
        passthrough, resend = offered(init)
        self.passthrough_agreed = self._passthrough and passthrough
        self.resend_agreed = self._resend and resend
        without_splice(init)
        return init

    def _take_back(self, unique: int) -> None:
        """The kernel sends a request again: it never got the answer."""
        self.resent += 1
        said = self._doubtful.pop(unique & ~RESENT, None)
        if said is not None:
            self._ledger.unsaid(unique)
            self._undelivered(said)

    def _note_request(self, message: memoryview, opcode: int, unique: int, pid: int) -> None:
        """Remember what its reply, or its handler, will be asked for.

        pyfuse3 does not tell handlers the unique number of a request, so that of one which must not be done twice
        travels as the process it comes from.
        """
        if opcode in TELLING:
            self._awaited[unique] = opcode
        if opcode == OPEN:
            self._opens.sent(unique, IN_HEADER.unpack_from(message)[3])
            (flags,) = OPEN_IN_FLAGS.unpack_from(message, IN_HEADER.size)
            if flags & os.O_ACCMODE == os.O_RDONLY:
                self._read_only_opens.add(unique)
        if opcode in ONCE:
            token = _FIRST_TOKEN + next(self._tokens) % _FIRST_TOKEN
            self._callers[token] = pid, unique
            set_pid(message, token)

    def _answer_short(self, short: ShortAnswers, opcode: int, message: memoryview) -> bool:
        """True if the request was answered here, or is no longer this pump's."""
        try:
            body = short.answer(message)
        except TookTooLong:
            return True
        if body is None:
            return False
        unique = IN_HEADER.unpack_from(message)[2]
        reply = memoryview(OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
        if opcode in TELLING:
            self._ledger.said(unique, *told_by(opcode, reply))
        self._answer([reply])
        return True

    def _watch(self) -> None:
        """Send requests whose pump hangs in the source the long way; end the waiting of callers who gave up."""
        while not self._closed:
            time.sleep(LATE_SECONDS / 2)
            for unique in self._opens.take_given_up():
                self._answer_interrupted(unique)
            for message in self._short.take_late() if self._short is not None else ():
                _, opcode, unique, _, _, _, pid, _, _ = IN_HEADER.unpack_from(message)
                self._note_request(memoryview(message), opcode, unique, pid)
                self._forward(memoryview(message))

    def _forward(self, message: memoryview) -> None:
        """A large packet needs contiguous memory; on a fragmented machine that takes a while."""
        while True:
            try:
                self._ours.send(message)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            time.sleep(_NOBUFS_PAUSE_SECONDS)

    def _interrupt(self, unique: int) -> None:
        """Somebody gave up waiting: a READ that is parked is answered at once, an OPEN if it takes long."""
        if self.reads.give_up(unique):
            self._answer_interrupted(unique)
        else:
            self._opens.interrupted(unique)

    def _answer_interrupted(self, unique: int) -> None:
        self._answer([memoryview(OUT_HEADER.pack(OUT_HEADER.size, -errno.EINTR, unique))])

    # --- libfuse to kernel ---

    def _pump_out(self) -> None:
        buffer = bytearray(_MESSAGE_BYTES_MAX)
        view = memoryview(buffer)
        while size := self._ours.recv_into(buffer):
            _, error, unique = OUT_HEADER.unpack_from(buffer)
            given_up = self._opens.answered(unique)
            if given_up is not None:
                self._undo_open(buffer, given_up)
                continue
            if unique in self._read_only_opens:
                self._read_only_opens.discard(unique)
                if error == 0:
                    finish_open(buffer, self._backing_of_open.pop(handle_in(buffer), 0))
            elif unique == self._init_unique and error == 0:
                self._init_unique = None
                if self._replayed:
                    continue
                agreed = {"passthrough": bool(self.passthrough_agreed), "resend": bool(self.resend_agreed)}
                set_limits(buffer, self._room // 4, **agreed)
            opcode = self._awaited.pop(unique, None)
            if opcode is not None and error == 0:
                self._ledger.said(unique, *told_by(opcode, view[:size]))
            self._answer([view[:size]])

    def _undo_open(self, reply: bytearray, node_id: int) -> None:
        """The kernel was told EINTR: it will never release what was opened."""
        _, error, unique = OUT_HEADER.unpack_from(reply)
        self._read_only_opens.discard(unique)
        self._awaited.pop(unique, None)
        if error == 0:
            self._forward(memoryview(release_message(unique, node_id, handle_in(reply))))

    def _answer(self, parts: list[memoryview]) -> None:
        """Write one message to the device. ENOENT: the request was interrupted or aborted; nobody waits for it."""
        try:
            os.writev(self.device, parts)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


_END_ERRORS = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})
"""How the device and the socket say that the mount is over."""


_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


def _widen(end: socket.socket) -> int:
    """Make room for messages of a MiB: past the system's limit as root, up to it else; the bytes there are."""
    for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BYTES)
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
