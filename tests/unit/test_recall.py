"""How a file that is recalled is cut into requests. What a recall does to stubs: `controller/test_promote_tree.py`."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.objects.sums import CHUNK_BYTES
from tierd.recall import RANGE_BYTES_MAX, RANGE_BYTES_MIN, ranges_of

GIB = 1 << 30


@given(st.integers(1, 20 * GIB))
def test_ranges_are_the_file_in_whole_chunks(size: int) -> None:
    found = list(ranges_of(7, size))
    assert found[0].offset == 0
    assert found[-1].offset + found[-1].length == size
    for one, following in itertools.pairwise(found):
        assert one.offset + one.length == following.offset
        assert one.length % CHUNK_BYTES == 0
        assert RANGE_BYTES_MIN <= one.length <= RANGE_BYTES_MAX
    assert 0 < found[-1].length <= RANGE_BYTES_MAX
    assert {each.fd for each in found} == {7}


def test_there_is_nothing_to_ask_for_of_nothing() -> None:
    assert list(ranges_of(7, 0)) == []


@pytest.mark.parametrize("size", [GIB, 10 * GIB])
def test_the_last_ranges_are_short(size: int) -> None:
    """They land together, and what is left to hash then is what a recall is longer than its transfer."""
    last = list(ranges_of(7, size))[-8:]
    assert sum(each.length for each in last) <= size // 5
    assert sum(each.length for each in last) <= 8 * 24 << 20
