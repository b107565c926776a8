"""What a ledger says in the end, and that its compaction says the same."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.node import estate as estate_module
from tierd.node.estate import DOUBTFUL_MAX, INTENTS_MAX, Estate, Said, compact, compacted, read
from tierd.node.ledger import ATTRIBUTES, HANDLE, ID, IDS_MAX, NODE, ROOT_ID, HandleRecord, Ledger, NodeRecord


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.close()


def node(node_id: int, *names: tuple[int, bytes], retired: bool = False) -> bytes:
    return NodeRecord(node_id, (0, 1000 + node_id), None, retired, names).pack()


def handle(fh: int, node_id: int) -> bytes:
    return HandleRecord(fh, node_id, False, False, False, False, b"", None).pack()


def short_of(ledger: Ledger) -> Estate:
    """What the compacted log says."""
    fd = os.memfd_create("tierd-ledger-short")
    try:
        compact(ledger.fd, fd, ledger.end)
        return read(fd)
    finally:
        os.close(fd)


def said_by(estate: Estate) -> dict[str, object]:
    """All that a heir may see of an estate; what nobody can ask for any longer is left out."""
    estate.drop_the_forgotten()
    return {
        "init": estate.init,
        "nodes": estate.nodes,
        "lookups": estate.lookups,
        "attributes": estate.attributes,
        "handles": estate.handles,
        "given": estate.given & estate.handles.keys(),
        "listed": {fh: positions for fh, positions in estate.listed.items() if fh in estate.handles},
        "backings": estate.backings,
        "intents": list(estate.intents.items()),
        "done": estate.done,
        "doubtful": list(estate.doubtful.items()),
        "last": estate.backing_max,
    }


def test_the_root_has_attributes(ledger: Ledger) -> None:
    """It has no record. Without them a daemon that takes over while the source hangs answers no name at all."""
    for node_id in (ROOT_ID, 2):
        ledger.append(ATTRIBUTES, ID.pack(node_id) + b"attributes")
    assert said_by(read(ledger.fd))["attributes"] == {ROOT_ID: ID.pack(ROOT_ID) + b"attributes"}
    assert said_by(short_of(ledger)) == said_by(read(ledger.fd))


# --- lookups ---


def test_lookups_are_what_was_said_less_what_was_forgotten(ledger: Ledger) -> None:
    ledger.said(1, [2, 3, 3])
    ledger.said(2, [2])
    ledger.forgot([(3, 1), (2, 1)])
    assert read(ledger.fd).lookups == {2: 1, 3: 1}
    ledger.forgot([(3, 1), (2, 5), (77, 1)])
    assert read(ledger.fd).lookups == {}


def test_a_reply_that_was_not_delivered_is_taken_back_once(ledger: Ledger) -> None:
    ledger.append(HANDLE, handle(1001, 2))
    ledger.said(1, [2], 1001)
    ledger.said(3, [2])
    estate = read(ledger.fd)
    assert estate.doubtful == {1: Said((2,), 1001), 3: Said((2,), 0)}
    ledger.unsaid(1)
    ledger.unsaid(1)
    estate = read(ledger.fd)
    assert (estate.lookups, estate.given, list(estate.doubtful)) == ({2: 1}, set(), [3])


def test_a_reply_said_twice_is_in_doubt_as_it_was_said_last(ledger: Ledger) -> None:
    """The daemon that answered a request again died, too: the older answer was taken back by then."""
    ledger.said(1, [2], 1001)
    ledger.said(5, [9])
    ledger.unsaid(1)
    ledger.said(1, [3], 1002)
    estate = read(ledger.fd)
    assert estate.lookups == {3: 1, 9: 1}
    assert list(estate.doubtful.items()) == [(5, Said((9,), 0)), (1, Said((3,), 1002))]
    ledger.unsaid(1)
    assert read(ledger.fd).lookups == {9: 1}


def test_only_the_last_replies_are_in_doubt(ledger: Ledger) -> None:
    for unique in range(1, DOUBTFUL_MAX + 11):
        ledger.said(unique, [2])
    estate = read(ledger.fd)
    assert list(estate.doubtful) == list(range(11, DOUBTFUL_MAX + 11))
    ledger.unsaid(10)
    assert read(ledger.fd).lookups == {2: DOUBTFUL_MAX + 10}, "nobody asks again for what was answered so long ago"


def test_a_short_log_counts_what_was_forgotten_before_it_was_taken_back(ledger: Ledger) -> None:
    """The node has no lookup left while its reply is in doubt, so the rest must be written as one fewer than none."""
    ledger.append(NODE, node(2, (ROOT_ID, b"a")))
    ledger.said(1, [2])
    ledger.forgot([(2, 1)])
    assert read(ledger.fd).lookups == {}
    assert short_of(ledger).lookups.get(2, 0) == 0
    ledger.said(3, [2])
    assert short_of(ledger).lookups == read(ledger.fd).lookups == {2: 1}


def test_many_nodes_are_counted(ledger: Ledger) -> None:
    many = range(2, 2 + 3 * IDS_MAX)
    for node_id in many:
        ledger.append(NODE, node(node_id, (ROOT_ID, b"%d" % node_id)))
        ledger.said(0, [node_id])
    assert short_of(ledger).lookups == dict.fromkeys(many, 1)


# --- nodes ---


def test_what_the_kernel_forgot_is_kept_as_long_as_something_leads_through_it(ledger: Ledger) -> None:
    """A directory without lookups is on the way to a file that has one, and so is one that an other name lies in."""
    for record in (
        node(2, (ROOT_ID, b"d")), node(3, (2, b"e")), node(4, (3, b"file"), (5, b"link")), node(5, (ROOT_ID, b"f")),
        node(6, (ROOT_ID, b"gone")), node(7, (6, b"open")), node(8, (ROOT_ID, b"nobody")),
    ):  # fmt: skip
        ledger.append(NODE, record)
        ledger.append(ATTRIBUTES, record[:8] + b"attributes")
    ledger.said(0, [4])
    ledger.append(HANDLE, handle(1001, 7))
    estate = read(ledger.fd)
    estate.drop_the_forgotten()
    assert set(estate.nodes) == set(estate.attributes) == {2, 3, 4, 5, 6, 7}
    assert estate.lookups == {4: 1}


def test_names_that_lead_in_a_circle_are_no_trouble(ledger: Ledger) -> None:
    ledger.append(NODE, node(2, (3, b"a")))
    ledger.append(NODE, node(3, (2, b"b")))
    ledger.said(0, [2])
    assert set(short_of(ledger).nodes) == {2, 3}


# --- handles and listings ---


def test_a_handle_ends_with_all_that_is_known_of_it(ledger: Ledger) -> None:
    ledger.append(HANDLE, handle(1001, 1))
    ledger.said(1, (), 1001)
    ledger.listed(1001, 3, b"c")
    ledger.listed(1001, 5, b"e")
    estate = read(ledger.fd)
    assert (estate.given, estate.listed) == ({1001}, {1001: {3: b"c", 5: b"e"}})
    ledger.closed(1001)
    ledger.closed(1001)
    estate = read(ledger.fd)
    assert (estate.handles, estate.given, estate.listed) == ({}, set(), {})


# --- backings ---


def test_a_backing_is_known_until_it_is_closed_and_the_last_number_for_ever(ledger: Ledger) -> None:
    ledger.backing(2, 5)
    ledger.backing(3, 6)
    ledger.backing(3, 0)
    ledger.backing(0, 7)
    for estate in (read(ledger.fd), short_of(ledger)):
        assert (estate.backings, estate.backing_max) == ({2: 5}, 7), "node 0 has none: an heir would close it"


# --- intents ---


def test_an_intent_is_done_or_refused(ledger: Ledger) -> None:
    for unique in (2, 4, 6):
        ledger.intent(unique, b"before %d" % unique)
    ledger.done(4)
    ledger.failed(6)
    ledger.done(6)
    ledger.done(8)
    estate = read(ledger.fd)
    assert dict(estate.intents) == {2: ID.pack(2) + b"before 2", 4: ID.pack(4) + b"before 4"}
    assert estate.done == {4}


def test_an_intent_made_again_is_not_done_yet(ledger: Ledger) -> None:
    ledger.intent(2, b"first")
    ledger.done(2)
    ledger.intent(2, b"second")
    estate = read(ledger.fd)
    assert dict(estate.intents) == {2: ID.pack(2) + b"second"}
    assert estate.done == set()


def test_one_that_takes_long_outlives_any_number_that_are_done(ledger: Ledger) -> None:
    """They went by age: an unlink that took its time was forgotten while a thousand files were made beside it."""
    ledger.intent(2, b"slow")
    for unique in range(4, 4 + 4 * INTENTS_MAX, 2):
        ledger.intent(unique, b"quick")
        ledger.done(unique)
    estate = read(ledger.fd)
    assert len(estate.intents) == INTENTS_MAX
    assert 2 in estate.intents
    assert estate.done < set(estate.intents)
    assert max(estate.intents) == 4 * INTENTS_MAX + 2, "and the latest of them are kept"


def test_intents_have_a_bound_even_if_none_is_ever_done(ledger: Ledger) -> None:
    for unique in range(2, 2 + 4 * INTENTS_MAX, 2):
        ledger.intent(unique, b"")
    assert len(read(ledger.fd).intents) == INTENTS_MAX


# --- compaction ---

small = st.integers(1, 6)
fhs = st.sampled_from([1001, 1002, 1003])
uniques = st.sampled_from([2, 4, 6, 8])
entries = st.lists(st.tuples(small, st.binary(max_size=5)), max_size=3)
writes: st.SearchStrategy[Callable[[Ledger], None]] = st.one_of(
    st.builds(lambda data: lambda log: log.init(data), st.binary(max_size=9)),
    st.builds(
        lambda i, names, gone: lambda log: log.append(NODE, node(i, *names, retired=gone)),
        small, entries, st.booleans(),
    ),
    st.builds(lambda i, data: lambda log: log.append(ATTRIBUTES, ID.pack(i) + data), small, st.binary(max_size=9)),
    st.builds(
        lambda unique, ids, fh: lambda log: log.said(unique, ids, fh),
        st.integers(1, DOUBTFUL_MAX + 9), st.lists(small, max_size=4), st.just(0) | fhs,
    ),
    st.builds(lambda unique: lambda log: log.unsaid(unique), st.integers(1, DOUBTFUL_MAX + 9)),
    st.builds(
        lambda pairs: lambda log: log.forgot(pairs), st.lists(st.tuples(small, st.integers(1, 3)), max_size=3)
    ),
    st.builds(lambda fh, i: lambda log: log.append(HANDLE, handle(fh, i)), fhs, small),
    st.builds(lambda fh: lambda log: log.closed(fh), fhs),
    st.builds(lambda i, backing: lambda log: log.backing(i, backing), small, st.integers(0, 4)),
    st.builds(lambda unique, data: lambda log: log.intent(unique, data), uniques, st.binary(max_size=9)),
    st.builds(lambda unique: lambda log: log.done(unique), uniques),
    st.builds(lambda unique: lambda log: log.failed(unique), uniques),
    st.builds(lambda fh, at, name: lambda log: log.listed(fh, at, name), fhs, small, st.binary(max_size=5)),
)  # fmt: skip


@settings(max_examples=100)
@given(first=st.lists(writes, max_size=40), then=st.lists(writes, max_size=20))
def test_a_short_log_says_what_the_long_one_says_and_goes_on_alike(
    first: list[Callable[[Ledger], None]], then: list[Callable[[Ledger], None]]
) -> None:
    """Also a short log of a short log, and whatever comes after. No reply tells of a node that is not written down."""
    ledger = Ledger()
    for number in range(1, 7):
        ledger.append(NODE, node(number))
    for write in first:
        write(ledger)
    short = Ledger(os.memfd_create("tierd-ledger-short"))
    compact(ledger.fd, short.fd, ledger.end)
    short = Ledger(short.fd)
    shorter = Ledger(os.memfd_create("tierd-ledger-shorter"))
    compact(short.fd, shorter.fd, short.end)
    shorter = Ledger(shorter.fd)
    assert said_by(read(short.fd)) == said_by(read(shorter.fd)) == said_by(read(ledger.fd))
    for write in then:
        for log in (ledger, short, shorter):
            write(log)
    assert _counts(short) == _counts(shorter) == _counts(ledger)
    for log in (ledger, short, shorter):
        log.close()


def _counts(ledger: Ledger) -> tuple[object, ...]:
    estate = read(ledger.fd)
    known = {node_id: count for node_id, count in estate.lookups.items() if count > 0}
    return known, estate.handles, estate.given & estate.handles.keys(), list(estate.doubtful.items())


def test_a_log_is_compacted_by_a_process_of_its_own_and_gone_on_in(ledger: Ledger) -> None:
    ledger.init(b"init")
    for number in range(3000):
        ledger.append(NODE, node(2, (ROOT_ID, b"name %d" % number)))
    ledger.said(1, [2])
    short, since = compacted(ledger)
    ledger.forgot([(2, 1)])
    ledger.said(3, [2, 2])
    expected = said_by(read(ledger.fd))
    ledger.replace(short, since, lambda fd: None)
    assert ledger.end < 1000
    assert said_by(read(ledger.fd)) == expected
    ledger.forgot([(2, 2)])
    assert read(ledger.fd).lookups == {}


def test_a_compaction_that_fails_leaves_no_descriptor(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(99, b"no such record")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(subprocess.CalledProcessError):
        compacted(ledger)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert ledger.end == 4 + len(b"no such record")


def test_a_log_without_memory_is_no_compaction(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.init(b"init")
    monkeypatch.setattr(estate_module.Ledger, "_turn", lambda log: setattr(log, "lost", True))
    fd = os.memfd_create("tierd-ledger-none")
    with pytest.raises(MemoryError):
        compact(ledger.fd, fd, ledger.end)
    os.close(fd)


def test_a_reply_may_carry_more_nodes_than_a_window_s_worth_of_names() -> None:
    """The largest READDIRPLUS reply: a MiB of entries with names of one byte."""
    ledger = Ledger()
    ids = list(range(2, 2 + (1 << 20) // 160))
    ledger.said(1, ids)
    assert read(ledger.fd).doubtful[1].node_ids == tuple(ids)
    assert struct.calcsize(f"={len(ids)}Q") < IDS_MAX * 8
    ledger.close()
