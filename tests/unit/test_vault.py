"""What a keeper holds, with a socket for the device: kept until it is let go of, and nothing waits for that."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import wait_until
from tierd.node.ledger import Ledger, records
from tierd.node.packets import DEVICE, FIRST_HANDLE, LEDGER, LOCKS, SOURCE_ROOT
from tierd.node.vault import Vault

SECONDS = 10.0
HANDLE = FIRST_HANDLE + 1


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Vault({DEVICE: device.detach()}, str(tmp_path), allow_other=False)
    with kernel:
        yield made
    for key in list(made.held):
        made.drop(key)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def something() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_what_is_let_go_of_is_closed_and_all_else_is_kept(vault: Vault) -> None:
    kept, dropped = something(), something()
    vault.hold(HANDLE, kept)
    vault.hold(HANDLE + 1, dropped)
    vault.drop(HANDLE + 1)
    wait_until(lambda: not is_open(dropped), SECONDS, "it is closed")
    assert is_open(kept)
    assert vault.held[HANDLE] == kept


def test_what_takes_the_place_of_another_ends_it(vault: Vault) -> None:
    before, after = something(), something()
    vault.hold(LEDGER, before)
    vault.hold(LEDGER, after)
    wait_until(lambda: not is_open(before), SECONDS, "it is closed")
    assert vault.held[LEDGER] == after


def test_what_is_not_held_cannot_be_let_go_of(vault: Vault) -> None:
    vault.drop(4711)
    assert set(vault.held) == {DEVICE}


def lingering() -> tuple[int, socket.socket]:
    """A descriptor whose close(2) waits for the other side, as that of a file in a source that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, int(SECONDS)))
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(1 << 16))
    except BlockingIOError:
        ours.setblocking(True)
    return ours.detach(), theirs


def test_nothing_waits_for_a_close_that_hangs(vault: Vault) -> None:
    fd, other_side = lingering()
    vault.hold(HANDLE, fd)
    started = time.monotonic()
    vault.drop(HANDLE)
    vault.hold(HANDLE, something())
    assert time.monotonic() - started < SECONDS / 10
    other_side.close()


def test_daemons_get_all_but_the_locks(vault: Vault) -> None:
    """One that cannot be killed would hold them for ever."""
    for key in (LEDGER, SOURCE_ROOT, *LOCKS, HANDLE):
        vault.hold(key, something())
    assert set(vault.for_daemons()) == {DEVICE, LEDGER, SOURCE_ROOT, HANDLE}


def test_whoever_stands_in_writes_to_a_ledger_that_stays(vault: Vault) -> None:
    ledger = Ledger()
    ledger.init(b"init")
    vault.hold(LEDGER, os.dup(ledger.fd))
    before = set(os.listdir("/proc/self/fd"))
    assert vault.stand_by() is vault.stand_in
    vault.relieve()
    vault.relieve()
    assert vault.stand_in is None
    assert set(os.listdir("/proc/self/fd")) == before, "it had descriptors of its own"
    assert len(list(records(vault.held[LEDGER]))) == 1
    ledger.close()
