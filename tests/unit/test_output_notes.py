"""What the controller hears of outputs: from the overlay through journal, index and outbox into messages. No kernel."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from tests.cold import freeze, stub_of
from tests.unit.conftest import Reads
from tests.unit.kernel import FakeKernel
from tests.unit.test_outbox import accessed
from tierd.metrics import Metrics
from tierd.node import index as index_module
from tierd.node.cold_source import ColdSource
from tierd.node.index import Batch, Index, OutputDelta
from tierd.node.journal import Changed, Event, Journal, Opened
from tierd.node.outbox import BATCHES_MAX, Outbox
from tierd.node.overlay import Overlay
from tierd.node.recorder import Recorder
from tierd.statistics import BadMessage, Message, NumberedBatch, OutputNews, decode, encode
from tierd.stubs import Origin

ID = "a1b2c3d4-e5f6-7890-abcd-ef1234567890"
DAY = b"u/2026/01/12"
PATH = DAY + b"/%s.png" % ID.encode()
OUTPUT = b"outputs/" + PATH


class Setup:
    """An overlay over a source, and all that its events pass on their way."""

    def __init__(self, tmp_path: Path, root: bytes | None = b"outputs", capacity: int = 100) -> None:
        self.source = tmp_path / "source"
        (self.source / "outputs" / DAY.decode()).mkdir(parents=True)
        self.journal = Journal(capacity)
        self.dropped = 0
        self.overlay = Overlay(
            ColdSource(self.source),
            self.journal,
            Reads(),
            event_dropped=self._drop,
            now_ns=lambda: 42,
            outputs_root=root,
        )
        self.kernel = FakeKernel(self.overlay)

    def _drop(self) -> None:
        self.dropped += 1

    def changes(self) -> list[Event]:
        """Of outputs; the journal is empty afterwards."""
        return [event for event in self.journal.take(100) if isinstance(event, Changed)]


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.overlay.check()
    made.overlay.source.close()


# --- the overlay ---


async def test_a_file_closed_after_a_write_is_told(setup: Setup) -> None:
    await setup.kernel.write_file(OUTPUT, b"png")
    assert setup.changes() == [Changed(PATH, 42)]


async def test_one_that_is_only_read_or_still_open_is_not(setup: Setup) -> None:
    (setup.source / OUTPUT.decode()).write_bytes(b"png")
    await setup.kernel.read_file(OUTPUT)
    opened = await setup.kernel.open(OUTPUT, os.O_WRONLY)
    await setup.overlay.write(opened.fh, 0, b"PNG")
    assert setup.changes() == []
    await setup.overlay.release(opened.fh)
    assert setup.changes() == [Changed(PATH, 42)]


async def test_one_written_beside_and_renamed_to_its_name_is_told(setup: Setup) -> None:
    beside = OUTPUT + b".tmp"
    await setup.kernel.write_file(beside, b"png")
    assert setup.changes() == [], "it has no name of an output yet"
    day, name = await setup.kernel.parent(beside)
    await setup.overlay.rename(day, name, day, name.removesuffix(b".tmp"), 0)
    assert setup.changes() == [Changed(PATH, 42)]


async def test_one_that_is_removed_is_told(setup: Setup) -> None:
    (setup.source / OUTPUT.decode()).write_bytes(b"png")
    await setup.overlay.unlink(*await setup.kernel.parent(OUTPUT))
    assert setup.changes() == [Changed(PATH, 42, removed=True)]


def make_cold(setup: Setup, version: int = 3) -> Path:
    """The output is cold; its stub."""
    file = setup.source / OUTPUT.decode()
    file.write_bytes(b"png")
    origin = Origin(f"outputs/{DAY.decode()}", version, file.name.encode(), 3, "0" * 64)
    freeze({file: origin})
    return stub_of(file)


async def test_with_its_last_name_the_object_of_a_cold_one_is_told(setup: Setup) -> None:
    make_cold(setup)
    await setup.overlay.unlink(*await setup.kernel.parent(OUTPUT))
    assert setup.changes() == [Changed(PATH, 42, removed=True, ended=3)]


async def test_a_cold_one_with_another_name_ends_no_object(setup: Setup) -> None:
    stub = make_cold(setup)
    os.link(stub, setup.source / "elsewhere")
    await setup.overlay.unlink(*await setup.kernel.parent(OUTPUT))
    assert setup.changes() == [Changed(PATH, 42, removed=True)]


async def test_a_cold_file_from_elsewhere_ends_no_object_of_the_output(setup: Setup) -> None:
    file = setup.source / OUTPUT.decode()
    file.write_bytes(b"png")
    freeze({file: Origin(f"outputs/{DAY.decode()}", 3, b"another.png", 3, "0" * 64)})
    await setup.overlay.unlink(*await setup.kernel.parent(OUTPUT))
    assert setup.changes() == [Changed(PATH, 42, removed=True)]


async def test_what_is_no_output_is_nobodys_business(setup: Setup) -> None:
    (setup.source / "other").mkdir()
    for path in (b"other/x", b"outputs/" + DAY + b"/cat.png", b"outputs/%s.png" % ID.encode()):
        await setup.kernel.write_file(path, b"x")
        await setup.overlay.unlink(*await setup.kernel.parent(path))
    assert setup.changes() == []


async def test_without_anybody_to_tell_nothing_is_noted(tmp_path: Path) -> None:
    setup = Setup(tmp_path, root=None)
    await setup.kernel.write_file(OUTPUT, b"png")
    assert setup.changes() == []
    setup.overlay.source.close()


async def test_what_finds_no_room_is_counted(tmp_path: Path) -> None:
    setup = Setup(tmp_path, capacity=0)
    await setup.kernel.write_file(OUTPUT, b"png")
    assert (setup.changes(), setup.dropped) == ([], 1)
    setup.overlay.source.close()


async def test_a_write_that_the_end_of_the_daemon_cuts_short_is_told(setup: Setup) -> None:
    opened = await setup.kernel.open(OUTPUT, os.O_WRONLY | os.O_CREAT)
    await setup.overlay.write(opened.fh, 0, b"png")
    setup.overlay.end_records()
    assert setup.changes() == [Changed(PATH, 42)]
    await setup.overlay.release(opened.fh)


# --- the index ---


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(tmp_path / "index.db", unsent=True)) as made:
        yield made


@pytest.fixture
def outbox(index: Index) -> Outbox:
    made = Outbox(index)
    made.begin()
    return made


def record(index: Index, *events: Event, root: bytes | None = b"outputs") -> None:
    """What the recorder makes of events."""
    Recorder(
        Journal(1),
        index,
        Metrics(CollectorRegistry()),
        models_roots=[b"models"],
        is_model_dir=lambda _: False,
        load_idle_gap_s=30.0,
        outputs_root=root,
    ).record(events)


def news(outbox: Outbox) -> list[list[OutputNews]]:
    """The outputs of all batches."""
    return [list(batch.outputs) for batch in outbox.waiting()]


def test_reads_and_changes_of_an_output_add_up(index: Index, outbox: Outbox) -> None:
    record(index, Changed(PATH, 5), Opened(1, OUTPUT, 7, 0, None), Opened(2, OUTPUT, 6, 0, None))
    record(
        index,
        Opened(3, OUTPUT, 9, 0, None),
        Changed(PATH, 11, removed=True, ended=2),
        Opened(4, b"outputs/x", 10, 0, None),
    )
    outbox.freeze({})
    told = OutputNews(path=PATH.decode(), opens=3, last_access_ns=9, written_ns=5, removed_ns=11, ended=2)
    assert news(outbox) == [[told]]
    outbox.freeze({})
    assert news(outbox) == [[told]], "it is told once"


def test_without_an_outputs_root_reads_are_not_counted(index: Index, outbox: Outbox) -> None:
    record(index, Opened(1, OUTPUT, 7, 0, None), root=None)
    outbox.freeze({})
    assert news(outbox) == []


def test_outputs_travel_with_models_and_go_with_their_acknowledgement(index: Index, outbox: Outbox) -> None:
    accessed(index)
    record(index, Changed(PATH, 5))
    outbox.freeze(dict.fromkeys(outbox.unsent(), 100))
    (batch,) = outbox.waiting()
    assert (batch.sequence, len(batch.models), len(batch.outputs)) == (1, 1, 1)
    outbox.acknowledge(1)
    assert outbox.waiting() == []
    with index.reader() as db:
        assert db.execute("SELECT count(*) FROM unacknowledged_outputs").fetchone() == (0,)


def test_outputs_wait_while_there_is_no_room_for_a_batch(index: Index, outbox: Outbox) -> None:
    for second in range(BATCHES_MAX + 3):
        record(index, Changed(PATH, second + 1))
        outbox.freeze({})
    assert len(outbox.waiting()) == BATCHES_MAX
    outbox.acknowledge(1)
    outbox.freeze({})
    assert outbox.waiting()[-1].outputs[0].written_ns == BATCHES_MAX + 3, "nothing was lost"


def test_what_waits_is_bounded_and_the_rest_counted(
    index: Index, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_UNSENT_OUTPUTS_MAX", 2)
    paths = [DAY + b"/%s.png" % str(UUID(int=number)).encode() for number in range(4)]
    index.apply(Batch(outputs={path: OutputDelta(written_ns=1) for path in paths}))
    index.apply(Batch(outputs={paths[0]: OutputDelta(written_ns=9)}))
    outbox.freeze({})
    assert [(one.path.encode(), one.written_ns) for one in news(outbox)[0]] == [(paths[0], 9), (paths[1], 1)]
    assert outbox.outputs_dropped == 2


# --- messages ---


def message(*outputs: OutputNews) -> Message:
    """One with a batch of these."""
    batch = NumberedBatch(sequence=1, models=(), outputs=outputs)
    return Message(node_id="gpu-1", boot=UUID(int=1), version="0.1.0", sent_ns=1, oldest=1, batch=batch)


def test_a_message_carries_outputs() -> None:
    made = message(OutputNews(path=PATH.decode(), opens=1, last_access_ns=2))
    assert decode(encode(made)) == made


def test_a_message_without_outputs_is_what_older_controllers_read() -> None:
    assert b"outputs" not in encode(message())


@pytest.mark.parametrize("path", ["u/2026/01/12/cat.png", f"../2026/01/12/{ID}.png", ""])
def test_a_message_that_names_what_is_no_output_is_refused(path: str) -> None:
    told = encode(message(OutputNews(path=PATH.decode()))).decode()
    with pytest.raises(BadMessage, match=r"outputs\.0"):
        decode(told.replace(PATH.decode(), path).encode())


def test_a_message_names_each_output_once() -> None:
    one = OutputNews(path=PATH.decode())
    other = OutputNews(path=PATH.decode().replace(ID, ID[:-1] + "1"))
    told = encode(message(one, other)).replace(other.path.encode(), one.path.encode())
    with pytest.raises(BadMessage, match="each output once"):
        decode(told)
