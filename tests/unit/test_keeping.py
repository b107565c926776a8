"""A daemon's side of its keeper, over the sockets that they have: what it is given, and what it does without one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import trio

from tierd.errors import DaemonError
from tierd.node import keeping as keeping_module
from tierd.node.estate import read
from tierd.node.keeping import Keeping
from tierd.node.ledger import NODE, Ledger, NodeRecord, records
from tierd.node.packets import DEVICE, pair, receive, send, send_held


class Line(NamedTuple):
    """Both ends."""

    keeper: socket.socket
    keeping: Keeping


@pytest.fixture
def line() -> Iterator[Line]:
    keeper, daemon = pair()
    with keeper, daemon:
        yield Line(keeper, Keeping(daemon))


def test_what_it_is_given(line: Line) -> None:
    told = {"told": {"source": "/s"}, "restarts": 3, "keeper_pid": 7}
    send(line.keeper, b"J" + json.dumps(told).encode())
    held = {DEVICE: 0, **dict.fromkeys(range(1000, 1500), 0)}
    send_held(line.keeper, held)
    line.keeping.attach()
    assert receive(line.keeper)[0] == b"P%d" % os.getpid()
    assert (line.keeping.told, line.keeping.restarts, line.keeping.keeper_pid) == ({"source": "/s"}, 3, 7)
    assert set(line.keeping.held) == set(held)
    for fd in line.keeping.held.values():
        assert os.path.samestat(os.fstat(fd), os.fstat(0))
        os.close(fd)


@pytest.mark.parametrize("first", [b"l", b"s", None])
def test_a_keeper_that_wants_no_daemon_or_ends(line: Line, first: bytes | None) -> None:
    """Another one takes over, or the mount ends, before this one had anything."""
    if first is None:
        line.keeper.close()
    else:
        send(line.keeper, first)
    with pytest.raises(DaemonError, match="does not answer"):
        line.keeping.attach()


def test_a_keeper_that_ends_in_the_middle(line: Line) -> None:
    send(line.keeper, b'J{"told": {}, "restarts": 0, "keeper_pid": 1}')
    line.keeper.shutdown(socket.SHUT_WR)
    with pytest.raises(DaemonError, match="the other side is gone"):
        line.keeping.attach()


class Heard:
    """What a daemon did because its keeper said so."""

    def __init__(self) -> None:
        self.what: list[str] = []

    def stop(self) -> None:
        self.what.append("stop")

    def changed(self) -> None:
        self.what.append("changed")

    async def leave(self) -> None:
        self.what.append("leave")

    async def gone(self) -> None:
        self.what.append("gone")

    async def run(self, keeping: Keeping) -> None:
        """Until the keeper is gone."""
        with trio.fail_after(10):
            await keeping.run(self.stop, self.leave, self.changed, self.gone)


async def test_what_it_is_told_to(line: Line) -> None:
    heard = Heard()
    for message in (b"k77", b"l", b"s"):
        send(line.keeper, message)
    line.keeper.shutdown(socket.SHUT_WR)
    await heard.run(line.keeping)
    assert heard.what == ["changed", "leave", "stop", "gone"]
    assert (line.keeping.alone, line.keeping.keeper_pid) == (True, None)
    assert receive(line.keeper)[0] == b"b", "and it said that it lives"


async def test_a_keeper_that_dies_before_it_heard_everything_is_gone(line: Line) -> None:
    """The socket says so by an error of its own, unix(7)."""
    heard = Heard()
    line.keeping.hold(1000, 0)
    line.keeper.close()
    await heard.run(line.keeping)
    assert heard.what == ["gone"]


async def test_without_a_keeper_nothing_is_held_nor_counted(line: Line) -> None:
    line.keeper.close()
    await Heard().run(line.keeping)
    ledger = Ledger()
    line.keeping.keep_ledger(ledger.fd)
    line.keeping.hold(1000, 0)
    line.keeping.drop(1000)
    line.keeping.ready(resend=True)
    line.keeping.farewell(0)
    assert (line.keeping.missed_sends, len(line.keeping._undropped)) == (0, 0)
    ledger.close()


def test_a_keeper_that_does_not_listen_holds_nobody_up(line: Line) -> None:
    while not line.keeping.missed_sends:
        line.keeping.hold(1000, 0)
    line.keeping.drop(1000)
    assert list(line.keeping._undropped) == [1000], "it is said again later"


# --- a ledger that grows ---


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(keeping_module, "_LEDGER_BYTES_MAX", 100_000)
    monkeypatch.setattr(keeping_module, "_COMPACT_CHECK_SECONDS", 0.01)
    return 100_000


def grow(ledger: Ledger, size: int, *, nodes: int) -> None:
    """Say of so many nodes, again and again, where they lie."""
    number = 0
    while ledger.end < size:
        node_id = 2 + number % nodes
        ledger.append(NODE, NodeRecord(node_id, (0, node_id), 1, False, ((1, b"n" * 200),)).pack())
        ledger.said(0, [node_id])
        number += 1


async def compactions(line: Line, ledger: Ledger, seconds: float) -> list[int]:
    """How long the ledgers were that the keeper was given meanwhile. One takes a tenth of a second."""
    with trio.move_on_after(seconds):
        await line.keeping.compact(ledger)
    lengths = []
    while True:
        try:
            message, fds = receive(line.keeper, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return lengths
        assert message == b"L"
        lengths.append(sum(4 + len(payload) for _, payload in records(fds[0])))
        os.close(fds[0])


async def test_a_long_ledger_is_made_short(line: Line, small_bound: int) -> None:
    ledger = Ledger()
    grow(ledger, small_bound - 1000, nodes=10)
    assert await compactions(line, ledger, 0.2) == [], "it is short enough"
    grow(ledger, 5 * small_bound, nodes=10)
    before = ledger.end
    (length,) = await compactions(line, ledger, 1.5)
    assert length == ledger.end < before / 50
    ledger.close()


def test_a_long_ledger_is_not_gone_on_with(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by 500 kills: nobody lived for long enough to make it short, and each successor read all of it."""
    monkeypatch.setattr(keeping_module, "_LEDGER_BYTES_MAX", 100_000)
    ledger = Ledger()
    grow(ledger, 90_000, nodes=10)
    line.keeping.shorten(ledger, read(ledger.fd))
    grow(ledger, 200_000, nodes=10)
    said = read(ledger.fd)
    line.keeping.shorten(ledger, said)
    ledger.append(NODE, NodeRecord(99, (0, 99), 1, False, ((1, b"later"),)).pack())
    message, (fd,) = receive(line.keeper)
    assert message == b"L"
    assert ledger.end < 5_000, "the first time it was short enough"
    assert read(fd).lookups == said.lookups
    assert read(fd).nodes.keys() == {*said.nodes, 99}
    os.close(fd)
    ledger.close()


def test_a_ledger_is_gone_on_with_if_the_keeper_has_died(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping_module, "_LEDGER_BYTES_MAX", 100_000)
    ledger = Ledger()
    grow(ledger, 200_000, nodes=10)
    line.keeper.close()
    line.keeping.shorten(ledger, read(ledger.fd))
    assert ledger.end >= 200_000
    ledger.close()


async def test_one_that_must_say_much_is_not_made_short_all_the_time(line: Line, small_bound: int) -> None:
    """That would keep a processor busy."""
    ledger = Ledger()
    grow(ledger, 3 * small_bound, nodes=800)
    assert len(await compactions(line, ledger, 2.0)) == 1
    assert ledger.end > small_bound
    ledger.close()


async def test_a_ledger_that_is_lost_is_left_alone(line: Line, small_bound: int) -> None:
    ledger = Ledger()
    grow(ledger, 3 * small_bound, nodes=10)
    ledger.lost = True
    assert await compactions(line, ledger, 0.2) == []
    ledger.close()
