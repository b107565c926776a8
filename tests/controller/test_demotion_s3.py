"""A model goes to a real S3 server and back: large files in parts, a kill in the middle of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import s3
from tests.controller.fate import Fate, Killed
from tests.controller.moving import MODEL, Site, site_of
from tests.objects.servers import LIMITS, MIB, s3_store
from tests.servers import run
from tierd.controller.moves.steps import MoveState
from tierd.objects.s3 import S3Store

LARGE = 20 * MIB + 7
"""Three parts."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[S3Store]:
    """A client of an rclone of its own."""
    (tmp_path / "data").mkdir()
    with s3.serve(tmp_path / "data", tmp_path / "s3.log") as running:
        made = s3_store(running.server, LIMITS)
        yield made
        made.close()


def test_a_model_goes_to_s3_and_back(schema: str, tmp_path: Path, store: S3Store) -> None:
    site: Site = site_of(tmp_path, schema, store)
    (site.model / "large.safetensors").write_bytes(content := os.urandom(LARGE))

    def kill(effect: str) -> None:
        if effect == "begin copied":
            raise Killed

    async def main() -> None:
        await site.register("gpu-1")
        with pytest.raises(Killed):
            async with site.leading(Fate(0, kill)) as moves:
                await moves.advance(await moves.demote(MODEL, "test"))
        async with site.leading() as moves:
            await moves.resume_all()
            assert (await site.move())[0] == "in_grace"
            assert site.read("large.safetensors") == content
            assert await moves.advance(await moves.undo(MODEL)) is MoveState.DONE
            move = await moves.demote(MODEL, "again")
            assert await moves.advance(move) is MoveState.IN_GRACE
            await site.end_grace()
            assert await moves.advance(move) is MoveState.DONE

    run(main())
    assert site.hot_names() == {"empty"}
    assert site.read("large.safetensors") == content
    assert list((tmp_path / "state/uploads").iterdir()) == []
