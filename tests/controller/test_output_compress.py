"""Old images are packed anew into objects of their own: each can be read at each moment, wherever that is cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from tests.controller.fate import Fate, Killed
from tests.controller.images import picture
from tests.controller.moving import stub_path
from tests.controller.outputs import DAY, House, Leader, read
from tests.servers import run
from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.outputs import compress as output_compress
from tierd.controller.outputs.backup import key_of
from tierd.controller.outputs.compression import OutputCompressions
from tierd.controller.outputs.png_recode import recode
from tierd.errors import UsageError

CONTENT = picture(8)
PACKED = recode(CONTENT)
DAYS = 30.0


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


async def nobody(_: str) -> None:
    """Listens to what a job is at."""


async def make_cold(house: House, leader: Leader) -> None:
    """All that is there has left the hot tier for good."""
    await leader.scan()
    await leader.back_up()
    await leader.clean_up()
    await house.rows("UPDATE moves SET grace_until = now() WHERE state = 'in_grace' RETURNING 1")
    await leader.work.moves.resume_all()


async def compress(leader: Leader, *, dry_run: bool = False) -> Outcome:
    return await output_compress.compress_old_outputs(Context(leader.work, dry_run, nobody))


async def end_grace(house: House) -> None:
    await house.rows("UPDATE output_compressions SET try_at = now() WHERE finished_at IS NULL RETURNING 1")


async def state(house: House) -> list[tuple[Any, ...]]:
    return await house.rows("SELECT state, reason FROM output_compressions ORDER BY id")


ROW = "SELECT version, size_bytes, hot_storage, cold_storage FROM generated_outputs"


def test_an_old_image_is_packed_anew_and_its_original_goes_after_the_grace(house: House) -> None:
    path, other = house.make(content=CONTENT), house.make(ending="wav", content=b"sound")
    mtime_ns = (house.outputs / path).stat().st_mtime_ns

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            assert (await compress(leader, dry_run=True)).counts == {"outputs": 1, "bytes": len(CONTENT)}
            assert house.object(path, 2) is None
            outcome = await compress(leader)
            assert (outcome.state, outcome.counts["in_grace"]) == ("done", 1), outcome
            assert read(house, path) == PACKED
            assert (house.object(path, 1), house.object(path, 2)) == (CONTENT, PACKED), "the original stays for a grace"
            assert (await compress(leader)).counts["done"] == 0, "it is not over"
            await end_grace(house)
            outcome = await compress(leader)
            assert (outcome.counts["done"], outcome.counts["bytes_saved"]) == (1, len(CONTENT) - len(PACKED))
            assert (await compress(leader)).counts["in_grace"] == 0, "once"

    run(main())
    assert read(house, path) == PACKED
    assert (house.object(path, 1), house.object(path, 2)) == (None, PACKED)
    assert read(house, other) == b"sound"
    assert stub_path(house.outputs / path).stat().st_mtime_ns == mtime_ns
    rows = run(house.rows(f"{ROW} WHERE filename LIKE '%.png'"))
    assert rows == [(2, len(PACKED), False, True)]
    link = "SELECT old_version, old_size, version, size_bytes, state FROM output_compressions"
    assert run(house.rows(link)) == [(1, len(CONTENT), 2, len(PACKED), "done")]
    assert house.registry.get_sample_value("tierd_output_compressions_total") == 1


def test_it_is_off_by_default_and_what_was_begun_ends_all_the_same(house: House) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading() as leader:
            await make_cold(house, leader)
            assert (await compress(leader)).counts["in_grace"] == 0
            assert (await compress(leader, dry_run=True)).counts["outputs"] == 0
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await compress(leader)
        await end_grace(house)
        async with house.leading() as leader:
            assert (await compress(leader)).counts["done"] == 1

    run(main())
    assert house.object(path, 1) is None


def test_without_a_library_it_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UsageError("Pillow is not installed", hint="pip install 'tierd[images]'")

    monkeypatch.setattr(output_compress, "require_library", missing)

    async def main() -> Outcome:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            return await compress(leader)

    outcome = run(main())
    assert (outcome.state, outcome.result) == ("refused", "Pillow is not installed: pip install 'tierd[images]'")


async def _young(house: House, leader: Leader, path: str) -> None:
    await house.rows("UPDATE generated_outputs SET created_at = now() - interval '29 days' RETURNING 1")


async def _promoted(house: House, leader: Leader, path: str) -> None:
    await house.rows("UPDATE generated_outputs SET hot_storage = true RETURNING 1")


async def _waiting(house: House, leader: Leader, path: str) -> None:
    await house.rows("UPDATE generated_outputs SET pending_since = now() RETURNING 1")


async def _moving(house: House, leader: Leader, path: str) -> None:
    await house.rows("UPDATE moves SET state = 'in_grace', finished_at = NULL RETURNING 1")


@pytest.mark.parametrize("spoil", [_young, _promoted, _waiting, _moving])
def test_only_what_has_left_for_good_and_is_old_is_compressed(house: House, spoil: Callable[..., Any]) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            await spoil(house, leader, path)
            await compress(leader)

    run(main())
    assert house.object(path, 2) is None
    assert run(state(house)) == []


@pytest.mark.parametrize("content", [PACKED, b"no image"])
def test_what_does_not_get_smaller_or_is_no_image_is_left_and_not_tried_again(house: House, content: bytes) -> None:
    path = house.make(content=content)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            assert (await compress(leader)).counts["left"] == 1
            assert (await compress(leader)).counts["left"] == 0

    run(main())
    assert (house.object(path, 1), house.object(path, 2)) == (content, None)
    ((ended, reason),) = run(state(house))
    assert ended == "left"
    assert reason in ("it would save less than 3%", "it is no PNG file")


def test_an_object_that_is_damaged_is_not_compressed(house: House) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            objects(house, path, 1).write_bytes(CONTENT[:-1] + b"x")
            with capture_logs():
                outcome = await compress(leader)
            assert outcome.state == "failed"
            assert "is damaged" in outcome.result

    run(main())
    assert house.object(path, 2) is None


def objects(house: House, path: str, version: int) -> Path:
    return house.root / "objects/generated-outputs" / key_of(b"outputs", path.encode(), version)


def _lose(house: House, path: str) -> None:
    objects(house, path, 2).unlink()


def _damage(house: House, path: str) -> None:
    objects(house, path, 2).write_bytes(PACKED[:-1] + b"x")


@pytest.mark.parametrize("harm", [_lose, _damage])
def test_if_the_new_object_is_lost_the_original_takes_its_place(
    house: House, harm: Callable[[House, str], None]
) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            await compress(leader)
            harm(house, path)
            await end_grace(house)
            with capture_logs():
                assert (await compress(leader)).counts["kept"] == 1

    run(main())
    assert read(house, path) == CONTENT
    assert run(house.rows(ROW)) == [(1, len(CONTENT), False, True)]


def _rename(house: House, path: str) -> None:
    """As an overlay does: what the stub stands for is known where it goes."""
    day = house.outputs / DAY
    (day / ".tierd/cold" / path.rpartition("/")[2]).rename(day / ".tierd/cold/mine.png")


def _link(house: House, path: str) -> None:
    os.link(stub_path(house.outputs / path), house.root / "link")


def _write(house: House, path: str) -> None:
    (house.outputs / path).write_bytes(b"new")


@pytest.mark.parametrize("meddle", [_rename, _link, _write])
@pytest.mark.parametrize("when", ["in the grace", "before the switch"])
def test_the_original_stays_if_anybody_might_need_it(
    house: House, meddle: Callable[[House, str], None], when: str
) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            if when == "before the switch":
                meddle(house, path)
            await compress(leader)
            if when == "in the grace":
                meddle(house, path)
            await end_grace(house)
            await compress(leader)

    run(main())
    assert [row[0] for row in run(state(house))] == ["kept"]
    assert house.object(path, 1) == CONTENT


async def _took_elsewhere(house: House, leader: Leader, path: str) -> None:
    """An earlier cold file of the same object was renamed, and the same bytes written again."""
    await house.rows("UPDATE generated_outputs SET loose = ARRAY[1] RETURNING 1")


@pytest.mark.parametrize("when", ["in the grace", "before"])
def test_an_original_that_another_cold_file_may_stand_for_stays(house: House, when: str) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            if when == "before":
                await _took_elsewhere(house, leader, path)
            await compress(leader)
            await _took_elsewhere(house, leader, path)
            await end_grace(house)
            await compress(leader)

    run(main())
    assert house.object(path, 1) == CONTENT
    assert run(state(house)) == (
        [("kept", "the original stays: another cold file may stand for it")] if when == "in the grace" else []
    )


def test_one_that_is_written_again_gets_a_version_of_its_own(house: House) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            await compress(leader)
            stub_path(house.outputs / path).unlink()
            house.write(path, b"new")
            await house.told(path, written_age_ns=1)
            await leader.back_up()
            assert (await house.rows(ROW))[0][0] == 3
        await end_grace(house)
        async with house.leading() as leader:
            await compress(leader)

    run(main())
    assert [house.object(path, version) for version in (1, 2, 3)] == [CONTENT, PACKED, b"new"]


def test_one_that_is_deleted_while_it_is_packed_leaves_no_object(house: House) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        def delete(effect: str) -> None:
            if effect == "object was put":
                house.meanwhile("DELETE FROM generated_outputs")

        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            one = compressions(leader, delete)
            begun = await one.begin(UUID(path.rpartition("/")[2][:36]), DAYS)
            assert begun is not None
            await one.advance(begun)

    run(main())
    assert house.object(path, 2) is None
    assert run(state(house)) == []


def test_rm_in_the_grace_deletes_both_objects(house: House) -> None:
    path = house.make(content=CONTENT)

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            await compress(leader)
            stub_path(house.outputs / path).unlink()
            await house.told(path, removed_age_ns=1, ended=2)
            await leader.back_up()
            while await leader.work.output_work.deletion.round():
                pass
            for _ in range(3):
                await leader.work.output_work.erasure.round()
            assert await house.rows("SELECT 1 FROM generated_outputs") == []
            await end_grace(house)
            await compress(leader)
            await compress(leader)

    run(main())
    assert (house.object(path, 1), house.object(path, 2)) == (None, None)
    assert run(state(house)) == []


def test_who_an_image_was_of_is_forgotten_with_it(house: House) -> None:
    house.make(content=b"no image")

    async def main() -> None:
        async with house.leading(outputs_compress_after_days=DAYS) as leader:
            await make_cold(house, leader)
            await compress(leader)
            assert len(await state(house)) == 1
            await house.rows("DELETE FROM generated_outputs RETURNING 1")
            await compress(leader)

    run(main())
    assert run(state(house)) == []


def compressions(leader: Leader, at: Callable[[str], None]) -> OutputCompressions:
    work = leader.work
    files = work.output_files
    where = work.store, work.output_backup.bucket
    return OutputCompressions(work.database, work.epoch, files.tree, files.root, *where, 3600.0, 0.0, at)


async def whole(house: House, leader: Leader, path: str, at: Callable[[str], None]) -> None:
    """From its beginning, or wherever it is, to its end."""
    one, name = compressions(leader, at), path.rpartition("/")[2][:36]
    query = "SELECT id FROM output_compressions WHERE output_id = $1::text::uuid"
    found = await house.rows(query, name)
    begun = found[0][0] if found else await one.begin(UUID(name), DAYS)
    if begun is None:
        return
    if (await one.advance(begun)).state == "in_grace":
        await end_grace(house)
        await one.advance(begun)


def test_killed_between_any_two_effects(house: House) -> None:
    """At each moment it is there, as the one or the other; at the end once."""

    async def one(number: int, last: int) -> list[str]:
        path = house.make(f"user{number}/2026/01/12", content=CONTENT, name=str(uuid4()))

        def look(_: str) -> None:
            assert read(house, path) in (CONTENT, PACKED)

        fate = Fate(last, look)
        async with house.leading() as leader:
            await make_cold(house, leader)
        with suppress(Killed):
            async with house.leading() as leader:
                await whole(house, leader, path, fate)
        look("")
        async with house.leading() as leader:
            await whole(house, leader, path, look)
        assert read(house, path) == PACKED
        assert (house.object(path, 1), house.object(path, 2), house.object(path, 3)) == (None, PACKED, None)
        rows = await house.rows(f"{ROW} WHERE user_id = $1", f"user{number}")
        assert rows == [(2, len(PACKED), False, True)]
        return fate.effects

    async def main() -> None:
        effects = await one(0, 0)
        assert len(effects) > 15
        for last in range(1, len(effects) + 1):
            try:
                await one(last, last)
            except BaseException as error:
                error.add_note(f"killed at {last}: {effects[last - 1]}")
                raise

    with capture_logs():
        run(main(), seconds=600)
