"""The source as the controller knows it: by a name of its own, mounted anew, and with trash that nobody knows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from bench.juicefs import JuiceFS
from tests.conftest import DirectoryFactory
from tests.controller.moving import FILES, Site, demote
from tests.servers import run
from tierd.controller.moves.steps import MoveState
from tierd.controller.source.hot_tree import HotTree


def test_a_source_has_one_name_whoever_gives_it(tmp_path: Path) -> None:
    one, other = HotTree(tmp_path), HotTree(tmp_path)
    assert one.identity() is None
    name = one.identity(make=True)
    assert name
    assert other.identity(make=True) == name
    assert os.listdir(tmp_path / ".tierd") == ["source-id"]
    (tmp_path / "elsewhere").mkdir()
    assert HotTree(tmp_path / "elsewhere").identity(make=True) != name


def test_a_source_that_was_mounted_anew_is_used_without_a_restart(
    juicefs_volume: JuiceFS, new_directory: DirectoryFactory
) -> None:
    where = new_directory("mounted-anew")
    mount = juicefs_volume.mount(where)
    tree = HotTree(where)
    name = tree.identity(make=True)
    mount.close()
    juicefs_volume.mount(where)
    try:
        assert tree.identity() == name
        assert tree.device == where.stat().st_dev
    finally:
        tree.close()
        juicefs_volume.umount(where)


def test_a_source_whose_mount_died_is_an_error_and_not_an_empty_one(
    juicefs_volume: JuiceFS, new_directory: DirectoryFactory
) -> None:
    where = new_directory("died")
    mount = juicefs_volume.mount(where)
    tree = HotTree(where)
    name = tree.identity(make=True)
    mount.close()
    found: object
    try:
        found = tree.identity()
    except OSError as error:
        found = error.errno
    assert found in (None, errno.ENOTCONN), "what a move began in is not that"
    assert found != name
    tree.close()


def test_trash_that_no_move_is_known_of_is_told_and_never_taken(site: Site) -> None:
    """The database was lost in the grace of a demotion: the next one would get its number, and its trash."""
    first, _ = run(demote(site))

    async def lose() -> None:
        await site.execute("DELETE FROM moves")
        await site.execute("ALTER TABLE moves ALTER COLUMN id RESTART")
        await site.execute("DELETE FROM model_locations")

    run(lose())
    before = site.trash()
    assert before
    site.model_id = "models/other"
    site.make_model()
    run(site.register())

    async def look_around() -> list[int]:
        async with site.leading() as moves:
            return await moves.look_around()

    assert run(look_around()) == [first]
    second, state = run(demote(site))
    assert state is MoveState.IN_GRACE
    assert second > first
    assert run(look_around()) == [first]
    assert [path for path in site.trash() if path.startswith(f"{first}/")] == before
    assert {name: site.read(name) for name in FILES} == FILES
