"""`tierd demote`, `promote`, `undo`: by a controller that leads, and without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.controller.controllers import Site, running, until
from tests.controller.house import HEEDS_CTRL_C, connected, environment, settings_for
from tests.servers import run
from tierd.controller.leader import NotLeaderError, begin_epoch
from tierd.controller.moves import wishes as move_wishes
from tierd.controller.moves.wishes import Answers
from tierd.controller.settings import ControllerSettings
from tierd.errors import DatabaseError, UsageError
from tierd.postgres import Database

MODEL = "models/llama"


@pytest.fixture
def site(tmp_path: Path, schema: str) -> Site:
    """A model that the catalogue knows."""
    made = Site(tmp_path, schema, grace=0)
    made.model(MODEL)
    made.ask("INSERT INTO model_locations (model_id, tier, size_bytes) VALUES ($1, 'hot', 20000)", MODEL)
    return made


def tier(site: Site) -> str:
    found: str = site.value("SELECT tier FROM model_locations")
    return found


def bytes_of(site: Site) -> dict[str, bytes]:
    """Files that have their bytes in the source."""
    return {path.name: path.read_bytes() for path in (site.source / MODEL).iterdir() if path.is_file()}


def test_without_a_controller_commands_do_it_themselves(site: Site) -> None:
    before = bytes_of(site)
    done = site.tierd("demote", MODEL, "--json", grace=3600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["kind"], told["succeeded"]) == ("in_grace", "demote", True)
    assert told["grace_until"]
    assert (tier(site), bytes_of(site)) == ("cold", {})
    done = site.tierd("undo", MODEL, grace=3600)
    assert (done.returncode, done.stdout) == (0, f"{MODEL}: is hot: what had been demoted is back\n"), done.stderr
    assert (tier(site), bytes_of(site)) == ("hot", before)


def test_a_controller_that_leads_does_it(site: Site) -> None:
    before = bytes_of(site)
    with running(site) as controller:
        controller.wait_for("leading")
        assert site.tierd("demote", MODEL, source="").returncode != 0, "an empty path is no setting"
        done = site.tierd("demote", MODEL)
        assert (done.returncode, done.stdout) == (0, f"{MODEL}: is cold\n"), done.stderr
        until(lambda: site.value("SELECT state FROM moves ORDER BY id DESC") == "done")
        done = site.tierd("promote", MODEL, "--json")
        told = json.loads(done.stdout)
        assert (told["state"], told["size_bytes"], told["done_bytes"]) == ("done", 20_000, 20_000)
        assert (tier(site), bytes_of(site)) == ("hot", before)
        assert site.value("SELECT epoch FROM leader") == 1, "nobody else led"
        assert {line["kind"] for line in controller.log("move_planned")} == {"demote", "promote"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["promote", MODEL], 1, "is hot already"),
        (["undo", MODEL], 1, "was never demoted"),
        (["demote", "models/unknown"], 1, "is not in the catalogue"),
        (["demote", "../etc"], 2, "'..'"),
        (["promote", MODEL, "--dry-run"], 1, "is hot already"),
        (["undo", MODEL, "--dry-run"], 1, "no demotion to be undone"),
        (["demote", "models/unknown", "--dry-run"], 1, "is not in the catalogue"),
    ],
)
def test_refusals_are_one_line_and_a_hint(site: Site, words: list[str], code: int, says: str) -> None:
    done = site.tierd(*words)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert site.value("SELECT count(*) FROM moves") == 0


def test_a_dry_run_changes_nothing(site: Site) -> None:
    done = site.tierd("demote", MODEL, "--dry-run")
    assert (done.returncode, done.stdout) == (0, f"would demote {MODEL}, 19.5 KiB\n")
    assert json.loads(site.tierd("demote", MODEL, "--dry-run", "--json").stdout)["kind"] == "demote"
    assert site.value("SELECT count(*) FROM move_wishes") == 0
    assert site.tierd("demote", MODEL, grace=3600).returncode == 0
    assert site.tierd("promote", MODEL, "--dry-run").stdout == f"would undo {MODEL}, 19.5 KiB\n"
    assert tier(site) == "cold"


def test_a_model_that_is_open_somewhere_is_refused(site: Site) -> None:
    site.ask("INSERT INTO nodes (node_id, boot, leases_at) VALUES ('gpu-1', gen_random_uuid(), now())")
    site.ask("INSERT INTO node_leases (node_id, model_id) VALUES ('gpu-1', $1)", MODEL)
    for words in (["--dry-run"], []):
        done = site.tierd("demote", MODEL, *words, nodes_report=True)
        assert done.returncode == 1
        assert "is open on 'gpu-1'" in done.stderr
    assert tier(site) == "hot"


def test_whoever_gives_up_before_anybody_heard_has_asked_for_nothing(site: Site) -> None:
    """Another one leads, and hears nothing; this one has no source."""
    config = site.config(source=None)

    async def main() -> None:
        async with connected(site.dsn) as session:
            await begin_epoch(session, "deaf")
            command = [*HEEDS_CTRL_C, sys.executable, "-m", "tierd", "demote", MODEL]
            env = environment({"TIERDCTL_CONFIG": str(config)})
            with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:  # noqa: ASYNC220
                query = "SELECT count(*) FROM move_wishes"
                while not await session.fetchval(query):
                    pass
                os.kill(process.pid, signal.SIGINT)
                assert process.wait(30) == 130

    run(main())
    assert site.value("SELECT state FROM move_wishes") == "withdrawn"


def test_an_answer_is_the_leaders(site: Site) -> None:
    """One that leads no longer answers nothing; one that answers again answers with the same move."""

    class Moves:
        asked = 0

        async def demote(self, model_id: str, reason: str, *, by_hand: bool = False) -> int:
            raise DatabaseError("is not reached")

        promote = demote

        async def undo(self, model_id: str, reason: str = "") -> int:
            raise UsageError("no", hint="never")

        async def adopt(self, model_id: str, prefix: str, reason: str) -> int:
            raise DatabaseError("is not reached")

    async def main() -> None:
        async with connected(site.dsn) as session, Database(_settings(site)) as database:
            epoch = await begin_epoch(session, "test")
            wish = await move_wishes.ask(session, "undo", MODEL, "test")
            with pytest.raises(NotLeaderError):
                await Answers(database, Moves(), epoch - 1).round()
            assert (await move_wishes.look(session, wish)).state == "asked"
            await Answers(database, Moves(), epoch).round()
            found = await move_wishes.look(session, wish)
            assert (found.state, found.answer, found.hint) == ("refused", "no", "never")
            move = await session.fetchval("INSERT INTO moves (kind, subject) VALUES ('demote', $1) RETURNING id", MODEL)
            wish = await move_wishes.ask(session, "demote", MODEL, "test")
            await Answers(database, Moves(), epoch).round()
            assert (await move_wishes.look(session, wish)).move_id == move

    run(main())


def _settings(site: Site) -> ControllerSettings:

    return settings_for(site.dsn)
