"""FUSE messages: the kernel's structures, as include/uapi/linux/fuse.h has them, read and mended."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.node.messages import (
    BATCH_FORGET,
    CREATE,
    FORGET,
    LINK,
    LOOKUP,
    MAX_BACKGROUND,
    MKDIR,
    OPEN,
    OPENDIR,
    READ_BYTES_MAX,
    READDIRPLUS,
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

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
INIT_IN = struct.Struct("=IIIII44x")
"""major, minor, max_readahead, flags, flags2"""
INIT_OUT = struct.Struct("=IIIIHHIIHHIII24x")
"""..., max_stack_depth, request_timeout and unused"""
ENTRY_BYTES = 128
INIT_EXT, PASSTHROUGH2, RESEND2 = 1 << 30, 1 << 5, 1 << 7
ATOMIC_O_TRUNC, SPLICES = 1 << 3, 0b111 << 7
KEEP_CACHE, NOFLUSH, PASSTHROUGH = 1 << 1, 1 << 5, 1 << 7
U64 = st.integers(0, (1 << 64) - 1)


def request(opcode: int, body: bytes, node_id: int = 7) -> bytearray:
    return bytearray(IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 3, node_id, 4, 5, 6, 0, 0) + body)


def reply(body: bytes) -> bytearray:
    return bytearray(OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, 3) + body)


def entry(node_id: int) -> bytes:
    """struct fuse_entry_out: the node ID first, all else of no interest here."""
    return struct.pack("=Q", node_id) + b"\xee" * (ENTRY_BYTES - 8)


def listed(node_id: int, name: bytes) -> bytes:
    """struct fuse_direntplus, padded to eight bytes."""
    body = entry(node_id) + struct.pack("=QQII", 99, 98, len(name), 0) + name
    return body + bytes(-len(body) % 8)


# --- INIT ---


def init(flags: int, flags2: int) -> bytearray:
    return request(26, INIT_IN.pack(7, 45, 1 << 20, flags, flags2))


@pytest.mark.parametrize(
    ("flags", "flags2", "offers"),
    [
        (INIT_EXT, PASSTHROUGH2 | RESEND2, (True, True)),
        (INIT_EXT, PASSTHROUGH2, (True, False)),
        (INIT_EXT, RESEND2, (False, True)),
        (INIT_EXT, 0, (False, False)),
        (0, PASSTHROUGH2 | RESEND2, (False, False)),
    ],
)
def test_what_the_kernel_offers(flags: int, flags2: int, offers: tuple[bool, bool]) -> None:
    """Without INIT_EXT the second word of flags is none."""
    assert offered(init(flags, flags2)) == offers


def test_libfuse_is_offered_no_splicing_and_all_else() -> None:
    message = init(0xFFFFFFFF, 0xFFFFFFFF)
    without_splice(message)
    assert message == init(0xFFFFFFFF & ~SPLICES, 0xFFFFFFFF)


@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("resend", [False, True])
def test_limits_and_what_is_taken_of_the_offers(passthrough: bool, resend: bool) -> None:
    message = reply(INIT_OUT.pack(7, 31, 11, ATOMIC_O_TRUNC | 1, 12, 9, 1 << 20, 1, 16, 17, 0, 0, 77))
    set_limits(message, 1 << 30, passthrough=passthrough, resend=resend)
    page = os.sysconf("SC_PAGE_SIZE")
    wanted2 = PASSTHROUGH2 * passthrough | RESEND2 * resend
    assert INIT_OUT.unpack_from(message, OUT_HEADER.size) == (
        7, 31, 11, 1 | (INIT_EXT if wanted2 else 0), MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4, 1 << 20, 1,
        READ_BYTES_MAX // page, 17, wanted2, 2 if passthrough else 0, 77,
    )  # fmt: skip


@pytest.mark.parametrize(("room", "pages"), [(0, 1), (4097, 1), (100_000, 24), (1 << 30, 256)])
def test_writes_are_whole_pages_that_fit(room: int, pages: int) -> None:
    message = reply(INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4 << 20, 1, 16, 0, 0, 0, 0))
    set_limits(message, room, passthrough=False, resend=False)
    page = os.sysconf("SC_PAGE_SIZE")
    wanted = max(page, min(pages * 4096, READ_BYTES_MAX) // page * page)
    assert INIT_OUT.unpack_from(message, OUT_HEADER.size)[6] == wanted


# --- opens ---


@pytest.mark.parametrize(
    ("backing", "flags"), [(0, KEEP_CACHE | NOFLUSH | 1), (5, PASSTHROUGH | NOFLUSH | 1)]
)  # bits of others stay
def test_a_read_only_open_is_completed(backing: int, flags: int) -> None:
    message = reply(struct.pack("=QIi", 1 << 40, KEEP_CACHE | 1, 0))
    finish_open(message, backing)
    assert struct.unpack_from("=QIi", message, OUT_HEADER.size) == (1 << 40, flags, backing)
    assert handle_in(message) == 1 << 40


# --- what replies tell ---


@pytest.mark.parametrize("opcode", [LOOKUP, MKDIR, LINK])
def test_an_entry_tells_of_its_node(opcode: int) -> None:
    assert told_by(opcode, memoryview(reply(entry(9)))) == ([9], 0)


def test_an_entry_that_is_none_tells_of_nothing() -> None:
    """Node 0: the name does not exist, and the kernel may remember that."""
    assert told_by(LOOKUP, memoryview(reply(entry(0)))) == ([], 0)


@pytest.mark.parametrize("opcode", [OPEN, OPENDIR])
def test_an_open_tells_of_a_handle(opcode: int) -> None:
    assert told_by(opcode, memoryview(reply(struct.pack("=QIi", 1 << 33, 0, 0)))) == ([], 1 << 33)


def test_a_create_tells_of_both() -> None:
    assert told_by(CREATE, memoryview(reply(entry(9) + struct.pack("=QIi", 1 << 33, 0, 0)))) == ([9], 1 << 33)


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: name not in (b".", b".."))


@given(
    entries=st.lists(st.tuples(st.integers(0, 1 << 63), NAMES | st.sampled_from([b".", b"..", b"...", b"..a", b".b"])))
)
def test_a_listing_tells_of_all_but_the_dots(entries: list[tuple[int, bytes]]) -> None:
    """Of `.` and `..` the kernel counts no lookup, nor of entries without a node."""
    body = b"".join(listed(node_id, name) for node_id, name in entries)
    wanted = [node_id for node_id, name in entries if node_id and name not in (b".", b"..")]
    assert told_by(READDIRPLUS, memoryview(reply(body))) == (wanted, 0)


def test_an_empty_listing_tells_of_nothing() -> None:
    assert told_by(READDIRPLUS, memoryview(reply(b""))) == ([], 0)


# --- requests ---


@given(node_id=U64, count=U64)
def test_a_forget(node_id: int, count: int) -> None:
    message = request(FORGET, struct.pack("=Q", count), node_id)
    assert forgotten(FORGET, memoryview(message)) == [(node_id, count)]


@given(pairs=st.lists(st.tuples(U64, U64), max_size=70))
def test_a_batch_of_forgets(pairs: list[tuple[int, int]]) -> None:
    body = struct.pack("=II", len(pairs), 0) + b"".join(struct.pack("=QQ", *pair) for pair in pairs)
    assert forgotten(BATCH_FORGET, memoryview(request(BATCH_FORGET, body, 0))) == pairs


def test_a_caller_is_replaced_and_nothing_else() -> None:
    message = request(LOOKUP, b"name\0")
    before = IN_HEADER.unpack_from(message)
    set_pid(memoryview(message), 1 << 30)
    after = IN_HEADER.unpack_from(message)
    assert after == (*before[:6], 1 << 30, *before[7:])
    assert message[IN_HEADER.size :] == b"name\0"


@pytest.mark.parametrize(("pages", "offset"), [(True, 0), (False, -1)])
def test_an_invalidation(pages: bool, offset: int) -> None:
    """A negative offset: attributes alone (fuse_reverse_inval_inode)."""
    assert struct.unpack("=IiQQqq", invalidate(9, pages=pages)) == (40, 2, 0, 9, offset, 0)
