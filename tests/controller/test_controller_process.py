"""Controllers as real processes: one leads, another takes over, whatever ends them leaves everything resumable."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory
from tests.controller.controllers import Controller, Site, running, until
from tests.controller.house import HEEDS_CTRL_C, environment
from tests.faulty import FaultySource


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


# --- in the middle of a move ---


def slow(site: Site, bandwidth: int = 1 << 20) -> dict[str, object]:
    """An object store that takes half a minute for the models of this test."""
    return {"objects": {"directory": str(site.objects), "bandwidth": bandwidth}}


@pytest.fixture
def moving(site: Site) -> Iterator[Controller]:
    """A controller that is copying a model, for a job that somebody asked for."""
    site.model("models/llama-7b", size=16 << 20)
    assert site.tierd("job", "scan-catalogue").returncode == 0
    site.grow_old()
    with running(site, **slow(site)) as controller:
        controller.wait_for("leading")
        site.ask("INSERT INTO job_runs (job, state, requested_by) VALUES ('cleanup-unused-models', 'requested', 'me')")
        until(lambda: site.ask("SELECT FROM moves WHERE state = 'copying'"), what=controller.text)
        yield controller


def is_cold(site: Site) -> bool:
    return bool(site.ask("SELECT FROM model_locations WHERE tier = 'cold'"))


def runs_of(site: Site) -> list[str]:
    return [row["state"] for row in site.ask("SELECT state FROM job_runs WHERE job = 'cleanup-unused-models'")]


def test_sigterm_in_the_middle_of_a_move_leaves_it_resumable(site: Site, moving: Controller) -> None:
    assert moving.end() == 0
    assert moving.log()[-1]["event"] == "stopped"
    assert site.value("SELECT state FROM moves") == "copying"
    assert runs_of(site) == ["interrupted"]
    assert (site.source / "models/llama-7b/part-0.safetensors").stat().st_size == 16 << 20
    with running(site) as other:
        other.wait_for("leading")
        until(lambda: is_cold(site), what=other.text)
    assert site.value("SELECT count(*) FROM moves") == 1
    assert runs_of(site) == ["interrupted"], "it is not repeated: its move went on"


def test_sigkill_in_the_middle_of_a_move_leaves_it_resumable(site: Site, moving: Controller) -> None:
    with running(site) as other:
        other.wait_for("standby")
        moving.kill()
        other.wait_for("leading", seconds=10)
        until(lambda: is_cold(site), what=other.text)
        assert other.wait_for("job_interrupted")["job"] == "cleanup-unused-models"
    assert site.value("SELECT count(*) FROM moves") == 1


def test_a_leader_that_loses_its_session_in_the_middle_of_a_move_goes_on_after_it_leads_again(
    site: Site, moving: Controller
) -> None:
    site.ask("SELECT pg_terminate_backend(backend_pid) FROM leader")
    moving.wait_for("leadership_lost")
    assert moving.wait_for("leading", count=2)["epoch"] == site.value("SELECT epoch FROM leader")
    assert site.value("SELECT state FROM moves") == "copying"
    assert runs_of(site) == ["interrupted"]


def test_a_source_that_hangs_keeps_nobody_else_from_leading(site: Site, new_directory: DirectoryFactory) -> None:
    """A thread that waits for it cannot be ended, not even with its process."""
    with FaultySource(new_directory("faulty")) as faulty:
        (faulty.backing / "models/llama").mkdir(parents=True)
        (faulty.backing / "models/llama/a.safetensors").write_bytes(b"x")
        with running(site, source=str(faulty.mountpoint), shutdown_timeout=2) as hanging:
            try:
                hanging.wait_for("leading")
                with running(site, state_dir=str(site.directory / "other")) as other:
                    other.wait_for("standby")
                    faulty.stall("lookup", "getattr", path="models*")
                    site.ask(
                        "INSERT INTO job_runs (job, state, requested_by) VALUES ('scan-catalogue', 'requested', 'me')"
                    )
                    until(lambda: faulty.stalled("lookup") + faulty.stalled("getattr"), what=hanging.text)
                    hanging.process.terminate()
                    hanging.wait_for("stopped_in_the_middle")
                    other.wait_for("leading")
            finally:
                faulty.release()


# --- jobs by command ---


def test_a_command_without_a_source_has_the_leader_do_it(site: Site) -> None:
    site.model("models/llama-7b")
    with running(site) as controller:
        controller.wait_for("leading")
        done = site.tierd("job", "scan-catalogue", source=None)
        assert (done.returncode, done.stdout) == (0, "1 models, registered 1, 0 are no longer there\n")
        assert controller.log("job_ended")


def test_a_request_that_nobody_began_is_withdrawn_by_ctrl_c(site: Site) -> None:
    command = [*HEEDS_CTRL_C, sys.executable, "-m", "tierd", "job", "scan-catalogue"]
    command += ["--config", str(site.config(source=None))]
    with subprocess.Popen(command, env=environment({}), stderr=subprocess.DEVNULL) as process:
        until(lambda: site.ask("SELECT FROM job_runs WHERE state = 'requested'"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert site.value("SELECT state FROM job_runs") == "withdrawn"
