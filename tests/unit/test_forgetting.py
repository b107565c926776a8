"""A node forgets deleted outputs, and says so only when nothing of them is left and nobody reads one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.stream import FakeRedis
from tierd.erasures import WAITING, decode, encode, key_of
from tierd.node.forgetting import Forgetting
from tierd.node.index import Batch, FileDelta, Index, OpenRow
from tierd.node.outbox import Outbox
from tierd.node.publish import Exchange
from tierd.stubs import Origin

DAY = "outputs/u/2026/01/12"
NAME = b"%s.png" % str(UUID(int=1)).encode()
PATH = DAY.encode() + b"/" + NAME
OTHER = b"outputs/u/2026/01/12/%s.png" % str(UUID(int=2)).encode()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(tmp_path / "index.db", unsent=True)) as made:
        yield made


def told(redis: FakeRedis, number: int, *paths: bytes) -> None:
    """What a controller writes."""
    redis.sorted_sets.setdefault(WAITING, []).append(str(number).encode())
    redis.values[key_of(number)] = encode(paths)


def test_an_erasure_is_confirmed_in_reports_as_long_as_somebody_waits_for_it(index: Index) -> None:
    redis = FakeRedis()
    forgetting = Forgetting(index, None, None, lambda: ())
    exchange = Exchange(Outbox(index), redis.connect, "gpu-1", version="1", forget=forgetting.round)

    def erased() -> tuple[int, ...]:
        exchange.receive()
        exchange.send({}, frozenset())
        (message,) = redis.take()
        assert message.report is not None
        return message.report.erased

    assert erased() == ()
    told(redis, 7, PATH)
    assert erased() == erased() == (7,)
    told(redis, 9, OTHER)
    assert erased() == (7, 9)
    redis.sorted_sets[WAITING].remove(b"7")
    assert erased() == (9,)


def test_what_cannot_be_read_is_not_confirmed(index: Index) -> None:
    redis = FakeRedis()
    forgetting = Forgetting(index, None, None, lambda: ())
    redis.sorted_sets[WAITING] = [b"1", b"2", b"x"]
    redis.values[key_of(2)] = b"[1]"
    assert forgetting.round(redis) == ()
    told(redis, 1, PATH)
    assert forgetting.round(redis) == (1,), "once it is there"


def test_a_reader_of_a_cold_one_is_waited_for(index: Index) -> None:
    redis = FakeRedis()
    reading = [Origin(DAY, 1, NAME, 10, "0" * 64)]
    forgetting = Forgetting(index, None, None, lambda: reading)
    told(redis, 1, PATH)
    told(redis, 2, OTHER)
    assert forgetting.round(redis) == (2,)
    reading.clear()
    assert forgetting.round(redis) == (1, 2)


def test_its_history_goes(index: Index) -> None:
    redis = FakeRedis()
    files = {path: FileDelta(None, opens=1, last_access_ns=1) for path in (PATH, OTHER)}
    index.apply(Batch(files=files, opens=[OpenRow(1, path, None, 0, None) for path in files]))
    told(redis, 1, PATH)
    Forgetting(index, None, None, lambda: ()).round(redis)
    with index.reader() as db:
        assert db.execute("SELECT path FROM files").fetchall() == [(OTHER,)]
        assert db.execute("SELECT path FROM opens").fetchall() == [(OTHER,)]


def test_paths_travel_whatever_their_bytes() -> None:
    assert decode(encode([PATH, b"\xff\n"])) == {PATH, b"\xff\n"}
    for wrong in (b"", b"{", b"{}", b"[1]", b'["\\ud800x"]'):
        assert decode(wrong) is None
