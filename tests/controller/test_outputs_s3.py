"""Outputs on real S3 servers of two makes: backed up, cold, packed anew, restored, deleted; large ones in parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from bench import s3
from tests.controller.fate import Killed
from tests.controller.house import connected
from tests.controller.images import picture
from tests.controller.outputs import BUCKET, DAY, House, Leader, read
from tests.objects.servers import LIMITS, MIB, Objects, moto, s3_store
from tests.servers import run
from tierd.controller.jobs.run import Context
from tierd.controller.outputs import compress as output_compress
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.outputs import jobs as output_jobs
from tierd.controller.outputs import restore as output_restore
from tierd.controller.outputs.backup import key_of
from tierd.controller.outputs.png_recode import recode
from tierd.controller.outputs.restore import Wish
from tierd.objects.store import Stored

LARGE = os.urandom(20 * MIB + 7)
"""Three parts: a sound as long as the seed has them."""
IMAGE = picture(24)


@pytest.fixture(params=["rclone", "moto"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[s3.Server]:
    with ExitStack() as stack:
        if request.param == "moto":
            yield stack.enter_context(moto(tmp_path))
            return
        (tmp_path / "data").mkdir()
        yield stack.enter_context(s3.serve(tmp_path / "data", tmp_path / "s3.log")).server


@pytest.fixture
def house(server: s3.Server, tmp_path: Path, schema: str) -> Iterator[House]:
    store = s3_store(server, LIMITS)
    yield House(tmp_path / "house", schema, objects=store)
    store.close()


async def nobody(_: str) -> None:
    """Listens to what a job is at."""


async def make_cold(house: House, leader: Leader) -> None:
    assert (await leader.clean_up()).state == "done"
    await house.rows("UPDATE moves SET grace_until = now() WHERE state = 'in_grace' RETURNING 1")
    await leader.work.moves.resume_all()


async def restore(leader: Leader, wish: Wish) -> None:
    async with leader.work.database.connection() as connection:
        await output_restore.ask(connection, wish, "test")
    assert (await output_jobs.restore_outputs(Context(leader.work, False, nobody))).counts["restored"] == 1


async def delete_all(house: House, leader: Leader, user: str) -> None:
    async with connected(house.dsn) as connection:
        await output_deletion.ask(connection, user, None, "test")
    while await leader.work.output_work.deletion.round():
        pass
    for _ in range(4):
        await leader.work.output_work.erasure.round()


def test_the_life_of_outputs(house: House, server: s3.Server) -> None:
    image, sound = house.make(content=IMAGE), house.make(ending="wav", content=LARGE)
    beneath = Objects(s3.client_of(server))
    keys = {path: key_of(b"outputs", path.encode(), 1) for path in (image, sound)}

    def kill(effect: str) -> None:
        if effect == "object was put":
            raise Killed

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
        with suppress(Killed):
            async with house.leading(kill) as leader:
                await leader.back_up()
        assert await house.rows("SELECT DISTINCT cold_storage FROM generated_outputs") == [(False,)]
        async with house.leading(outputs_compress_after_days=30) as leader:
            await leader.back_up()
            assert beneath.get(BUCKET, keys[sound]) == LARGE
            (house.outputs / sound).unlink()
            await restore(leader, Wish(output_ids=[UUID(sound.rpartition("/")[2][:36])]))
            assert (house.outputs / sound).read_bytes() == LARGE
            await leader.back_up()
            await house.rows("UPDATE generated_outputs SET hot_since = NULL RETURNING 1")
            await make_cold(house, leader)
            assert (read(house, image), read(house, sound)) == (IMAGE, LARGE)
            context = Context(leader.work, False, nobody)
            assert (await output_compress.compress_old_outputs(context)).counts["in_grace"] == 1
            await house.rows("UPDATE output_compressions SET try_at = now() RETURNING 1")
            assert (await output_compress.compress_old_outputs(context)).counts["done"] == 1
            assert (read(house, image), read(house, sound)) == (recode(IMAGE), LARGE)
            assert keys[image] not in beneath.keys(BUCKET)
            await delete_all(house, leader, DAY.partition("/")[0])

    run(main(), seconds=120)
    left = {key for key in beneath.keys(BUCKET) if not key.endswith(".manifest")}
    assert {key for key in left if "user123" in key} == set(), "no bytes and no checksums of the user's"
    assert list((house.root / "state/output-uploads").iterdir()) == []


def test_an_object_that_is_damaged_in_the_store_is_noticed_before_anything_leaves(
    house: House, server: s3.Server
) -> None:
    path = house.make(content=b"content")

    async def main() -> None:
        async with house.leading() as leader:
            await leader.scan()
            await leader.back_up()
            key = key_of(b"outputs", path.encode(), 1)
            Objects(s3.client_of(server)).put(BUCKET, key, b"c0ntent")
            with capture_logs():
                assert (await leader.clean_up()).counts["days_spared"] == 1
            assert house.store.hash(BUCKET, key) != Stored(7, "")

    run(main())
    assert (house.outputs / path).read_bytes() == b"content"
