"""cleanup-unused-models: what it refuses, what it demotes, what it stops at; over real moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.controller.controllers import Site
from tests.controller.house import connected, settings_for
from tests.controller.test_jobs import leading
from tests.servers import run
from tierd.controller import nodes
from tierd.controller.jobs.run import Context, Outcome
from tierd.controller.models import candidates
from tierd.controller.models.cleanup import cleanup_unused_models
from tierd.errors import DatabaseError, UsageError

BOOT = "6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11"


@pytest.fixture
def site(tmp_path: Path, schema: str) -> Site:
    return Site(tmp_path, schema, nodes_report=True, cleanup_share_max=1.0)


def cleanup(site: Site, *, dry_run: bool = False, break_moves: Sequence[str] = (), **more: Any) -> Outcome:
    """Run it, as the leader. Demotions of `break_moves` fail."""

    async def tell(_: str) -> None: ...

    async def main() -> Outcome:
        async with leading(site, **more) as work:
            plain = work.moves.demote

            async def demote(model_id: str, reason: str, **options: Any) -> int:
                if model_id in break_moves:
                    raise DatabaseError("the moon is in the way")
                return await plain(model_id, reason, **options)

            work.moves.demote = demote  # type: ignore[method-assign]
            return await cleanup_unused_models(Context(work, dry_run, tell))

    return run(main())


def report(site: Site, node: str = "gpu-1", age_s: float | None = 0, leases: Sequence[str] = ()) -> None:
    """A node said so many seconds ago what is open there."""
    site.ask(
        "INSERT INTO nodes (node_id, boot, leases_at) VALUES ($1, $2, now() - make_interval(secs => $3))"
        " ON CONFLICT (node_id) DO UPDATE SET leases_at = excluded.leases_at",
        *(node, BOOT, age_s),
    )
    for model in leases:
        site.ask("INSERT INTO node_leases (node_id, model_id) VALUES ($1, $2)", node, model)


def old_models(site: Site, *names: str, days: int = 40) -> None:
    for name in names:
        site.model(f"models/{name}", size=1000, files=1)
    cleanup(site, dry_run=False, nodes_report=False, cleanup_models_max=1)  # registers them
    site.grow_old(days)


def tiers(site: Site) -> dict[str, str]:
    rows = site.ask("SELECT model_id, tier FROM model_locations ORDER BY model_id")
    return {row["model_id"].removeprefix("models/"): row["tier"] for row in rows}


def test_old_models_go_and_young_ones_stay(site: Site) -> None:
    report(site)
    old_models(site, "a", "b")
    site.ask("UPDATE model_locations SET last_access = now() - interval '29 days' WHERE model_id = 'models/b'")
    outcome = cleanup(site)
    assert (outcome.state, outcome.result) == ("done", "demoted 1 of 1 candidates")
    assert tiers(site) == {"a": "cold", "b": "hot"}
    move = site.ask("SELECT kind, state, reason, by_hand FROM moves")
    assert move == [
        {"kind": "demote", "state": "in_grace", "reason": "not read for 40 days, unused_days is 30", "by_hand": False}
    ]
    assert cleanup(site).result == "demoted 0 of 0 candidates"


def test_a_dry_run_moves_nothing(site: Site) -> None:
    report(site)
    old_models(site, "a")
    outcome = cleanup(site, dry_run=True)
    assert (outcome.state, outcome.result) == ("done", "would demote 1 of 1 hot models")
    assert tiers(site) == {"a": "hot"}
    assert site.ask("SELECT * FROM moves") == []


def test_what_was_demoted_in_the_last_day_counts(site: Site) -> None:
    report(site)
    old_models(site, "a", "b", "c")
    assert cleanup(site, cleanup_models_max=2).counts["demoted"] == 2
    assert cleanup(site, cleanup_models_max=2).counts["demoted"] == 0
    site.ask("UPDATE moves SET created_at = now() - interval '21 hours'")
    assert cleanup(site, cleanup_models_max=2).counts["demoted"] == 1


@pytest.mark.parametrize(
    ("ages", "says"),
    [
        ({}, "no node has ever reported what is open there"),
        ({"gpu-1": 0, "gpu-2": 301}, "nobody knows what is open on gpu-2 (last report 30"),
        ({"gpu-2": None}, "nobody knows what is open on gpu-2 (never reported)"),
        ({f"gpu-{n}": 1e9 for n in range(7)}, "gpu-4 (last report days ago or doubtful) and 2 others"),
    ],
)
def test_nothing_is_demoted_while_a_node_is_silent(site: Site, ages: dict[str, float | None], says: str) -> None:
    for node, age_s in ages.items():
        report(site, node, age_s)
    old_models(site, "a")
    outcome = cleanup(site)
    assert outcome.state == "refused"
    assert says in outcome.result
    assert tiers(site) == {"a": "hot"}


def test_a_node_that_is_gone_holds_nothing_up_once_it_is_forgotten(site: Site) -> None:
    report(site)
    report(site, "dead", 10_000, leases=["models/a"])
    old_models(site, "a")

    def forget(node: str) -> None:
        async def main() -> None:
            async with connected(site.dsn) as connection, connection.transaction():
                await nodes.forget(connection, node, 300)

        run(main())

    with pytest.raises(UsageError, match="reports what is open"):
        forget("gpu-1")
    with pytest.raises(UsageError, match="no node none is registered"):
        forget("none")
    forget("dead")
    assert cleanup(site).counts["demoted"] == 1


@pytest.mark.parametrize("lease", ["models/a", "models/a/part", "models"])
def test_what_is_open_or_within_something_open_stays(site: Site, lease: str) -> None:
    report(site, leases=[lease])
    old_models(site, "a")
    assert cleanup(site).counts["candidates"] == 0
    assert tiers(site) == {"a": "hot"}


def test_clocks_that_disagree_are_not_trusted(site: Site) -> None:
    report(site)
    old_models(site, "a")

    async def main() -> candidates.Situation:
        async with connected(site.dsn) as connection:
            later = datetime.now(UTC) + timedelta(hours=2)
            return await candidates.look(connection, settings_for(site.dsn), now=later)

    assert run(main()).refusal == "the clocks of the database and of this machine are 2.0 hours apart"


def test_a_source_that_is_not_mounted_stops_it(site: Site) -> None:
    report(site)
    old_models(site, "a")
    (site.source / "models").rename(site.source / "away")
    outcome = cleanup(site)
    assert outcome.state == "refused"
    assert "is it mounted?" in outcome.result


def test_it_stops_when_too_many_fail(site: Site) -> None:
    report(site)
    names = [f"m{number}" for number in range(8)]
    old_models(site, *names)
    broken = [f"models/{name}" for name in names]
    outcome = cleanup(site, break_moves=broken)
    assert outcome.state == "failed"
    assert outcome.counts["failed"] == 3
    assert outcome.result == ("stopped: 3 of 3 demotions failed, the last one of models/m2: the moon is in the way")
    assert set(tiers(site).values()) == {"hot"}


def test_one_that_fails_does_not_spare_the_others(site: Site) -> None:
    report(site)
    old_models(site, "a", "b", "c")
    outcome = cleanup(site, break_moves=["models/a"])
    assert outcome.state == "failed"
    assert {name: outcome.counts[name] for name in ("demoted", "failed")} == {"demoted": 2, "failed": 1}
    assert tiers(site) == {"a": "hot", "b": "cold", "c": "cold"}


def test_a_model_that_cannot_be_moved_is_spared_and_no_error(site: Site) -> None:
    report(site)
    old_models(site, "a")
    (site.source / "models/a/fifo").touch()
    (site.source / "outside").mkdir()
    (site.source / "outside/link").hardlink_to(site.source / "models/a/part-0.safetensors")
    outcome = cleanup(site)
    assert (outcome.state, outcome.counts["spared"]) == ("done", 1)
    assert tiers(site) == {"a": "hot"}


# --- the plan ---


def test_the_plan_tells_what_would_go_and_why_not(site: Site) -> None:
    report(site, leases=["models/c"])
    old_models(site, "a", "b", "c")
    assert site.tierd("catalogue", "pin", "models/b").returncode == 0
    told = json.loads(site.tierd("plan", "--controller", "--json").stdout)
    assert told["refusal"] == ""
    assert {row["model"]: (row["demote"], row["reason"]) for row in told["models"]} == {
        "models/a": (True, "not read for 40 days, unused_days is 30"),
        "models/b": (False, "pinned"),
        "models/c": (False, "open on gpu-1"),
    }
    report(site, age_s=1000)
    done = site.tierd("plan", "--controller")
    assert done.returncode == 0
    assert "1 of 3 hot models would be demoted, 1000 B" in done.stdout
    assert "but nothing is demoted now: nobody knows what is open on gpu-1" in done.stdout
    assert "beside the overlay" in done.stdout
    assert tiers(site) == {"a": "hot", "b": "hot", "c": "hot"}


def test_commands_show_models_nodes_and_runs(site: Site) -> None:
    report(site, leases=["models/a"])
    old_models(site, "a", "b")
    assert site.tierd("job", "scan-catalogue").stdout == "2 models, registered 0, 0 are no longer there\n"
    assert [row["model_id"] for row in json.loads(site.tierd("catalogue", "list", "--json").stdout)] == [
        "models/a",
        "models/b",
    ]
    assert json.loads(site.tierd("catalogue", "list", "--tier", "cold", "--json").stdout) == []
    assert json.loads(site.tierd("catalogue", "nodes", "--json").stdout)[0]["leases"] == 1
    runs = json.loads(site.tierd("job", "list", "--json").stdout)
    assert [(row["job"], row["state"]) for row in runs] == [("scan-catalogue", "done")]
    for words in (["catalogue", "list"], ["catalogue", "nodes"], ["job", "list"]):
        assert site.tierd(*words).returncode == 0
    done = site.tierd("catalogue", "pin", "models/none")
    assert (done.returncode, "hint: " in done.stderr) == (2, True)


def test_a_job_that_is_refused_exits_with_one_line(site: Site) -> None:
    old_models(site, "a")
    done = site.tierd("job", "cleanup-unused-models")
    assert done.returncode == 1
    said, hint = done.stderr.splitlines()[-2:]
    assert said.startswith("tierd: cleanup-unused-models refused: nothing was demoted: no node has ever reported")
    assert hint.startswith("hint: ")
    assert "Traceback" not in done.stderr
