"""Bytes of an answer go where the caller wants them: piece by piece, chunk by chunk, and the connection is kept."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3
from urllib3.exceptions import IncompleteRead

from tests.faulty_s3 import Request
from tests.objects.house import BUCKET, house
from tests.objects.servers import MIB
from tierd.objects import ranges
from tierd.objects.faults import Broken
from tierd.objects.ranges import write_all
from tierd.objects.store import FileRange
from tierd.objects.sums import CHUNK_BYTES
from tierd.objects.wire import Incoming

KEY = "m/v1/weights"
CONTENT = os.urandom(6 * CHUNK_BYTES + 5)
SILENCE_S = 5.0


@contextmanager
def answered(*, headers: str, body: bytes) -> Iterator[tuple[urllib3.HTTPResponse, socket.socket]]:
    """What a server has sent so far, and its end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(SILENCE_S)
        theirs.sendall(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode())
        response = http.client.HTTPResponse(ours)
        response.begin()
        theirs.sendall(body)
        yield urllib3.HTTPResponse(response, preload_content=False), theirs


class EnoughError(Exception):
    """The pace ends a try."""


def test_the_deadline_is_looked_at_however_slowly_bytes_drip() -> None:
    """After each piece that came, not when all of them did."""
    told: list[int] = []

    def pace(size: int) -> None:
        told.append(size)
        raise EnoughError

    with answered(headers="Content-Length: 1000000", body=b"abc") as (response, _), pytest.raises(EnoughError):
        Incoming(response, 1_000_000).fill(memoryview(bytearray(1_000_000)), pace)
    assert told == [3]


def test_an_answer_that_ends_too_early_is_a_broken_connection() -> None:
    with answered(headers="Content-Length: 10", body=b"abc") as (response, server):
        server.shutdown(socket.SHUT_WR)
        with pytest.raises(IncompleteRead, match="3 bytes read, 7 more expected"):
            Incoming(response, 10).fill(memoryview(bytearray(10)), lambda size: None)


def test_an_answer_in_pieces_of_its_own_is_not_taken_for_bytes() -> None:
    """Its lengths would be read as if they were the object's."""
    headers = "Transfer-Encoding: chunked\r\nContent-Length: 3"
    body = b"3\r\nabc\r\n0\r\n\r\n"
    with answered(headers=headers, body=body) as (response, _), pytest.raises(Broken, match="its length is not told"):
        Incoming(response, 3)


def test_what_is_left_of_an_answer_is_not_taken_for_the_next_one() -> None:
    with answered(headers="Content-Length: 10", body=b"0123456789") as (response, _):
        incoming = Incoming(response, 10)
        incoming.fill(memoryview(bytearray(4)), lambda size: None)
        with pytest.raises(Broken, match="4 bytes were taken of 10"):
            incoming.end()
        incoming.fill(memoryview(bytearray(6)), lambda size: None)
        incoming.end()
        assert response.closed, "which gives the connection free"


def test_a_connection_serves_one_request_after_the_other(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        stored = at.put(KEY, CONTENT)
        buffer = bytearray(CHUNK_BYTES)
        for chunk in range(6):
            at.far.get_range(BUCKET, KEY, stored, chunk * CHUNK_BYTES, memoryview(buffer))
            assert buffer == CONTENT[chunk * CHUNK_BYTES :][:CHUNK_BYTES]
        assert (at.far.repeated, at.proxy.connections) == (0, 1)


def test_a_file_is_received_by_one_request_that_goes_on_where_it_broke(tmp_path: Path) -> None:
    """A bit flips on the way: the chunks before it are in the file, and are not asked for again."""
    asked: list[str] = []

    def flip_once(request: Request) -> str | None:
        if not request.range or "/.tierd/" in request.path:
            return None
        asked.append(request.range)
        return "wrong" if len(asked) == 1 else None

    with house(tmp_path, seed=3, script=flip_once) as at, (tmp_path / "target").open("w+b") as file:
        stored = at.put(KEY, CONTENT)
        at.far.get_range(BUCKET, KEY, stored, 0, FileRange(file.fileno(), 0, len(CONTENT)))
        assert (tmp_path / "target").read_bytes() == CONTENT
    whole, rest = asked
    assert whole == f"bytes=0-{len(CONTENT) - 1}", "larger than a part, and still one request"
    first = int(rest.removeprefix("bytes=").partition("-")[0])
    assert first > 0, "the flipped bit of this seed is not in the first chunk"
    assert first % CHUNK_BYTES == 0


def test_a_file_that_cannot_be_written_to_is_not_asked_for_again(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        stored = at.put(KEY, CONTENT)
        at.proxy.forget()
        with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match="No space left"):
            at.far.get_range(BUCKET, KEY, stored, 0, FileRange(full.fileno(), 0, len(CONTENT)))
        assert at.far.repeated == 0
        asked = [request for request in at.proxy.seen if "/.tierd/" not in request.path]
        assert len(asked) == 1


def test_no_write_is_larger_than_what_page_cache_gets_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    pwrite = os.pwrite

    def noted(fd: int, content: memoryview, offset: int) -> int:
        sizes.append(len(content))
        return pwrite(fd, content, offset)

    monkeypatch.setattr(ranges.os, "pwrite", noted)
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), memoryview(CONTENT), 3)
    assert (tmp_path / "file").read_bytes() == bytes(3) + CONTENT
    assert max(sizes) <= MIB
