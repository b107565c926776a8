"""What only grows is purged, and the metrics tell how the tiers stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest

from tests.controller.controllers import Site
from tests.controller.test_jobs import leading
from tests.servers import run
from tierd.controller import housekeeping
from tierd.output_metrics import DELETION_STATES

BOOT = "6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f1{}"


@pytest.fixture
def site(tmp_path: Path, schema: str) -> Site:
    return Site(tmp_path, schema)


def test_indexes_that_no_node_has_any_more_are_forgotten_and_the_latest_never(site: Site) -> None:
    site.ask("INSERT INTO nodes (node_id, boot) VALUES ('gpu-1', $1)", BOOT.format(1))
    for number, days in ((1, 400), (2, 91), (3, 89)):
        site.ask(
            "INSERT INTO statistics_applied VALUES ('gpu-1', $1, 7, now() - make_interval(days => $2))",
            *(BOOT.format(number), days),
        )

    async def main() -> bool:
        async with leading(site) as work:
            return await housekeeping.purge(work)

    assert run(main())
    assert [str(row["boot"]) for row in site.ask("SELECT boot FROM statistics_applied ORDER BY boot")] == [
        BOOT.format(1),
        BOOT.format(3),
    ]
    assert not run(main()), "nothing is left to be purged"


def test_events_are_purged_by_count(site: Site) -> None:
    site.ask("INSERT INTO move_events (subject, event) SELECT 'm', 'e' FROM generate_series(1, 30)")

    async def main() -> None:
        async with leading(site, move_events_kept=10) as work:
            assert await housekeeping.purge(work)

    run(main())
    assert site.value("SELECT count(*) FROM move_events") == 10


def test_moves_that_are_late_or_fail_are_told(site: Site) -> None:
    rows = [("copying", 100, None, "the moon"), ("in_grace", 9_000, 5_000, None), ("in_grace", 9_000, -50, None)]
    for number, (state, age, left, error) in enumerate(rows):
        site.ask(
            "INSERT INTO moves (kind, subject, state, version, created_at, grace_until, error)"
            " VALUES ('demote', $1, $2, 1, now() - make_interval(secs => $3), now() + make_interval(secs => $4), $5)",
            *(f"models/{number}", state, age, left, error),
        )

    async def main() -> dict[str, float | None]:
        async with leading(site) as work:
            await housekeeping.tell_metrics(work)
            names = ("tierd_moves_oldest_seconds", "tierd_moves_failing")
            return {name: work.metrics.registry.get_sample_value(name) for name in names}

    found = run(main())
    assert found["tierd_moves_failing"] == 1
    oldest = found["tierd_moves_oldest_seconds"]
    assert oldest is not None
    assert 100 <= oldest < 200


def test_metrics_tell_how_the_tiers_stand(site: Site) -> None:
    site.ask("INSERT INTO nodes (node_id, boot) VALUES ('gpu-1', $1)", BOOT.format(1))
    site.ask(
        "INSERT INTO model_locations (model_id, tier, size_bytes, version)"
        " VALUES ('a', 'hot', 10, 0), ('b', 'cold', 20, 1), ('c', 'cold', 30, 1)"
    )
    site.ask("INSERT INTO moves (kind, subject, state) VALUES ('demote', 'a', 'copying')")

    async def main() -> str:
        async with leading(site) as work:
            await housekeeping.tell_metrics(work)
            return generate_latest(work.metrics.registry).decode()

    text = run(main())
    for line in (
        'tierd_models{tier="cold"} 2.0',
        'tierd_models_bytes{tier="cold"} 50.0',
        'tierd_models{tier="hot"} 1.0',
        'tierd_moves_unfinished{state="copying"} 1.0',
        "tierd_nodes_silent 1.0",
    ):
        assert line in text


def test_metrics_tell_of_outputs_that_are_being_deleted(site: Site) -> None:
    for number, state in enumerate(("planned", "hidden", "hidden", "deleted")):
        site.ask(
            "INSERT INTO output_erasures (id, user_id, date, epoch, state, asked_at)"
            " OVERRIDING SYSTEM VALUE VALUES ($1, 'u', '2026/01/12', 1, $2, now() - make_interval(secs => $3))",
            *(number + 1, state, 100 if state == "hidden" else 9000 if state == "deleted" else 50),
        )
        site.ask(
            "INSERT INTO output_tombstones (erasure_id, output_id, user_id, filename, version)"
            " SELECT $1, gen_random_uuid(), 'u', '2026/01/12/x', 1 FROM generate_series(1, 3)",
            number + 1,
        )

    async def main() -> dict[str, float | None]:
        async with leading(site) as work:
            await housekeeping.tell_metrics(work)
            value = work.metrics.registry.get_sample_value
            found = {state: value("tierd_output_deletions", {"state": state}) for state in DELETION_STATES}
            return found | {"oldest": value("tierd_output_oldest_deletion_seconds")}

    found = run(main())
    assert (found["planned"], found["hidden"], found["deleted"]) == (3, 6, 3)
    assert found["oldest"] is not None
    assert 100 <= found["oldest"] < 200, "what is deleted and only remembered is not late"
