"""A daemon as its keeper sees it: when it counts as dead, and how long the next one waits."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tierd.node.device import open_device, unmount
from tierd.node.messages import IN_HEADER, INIT, OUT_HEADER
from tierd.node.packets import pair
from tierd.node.peer import BEAT_SECONDS, DYING_SECONDS, QUICK_DEATHS_MAX, SEND_SECONDS, START_SECONDS, Peer, Succession

LAST_THREAD_LIVES = """
import ctypes, os, sys, threading, time
threading.Thread(target=lambda: (time.sleep(0.1), print("alone", flush=True), sys.stdin.read(), os._exit(0))).start()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)  # exit(2) of the main thread alone
"""
INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
REQUEST_BYTES = 1 << 20


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """The keeper's end of a socket whose other end nobody reads."""
    ours, theirs = pair()
    with ours, theirs:
        yield ours


@pytest.fixture
def headless() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose first thread has ended and whose last one lives until its standard input ends."""
    started = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAST_THREAD_LIVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"alone\n"
        yield started
        started.communicate()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose first thread waits in the kernel for a file system that never answers."""
    device = open_device(str(tmp_path), allow_other=False)
    started = subprocess.Popen(["stat", str(tmp_path / "name")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = os.read(device, REQUEST_BYTES)
        assert IN_HEADER.unpack_from(request)[1] == INIT
        answer = INIT_OUT.pack(7, 38, 0, 0, 12, 9, 1 << 16, 1, 1, 0, 0, 0)
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(answer), 0, IN_HEADER.unpack_from(request)[2]) + answer)
        assert os.read(device, REQUEST_BYTES), "one that was read can no longer be taken back"
        yield started
    finally:
        unmount(str(tmp_path))
        os.close(device)
        started.wait()


def state_of(process: subprocess.Popen[bytes]) -> str:
    """The letter of proc(5)."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


# --- dead or alive ---


def test_one_that_speaks_lives(sock: socket.socket) -> None:
    peer = Peer(sock, os.getpid(), ready_at=1.0)
    assert not peer.dead(peer.heard + BEAT_SECONDS)
    assert peer.dead(peer.heard + BEAT_SECONDS + 0.1), "it hangs"


def test_one_that_starts_may_be_silent_for_longer(sock: socket.socket) -> None:
    """It was killed after 20 s though it only waited for its source."""
    peer = Peer(sock, os.getpid())
    assert not peer.dead(peer.heard + BEAT_SECONDS + 10)
    assert peer.dead(peer.heard + START_SECONDS + 0.1)


def test_one_that_shall_leave_is_dead_if_it_stays(sock: socket.socket) -> None:
    peer = Peer(sock, os.getpid(), ready_at=1.0)
    peer.leave_by = peer.heard + 2
    assert not peer.dead(peer.heard + 2)
    assert peer.dead(peer.heard + 2.1)


def test_a_killed_one_is_given_a_moment_for_its_last_thread(
    sock: socket.socket, headless: subprocess.Popen[bytes]
) -> None:
    """A thread in the middle of a call ends that first: the next daemon must not do it beside it."""
    peer, now = Peer(sock, headless.pid, ready_at=1.0), time.monotonic()
    assert state_of(headless) == "Z"
    assert not peer.dead(now)
    assert not peer.dead(now + DYING_SECONDS)
    assert peer.dead(now + DYING_SECONDS + 0.1), "no longer: it may hang in a source for ever"


def test_one_that_was_killed_and_hangs_is_not_waited_for(sock: socket.socket, hanging: subprocess.Popen[bytes]) -> None:
    """Its event loop itself hung in the source: only after 20 s of silence was it taken for dead."""
    peer = Peer(sock, hanging.pid, ready_at=1.0)
    now = time.monotonic()
    assert not peer.dead(now), "it only waits"
    assert peer.leave_by is None
    hanging.kill()
    while state_of(hanging) != "D":
        assert time.monotonic() < now + 10
    assert not peer.dead(now)
    assert peer.dead(now + DYING_SECONDS + 0.1)


def test_a_killed_one_has_no_more_time_to_leave_than_it_was_given(
    sock: socket.socket, headless: subprocess.Popen[bytes]
) -> None:
    peer, now = Peer(sock, headless.pid, ready_at=1.0), time.monotonic()
    peer.leave_by = now + DYING_SECONDS / 2
    assert peer.dead(now + DYING_SECONDS / 2 + 0.1)


@pytest.mark.parametrize("pid", [None, 0, 1 << 30])
def test_one_that_is_not_in_sight_is_judged_by_what_it_says(sock: socket.socket, pid: int | None) -> None:
    """It has not told yet; it lives in another PID namespace; its process is gone and its socket still ends."""
    peer = Peer(sock, pid, ready_at=1.0)
    assert not peer.dead(peer.heard + BEAT_SECONDS)
    assert peer.dead(peer.heard + BEAT_SECONDS + 0.1)


@pytest.mark.parametrize("pid", [None, 0, -1])
def test_nobody_is_killed_in_its_place(sock: socket.socket, pid: int | None) -> None:
    """kill(2) takes 0 for our whole process group and -1 for everybody."""
    Peer(sock, pid).kill()


def test_a_kill_ends_all_its_threads(sock: socket.socket, headless: subprocess.Popen[bytes]) -> None:
    Peer(sock, headless.pid).kill()
    assert headless.wait(10) == -9


def test_one_that_does_not_listen_is_waited_for_a_moment_only(sock: socket.socket) -> None:
    peer = Peer(sock)
    with suppress(BlockingIOError):
        while True:
            sock.send(b"x" * 100_000, socket.MSG_DONTWAIT)
    started = time.monotonic()
    peer.tell(b"x" * 100_000)
    assert time.monotonic() - started < SEND_SECONDS + 1


def test_what_is_told_to_one_that_is_gone_is_lost(sock: socket.socket) -> None:
    ours, theirs = pair()
    theirs.close()
    with ours:
        Peer(ours).tell(b"l")


# --- the next one ---


def test_the_first_deaths_cost_no_wait_and_more_of_them_more_and_more() -> None:
    succession = Succession()
    assert [round(succession.died(0.0), 3) for _ in range(12)] == [
        0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0,
    ]  # fmt: skip


def test_the_wait_has_a_bound_however_many_died() -> None:
    succession = Succession()
    succession.quick_deaths = 1_000_000
    assert succession.died(0.0) == 30.0


def test_it_is_hopeless_after_a_few_deaths_and_not_once_one_lived() -> None:
    succession = Succession()
    hopeless = []
    for _ in range(QUICK_DEATHS_MAX):
        hopeless.append(succession.hopeless)
        succession.died(0.5)
    assert not any(hopeless)
    assert succession.hopeless
    assert succession.died(1.0) == 0.0
    assert not succession.hopeless
    assert (succession.died(0.0), succession.died(0.0)) == (0.0, 0.2), "as at the beginning"


def test_deaths_with_lives_between_them_cost_no_wait() -> None:
    succession = Succession()
    assert [succession.died(served) for served in (0.1, 5.0, 0.1, 5.0, 0.1)] == [0.0] * 5
