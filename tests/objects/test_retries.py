"""When a request is made again, how fast bytes move, and what faults are called: clocks and chance are arguments."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3.exceptions as http
from hypothesis import given
from hypothesis import strategies as st
from minio.error import InvalidResponseError, S3Error, ServerError

from tierd.objects.attempts import Attempts
from tierd.objects.faults import Broken, Unlike, UploadGone, explain
from tierd.objects.pace import SLOWEST_BYTES_PER_S, Deadline, Stopping, Throttle
from tierd.objects.retries import Schedule, worth_another_try
from tierd.objects.store import ObjectDamaged, ObjectMissing, ObjectStoreUnavailable, Place

PLACE = Place("http://host:1", "cold-models", "m/v1/x")


# --- the schedule ---


def test_pauses_double_up_to_their_bound() -> None:
    schedule = Schedule(attempts_max=8, base_s=0.05, cap_s=1.0)
    assert [schedule.delay_s(failures, 0.0, 1.0) for failures in range(1, 9)] == [
        0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None,
    ]  # fmt: skip
    assert schedule.delay_s(3, 0.0, 0.25) == 0.05, "a random part of it"
    assert schedule.delay_s(3, 0.0, 0.0) == 0.0


def test_pauses_end_with_the_time_for_all_tries() -> None:
    schedule = Schedule(attempts_max=100, base_s=1.0, cap_s=8.0, total_s=10.0)
    assert schedule.delay_s(4, 1.9, 1.0) == 8.0
    assert schedule.delay_s(4, 2.0, 1.0) is None


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_are_bounded(failures: int, random: float) -> None:
    delay_s = Schedule(attempts_max=20_000).delay_s(failures, 0.0, random)
    assert delay_s is not None
    assert 0 <= delay_s <= 5.0


@pytest.mark.parametrize("status", [None, 408, 429, 500, 502, 503, 504])
def test_worth_another_try(status: int | None) -> None:
    assert worth_another_try(status)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 405, 409, 411, 412, 413, 416, 501, 505])
def test_not_worth_another_try(status: int) -> None:
    assert not worth_another_try(status)
    assert worth_another_try(status, "RequestTimeout"), "S3's own word for a connection that was slow"


# --- tries ---


class Clock:
    """Moves when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now


class Waits(threading.Event):
    """An event nobody sets: waiting for it moves the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.clock.waits.append(timeout)
        self.clock.now += timeout
        return self.is_set()


def failing(*errors: BaseException) -> Callable[[], str]:
    """Raises these one after the other, then answers."""
    left = list(errors)

    def request() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return request


def attempts(clock: Clock, **schedule: Any) -> Attempts:
    return Attempts(Schedule(**schedule), Waits(clock), clock, lambda: 0.5)


def test_it_is_asked_until_it_answers() -> None:
    clock = Clock()
    tries = attempts(clock)
    assert tries.run(PLACE, failing(ConnectionResetError(), Broken("half"), ServerError("x", 503))) == "answer"
    assert clock.waits == [0.025, 0.05, 0.1]
    assert tries.repeated == 3


def test_it_gives_up_after_so_many_tries() -> None:
    clock = Clock()
    with pytest.raises(ObjectStoreUnavailable, match=r"it answered 503 \(3 tries\)") as raised:
        attempts(clock, attempts_max=3).run(PLACE, failing(*[ServerError("x", 503)] * 3))
    assert len(clock.waits) == 2
    assert not raised.value.refused


@pytest.mark.parametrize(
    ("positions", "schedule", "asked"),
    [
        ([0, 0, 1, 1, 1], {"attempts_max": 3, "total_s": 1000.0}, 5),
        ([1, 2, 3, 4, 4, 4], {"attempts_max": 100, "total_s": 10.0}, 6),
    ],
)
def test_tries_and_their_time_are_counted_anew_after_each_step(
    positions: list[int], schedule: dict[str, Any], asked: int
) -> None:
    """A long request over a bad network would be given up although it gets on; one that stands still is."""
    clock = Clock()
    reached: list[int] = [0]

    def one_try() -> str:
        reached.append(positions[len(reached) - 1])
        clock.now += 7.0
        raise ConnectionResetError

    with pytest.raises(ObjectStoreUnavailable, match="broke off"):
        attempts(clock, **schedule).run(PLACE, one_try, lambda: reached[-1])
    assert len(reached) - 1 == asked


def test_what_is_no_fault_of_the_store_is_not_tried_again() -> None:
    clock = Clock()
    with pytest.raises(ZeroDivisionError):
        attempts(clock).run(PLACE, failing(ZeroDivisionError()))
    assert clock.waits == []


def test_closing_ends_the_tries() -> None:
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(ObjectStoreUnavailable, match="tierd stops using it"):
        Attempts(Schedule(), stopping).run(PLACE, failing())


# --- what faults are called ---


def s3_error(status: int, code: str) -> S3Error:
    response: Any = SimpleNamespace(status=status)
    return S3Error(response, code, "AKIA-the-access-key", "/secret", "id", "host")


POOL: Any = None
CERTIFICATE = ssl.SSLCertVerificationError(1, "certificate verify failed")
CERTIFICATE.verify_message = "self-signed certificate"
EXPLAINED: list[tuple[BaseException, type[Exception], str, bool]] = [
    (s3_error(404, "NoSuchKey"), ObjectMissing, "is not there", False),
    (s3_error(404, "NoSuchBucket"), ObjectMissing, "is not there", False),
    (s3_error(404, "NoSuchUpload"), UploadGone, "no such upload", False),
    (s3_error(416, "InvalidRange"), ObjectDamaged, "shorter", False),
    (s3_error(403, "SignatureDoesNotMatch"), ObjectStoreUnavailable, "403 'SignatureDoesNotMatch'", False),
    (s3_error(503, "SlowDown"), ObjectStoreUnavailable, "503 'SlowDown'", True),
    (s3_error(400, "RequestTimeout"), ObjectStoreUnavailable, "400", True),
    (s3_error(400, "XAmzContentSHA256Mismatch"), ObjectStoreUnavailable, "400", True),
    (s3_error(400, "InvalidArgument"), ObjectStoreUnavailable, "400", False),
    (InvalidResponseError(404, "text/xml", "<Error><Code>NoSuchKey</Code></Error>"), ObjectMissing, "not there", False),
    (InvalidResponseError(404, "text/html", "<p>AKIA-the-access-key"), ObjectStoreUnavailable, "answered 404", False),
    (ServerError("x", 502), ObjectStoreUnavailable, "it answered 502", True),
    (Broken("half of it"), ObjectDamaged, "half of it", True),
    (Unlike("another"), ObjectDamaged, "another", False),
    (TimeoutError(), ObjectStoreUnavailable, "stalled", True),
    (http.ReadTimeoutError(POOL, "/", "x"), ObjectStoreUnavailable, "stalled", True),
    (http.ProtocolError("x", ConnectionResetError(104, "Connection reset by peer")), ObjectStoreUnavailable,
     "Connection reset by peer", True),
    (http.SSLError(CERTIFICATE), ObjectStoreUnavailable, "self-signed certificate", False),
    (http.SSLError(ssl.SSLEOFError(8, "EOF occurred")), ObjectStoreUnavailable, "EOF|broke off", True),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "text", "again"), EXPLAINED, ids=range(len(EXPLAINED)))
def test_faults_in_our_words(error: BaseException, kind: type[Exception], text: str, again: bool) -> None:
    fault = explain(error)
    assert fault.again is again
    raised = fault.as_error(PLACE, 1)
    assert type(raised) is kind
    message = str(raised)
    assert "'m/v1/x' in bucket 'cold-models' of http://host:1" in message
    assert message.isprintable()
    assert "AKIA" not in message + raised.hint
    with pytest.raises(kind, match=text):
        raise raised


# --- pace ---


def test_transfers_share_the_bandwidth() -> None:
    clock = Clock()
    throttle = Throttle(1000, Waits(clock), clock)
    assert [throttle.wait(500) for _ in range(4)] == [0.0, 0.5, 0.5, 0.5]
    assert clock.now == 1.5
    assert Throttle(0, Waits(clock), clock).wait(1 << 40) == 0.0


def test_waiting_for_bandwidth_ends_with_the_store() -> None:
    stopping = threading.Event()
    throttle = Throttle(1, stopping)
    throttle.wait(1 << 40)
    thread = threading.Thread(target=stopping.set)
    thread.start()
    with pytest.raises(Stopping):
        throttle.wait(1)
    thread.join()


def test_a_deadline_grows_with_the_bytes_and_with_our_own_waits() -> None:
    clock = Clock()
    deadline = Deadline(10.0, 5 * SLOWEST_BYTES_PER_S, clock)
    clock.now = 15.0
    deadline.check()
    clock.now = 15.1
    with pytest.raises(TimeoutError):
        deadline.check()
    deadline.extend(0.2)
    deadline.check()
