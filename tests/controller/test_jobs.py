"""Jobs run once: by the schedule, on request, over all controllers, and what is cut off is said to be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.controller.controllers import Site
from tests.controller.house import connected
from tests.servers import run
from tierd.controller.jobs import runs as job_runs
from tierd.controller.jobs.names import JOB_HELP
from tierd.controller.jobs.registry import JOBS
from tierd.controller.jobs.run import Context, Job, Outcome, run_next
from tierd.controller.leader import NotLeaderError, begin_epoch
from tierd.controller.settings import load
from tierd.controller.work import Work
from tierd.controller.workplace import Workplace
from tierd.errors import UsageError

DONE = Outcome("done", "all of it", {"things": 3})


@pytest.fixture
def site(tmp_path: Path, schema: str) -> Site:
    return Site(tmp_path, schema)


@asynccontextmanager
async def leading(site: Site, **more: Any) -> AsyncIterator[Work]:
    """Lead, in this process."""
    async with connected(site.dsn) as session:
        epoch = await begin_epoch(session, "test")
        async with Workplace(load(site.settings | more), {}).work(epoch) as work:
            yield work


def job(do: Callable[[Context], Awaitable[Outcome]] | None = None, at: time | None = None) -> Job:
    async def nothing(_: Context) -> Outcome:
        return DONE

    return Job("test-job", lambda _: at, do or nothing)


async def ask(work: Work, *, dry_run: bool = False) -> int:
    async with work.database.connection() as connection:
        return await job_runs.request(connection, "test-job", dry_run=dry_run, by="somebody")


def states(site: Site) -> list[str]:
    return [row["state"] for row in site.ask("SELECT state FROM job_runs ORDER BY id")]


def now_at(site: Site) -> time:
    """A time of day that was a minute ago by the database."""
    now: datetime = site.value("SELECT now()")
    return (now.astimezone(UTC) - timedelta(minutes=1)).time().replace(microsecond=0)


def test_every_job_has_help() -> None:
    assert JOBS.keys() == JOB_HELP.keys()


# --- the schedule ---


def installed(site: Site, days_ago: float) -> None:
    site.ask("UPDATE tierd_migrations SET applied_at = now() - make_interval(secs => $1)", days_ago * 86_400)


def test_a_run_that_is_due_is_run_once_over_all_leaders(site: Site) -> None:
    installed(site, days_ago=5)
    due = job(at=now_at(site))

    async def main() -> None:
        async with leading(site) as work:
            assert await run_next(due, work) == "done"
            assert await run_next(due, work) is None
        async with leading(site) as work:
            assert await run_next(due, work) is None

    run(main())
    assert site.ask("SELECT state, requested_by, result, counts, epoch FROM job_runs") == [
        {"state": "done", "requested_by": "schedule", "result": "all of it", "counts": '{"things": 3}', "epoch": 1}
    ]


def test_runs_that_were_missed_are_made_up_for_once(site: Site) -> None:
    installed(site, days_ago=30)
    at = now_at(site)
    site.ask(
        "INSERT INTO job_runs (job, due_at, state, requested_by, started_at, finished_at, epoch)"
        " VALUES ('test-job', now() - interval '9 days', 'done', 'schedule', now(), now(), 1)"
    )

    async def main() -> list[str | None]:
        async with leading(site) as work:
            return [await run_next(job(at=at), work) for _ in range(3)]

    assert run(main()) == ["done", None, None]


def test_a_new_installation_makes_up_for_nothing(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            assert await run_next(job(at=now_at_of), work) is None

    installed(site, days_ago=0)
    now_at_of = now_at(site)
    run(main())
    assert states(site) == []


def test_a_job_without_a_time_never_runs_by_itself(site: Site) -> None:
    installed(site, days_ago=30)

    async def main() -> None:
        async with leading(site) as work:
            assert await run_next(job(at=None), work) is None
            assert await run_next(job(at=time(0)), work, scheduled=False) is None

    run(main())


# --- requests ---


def test_who_asks_for_the_same_waits_for_the_same_run(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            first, second, dry = await ask(work), await ask(work), await ask(work, dry_run=True)
            assert first == second != dry
            seen: list[bool] = []

            async def look(context: Context) -> Outcome:
                seen.append(context.dry_run)
                third = await ask(work)
                assert third not in (first, dry), "what runs already may have looked before"
                return DONE

            assert await run_next(job(look), work) == "done"
            assert await run_next(job(), work) == "done"
            assert seen == [False]

    run(main())


def test_only_the_leader_begins_a_run(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            await ask(work)
            site_epoch = work.epoch
            async with work.database.transaction() as connection:
                await connection.execute("UPDATE leader SET epoch = epoch + 1")
            with pytest.raises(NotLeaderError, match=f"epoch {site_epoch} is over"):
                await run_next(job(), work)

    run(main())
    assert states(site) == ["requested"]


def test_a_failing_job_says_so_in_one_line_and_a_defect_keeps_nobody_waiting(site: Site) -> None:
    async def refuse(_: Context) -> Outcome:
        raise UsageError("no such\nthing", hint="")

    async def break_down(_: Context) -> Outcome:
        raise KeyError("x")

    async def main() -> None:
        async with leading(site) as work:
            for do in (refuse, break_down):
                await ask(work)
                assert await run_next(job(do), work) == "failed"

    run(main())
    assert [row["result"] for row in site.ask("SELECT result FROM job_runs ORDER BY id")] == [
        "no such thing",
        "a defect of tierd: the controller's log has the traceback",
    ]


def test_progress_is_there_to_be_seen_while_it_runs(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            run_id = await ask(work)

            async def look(context: Context) -> Outcome:
                await context.tell("1 of 2")
                async with work.database.connection() as connection:
                    found = await job_runs.run_of(connection, run_id)
                assert found is not None
                assert (found.state, found.progress) == ("running", "1 of 2")
                return DONE

            assert await run_next(job(look), work) == "done"

    run(main())
    assert site.value("SELECT progress FROM job_runs") == ""


# --- cut off ---


def test_a_run_that_is_cancelled_is_interrupted(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            await ask(work)
            begun = asyncio.Event()

            async def wait(_: Context) -> Outcome:
                begun.set()
                await asyncio.Event().wait()
                return DONE

            task = asyncio.create_task(run_next(job(wait), work))
            await begun.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main())
    assert states(site) == ["interrupted"]


def test_a_run_of_a_leader_that_died_is_interrupted_by_the_next_and_not_repeated(site: Site) -> None:
    installed(site, days_ago=5)
    at = now_at(site)

    async def main() -> None:
        async with leading(site) as work, work.database.transaction() as connection:
            now, _, _ = await job_runs.last_due(connection, "test-job")
            due = datetime.combine(now.date(), at, UTC)
            due = due if due <= now else due - timedelta(days=1)
            assert await job_runs.begin_due(connection, "test-job", due, work.epoch)
        async with leading(site) as work:
            assert await run_next(job(at=at), work) is None

    run(main())
    assert states(site) == ["interrupted"]


def test_a_run_whose_end_could_not_be_told_does_not_seem_to_run_for_ever(site: Site) -> None:
    async def main() -> None:
        async with leading(site) as work:
            await ask(work)
            async with work.database.transaction() as connection:
                assert await job_runs.begin_requested(connection, "test-job", work.epoch)
            await ask(work)
            assert await run_next(job(), work) == "done"

    run(main())
    assert states(site) == ["interrupted", "done"]


# --- history ---


def test_history_is_bounded_and_keeps_the_last_run_of_each_schedule(site: Site) -> None:
    insert = (
        "INSERT INTO job_runs (job, due_at, state, requested_by, started_at, finished_at, epoch)"
        " SELECT $1, CASE WHEN $2 THEN now() - n * interval '1 day' END, 'done', 'x', now(), now(), 1"
        " FROM generate_series(1, $3::int) n"
    )
    site.ask(insert, "rare", True, 1)
    site.ask(insert, "often", False, 50)

    async def main() -> int:
        async with connected(site.dsn) as connection:
            return await job_runs.purge_runs(connection, keep=10)

    assert run(main()) == 40
    assert site.ask("SELECT job, count(*) FROM job_runs GROUP BY job ORDER BY job") == [
        {"job": "often", "count": 10},
        {"job": "rare", "count": 1},
    ]
