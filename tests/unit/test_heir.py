"""Daemons that die at any record of their ledger: the next one is what they were, and the kernel notices nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.unit.conftest import end_bench
from tests.unit.kernel import CALLER
from tests.unit.mortal import Death, MortalBench, join_closers, make_mortal
from tests.unit.test_overlay_model import Comparison, steps

deaths = st.lists(st.builds(Death, st.integers(0, 9), *[st.booleans()] * 3), min_size=3, max_size=30)


def end_mortal(bench: MortalBench) -> None:
    """The kernel forgets everything; nothing is left of anybody."""
    join_closers()
    mortal = bench.mortal
    assert not mortal.known, "the test closes what it opened"
    bench.overlay.check()
    bench.kernel.forget_all()
    mortal.die()
    join_closers()
    assert not mortal.keep.held, "the keeper holds what nobody has open"
    assert not mortal.kernel_backings.live, "backings that nobody knows pin their files"
    end_bench(bench)
    assert not mortal.descriptors()
    mortal.ledger.close()


@pytest.fixture
def beneath(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
async def mortal(beneath: Path) -> AsyncIterator[MortalBench]:
    """One that dies when the test says so."""
    made = make_mortal(beneath, [], passthrough=True)
    yield made
    end_mortal(made)


# --- one thing at a time ---


async def test_nodes_are_what_they_were(mortal: MortalBench) -> None:
    (mortal.beneath / "d").mkdir()
    (mortal.beneath / "d" / "a").write_bytes(b"content")
    (mortal.beneath / "b").hardlink_to(mortal.beneath / "d" / "a")
    a, b = await mortal.kernel.node(b"d/a"), await mortal.kernel.node(b"b")
    assert a == b
    for _ in range(3):
        mortal.mortal.die()
        assert (await mortal.overlay.getattr(a)).attributes.st_nlink == 2
        assert await mortal.kernel.node(b"d/a") == a
        (mortal.beneath / "b").unlink()
        assert (await mortal.overlay.getattr(a)).attributes.st_nlink == 1, "found under its other name"
        (mortal.beneath / "b").hardlink_to(mortal.beneath / "d" / "a")


async def test_node_ids_are_not_used_again(mortal: MortalBench) -> None:
    (mortal.beneath / "a").touch()
    before = await mortal.kernel.node(b"a")
    mortal.kernel.forget_all()
    mortal.mortal.die()
    (mortal.beneath / "b").touch()
    assert await mortal.kernel.node(b"b") > before
    assert await mortal.kernel.node(b"a") not in (before, await mortal.kernel.node(b"b"))


async def test_handles_are_not_used_again(mortal: MortalBench) -> None:
    """RELEASE may be sent again after the handle was closed: it must not close another file's."""
    opened = await mortal.kernel.create(b"a")
    await mortal.overlay.release(opened.fh)
    mortal.mortal.die()
    other = await mortal.kernel.open(b"a")
    assert other.fh > opened.fh
    await mortal.mortal.overlay.release(opened.fh)
    assert await mortal.overlay.read(other.fh, 0, 10) == b""
    await mortal.overlay.release(other.fh)


async def test_handles_of_the_short_way_are_not_used_again(mortal: MortalBench) -> None:
    """Each daemon has numbers of its own, as above."""
    firsts = []
    for _ in range(3):
        mortal.mortal.die()
        firsts.append(mortal.mortal.hot._next_fh)
    assert [after - before for before, after in itertools.pairwise(firsts)] == [1 << 32, 1 << 32]


async def test_open_files_go_on(mortal: MortalBench) -> None:
    opened = await mortal.kernel.create(b"a")
    await mortal.overlay.write(opened.fh, 0, b"one")
    await mortal.overlay.unlink(1, b"a")
    for number in range(1, 4):
        mortal.mortal.die()
        await mortal.overlay.write(opened.fh, 3 * number, b"two")
        assert await mortal.overlay.read(opened.fh, 0, 100) == b"one" + b"two" * number
    await mortal.overlay.release(opened.fh)


async def test_what_was_written_before_a_death_is_no_change_beneath(mortal: MortalBench) -> None:
    """A file that is being written has no version to compare with: else its own writer's readers are sent away."""
    opened = await mortal.kernel.create(b"a")
    await mortal.overlay.write(opened.fh, 0, b"content")
    node_id = await mortal.kernel.node(b"a")
    mortal.mortal.die()
    assert mortal.overlay.inodes.get(node_id).dirty == 1
    reader = await mortal.kernel.open(b"a")
    assert await mortal.overlay.read(reader.fh, 0, 10) == b"content"
    mortal.mortal.die()
    await mortal.overlay.release(opened.fh)
    await mortal.overlay.release(reader.fh)
    mortal.mortal.die()
    assert await mortal.kernel.read_file(b"a") == b"content"
    assert await mortal.kernel.node(b"a") == node_id
    assert mortal.overlay.retired == 0


async def test_a_changed_file_is_noticed_after_a_death(mortal: MortalBench) -> None:
    """The version of a node is what its first open saw; a node without one would show the pages of before."""
    (mortal.beneath / "a").write_bytes(b"before")
    opened = await mortal.kernel.open(b"a")
    node_id = mortal.overlay.files[opened.fh].node.id
    mortal.mortal.die()
    (mortal.beneath / "a").write_bytes(b"after it")
    other = await mortal.kernel.retried(lambda: mortal.kernel.open(b"a"))
    assert mortal.overlay.files[other.fh].node.id != node_id
    await mortal.overlay.release(opened.fh)
    await mortal.overlay.release(other.fh)


async def test_an_open_that_was_sent_back_is_not_sent_back_again(mortal: MortalBench) -> None:
    """The kernel asks twice, then open(2) fails: what replaced a retired node is young, also for the next daemon."""
    (mortal.beneath / "a").write_bytes(b"content")
    reader = await mortal.kernel.open(b"a")
    assert reader.fh in mortal.mortal.passed_through
    with pytest.raises(OSError, match="Stale"):
        await mortal.kernel.open(b"a", os.O_RDWR)
    node_id = await mortal.kernel.node(b"a")
    mortal.mortal.die()
    other = await mortal.overlay.open(node_id, os.O_RDONLY, CALLER)
    assert other.fh not in mortal.mortal.passed_through, "else the writer is sent back, too"
    writer = await mortal.overlay.open(node_id, os.O_RDWR, CALLER)
    for opened in (reader, other, writer):
        await mortal.overlay.release(opened.fh)


async def test_the_kernel_s_backings_are_used_and_closed(mortal: MortalBench) -> None:
    """One node, one backing: an open after a death must get that of the opens before it."""
    (mortal.beneath / "a").write_bytes(b"content")
    first = await mortal.kernel.open(b"a")
    (backing_id,) = mortal.mortal.kernel_backings.live
    mortal.mortal.die()
    second = await mortal.kernel.open(b"a")
    assert {mortal.mortal.passed_through[fh] for fh in (first.fh, second.fh)} == {backing_id}
    await mortal.overlay.release(first.fh)
    mortal.mortal.die()
    assert mortal.mortal.kernel_backings.live == {backing_id}
    await mortal.overlay.release(second.fh)
    assert not mortal.mortal.kernel_backings.live


async def test_what_was_closed_while_no_daemon_lived_is_closed(mortal: MortalBench) -> None:
    """Whoever stands in for a daemon writes down that the kernel released a handle, and can do no more about it."""
    for name in ("a", "b"):
        (mortal.beneath / name).write_bytes(b"content")
    kept, closed = await mortal.kernel.open(b"a"), await mortal.kernel.open(b"b")
    kernel = mortal.mortal.kernel_backings
    kernel.opens.pop(closed.fh)
    mortal.mortal.known.discard(closed.fh)
    mortal.mortal.ledger.closed(closed.fh)
    mortal.mortal.die()
    join_closers()
    assert kernel.live == {mortal.mortal.passed_through[kept.fh]}
    assert closed.fh not in mortal.mortal.keep.held
    await mortal.overlay.release(kept.fh)
    assert not kernel.live


@pytest.mark.parametrize("opens", [0, 1])
async def test_a_backing_that_was_not_written_down_is_closed(mortal: MortalBench, opens: int) -> None:
    """Nobody knows it, and no /proc shows it, but it pins its file; the first one is no exception."""
    for number in range(opens):
        (mortal.beneath / f"{number}").write_bytes(b"content")
        opened = await mortal.kernel.open(b"%d" % number)
        await mortal.overlay.release(opened.fh)
    for _ in range(6):
        mortal.mortal.kernel_backings.open()
        mortal.mortal.die()
        assert not mortal.mortal.kernel_backings.live


async def test_a_listing_goes_on_after_the_name_it_ended_with(mortal: MortalBench) -> None:
    """Whatever came and went meanwhile: nothing that stayed is left out or told twice."""
    for number in range(40):
        (mortal.beneath / f"{number:02}").touch()
    fh = await mortal.overlay.opendir(1)
    names: list[bytes] = []
    position = await mortal.kernel.list_some(fh, 0, 10, names)
    (mortal.beneath / "00").unlink()
    (mortal.beneath / "07x").touch()
    (mortal.beneath / "0").touch()
    mortal.mortal.die()
    more = True
    while more:
        before, position = position, await mortal.kernel.list_some(fh, position, 10, names)
        more = position > before
        mortal.mortal.die()
    assert names == [b"%02d" % number for number in range(8)] + [b"07x"] + [b"%02d" % number for number in range(8, 40)]
    await mortal.overlay.releasedir(fh)


@pytest.mark.parametrize("told", [1, 2])
async def test_names_before_the_dots_are_listed_after_a_death(mortal: MortalBench, told: int) -> None:
    """A `-` or `#` sorts before them: such names were left out if only the dots had been told."""
    for name in ("#x", "-y", "a"):
        (mortal.beneath / name).touch()
    fh = await mortal.overlay.opendir(1)
    names: list[bytes] = []
    position = await mortal.kernel.list_some(fh, 0, told, names)
    mortal.mortal.die()
    await mortal.kernel.list_some(fh, position, 10, names)
    assert names == [b"#x", b"-y", b"a"]
    await mortal.overlay.releasedir(fh)


async def test_a_file_that_the_kernel_does_not_have_is_closed(mortal: MortalBench) -> None:
    """Opened, and the daemon died before it could say so: nobody will ever close it."""
    (mortal.beneath / "a").write_bytes(b"content")
    node_id = await mortal.kernel.node(b"a")
    await mortal.mortal.overlay.open(node_id, os.O_RDWR, CALLER)
    await mortal.mortal.overlay.opendir(1)
    assert len(mortal.mortal.keep.held) == 2
    mortal.mortal.die()
    join_closers()
    assert not mortal.mortal.keep.held
    assert not mortal.overlay.files
    assert mortal.mortal.descriptors() == {mortal.source.root_fd}


# --- everything at once ---


async def compare(history: list[tuple[str, Any]], how: list[Death], passthrough: bool, top: Path, clock: Any) -> None:
    for name in ("source", "twin"):
        (top / name / "d").mkdir(parents=True)
        (top / name / "e").mkdir()
        (top / name / "a").write_bytes(b"content")
        (top / name / "d" / "a").hardlink_to(top / name / "a")
        (top / name / "d" / "b").write_bytes(b"more")
    bench = make_mortal(top / "source", how, passthrough=passthrough)
    comparison = Comparison(bench, top / "twin", clock)
    for kind, what in history:
        await comparison.step("beneath_step" if kind == "beneath" else kind, what)
    await comparison.end()
    bench.mortal.ledger.death = None
    bench.mortal.deaths.clear()
    end_mortal(bench)


@settings(max_examples=100)
@given(history=st.lists(steps, min_size=10, max_size=40), how=deaths, passthrough=st.booleans())
def test_like_a_plain_directory_with_daemons_that_die(
    history: list[tuple[str, Any]], how: list[Death], passthrough: bool
) -> None:
    top = Path(tempfile.mkdtemp(prefix="tierd-mortal-"))
    before = os.umask(0)
    clock = MockClock()
    try:
        trio.run(compare, history, how, passthrough, top, clock, clock=clock)
    finally:
        os.umask(before)
        shutil.rmtree(top)
