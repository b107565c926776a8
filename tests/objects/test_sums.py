"""Checksums of chunks: whatever is wrong with a chunk or with them is noticed."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.objects import download
from tierd.objects.ranges import Span, Target, spans
from tierd.objects.store import Place, Stored
from tierd.objects.sums import CHUNK_BYTES, Summing, Sums, SumsDamaged, WholeSum, chunks_of, decode, encoded_bytes


def sums_of(content: bytes, *cuts: int) -> Sums:
    """Added in pieces that end there."""
    summing, view = Summing(), memoryview(content)
    for first, end in zip((0, *cuts), (*cuts, len(content)), strict=True):
        summing.add(view[first:end])
    return summing.end()


CONTENT = random.Random(3).randbytes(2 * CHUNK_BYTES + 100)
SUMS = sums_of(CONTENT)


@settings(max_examples=10)
@given(st.lists(st.integers(0, len(CONTENT)), max_size=6).map(sorted))
def test_pieces_do_not_matter(cuts: list[int]) -> None:
    assert sums_of(CONTENT, *cuts) == SUMS


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_they_come_back(size: int) -> None:
    sums = sums_of(CONTENT[:size])
    assert sums.stored == Stored(size, hashlib.sha256(CONTENT[:size]).hexdigest())
    assert len(sums.sums) == 16 * chunks_of(size)
    assert decode(sums.encode()) == sums
    assert len(sums.encode()) == encoded_bytes(size)


def test_each_chunk_has_its_own() -> None:
    view = memoryview(CONTENT)
    for chunk in range(3):
        content = view[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
        assert [SUMS.matches(number, content) for number in range(4)] == [number == chunk for number in range(4)]
        assert not SUMS.matches(chunk, content[:-1])


def test_a_small_object_is_its_own_chunk() -> None:
    whole = WholeSum(Stored(5, hashlib.sha256(b"hello").hexdigest()))
    assert whole.matches(0, memoryview(b"hello"))
    assert not whole.matches(0, memoryview(b"hellp"))
    assert not whole.matches(1, memoryview(b"hello"))


def test_every_cut_and_every_flipped_byte_is_noticed() -> None:
    text = SUMS.encode()
    for at in range(len(text)):
        for damaged in (text[:at], text[:at] + bytes([text[at] ^ 4]) + text[at + 1 :]):
            with pytest.raises(SumsDamaged):
                decode(damaged)


@pytest.mark.parametrize(
    "body", [b"", b"tierd sums 1 5", b"tierd sums 2 0 " + b"0" * 64 + b"\n", b"tierd sums 1 05 " + b"0" * 64 + b"\n",
             b"tierd sums 1 0 " + b"0" * 64 + b"\nx", b"tierd sums 1 4194305 " + b"0" * 64 + b"\n" + b"x" * 16]
)  # fmt: skip
def test_what_is_sealed_and_still_wrong(body: bytes) -> None:
    with pytest.raises(SumsDamaged):
        decode(body + hashlib.sha256(body).digest())


@given(st.data())
def test_spans_cover_what_was_asked_for_by_whole_chunks(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40 * CHUNK_BYTES))
    first = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - first))
    span_bytes = data.draw(st.integers(1, 4)) * CHUNK_BYTES
    found = list(spans(first, length, size, span_bytes))
    assert found[0].offset <= first < found[0].offset + CHUNK_BYTES
    assert first + length <= found[-1].end < first + length + CHUNK_BYTES
    for one, following in itertools.pairwise(found):
        assert one.end == following.offset
        assert one.length == span_bytes
    for span in found:
        assert span.offset % CHUNK_BYTES == 0
        assert span.end % CHUNK_BYTES == 0 or span.end == size
        assert 0 < span.length <= span_bytes


def test_there_are_no_spans_of_nothing() -> None:
    assert list(spans(5, 0, 10, CHUNK_BYTES)) == []


def test_a_target_takes_any_kind_of_memory() -> None:
    room = memoryview(bytearray(16)).cast("I")
    target = Target(4, room)
    assert target.length == 16
    target.put(Span(0, 20), memoryview(bytes(range(20))))
    assert bytes(room) == bytes(range(4, 20))


def test_known_checksums_are_bounded() -> None:
    cache = download.SumsCache(bytes_max=16 * 5)
    places = [Place("http://x", "bucket", f"k{number}") for number in range(4)]
    for place in places[:3]:
        cache.put(place, SUMS)
    assert [cache.get(place, SUMS.stored) is None for place in places[:3]] == [True, True, False]
    large = Sums(Stored(100 * CHUNK_BYTES, "0" * 64), b"x" * 1600)
    cache.put(places[3], large)
    assert cache.get(places[3], large.stored) is large
    assert cache.get(places[2], SUMS.stored) is None
    assert cache.get(places[3], SUMS.stored) is None, "another content is another entry"
