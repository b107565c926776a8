"""A cold model comes back into the source: whole, in place, whatever is killed, whoever else is there. Tree only."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cold import freeze, stub_of
from tests.conftest import DirectoryFactory
from tests.controller.freezing import BUCKET, Frozen, killed_after
from tierd.controller.source import cold_tree
from tierd.controller.source.hot_tree import HotTree
from tierd.controller.source.promote import Promotion, PromotionError, Stopped
from tierd.errors import TierdError
from tierd.objects.directory import DirectoryStore
from tierd.objects.store import FileRange, Into, ObjectDamaged
from tierd.recall import fetch_from, recall
from tierd.stub_files import is_cold
from tierd.stubs import Origin

MODEL = "models/org/m"


@pytest.fixture(params=["directory", "juicefs"])
def anywhere(request: pytest.FixtureRequest, new_directory: DirectoryFactory) -> Iterator[Frozen]:
    """A source over a directory, and over JuiceFS."""
    where = new_directory("source")
    if request.param == "juicefs":
        where = request.getfixturevalue("juicefs") / where.name
        where.mkdir()
    yield from _frozen(where, new_directory)


@pytest.fixture
def cold(new_directory: DirectoryFactory) -> Iterator[Frozen]:
    """A source over a directory."""
    yield from _frozen(new_directory("source"), new_directory)


def _frozen(source: Path, new_directory: DirectoryFactory) -> Iterator[Frozen]:
    objects = new_directory("objects")
    store = DirectoryStore(objects)
    store.ensure_bucket(BUCKET)
    made = Frozen(source, store, objects)
    _make_model(source / MODEL)
    yield made
    store.close()


def _make_model(top: Path) -> None:
    """Directories, links of both kinds, an empty file, and one that begins with a dot."""
    (top / "blobs").mkdir(parents=True)
    (top / "empty").mkdir()
    for number, name in enumerate(("config.json", "1.safetensors", "blobs/2", ".hidden")):
        (top / name).write_bytes(os.urandom(3000 + number))
        os.utime(top / name, ns=(1_000_000_007, 2_000_000_009 + number))
    (top / "2.safetensors").hardlink_to(top / "blobs/2")
    (top / "link").symlink_to("blobs/2")
    (top / "nothing").touch()
    (top / "config.json").chmod(0o640)


def promotion(frozen: Frozen, told: Callable[[int], None] = lambda size: None) -> Promotion:
    """Of the model. The descriptor of the root is left to the process."""
    return Promotion(HotTree(frozen.source), MODEL, fetch_from(frozen.store, BUCKET), told)


def test_all_of_it_comes_back_and_looks_as_before(anywhere: Frozen) -> None:
    before = anywhere.looks(MODEL)
    anywhere.freeze(MODEL)
    assert anywhere.looks(MODEL) == before
    assert not (anywhere.source / MODEL / "config.json").exists()
    told: list[int] = []
    need = promotion(anywhere, told.append).run()
    assert anywhere.looks(MODEL) == before
    assert need.files == 4, "the hard link is no file of its own"
    assert sum(told) == need.bytes == 4 * 3000 + 6
    assert (anywhere.source / MODEL / "2.safetensors").stat().st_nlink == 2
    assert anywhere.layers(MODEL) == [], "nothing of ours is left"


def test_a_stub_is_the_file_again(cold: Frozen) -> None:
    cold.freeze(MODEL)
    stub = stub_of(cold.source / MODEL / "1.safetensors").stat()
    promotion(cold).run()
    assert (cold.source / MODEL / "1.safetensors").stat().st_ino == stub.st_ino


def test_a_model_that_is_one_file(cold: Frozen) -> None:
    (cold.source / "models/one.gguf").write_bytes(b"weights")
    (cold.source / "models/other.gguf").write_bytes(b"others")
    cold.freeze("models/one.gguf")
    cold.freeze("models/other.gguf")
    Promotion(HotTree(cold.source), "models/one.gguf", fetch_from(cold.store, BUCKET)).run()
    assert (cold.source / "models/one.gguf").read_bytes() == b"weights"
    assert not (cold.source / "models/other.gguf").exists(), "the other one stays cold"
    assert stub_of(cold.source / "models/other.gguf").exists()


def test_a_hot_file_is_left_alone(cold: Frozen) -> None:
    cold.freeze(MODEL)
    (cold.source / MODEL / "config.json").write_bytes(b"newer")
    promotion(cold).run()
    assert (cold.source / MODEL / "config.json").read_bytes() == b"newer"
    assert cold.looks(MODEL)["config.json"][-1] == b"newer"


def test_one_that_comes_while_the_bytes_do_is_left_alone(cold: Frozen) -> None:
    cold.freeze(MODEL)

    def told(size: int) -> None:
        (cold.source / MODEL / "config.json").write_bytes(b"newer")

    promotion(cold, told).run()
    assert (cold.source / MODEL / "config.json").read_bytes() == b"newer"


@pytest.mark.parametrize("move", [cold_tree._move, cold_tree._link])
def test_no_name_is_ever_taken(cold: Frozen, move: Callable[[cold_tree.Layer, bytes], bool]) -> None:
    """Not even that of a file which comes between the look and the call."""
    cold.freeze(MODEL)
    (cold.source / MODEL / "config.json").write_bytes(b"newer")
    with cold_tree.opened_layer(HotTree(cold.source), os.fsencode(MODEL)) as layer:
        assert layer is not None
        assert not move(layer, b"config.json")
        assert move(layer, b"1.safetensors")
    assert (cold.source / MODEL / "config.json").read_bytes() == b"newer"
    assert stub_of(cold.source / MODEL / "config.json").exists()
    assert is_cold((cold.source / MODEL / "1.safetensors").stat())


def test_what_the_source_holds_is_compared_not_what_was_sent(cold: Frozen) -> None:
    cold.freeze(MODEL)
    stub = stub_of(cold.source / MODEL / "1.safetensors")
    with cold_tree.opened_layer(HotTree(cold.source), os.fsencode(MODEL)) as layer:
        assert layer is not None
        origin = cold_tree._origins(layer)[stub.stat().st_ino]

    def lose_a_byte(_: Origin, offset: int, into: Into) -> None:
        assert isinstance(into, FileRange)
        os.pwrite(into.fd, b"?" * into.length, offset)

    with pytest.raises(OSError, match="is not what was written to it"):
        recall(str(stub), origin, lose_a_byte)
    assert is_cold(stub.stat())


def test_renamed_models_bring_what_their_files_stand_for(cold: Frozen) -> None:
    before = cold.looks(MODEL)
    cold.freeze(MODEL, version=3)
    (cold.source / MODEL).rename(cold.source / "models/org/other")
    Promotion(HotTree(cold.source), "models/org/other", fetch_from(cold.store, BUCKET)).run()
    assert cold.looks("models/org/other") == before


def test_it_can_be_repeated(cold: Frozen) -> None:
    before = cold.looks(MODEL)
    cold.freeze(MODEL)
    promotion(cold).run()
    assert promotion(cold).run() == (0, 0)
    assert cold.looks(MODEL) == before


def test_killed_at_any_step_it_goes_on(cold: Frozen) -> None:
    """At each call: what a pod sees is what it saw before, and the next one ends it."""
    before = cold.looks(MODEL)
    calls = 0
    cold.freeze(MODEL)
    while killed_after(calls, promotion(cold).run):
        assert cold.looks(MODEL) == before, f"after {calls} calls"
        calls += 1
        if calls % 7 == 0:  # also what many kills leave together
            promotion(cold).run()
            assert cold.looks(MODEL) == before
            assert cold.layers(MODEL) == [], f"after {calls} calls"
            cold.freeze(MODEL)
    assert calls > 100, "there were steps"
    assert cold.layers(MODEL) == []


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_bytes_that_cannot_be_had_end_it_and_lose_nothing(cold: Frozen, harm: str) -> None:
    before = cold.looks(MODEL)
    cold.freeze(MODEL)
    path = cold.objects / BUCKET / MODEL / "v1/1.safetensors"
    content = path.read_bytes()
    path.unlink()
    if harm == "damaged":
        path.write_bytes(bytes(reversed(content)))
    with pytest.raises(TierdError) as raised:
        promotion(cold).run()
    assert harm != "damaged" or isinstance(raised.value, ObjectDamaged)
    assert stub_of(cold.source / MODEL / "1.safetensors").stat().st_size == 0
    path.write_bytes(content)
    promotion(cold).run()
    assert cold.looks(MODEL) == before


def test_what_nobody_knows_is_refused_before_anything_is_done(cold: Frozen) -> None:
    cold.freeze(MODEL)
    for file in (cold.source / MODEL / ".tierd/origins").iterdir():
        file.unlink()
    with pytest.raises(PromotionError, match="nobody knows where its bytes are"):
        promotion(cold).run()
    assert not (cold.source / MODEL / "blobs/2").exists()


def test_a_source_without_room_is_refused_before_anything_is_done(cold: Frozen) -> None:
    (cold.source / MODEL / "big").write_bytes(b"x")
    freeze({cold.source / MODEL / "big": Origin(MODEL, 1, b"big", 1 << 60, "0" * 64)})
    cold.freeze(MODEL)
    with pytest.raises(PromotionError, match="are free in the source") as raised:
        promotion(cold).run()
    assert raised.value.errno == errno.ENOSPC
    assert not (cold.source / MODEL / "config.json").exists()


def test_it_stops_when_asked(cold: Frozen) -> None:
    before = cold.looks(MODEL)
    cold.freeze(MODEL)
    made: Promotion
    made = promotion(cold, lambda size: made.stop())
    with pytest.raises(Stopped):
        made.run()
    assert cold.looks(MODEL) == before
    promotion(cold).run()
    assert cold.looks(MODEL) == before


def test_two_at_once_bring_it_once(cold: Frozen) -> None:
    before = cold.looks(MODEL)
    cold.freeze(MODEL)
    told: list[int] = []
    threads = [threading.Thread(target=promotion(cold, told.append).run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cold.looks(MODEL) == before
    assert sum(told) == 4 * 3000 + 6


def test_what_was_written_on_another_node_is_not_lost(
    juicefs: Path, other_node: Path, new_directory: DirectoryFactory
) -> None:
    """This mount remembers for a second that the stub is cold; there it came back, and was written to."""
    objects = new_directory("objects")
    store = DirectoryStore(objects)
    store.ensure_bucket(BUCKET)
    where = new_directory("written-elsewhere").name
    here, there = juicefs / where, other_node / where
    here.mkdir()
    (here / "x").write_bytes(b"old bytes")
    Frozen(here, store, objects).freeze("x")
    (origin,) = (Origin("x", 1, b"x", *store.hash(BUCKET, "x/v1/x")),)
    fetch = fetch_from(store, BUCKET)
    stub = stub_of(here / "x")
    assert is_cold(stub.stat())
    assert recall(str(stub_of(there / "x")), origin, fetch)
    stub_of(there / "x").write_bytes(b"new")
    assert not recall(str(stub), origin, fetch)
    assert stub_of(there / "x").read_bytes() == b"new"
    store.close()
