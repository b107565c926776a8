"""A model comes back to the hot tier: what is where at the end, what the books say, and what stops it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controller.moving import FILES, MODEL, Site, site_of
from tests.servers import run
from tierd.controller.leader import NotLeaderError
from tierd.controller.moves import promotion
from tierd.controller.moves.moves import Moves
from tierd.controller.moves.steps import MoveState
from tierd.controller.source.moved_file import MoveRefused
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key

ROW = "SELECT (tier, version, created_at) FROM model_locations WHERE model_id = $1"


@pytest.fixture
def site(schema: str, tmp_path: Path) -> Site:
    """A model, and nobody who reads it."""
    made = site_of(tmp_path, schema, lease_reports=False)
    run(made.register())
    return made


async def freeze(site: Site, moves: Moves) -> None:
    """Demote the model, and let its grace pass."""
    await moves.demote(site.model_id, "for a test", by_hand=True)
    await moves.resume_all()
    await site.end_grace()
    await moves.resume_all()


def leading(site: Site, then: Callable[[Moves], Any], **settings: Any) -> Any:
    """Do it as the leader, after the model has become cold."""

    async def main() -> Any:
        async with site.leading(**settings) as moves:
            await freeze(site, moves)
            return await then(moves)

    return run(main())


def test_it_is_as_before_its_demotion(site: Site) -> None:
    before, created = site.snapshot(), run(site.value("SELECT created_at FROM model_locations"))

    async def promote(moves: Moves) -> MoveState:
        return await moves.advance(await moves.promote(MODEL, "asked for by gpu-1"))

    assert leading(site, promote) is MoveState.DONE
    assert site.snapshot() == before
    assert run(site.value(ROW, MODEL)) == ("hot", 1, created), "its age goes on, and the archive stays"
    assert not list(site.model.rglob(".tierd"))
    assert len(list(site.store.list("cold-models", f"{MODEL}/v1/"))) == len(FILES) - 1 + 1, "files and the manifest"
    size, done = run(site.value("SELECT (size_bytes, done_bytes) FROM moves WHERE kind = 'promote'"))
    assert size == done == sum(map(len, FILES.values()))


def test_it_can_go_and_come_again(site: Site) -> None:
    before = site.snapshot()

    async def again(moves: Moves) -> None:
        for _ in range(2):
            await moves.advance(await moves.promote(MODEL, "asked for"))
            assert site.snapshot() == before
            await freeze(site, moves)

    leading(site, again)
    assert {name: site.read(name) for name in FILES} == FILES
    assert run(site.value("SELECT version FROM model_locations")) == 3


def test_within_the_grace_the_trash_comes_back(site: Site) -> None:
    before = {name: (site.model / name).stat().st_ino for name in site.hot_names()}

    async def main() -> None:
        async with site.leading() as moves:
            await moves.demote(MODEL, "for a test", by_hand=True)
            await moves.resume_all()
            await moves.promote(MODEL, "asked for")
            await moves.resume_all()

    run(main())
    assert {name: (site.model / name).stat().st_ino for name in site.hot_names()} == before
    assert run(site.value("SELECT array_agg(kind ORDER BY id) FROM moves")) == ["demote", "undo"]


def test_a_model_that_is_one_file(site: Site) -> None:
    site.model_id = "models/one.gguf"
    site.model.write_bytes(b"weights")
    (site.source / "models/other.gguf").write_bytes(b"others")
    run(site.register())

    async def promote(moves: Moves) -> MoveState:
        return await moves.advance(await moves.promote("models/one.gguf", "asked for"))

    assert leading(site, promote) is MoveState.DONE
    assert site.model.read_bytes() == b"weights"
    assert not (site.source / "models/.tierd").exists()


def test_what_is_hot_unknown_or_moving_is_refused(site: Site) -> None:
    async def main() -> None:
        async with site.leading() as moves:
            with pytest.raises(MoveRefused, match="is hot already"):
                await moves.promote(MODEL, "asked for")
            with pytest.raises(MoveRefused, match="is no model in the source"):
                await moves.promote("models/other", "asked for")
            await moves.demote(MODEL, "for a test", by_hand=True)
            with pytest.raises(MoveRefused, match="is on its way"):
                await moves.promote(MODEL, "asked for")
            await freeze_planned(site, moves)
            first = await moves.promote(MODEL, "asked for")
            with pytest.raises(MoveRefused, match=f"move {first}, promote"):
                await moves.promote(MODEL, "asked for")

    run(main())


async def freeze_planned(site: Site, moves: Moves) -> None:
    """Go on with a demotion to its end."""
    await moves.resume_all()
    await site.end_grace()
    await moves.resume_all()


def test_a_model_whose_objects_are_gone_fails_and_stays_cold(site: Site) -> None:
    async def promote(moves: Moves) -> MoveState:
        site.store.delete("cold-models", object_key(MODEL, 1, b"model-1.safetensors"))
        move = await moves.promote(MODEL, "asked for")
        for _ in range(3):
            state = await moves.advance(move)
        return state

    assert leading(site, promote, attempts=3) is MoveState.FAILED
    assert run(site.value("SELECT tier FROM model_locations")) == "cold"
    assert "is not there" in run(site.value("SELECT reason FROM move_events WHERE event = 'failed'"))
    assert site.read("config.json") == FILES["config.json"]


def test_a_leader_that_is_one_no_longer_stops(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notices when it tells how far it is, long before all has come."""
    monkeypatch.setattr(promotion, "_TELL_SECONDS", 0.01)

    async def main() -> None:
        async with site.leading() as moves:
            await freeze(site, moves)
        site.store = DirectoryStore(site.root / "objects", bytes_per_s=400_000)
        async with site.leading() as moves:
            move = await moves.promote(MODEL, "asked for")
            task = asyncio.ensure_future(moves.advance(move))
            while await site.value("SELECT state FROM moves WHERE id = $1", move) != "copying":  # noqa: ASYNC110
                await asyncio.sleep(0)
            await site.execute("UPDATE leader SET epoch = epoch + 1")
            with pytest.raises(NotLeaderError):
                await task

    run(main())
    assert "model-2.safetensors" not in site.hot_names()
    assert site.read("model-2.safetensors") == FILES["model-2.safetensors"]
    assert run(site.value("SELECT tier FROM model_locations")) == "cold"


def test_a_task_that_is_cancelled_leaves_no_thread_behind(site: Site) -> None:
    """Its threads have ended when it has; somebody else goes on."""
    before = site.snapshot()

    async def main() -> None:
        async with site.leading() as moves:
            await freeze(site, moves)
        slow = DirectoryStore(site.root / "objects", bytes_per_s=1000)
        site.store, kept = slow, site.store
        async with site.leading() as moves:
            move = await moves.promote(MODEL, "asked for")
            task = asyncio.ensure_future(moves.advance(move))
            while not [path for path in site.source.rglob(".tierd/cold/*") if path.stat().st_size]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            slow.close()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        site.store = kept
        assert {name: site.read(name) for name in FILES} == FILES
        async with site.leading() as moves:
            await moves.resume_all()

    run(main())
    assert site.snapshot() == before


def test_a_model_that_was_removed_is_hot_and_empty(site: Site) -> None:
    """By somebody who may: nothing is made up."""

    async def promote(moves: Moves) -> MoveState:
        move = await moves.promote(MODEL, "asked for")
        shutil.rmtree(site.model)
        return await moves.advance(move)

    assert leading(site, promote) is MoveState.DONE
    assert not site.model.exists()
    assert os.listdir(site.source / "models") == []
