"""A model goes to the cold tier and back: what is where at the end, and what stops it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.controller.moving import FILES, MODEL, Site, site_of
from tests.servers import run
from tierd.controller.steps import MoveState


@pytest.fixture
def site(schema: str, new_directory: object, tmp_path: Path) -> Site:
    """A model, and a node that holds nothing open."""
    made = site_of(tmp_path, schema)
    run(made.register("gpu-1"))
    return made


def test_a_model_becomes_cold_and_its_bytes_leave_after_the_grace(site: Site) -> None:
    created = run(site.value("SELECT created_at FROM model_locations"))

    async def main() -> None:
        async with site.leading() as moves:
            move = await moves.demote(MODEL, "not read for 90 days")
            assert await moves.advance(move) is MoveState.IN_GRACE
            assert site.hot_names() == {"empty"}
            assert {name: site.read(name) for name in FILES} == FILES
            assert await moves.advance(move) is MoveState.IN_GRACE
            assert len(site.trash()) == 5
            await site.end_grace()
            assert await moves.advance(move) is MoveState.DONE

    run(main())
    assert {name: site.read(name) for name in FILES} == FILES
    assert site.trash() == []
    assert not (site.source / ".tierd/trash/1").exists()
    row = run(site.value("SELECT (tier, version, files, size_bytes, created_at) FROM model_locations"))
    assert row == ("cold", 1, 5, sum(map(len, FILES.values())), created)
