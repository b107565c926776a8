"""The ledger: whatever a daemon did before it was killed, whole records come back, in order, and nothing else."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.node import ledger as ledger_module
from tierd.node.ledger import (
    BACKING,
    CLOSED,
    DONE,
    FAILED,
    FORGOT,
    ID,
    IDS_MAX,
    INIT,
    INTENT,
    LISTED,
    NODE,
    PAIR,
    SAID,
    SAID_HEAD,
    UNSAID,
    WINDOW_BYTES,
    HandleRecord,
    Ledger,
    NodeRecord,
    records,
)  # fmt: skip

HEADER = 4
U64 = st.integers(0, (1 << 64) - 1)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.close()


def all_of(ledger: Ledger) -> list[tuple[int, bytes]]:
    return list(records(ledger.fd))


def copy_of(ledger: Ledger) -> int:
    """A memfd with the same bytes: what another process finds."""
    fd = os.memfd_create("tierd-ledger-copy")
    os.pwrite(fd, os.pread(ledger.fd, 64 * WINDOW_BYTES, 0), 0)
    return fd


def filled_up_to(ledger: Ledger, end: int) -> list[tuple[int, bytes]]:
    """One record that ends at `end`."""
    payload = b"\xff" * (end - ledger.end - HEADER)
    ledger.append(NODE, payload)
    assert ledger.end == end
    return [(NODE, payload)]


# --- records ---


@given(
    node_id=U64, device=U64, inode=U64, version=st.none() | st.integers(0, (1 << 192) - 1), retired=st.booleans(),
    names=st.lists(st.tuples(U64, st.binary(max_size=300)), max_size=66),
)  # fmt: skip
def test_node_records_come_back(
    node_id: int, device: int, inode: int, version: int | None, retired: bool, names: list[tuple[int, bytes]]
) -> None:
    record = NodeRecord(node_id, (device, inode), version, retired, tuple(names))
    assert NodeRecord.unpack(record.pack()) == record


@given(
    fh=U64, node_id=U64, flags=st.tuples(*[st.booleans()] * 4), copy=st.binary(max_size=300),
    model=st.none() | st.binary(max_size=300),
)  # fmt: skip
def test_handle_records_come_back(
    fh: int, node_id: int, flags: tuple[bool, bool, bool, bool], copy: bytes, model: bytes | None
) -> None:
    record = HandleRecord(fh, node_id, *flags, copy, model)
    assert HandleRecord.unpack(record.pack()) == record


def test_a_lease_on_a_model_without_a_name_is_one() -> None:
    """The root of a source may be a model: no name is not no model."""
    for model in (None, b""):
        assert HandleRecord.unpack(HandleRecord(5, 6, False, False, False, True, b"c", model).pack()).model == model


def test_what_is_written_comes_back_in_order(ledger: Ledger) -> None:
    ledger.init(b"init")
    ledger.said(7, [1, 2], 9)
    ledger.said(8, iter([3]))
    ledger.unsaid(8)
    ledger.forgot([(1, 5)])
    ledger.closed(9)
    ledger.backing(2, 3)
    ledger.intent(7, b"before")
    ledger.done(7)
    ledger.failed(7)
    ledger.listed(9, 4, b"name")
    assert all_of(ledger) == [
        (INIT, b"init"),
        (SAID, SAID_HEAD.pack(7, 9) + struct.pack("=2Q", 1, 2)),
        (SAID, SAID_HEAD.pack(8, 0) + ID.pack(3)),
        (UNSAID, ID.pack(8)),
        (FORGOT, PAIR.pack(1, 5)),
        (CLOSED, ID.pack(9)),
        (BACKING, PAIR.pack(2, 3)),
        (INTENT, ID.pack(7) + b"before"),
        (DONE, ID.pack(7)),
        (FAILED, ID.pack(7)),
        (LISTED, PAIR.pack(9, 4) + b"name"),
    ]


@pytest.mark.parametrize("count", [0, 1, IDS_MAX // 2, IDS_MAX // 2 + 1, 3 * IDS_MAX])
def test_any_number_of_forgets_is_written_whole(ledger: Ledger, count: int) -> None:
    pairs = [(node_id, node_id % 7 + 1) for node_id in range(count)]
    ledger.forgot(pairs)
    assert [pair for _, payload in all_of(ledger) for pair in PAIR.iter_unpack(payload)] == pairs


# --- windows ---


@pytest.mark.parametrize("left", [0, 1, HEADER - 1, HEADER, HEADER + 1, HEADER + 7, HEADER + 8, 100])
def test_no_record_crosses_from_one_window_to_the_next(ledger: Ledger, left: int) -> None:
    written = filled_up_to(ledger, WINDOW_BYTES - left)
    for number in range(1, 4):
        ledger.closed(number)
        written.append((CLOSED, ID.pack(number)))
    assert all_of(ledger) == written
    fits = max(0, left // (HEADER + ID.size))
    assert ledger.end == (WINDOW_BYTES + (3 - fits) * (HEADER + ID.size) if fits < 3 else WINDOW_BYTES - left + 36)


@pytest.mark.parametrize("left", [0, 1, HEADER - 1, HEADER, HEADER + 1, HEADER + 8, 100])
def test_a_successor_goes_on_at_a_window_border(ledger: Ledger, left: int) -> None:
    written = filled_up_to(ledger, WINDOW_BYTES - left)
    second = Ledger(copy_of(ledger))
    assert second.end == ledger.end
    for number in range(1, 4):
        second.closed(number)
        written.append((CLOSED, ID.pack(number)))
    assert all_of(second) == written
    second.close()


def test_parts_of_a_log_are_read_from_any_record_to_any_other(ledger: Ledger) -> None:
    ends, payloads = [0], []
    for number in range(40):
        payloads.append(bytes([number]) * (WINDOW_BYTES // 7))
        ledger.append(NODE, payloads[-1])
        ends.append(ledger.end)
    for start in range(0, 41, 3):
        for end in range(start, 41, 5):
            found = [payload for _, payload in records(ledger.fd, ends[start], ends[end])]
            assert found == payloads[start:end]
        assert [payload for _, payload in records(ledger.fd, ends[start])] == payloads[start:]


def test_the_end_is_not_put_together_from_two_windows(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is two numbers, and a log is compacted up to it: it was read while another thread turned the window."""
    filled_up_to(ledger, WINDOW_BYTES)
    ends, looking, allocate = list[int](), threading.Thread(target=lambda: ends.append(ledger.end)), os.posix_fallocate

    def slow_allocate(fd: int, offset: int, size: int) -> None:
        looking.start()
        looking.join(0.1)
        assert ends == [], "told in the middle of it"
        allocate(fd, offset, size)

    monkeypatch.setattr(ledger_module.os, "posix_fallocate", slow_allocate)
    ledger.closed(1)
    looking.join()
    assert ends == [ledger.end]


# --- kills ---


@given(payloads=st.lists(st.binary(max_size=60), min_size=1, max_size=6), torn=st.binary(max_size=80), data=st.data())
def test_a_kill_between_any_two_stores_leaves_the_records_before_it(
    payloads: list[bytes], torn: bytes, data: st.DataObject
) -> None:
    """A payload is stored byte by byte for all we know, and its header after it."""
    ledger = Ledger()
    for payload in payloads:
        ledger.append(NODE, payload)
    before = [(NODE, payload) for payload in payloads]
    killed = copy_of(ledger)
    os.pwrite(killed, torn[: data.draw(st.integers(0, len(torn)))], ledger.end + HEADER)
    assert list(records(killed)) == before
    second = Ledger(killed)
    after = data.draw(st.lists(st.binary(max_size=40), max_size=4))
    for number, payload in enumerate(after):
        assert list(records(killed)) == before + [(INTENT, earlier) for earlier in after[:number]]
        second.append(INTENT, payload)
    assert list(records(killed)) == before + [(INTENT, payload) for payload in after]
    ledger.close()
    second.close()


def test_what_a_kill_left_of_a_payload_is_not_read_behind_a_shorter_record() -> None:
    """It was: the successor's first record ended within it, and the bytes there were taken for a header."""
    ledger = Ledger()
    ledger.closed(1)
    killed = copy_of(ledger)
    os.pwrite(killed, b"\x02\x08\x00\x00" * 30, ledger.end + HEADER)
    second = Ledger(killed)
    second.closed(2)
    assert all_of(second) == [(CLOSED, ID.pack(1)), (CLOSED, ID.pack(2))]
    ledger.close()
    second.close()


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 500])
def test_a_kill_while_a_window_is_turned(ledger: Ledger, garbage: bytes) -> None:
    """The border is marked, and what was for the next window is there in part, or not at all."""
    written = filled_up_to(ledger, WINDOW_BYTES - 20)
    ledger.append(NODE, b"too long for what is left")
    killed = copy_of(ledger)
    os.ftruncate(killed, WINDOW_BYTES)
    if garbage:
        os.ftruncate(killed, 2 * WINDOW_BYTES)
        os.pwrite(killed, garbage, WINDOW_BYTES + HEADER)
    assert list(records(killed)) == written
    second = Ledger(killed)
    for payload in (b"fits here", b"no longer", b"does"):
        second.append(INTENT, payload)
        written.append((INTENT, payload))
        assert all_of(second) == written
    second.close()


# --- no memory ---


def test_a_log_without_memory_is_lost_and_says_so_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    with_news = Ledger(copy_of(ledger), on_lost=lambda: told.append(with_news.lost))
    with_news.closed(1)

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no memory")

    monkeypatch.setattr(ledger_module.os, "posix_fallocate", no_memory)
    with_news.append(NODE, bytes(WINDOW_BYTES - 100))
    with_news.append(NODE, bytes(WINDOW_BYTES - 100))
    with_news.closed(2)
    assert with_news.lost
    assert told == [True]
    assert all_of(with_news)[0] == (CLOSED, ID.pack(1)), "what was written stays readable"
    with_news.close()


# --- another log takes its place ---


def test_records_of_the_meantime_go_along_to_another_log(ledger: Ledger) -> None:
    ledger.closed(1)
    since = ledger.end
    ledger.closed(2)
    told, short = [], Ledger()
    short.closed(1)
    ledger.replace(short, since, lambda fd: told.append(list(records(fd))))
    assert told == [[(CLOSED, ID.pack(1)), (CLOSED, ID.pack(2))]], "all of it is there when the keeper is told"
    ledger.closed(3)
    assert all_of(ledger) == [(CLOSED, ID.pack(number)) for number in (1, 2, 3)]


def test_a_log_that_the_keeper_could_not_be_given_is_not_gone_on_in(ledger: Ledger) -> None:
    ledger.closed(1)
    other, before = Ledger(), ledger.fd
    other_fd = other.fd

    def gone(_: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        ledger.replace(other, 0, gone)
    assert ledger.fd == before
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(other_fd)
    ledger.closed(2)
    assert all_of(ledger) == [(CLOSED, ID.pack(1)), (CLOSED, ID.pack(2))]


def test_a_log_that_has_no_memory_for_the_meantime_is_not_gone_on_in(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.closed(1)
    other, before = Ledger(), ledger.fd
    other.lost = True
    ledger.replace(other, 0, lambda fd: pytest.fail("told"))
    assert ledger.fd == before
    assert all_of(ledger) == [(CLOSED, ID.pack(1))]


def test_threads_append_whole_records(ledger: Ledger) -> None:
    def write(letter: int) -> None:
        for size in range(400):
            ledger.append(NODE, bytes([letter]) * size * 4)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = all_of(ledger)
    assert len(found) == 1600
    for letter in range(1, 5):
        mine = [payload for _, payload in found if payload[:1] == bytes([letter])]
        assert [len(payload) for payload in mine] == [size * 4 for size in range(1, 400)]
        assert all(set(payload) == {letter} for payload in mine)
