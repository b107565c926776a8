"""A proxy before an S3 server that fails at a rate, or as a test says: 503, resets, short bodies, wrong bytes, stalls.

Real sockets on both sides. Which request fails is drawn from a seed, in the order in which requests come. It counts
what it saw and did, so that tests can tell how often something was asked.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

KINDS = ("503", "reset", "lost", "short", "wrong", "stall")
"""`reset` cuts the connection before the server hears of the request, `lost` after it answered.

Two more are for scripts: `whole` answers with all of an object, as a server would that knows no ranges, and
`error in 200` as S3 does when it finds out too late that it cannot.
"""
_OURS = frozenset({"connection", "transfer-encoding", "content-length", "date", "server", "keep-alive"})
_NOT_FORWARDED = frozenset({"connection", "keep-alive"})
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>"
_INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are sorry</Message></Error>"


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    range: str

    @property
    def part(self) -> int | None:
        """The number of the part that is uploaded; None for other requests."""
        number = dict(self.query).get("partNumber")
        return int(number) if self.method == "PUT" and number else None


Script = Callable[[Request], str | None]


class FaultyS3:
    """See the module. `script` names the fault of a request, before chance does."""

    def __init__(self, upstream: str, rate: float = 0.0, seed: int = 0, script: Script = lambda _: None) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.rate = rate
        self.script = script
        self.whole = b""
        """What the fault `whole` answers with."""
        self.seen: Counter[Request] = Counter()
        self.faults: Counter[str] = Counter()
        self.connections = 0
        self.changed = threading.Condition()
        self._random = random.Random(seed)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> int:
        """How many came."""
        with self.changed:
            return self.seen.total()

    def parts(self) -> Counter[int]:
        """How often each part was sent."""
        with self.changed:
            found: Counter[int] = Counter()
            for request, count in self.seen.items():
                if request.part is not None:
                    found[request.part] += count
            return found

    def await_parts(self, count: int, timeout_s: float) -> bool:
        """True once so many parts were sent; False if that did not happen in time."""
        with self.changed:
            return self.changed.wait_for(
                lambda: sum(count for request, count in self.seen.items() if request.part) >= count, timeout_s
            )

    def await_silence(self, timeout_s: float) -> bool:
        """True once nobody is connected, so that nothing is noted late; False if that did not happen in time."""
        with self.changed:
            return self.changed.wait_for(lambda: self.connections == 0, timeout_s)

    def connected(self, change: int) -> None:
        """So many clients more."""
        with self.changed:
            self.connections += change
            self.changed.notify_all()

    def forget(self) -> None:
        """Count from here on."""
        with self.changed:
            self.seen.clear()
            self.faults.clear()

    def fault_of(self, request: Request) -> str | None:
        """Note the request; how it is to fail."""
        with self.changed:
            self.seen[request] += 1
            fault = self.script(request)
            if fault is None and self._random.random() < self.rate:
                fault = self._random.choice(KINDS)
            if fault == "wrong" and not (request.method == "GET" and not request.query):
                fault = "lost"  # only what an object holds is protected by checksums
            if fault is not None:
                self.faults[fault] += 1
            self.changed.notify_all()
            return fault

    def position(self, size: int) -> int:
        """Where to flip a bit."""
        with self.changed:
            return self._random.randrange(size)

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyS3]:
        """Serves for the length of a `with`."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ending.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def _handler(self) -> type[_Handler]:
        return type("Handler", (_Handler,), {"proxy": self})


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one of its own to the server."""

    proxy: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.proxy.connected(1)
        self.upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()
        self.proxy.connected(-1)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests look at the counters."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = tuple(parse_qsl(url.query, keep_blank_values=True))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client is gone
            self.close_connection = True
            return
        request = Request(self.command, url.path, query, self.headers.get("Range", ""))
        fault = self.proxy.fault_of(request)
        if fault == "503":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        elif fault == "error in 200":
            self._answer(200, [("Content-Type", "application/xml")], _INTERNAL)
        elif fault == "whole":
            self._answer(200, [], self.proxy.whole)
        elif fault == "reset":
            self._reset()
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _forward(self, body: bytes, fault: str | None) -> None:
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _NOT_FORWARDED:
                self.upstream.putheader(name, value)
        self.upstream.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
            self.upstream.send(body)
        response = self.upstream.getresponse()
        content = response.read()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _OURS]
        length = int(response.headers.get("Content-Length") or len(content))
        if fault == "wrong" and content and response.status < 300:
            at = self.proxy.position(len(content))
            content = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        if fault == "lost":
            self._reset()
        elif fault in ("short", "stall"):
            self._answer(response.status, headers, content[: len(content) // 2], length)
            if fault == "stall":
                self._stall()
            self.close_connection = True
        else:
            self._answer(response.status, headers, content, length)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _stall(self) -> None:
        """Say nothing more until the client has had enough."""
        while not self.proxy.ending.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable:
                return

    def _reset(self) -> None:
        """RST instead of FIN (SO_LINGER of 0, socket(7))."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
