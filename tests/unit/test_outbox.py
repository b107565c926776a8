"""The outbox: what was accessed is told once, whatever becomes of messages, acknowledgements and the daemon."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tierd.controller.statistics.plan import Boot, Known, Received, plan
from tierd.node import outbox as outbox_module
from tierd.node.index import Batch, Index, ModelDelta
from tierd.node.outbox import BATCHES_MAX, Outbox
from tierd.statistics import MODELS_MAX, Message

MODEL, OTHER = b"models/a", b"models/b"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.db"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with closing(Index(path, unsent=True)) as made:
        yield made


@pytest.fixture
def outbox(index: Index) -> Outbox:
    made = Outbox(index)
    made.begin()
    return made


def accessed(index: Index, model: bytes = MODEL, *, at_ns: int = 10, loads: int = 1, hits: int = 0) -> None:
    """One more open, of a model's load perhaps."""
    index.apply(Batch(models={model: ModelDelta(opens=1, loads=loads, hits=hits, bytes_read=5, last_access_ns=at_ns)}))


def freeze_all(outbox: Outbox, size: int | None = 100) -> None:
    """As many batches as there is room for."""
    while models := outbox.unsent():
        outbox.freeze(dict.fromkeys(models, size))


def count(path: Path, table: str) -> int:
    """Rows, as another process sees them."""
    with closing(sqlite3.connect(path)) as db:
        (rows,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(rows)


def test_accesses_add_up_until_they_are_a_batch(index: Index, outbox: Outbox) -> None:
    accessed(index, at_ns=10, hits=1)
    accessed(index, at_ns=7, hits=-1, loads=0)
    accessed(index, OTHER, at_ns=3)
    assert outbox.unsent() == [MODEL, OTHER], "who waits longest comes first"
    outbox.freeze({MODEL: 1000})
    (batch,) = outbox.waiting()
    (access,) = batch.models
    assert batch.sequence == outbox.sequence == 1
    assert access.model_dump() == {
        "model_id": "models/a",
        "opens": 2,
        "loads": 1,
        "hits": 0,
        "bytes_read": 10,
        "last_access_ns": 10,
        "size_bytes": 1000,
    }
    assert outbox.unsent() == [OTHER]
    accessed(index, at_ns=20, hits=-1, loads=0)
    outbox.freeze({MODEL: None, OTHER: 0})
    again = {access.model_id: access for access in outbox.waiting()[1].models}
    assert again["models/a"].hits == -1, "what was said of the load before is taken back"
    assert again["models/a"].size_bytes is again["models/b"].size_bytes is None, "nothing is no size"
    assert outbox.unsent() == []


def test_a_batch_never_changes_and_goes_when_acknowledged(index: Index, outbox: Outbox) -> None:
    for at_ns in (1, 2, 3):
        accessed(index, at_ns=at_ns)
        freeze_all(outbox)
    before = outbox.waiting()
    accessed(index, at_ns=9)
    assert outbox.waiting() == before
    assert outbox.acknowledge(2) == 2
    assert [batch.sequence for batch in outbox.waiting()] == [3]
    assert outbox.acknowledge(1) == 0, "one that comes late"
    assert outbox.acknowledge(3) == 1
    freeze_all(outbox)
    assert [batch.sequence for batch in outbox.waiting()] == [4]


def test_where_nothing_is_published_nothing_grows(path: Path) -> None:
    with closing(Index(path)) as index:
        for number in range(20):
            accessed(index, b"models/%d" % number)
        assert count(path, "models") == 20
        assert [count(path, table) for table in ("unsent", "unacknowledged", "publisher")] == [0, 0, 0]


def test_the_first_time_all_that_was_ever_counted_is_told_once(path: Path) -> None:
    with closing(Index(path)) as index:
        accessed(index, at_ns=5, hits=1)
        accessed(index, OTHER, at_ns=6)
    with closing(Index(path, unsent=True)) as index:
        accessed(index, at_ns=7, hits=1)  # before the outbox had begun
        outbox = Outbox(index)
        outbox.begin()
        freeze_all(outbox)
        told = {access.model_id: access for access in outbox.waiting()[0].models}
    assert (told["models/a"].opens, told["models/a"].hits, told["models/a"].last_access_ns) == (2, 2, 7)
    assert (told["models/b"].opens, told["models/b"].last_access_ns) == (1, 6)


def test_a_restart_keeps_boot_and_numbers_and_tells_last_accesses_again(path: Path) -> None:
    with closing(Index(path, unsent=True)) as index:
        outbox = Outbox(index)
        outbox.begin()
        boot = outbox.boot
        accessed(index, at_ns=5)
        freeze_all(outbox)
    with closing(Index(path)) as index:  # for a while nobody was to be told
        accessed(index, at_ns=8)
    with closing(Index(path, unsent=True)) as index:
        outbox = Outbox(index)
        outbox.begin()
        assert outbox.boot == boot
        freeze_all(outbox)
        first, second = outbox.waiting()
    assert (first.sequence, second.sequence) == (1, 2)
    (again,) = second.models
    assert (again.opens, again.loads, again.hits, again.bytes_read) == (0, 0, 0, 0), "nothing counts twice"
    assert again.last_access_ns == 8


def test_a_new_index_is_another_boot(path: Path, outbox: Outbox, tmp_path: Path) -> None:
    with closing(Index(tmp_path / "other.db", unsent=True)) as index:
        other = Outbox(index)
        other.begin()
    assert other.boot != outbox.boot


def test_a_full_outbox_goes_on_adding_up(index: Index, outbox: Outbox, path: Path) -> None:
    for at_ns in range(1, BATCHES_MAX + 1):
        accessed(index, at_ns=at_ns)
        freeze_all(outbox)
    for at_ns in range(100, 150):
        accessed(index, at_ns=at_ns)
        accessed(index, OTHER, at_ns=at_ns)
        freeze_all(outbox)
    assert len(outbox.waiting()) == count(path, "unacknowledged") == BATCHES_MAX
    assert count(path, "unsent") == 2, "one row a model"
    outbox.acknowledge(1)
    freeze_all(outbox)
    last = {access.model_id: access for access in outbox.waiting()[-1].models}
    assert {name: (access.opens, access.last_access_ns) for name, access in last.items()} == {
        "models/a": (50, 149),
        "models/b": (50, 149),
    }


def test_a_batch_holds_so_many_models_and_the_next_one_the_rest(index: Index, outbox: Outbox) -> None:
    index.apply(
        Batch(models={b"models/%04d" % n: ModelDelta(opens=1, last_access_ns=n) for n in range(MODELS_MAX + 7)})
    )
    freeze_all(outbox)
    assert [len(batch.models) for batch in outbox.waiting()] == [MODELS_MAX, 7]


def test_what_no_catalogue_can_name_is_dropped_and_counted(index: Index, outbox: Outbox) -> None:
    accessed(index, b"models/\xff")
    accessed(index)
    with capture_logs() as logs:
        freeze_all(outbox)
        accessed(index, b"models/\xff")
        accessed(index, b"models/a\nb")
        freeze_all(outbox)
    assert [access.model_id for batch in outbox.waiting() for access in batch.models] == ["models/a"]
    assert outbox.dropped == 3
    assert [line["event"] for line in logs] == ["model_not_published"], "said once"
    assert outbox.sequence == 1, "no batch of nothing"


def test_an_older_state_of_an_index_counts_as_a_new_one(index: Index, outbox: Outbox) -> None:
    """Restored from a backup: the numbers that it would give next have been applied as something else."""
    accessed(index)
    freeze_all(outbox)
    accessed(index, at_ns=77)
    boot = outbox.boot
    with capture_logs() as logs:
        outbox.acknowledge(5)
    assert outbox.boot != boot
    assert [line["event"] for line in logs] == ["index_is_an_older_state"]
    assert outbox.waiting() == []
    freeze_all(outbox)
    (batch,) = outbox.waiting()
    assert batch.sequence == 1
    assert batch.models[0].last_access_ns == 77
    reread = Outbox(index)
    reread.begin()
    assert (reread.boot, reread.sequence) == (outbox.boot, 1)


def test_a_freeze_that_fails_changes_nothing(index: Index, outbox: Outbox, path: Path) -> None:
    accessed(index)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON unacknowledged BEGIN SELECT RAISE (ABORT, 'disk full'); END")
        db.commit()
    with pytest.raises(sqlite3.Error, match="disk full"):
        outbox.freeze({MODEL: 1})
    assert (outbox.unsent(), outbox.waiting(), outbox.sequence) == ([MODEL], [], 0)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TRIGGER full")
        db.commit()
    outbox.freeze({MODEL: 1})
    assert outbox.waiting()[0].sequence == 1


def test_a_batch_is_on_the_disk_before_anybody_sees_its_number(index: Index, outbox: Outbox) -> None:
    """In WAL mode only synchronous=FULL (2) outlives the power; all else goes on with NORMAL (1)."""
    levels = []

    def level(db: sqlite3.Connection) -> int:
        (found,) = db.execute("PRAGMA synchronous").fetchone()
        return int(found)

    accessed(index)
    index._writer.set_trace_callback(
        lambda said: levels.append(said) if "synchronous" in said or "INSERT INTO un" in said else None
    )
    levels.clear()
    freeze_all(outbox)
    index._writer.set_trace_callback(None)
    assert [said.split(" (")[0].split(" VALUES")[0] for said in levels] == [
        "PRAGMA synchronous = FULL",
        "INSERT INTO unacknowledged",
        "PRAGMA synchronous = NORMAL",
    ]
    with index.transaction() as db:
        assert level(db) == 1
    with index.transaction(durable=True) as db:
        assert level(db) == 2


# --- any history of the two sides ---


class World:
    """A node's outbox, a controller's tables, and what is on its way between them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: Counter[str] = Counter()
        self.last: dict[str, int] = {}
        self.sequences: dict[Boot, int] = {}
        self.hits: Counter[str] = Counter()
        self.seen: dict[str, int] = {}
        self.messages: list[Message] = []
        self.now_ns = 1000
        self.open()

    def open(self) -> None:
        """Start the node's side."""
        self.index = Index(self.path, unsent=True)
        self.outbox = Outbox(self.index)
        self.outbox.begin()

    def restart(self) -> None:
        """The daemon is killed and starts again; what is on its way stays so."""
        self.index.close()
        self.open()

    def access(self, model: int, hits: int) -> None:
        """Somebody reads."""
        self.now_ns += 10
        name = f"models/{model}"
        accessed(self.index, name.encode(), at_ns=self.now_ns, hits=hits)
        self.done[name] += hits
        self.last[name] = self.now_ns

    def tell(self, model: int, hits: int) -> None:
        """Somebody reads, and it is sent at once."""
        self.access(model, hits)
        self.freeze()
        self.send()

    def freeze(self) -> None:
        """Make a batch of one model, if there is room."""
        for model in self.outbox.unsent()[:1]:
            self.outbox.freeze({model: 1})

    def send(self) -> None:
        """Send all that waits."""
        waiting = self.outbox.waiting()
        for batch in waiting:
            self.messages.append(
                Message(
                    node_id="n",
                    boot=self.outbox.boot,
                    version="1",
                    sent_ns=self.now_ns,
                    oldest=waiting[0].sequence,
                    batch=batch,
                )
            )

    def fold(self, which: list[int], *, keep: bool) -> None:
        """The controller reads some messages, in whatever order; they may come again."""
        chosen = [self.messages[number % len(self.messages)] for number in which] if self.messages else []
        if not keep:
            self.messages = [message for message in self.messages if message not in chosen]
        received = [Received(message, self.now_ns - message.sent_ns) for message in chosen]
        made = plan(received, {one.boot: Known(self.sequences.get(one.boot, 0), True) for one in received})
        self.sequences |= made.applied
        for name, total in made.models.items():
            self.hits[name] += total.hits
            self.seen[name] = max(self.seen.get(name, 0), self.now_ns - total.age_ns)

    def acknowledge(self) -> None:
        """The node hears of what was applied."""
        known = self.sequences.get(Boot("n", self.outbox.boot))
        if known is not None:
            self.outbox.acknowledge(known)

    def settle(self) -> None:
        """No more is lost from now on."""
        while self.outbox.unsent() or self.outbox.waiting():
            freeze_all(self.outbox)
            self.messages.clear()
            self.send()
            self.fold(list(range(len(self.messages))), keep=False)
            self.acknowledge()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("access"), st.integers(0, 2), st.integers(-1, 3)),
        st.tuples(st.just("tell"), st.integers(0, 2), st.integers(1, 3)),
        st.tuples(st.just("freeze")),
        st.tuples(st.just("send")),
        st.tuples(st.just("fold"), st.lists(st.integers(0, 40), max_size=8), st.booleans()),
        st.tuples(st.just("lose"), st.integers(0, 40)),
        st.tuples(st.just("acknowledge")),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps)
def test_nothing_is_lost_and_nothing_counts_twice(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[object, ...]]
) -> None:
    monkeypatch.setattr(outbox_module, "BATCHES_MAX", 4)
    world = World(tmp_path_factory.mktemp("outbox") / "index.db")
    for name, *arguments in steps:
        match name, arguments:
            case "fold", [list() as which, bool() as keep]:
                world.fold(which, keep=keep)
            case "lose", [int() as number]:
                del world.messages[number : number + 3]
            case _:
                getattr(world, str(name))(*arguments)
    world.settle()
    world.index.close()
    assert world.hits == world.done
    assert world.seen == world.last
