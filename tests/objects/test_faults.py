"""An object store that fails: what is read is right, tries are bounded, and what cannot be had is said in one line."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from tests.faulty_s3 import KINDS, Request
from tests.objects.house import BUCKET, LARGE_BYTES, PATIENT, fetch_all, house, random_file
from tests.objects.servers import MIB, s3_store
from tierd.objects.retries import Schedule
from tierd.objects.store import ObjectDamaged, ObjectStoreUnavailable

ATTEMPTS_MAX = PATIENT.schedule.attempts_max
KEY = "m/v1/weights"


def test_fetches_at_a_tenth_of_faults(tmp_path: Path) -> None:
    """The short form of the campaign: 300 small objects and 6 large ones."""
    with house(tmp_path, rate=0.1, seed=1) as at:
        fetch_all(at, small=300, large=6, seed=1)
        assert set(at.proxy.faults) == {*KINDS}
        small = [count for request, count in at.proxy.seen.items() if "/small/" in request.path]
        assert len(small) == 300
        assert max(small) <= ATTEMPTS_MAX
        assert sum(small) < 300 * 1.4, "a tenth of them again, a tenth of those once more"
        assert at.far.repeated >= at.proxy.faults.total()


def test_uploads_at_a_quarter_of_faults(tmp_path: Path) -> None:
    """Faults of answers and connections: what an object holds is compared by reading it again."""
    with house(tmp_path, rate=0.25, seed=2) as at:
        for number in range(20):
            small = random_file(tmp_path / "small", 1000 + number)
            at.far.put_file(BUCKET, f"m/v1/{number}", small, 1000 + number)
            assert at.near.hash(BUCKET, f"m/v1/{number}").sha256 == hashlib.sha256(small.read_bytes()).hexdigest()
        for number in range(3):
            large = random_file(tmp_path / "large", LARGE_BYTES)
            stored = at.far.put_file(BUCKET, f"m/v1/large{number}", large, LARGE_BYTES)
            assert at.near.hash(BUCKET, f"m/v1/large{number}") == stored
            assert stored.sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
        assert at.proxy.faults.total() > 5
        assert max(at.proxy.parts().values()) <= 4 * ATTEMPTS_MAX
        assert at.near.abort_abandoned(BUCKET, "m/v1/small", -1000) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_never_works_is_asked_so_often_and_no_more(tmp_path: Path, kind: str) -> None:
    with house(tmp_path, script=lambda _: kind, limits=PATIENT._replace(stall_s=0.2)) as at:
        stored = at.put(KEY, b"x" * 1000)
        error = ObjectDamaged if kind == "wrong" else ObjectStoreUnavailable
        with pytest.raises(error, match=rf"'m/v1/weights' in bucket 'cold-models' of {at.proxy.url} .*\(8 tries\)"):
            at.far.get_range(BUCKET, KEY, stored, 0, memoryview(bytearray(1000)))
        assert at.proxy.requests == ATTEMPTS_MAX
        assert at.far.repeated == ATTEMPTS_MAX - 1


def test_chunks_that_were_right_are_not_fetched_again(tmp_path: Path) -> None:
    """One range of two chunks, whose second half is lost once: the first chunk came, and was compared."""
    ranges: list[str] = []

    def second_half_lost(request: Request) -> str | None:
        if not request.range or "/.tierd/" in request.path:
            return None
        ranges.append(request.range)
        return "wrong" if len(ranges) == 1 else None

    with house(tmp_path, seed=5, script=second_half_lost) as at:
        stored = at.put(KEY, b"x" * (8 * MIB))
        buffer = bytearray(8 * MIB)
        at.far.get_range(BUCKET, KEY, stored, 0, memoryview(buffer))
        assert buffer == b"x" * (8 * MIB)
        assert ranges == ["bytes=0-8388607", "bytes=4194304-8388607"], "the flipped bit of this seed is in the second"


def test_a_server_that_knows_no_ranges_is_found_out(tmp_path: Path) -> None:
    """And what it sends beyond the range is not taken for the next answer."""
    with house(
        tmp_path, script=lambda request: "whole" if request.path == f"/{BUCKET}/{KEY}" and request.range else None
    ) as at:
        at.proxy.whole = random_file(tmp_path / "source", LARGE_BYTES).read_bytes()
        stored = at.put(KEY, at.proxy.whole)
        for _ in range(3):
            with pytest.raises(ObjectDamaged, match="a part of it was asked for, and all of 16777221 bytes came"):
                at.far.get_range(BUCKET, KEY, stored, 0, memoryview(bytearray(1000)))
            with pytest.raises(ObjectDamaged, match="a part of it was asked for"):
                at.far.adopt(BUCKET, KEY)
        at.proxy.script = lambda _: None
        at.far.get_range(BUCKET, KEY, stored, 0, memoryview(bytearray(1000)))
        assert at.far.repeated == 0


def test_what_is_refused_is_not_asked_again(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        wrong = s3_store(at.server.__class__(at.proxy.url, at.server.access_key, "not the secret"), PATIENT)
        try:
            with pytest.raises(ObjectStoreUnavailable, match="it answered 403") as raised:
                wrong.stat(BUCKET, KEY)
        finally:
            wrong.close()
        assert "access key" in raised.value.hint
        assert at.server.access_key not in str(raised.value)
        assert at.proxy.requests == 1


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with house(tmp_path) as at:
        url = at.proxy.url
        server = at.server
    quick = PATIENT._replace(schedule=Schedule(attempts_max=3, base_s=0.001))
    store = s3_store(server, quick, url)
    try:
        with pytest.raises(ObjectStoreUnavailable, match=r"Connection refused \(3 tries\)"):
            store.stat(BUCKET, KEY)
    finally:
        store.close()


def test_a_stall_ends_after_its_time(tmp_path: Path) -> None:
    limits = PATIENT._replace(stall_s=0.3, schedule=Schedule(attempts_max=2, base_s=0.001))
    with house(tmp_path, script=lambda _: "stall", limits=limits) as at:
        stored = at.put(KEY, b"x" * 1000)
        began = time.monotonic()
        with pytest.raises(ObjectStoreUnavailable, match="stalled"):
            at.far.get_range(BUCKET, KEY, stored, 0, memoryview(bytearray(1000)))
        assert 0.55 < time.monotonic() - began < 5


# --- the end of an upload in parts ---


def test_an_answer_that_got_lost_at_the_end_is_no_second_upload(tmp_path: Path) -> None:
    """The server made the object, and nobody heard of it: the second try finds no upload, and the object."""
    lost: list[Request] = []

    def first_end_is_lost(request: Request) -> str | None:
        if request.method == "POST" and "uploadId" in dict(request.query) and not lost:
            lost.append(request)
            return "lost"
        return None

    with house(tmp_path, script=first_end_is_lost) as at:
        source = random_file(tmp_path / "source", LARGE_BYTES)
        stored = at.far.put_file(BUCKET, KEY, source, LARGE_BYTES)
        assert lost
        assert at.near.hash(BUCKET, KEY) == stored
        assert set(at.proxy.parts().values()) == {1}


def test_an_older_object_is_not_taken_for_an_upload_that_vanished(tmp_path: Path) -> None:
    """The upload is gone when it is to be put together, and an object is there: that of another upload."""
    aborted: list[int] = []

    def abort_before_the_end(request: Request) -> str | None:
        if request.method == "POST" and "uploadId" in dict(request.query) and not aborted:
            aborted.append(at.near.abort_abandoned(BUCKET, KEY, -1000))
        return None

    with house(tmp_path) as at:
        at.far.put_file(BUCKET, KEY, random_file(tmp_path / "older", LARGE_BYTES), LARGE_BYTES)
        at.proxy.script = abort_before_the_end
        stored = at.far.put_file(BUCKET, KEY, random_file(tmp_path / "source", LARGE_BYTES), LARGE_BYTES)
        assert aborted == [1]
        assert at.near.hash(BUCKET, KEY) == stored


def test_an_error_after_200_is_an_error(tmp_path: Path) -> None:
    """S3 answers 200 before it has put the parts together, and may find that it cannot."""
    ends: list[Request] = []

    def first_end_fails(request: Request) -> str | None:
        if request.method == "POST" and "uploadId" in dict(request.query):
            ends.append(request)
            return "error in 200" if len(ends) == 1 else None
        return None

    with house(tmp_path, script=first_end_fails) as at:
        source = random_file(tmp_path / "source", LARGE_BYTES)
        stored = at.far.put_file(BUCKET, KEY, source, LARGE_BYTES)
        assert len(ends) == 2
        assert at.near.hash(BUCKET, KEY) == stored


def test_readers_never_see_an_object_without_its_checksums(tmp_path: Path) -> None:
    """Whatever request of an upload is the last one that arrives."""
    source = random_file(tmp_path / "source", LARGE_BYTES)
    with house(tmp_path, limits=PATIENT._replace(schedule=Schedule(attempts_max=1))) as at:
        complete = at.far.put_file(BUCKET, KEY, source, LARGE_BYTES)
        needed = at.proxy.requests
        for arrived in range(needed):
            key = f"m/v1/{arrived}"
            at.proxy.forget()
            at.proxy.script = lambda _, arrived=arrived: "reset" if at.proxy.seen.total() > arrived else None
            with pytest.raises(ObjectStoreUnavailable):
                at.far.put_file(BUCKET, key, source, LARGE_BYTES, None, tmp_path / f"journal-{arrived}")
            if at.near.stat(BUCKET, key) is not None:
                at.near.get_range(BUCKET, key, complete, 0, memoryview(bytearray(LARGE_BYTES)))
