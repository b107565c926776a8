"""`tierd outputs`: what it shows, how it fetches a copy, and how it fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tests.controller.house import connected, settings_for, tierd
from tests.controller.outputs import BUCKET, DAY, House
from tests.servers import run
from tierd.controller.outputs import deletion as output_deletion
from tierd.controller.outputs.backup import key_of
from tierd.errors import UsageError
from tierd.outputs_api import delete_outputs

HOSTILE = "a\x1b[31mb"


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    """With two outputs that are backed up, one that is not, and what is left alone."""
    made = House(tmp_path, schema)
    made.make(content=b"content", name=str(UUID(int=1)))
    made.make("other/2026/01/12", "wav", name=str(UUID(int=2)))
    made.write(f"{DAY}/cat.png")
    made.write(f"{HOSTILE}/2026/01/12/{uuid4()}.png")

    async def main() -> None:
        async with made.leading() as leader:
            await leader.scan()
            await leader.back_up()
            made.make("third/2026/01/12", name=str(UUID(int=3)))
            await leader.scan()

    run(main())
    return made


def outputs(house: House, *words: str) -> subprocess.CompletedProcess[str]:
    """A command, with the settings of the house."""
    return tierd(
        *("outputs", *words), TIERDCTL_POSTGRES=house.dsn, TIERDCTL_OBJECTS=str(house.root / "objects"), COLUMNS="200"
    )  # fmt: skip


def test_list_shows_outputs_of_users_and_tiers(house: House) -> None:
    done = outputs(house, "list", "--json")
    rows = {UUID(row["output_id"]).int: row for row in json.loads(done.stdout)}
    assert rows.keys() == {1, 2, 3}
    assert rows[1] == {
        "output_id": str(UUID(int=1)),
        "user_id": "user123",
        "filename": f"2026/01/12/{UUID(int=1)}.png",
        "output_type": "image",
        "size_bytes": 7,
        "hot_storage": True,
        "cold_storage": True,
        "access_count": 0,
        "created_at": "2023-11-14T22:13:20+00:00",
        "last_accessed": None,
        "vanished_at": None,
        "error": None,
    }
    for words, found in (
        (["--user", "other"], {2}),
        (["--tier", "unbacked"], {3}),
        (["--tier", "cold"], {1, 2}),
        (["--tier", "vanished"], set()),
    ):
        told = json.loads(outputs(house, "list", "--json", *words).stdout)
        assert {UUID(row["output_id"]).int for row in told} == found, words
    assert str(UUID(int=2)) in outputs(house, "list", "--user", "other").stdout.replace("\n", "")


def test_stats_count_and_name_what_is_left_alone(house: House) -> None:
    told = json.loads(outputs(house, "stats", "--json").stdout)
    assert told["tiers"]["hot"]["outputs"] == 3
    assert told["tiers"]["cold"] == {"outputs": 2, "bytes": 10}
    assert told["tiers"]["unbacked"]["outputs"] == 1
    assert told["deletions"] == {"planned": 0, "hidden": 0, "deleted": 0, "oldest_s": 0}
    assert told["faults"] == 2
    assert told["oldest_unbacked_s"] > 0
    assert {fault["path"]: fault["reason"] for fault in told["left_alone"]} == {
        f"{DAY}/cat.png": "no UUID for a name",
        HOSTILE: "a user ID that cannot be one",
    }
    shown = outputs(house, "stats").stdout
    assert "cat.png" in shown
    assert "\x1b[31m" not in shown, "a name from outside changes no colour"


def test_stats_tell_of_deletions_that_go_on(house: House) -> None:
    async def main() -> None:
        async with connected(house.dsn) as connection:
            await output_deletion.ask(connection, "user123", None, "test")

    run(main())
    assert json.loads(outputs(house, "stats", "--json").stdout)["deletions"]["oldest_s"] > 0
    shown = outputs(house, "stats").stdout
    assert "deletions: 0 planned, 0 hidden, 0 deleted" in shown
    assert "the oldest that has not deleted everything was asked for" in shown


def test_get_fetches_a_copy_into_a_new_file(house: House, tmp_path: Path) -> None:
    target = tmp_path / "copy.png"
    done = outputs(house, "get", str(UUID(int=1)), str(target))
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes() == b"content"
    target.write_bytes(b"mine")
    done = outputs(house, "get", str(UUID(int=1)), str(target))
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"tierd: {target} is there already")
    assert target.read_bytes() == b"mine"
    assert not list(tmp_path.glob(".tierd-*"))


@pytest.mark.parametrize(("number", "why"), [(3, "is not backed up yet"), (9, "there is no output")])
def test_get_says_why_there_is_none(house: House, tmp_path: Path, number: int, why: str) -> None:
    done = outputs(house, "get", str(UUID(int=number)), str(tmp_path / "copy"))
    assert done.returncode == 2
    assert why in done.stderr
    assert not (tmp_path / "copy").exists()


def test_get_hands_out_no_wrong_byte(house: House, tmp_path: Path) -> None:
    key = key_of(b"outputs", f"{DAY}/{UUID(int=1)}.png".encode(), 1)
    (house.root / "objects" / BUCKET / key).write_bytes(b"cOntent")
    done = outputs(house, "get", str(UUID(int=1)), str(tmp_path / "copy"))
    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert not (tmp_path / "copy").exists()


# --- delete ---


def delete(house: House, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command where nobody leads, so that it does it itself."""
    env = {
        "TIERDCTL_POSTGRES": house.dsn,
        "TIERDCTL_OBJECTS": str(house.root / "objects"),
        "TIERDCTL_SOURCE": str(house.root / "source"),
        "TIERDCTL_STATE_DIR": str(house.root / "state"),
    } | env
    return tierd("outputs", "delete", *words, **env)


def test_delete_asks_first_and_a_dry_run_changes_nothing(house: House) -> None:
    done = delete(house, "--user", "user123")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "tierd: nobody can be asked whether it is meant")
    done = delete(house, "--user", "user123", "--dry-run", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"user": "user123", "outputs": 1, "bytes": 7})
    assert (house.outputs / DAY / f"{UUID(int=1)}.png").read_bytes() == b"content"
    assert run(house.rows("SELECT 1 FROM output_delete_wishes")) == []


def test_delete_removes_all_of_a_user(house: House) -> None:
    done = delete(house, "--user", "user123", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "user": "user123",
        "outputs": 1,
        "hidden": 1,
        "deleted": 1,
        "unconfirmed_nodes": [],
        "error": None,
        "deleted_everywhere": True,
    }
    assert sorted(path.name for path in (house.outputs / DAY).iterdir()) == ["cat.png"]
    assert not list((house.root / "objects").rglob(f"{UUID(int=1)}.png"))
    assert list((house.root / "objects").rglob(f"{UUID(int=2)}.wav"))


def test_delete_says_which_node_has_not_confirmed(house: House) -> None:
    run(house.rows("INSERT INTO nodes (node_id, boot) VALUES ('gpu-7', gen_random_uuid()) RETURNING 1"))
    words = ("--user", "other", "--output", str(UUID(int=2)), "--yes", "--wait", "1")
    done = delete(house, *words)
    assert done.returncode == 1
    assert "0 of 1 outputs of other are deleted" in done.stderr
    assert not (house.outputs / "other/2026/01/12" / f"{UUID(int=2)}.wav").exists()
    run(house.rows("UPDATE output_erasures SET hidden_at = now() - interval '2 hours' RETURNING 1"))
    done = delete(house, *words)
    assert done.returncode == 1
    assert "deleted, but not confirmed by gpu-7" in done.stderr
    assert not list((house.root / "objects").rglob(f"{UUID(int=2)}.wav"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--user", "user123", "--output", str(UUID(int=2))], "has no output"),
        (["--user", "../x"], "cannot be a user"),
    ],
)
def test_delete_refuses_what_is_nobodys(house: House, words: list[str], why: str) -> None:
    done = delete(house, *words, "--yes")
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_programs_delete_through_the_library(house: House) -> None:
    settings = settings_for(
        house.dsn, source=house.root / "source", objects=str(house.root / "objects"), state_dir=house.root / "state"
    )
    found = delete_outputs("other", UUID(int=2), settings=settings)
    assert (found.deleted, found.deleted_everywhere) == (1, True)
    with pytest.raises(UsageError):
        delete_outputs("other", UUID(int=9), settings=settings)
