"""Objects go only if nothing can refer to them."""

from __future__ import annotations

import pytest

from tests.controller.fate import Fate
from tests.controller.moving import BUCKET, FILES, MODEL, Site, demote
from tests.servers import run
from tierd.controller.moves.steps import MoveState

OLD = "UPDATE moves SET finished_at = now() - interval '2 days' WHERE finished_at IS NOT NULL"


async def clean_up(site: Site) -> int:
    async with site.leading() as moves:
        return await moves.clean_up()


def keys(site: Site) -> list[str]:
    return sorted(found.key for found in site.store.list(BUCKET))


async def given_up(site: Site) -> None:
    """A demotion that is abandoned when all is copied."""

    def change(effect: str) -> None:
        if effect == "put manifest":
            (site.model / "config.json").write_bytes(b"changed")

    async with site.leading(Fate(0, change)) as moves:
        assert await moves.advance(await moves.demote(MODEL, "test")) is MoveState.ABANDONED
    (site.model / "config.json").write_bytes(FILES["config.json"])


def test_what_was_given_up_before_the_switch_is_removed_after_a_day(site: Site) -> None:
    run(given_up(site))
    assert len(keys(site)) > 1
    assert run(clean_up(site)) == 0
    run(site.execute(OLD))
    assert run(demote(site))[1] is MoveState.IN_GRACE
    before = [key for key in keys(site) if "/v2/" in key]
    assert run(clean_up(site)) == 1
    assert keys(site) == before
    assert run(clean_up(site)) == 0
    assert {name: site.read(name) for name in FILES} == FILES


@pytest.mark.parametrize("ending", ["undo", "put back"])
def test_what_was_switched_once_stays(ending: str, site: Site) -> None:
    """A user may have renamed a stub to anywhere."""

    def lease(effect: str) -> None:
        if effect == "commit copy manifest" and ending == "put back":
            site.meanwhile("INSERT INTO node_leases VALUES ('gpu-1', 'models/llama-7b')")

    async def main() -> None:
        async with site.leading(Fate(0, lease)) as moves:
            await moves.advance(await moves.demote(MODEL, "test"))
            if ending == "undo":
                await moves.advance(await moves.undo(MODEL))

    run(main())
    before = keys(site)
    assert before
    run(site.execute(OLD))
    assert run(clean_up(site)) == 0
    assert keys(site) == before


def test_objects_that_were_there_already_stay(site: Site) -> None:
    """The database is older than the store, or new: versions are given out again, and a stub that a user moved to
    another model stands for one of these objects. A demotion that finds them ends, and takes nothing with it."""
    run(demote(site))
    moved = site.source / "models/other"
    moved.mkdir()
    site.model.rename(moved / "part")
    site.make_model()
    before = keys(site)

    async def forget() -> None:
        await site.execute("DELETE FROM moves")
        await site.execute("UPDATE model_locations SET version = 0, tier = 'hot'")

    run(forget())
    assert run(demote(site))[1] is MoveState.ABANDONED
    run(site.execute(OLD))
    run(clean_up(site))
    assert keys(site) == before
