"""Controllers as real processes: one leads, another takes over, whatever ends them leaves everything resumable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.controller.controllers import Site, running, until


@pytest.fixture
def site(tmp_path: Path, database: str) -> Site:
    return Site(tmp_path, database)


def test_it_leads_tells_how_it_is_and_ends_when_asked(site: Site) -> None:
    with running(site) as controller:
        assert controller.wait_for("leading")["epoch"] == 1
        assert controller.tell("/healthz") == (200, "ok\n")
        assert controller.tell("/readyz") == (200, "ok\n")
        status, text = controller.tell("/metrics")
        assert status == 200
        assert "tierd_controller_leading 1.0" in text
        assert controller.end() == 0
        assert [line["event"] for line in controller.log()][-2:] == ["stopping", "stopped"]


def test_one_leads_and_the_other_takes_over(site: Site) -> None:
    with running(site) as first:
        first.wait_for("leading")
        with running(site) as second:
            second.wait_for("standby")
            assert second.tell("/readyz")[0] == 200
            assert "tierd_controller_leading 0.0" in second.tell("/metrics")[1]
            first.kill()
            assert second.wait_for("leading", seconds=10)["epoch"] == 2
            assert not second.log("leadership_lost")


def test_a_leader_whose_session_ends_stops_and_begins_anew(site: Site) -> None:
    with running(site) as controller:
        controller.wait_for("leading")
        site.ask("SELECT pg_terminate_backend(backend_pid) FROM leader")
        controller.wait_for("leadership_lost")
        assert controller.wait_for("leading", count=2)["epoch"] == 2
        assert controller.end() == 0


def test_a_database_without_tables_is_refused(site: Site) -> None:
    site.ask("DELETE FROM tierd_migrations WHERE version = (SELECT max(version) FROM tierd_migrations)")
    done = site.tierd("controller")
    assert done.returncode == 1
    assert "tierd: the database lacks migration" in done.stderr
    assert "hint: run `tierd db migrate`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"source": "/nowhere"}, "source /nowhere is no directory"),
        ({"objects": None}, "no object store is named"),
        ({"source": None}, "no source is named"),
        ({"objects": {"directory": "/nowhere"}}, "object directory /nowhere is not there"),
        ({"metrics": "192.0.2.1:1"}, "cannot serve metrics on 192.0.2.1:1"),
        ({"time_zone": "Mars/Olympus"}, "must be a time zone"),
        ({"cleanup_at": "25:00"}, "must be a time of day"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(site: Site, more: dict[str, object], says: str) -> None:
    done = site.tierd("controller", **more)
    assert done.returncode == 2
    assert says in done.stderr
    assert "hint: " in done.stderr


def test_a_model_that_nobody_reads_is_demoted_and_a_killed_leader_changes_nothing_of_that(site: Site) -> None:
    site.model("models/llama-7b")
    site.model("models/org/mistral")
    assert site.tierd("job", "scan-catalogue").returncode == 0
    site.grow_old()
    with running(site) as first, running(site) as second:
        until(lambda: first.log("leading") or second.log("leading"))
        leader, other = (first, second) if first.log("leading") else (second, first)
        assert site.tierd("catalogue", "pin", "models/org/mistral").returncode == 0
        done = site.tierd("job", "cleanup-unused-models")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "demoted 1 of 1 candidates\n"
        leader.wait_for("job_ended")
        leader.kill()
        other.wait_for("leading")
        rows = site.ask("SELECT model_id, tier, size_bytes FROM model_locations ORDER BY model_id")
        assert rows == [
            {"model_id": "models/llama-7b", "tier": "cold", "size_bytes": 20_000},
            {"model_id": "models/org/mistral", "tier": "hot", "size_bytes": 20_000},
        ]
