"""The controller archives and purges: by the schedule, on request, as a command, and on after it was killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.contexts.test_archive import FILL
from tests.controller.controllers import Site, running, until
from tests.controller.house import connected
from tests.servers import run
from tierd.controller.contexts import jobs as context_jobs
from tierd.controller.contexts.jobs import rules_of
from tierd.controller.contexts.purge import PurgeRules
from tierd.controller.jobs import runs as job_runs
from tierd.controller.jobs.names import ARCHIVE_OLD_CONTEXTS, PURGE_EXPIRED_CONTEXTS
from tierd.controller.jobs.registry import JOBS
from tierd.controller.jobs.run import run_next
from tierd.controller.leader import begin_epoch
from tierd.controller.settings import load
from tierd.controller.work import Work
from tierd.controller.workplace import Workplace
from tierd.errors import UsageError
from tierd.postgres import Connection

COUNTS = "SELECT (SELECT count(*) FROM user_contexts) warm, (SELECT count(*) FROM user_contexts_archive) archive"
PLACES = """
SELECT count(*), count(DISTINCT (a.user_id, a.conversation_id)) AS distinct, count(k.archived_at) AS keys
FROM user_contexts_archive a LEFT JOIN context_archive_keys k USING (user_id, conversation_id, archived_at)
"""
WAITS = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
NO_GRACE = {"contexts_grace": 0, "contexts_purge_share_max": 1.0}


@pytest.fixture
def site(tmp_path: Path, database: str) -> Site:
    return Site(tmp_path, database)


@asynccontextmanager
async def leading(site: Site, **more: Any) -> AsyncIterator[Work]:
    async with connected(site.dsn) as session:
        epoch = await begin_epoch(session, "test")
        async with Workplace(load(site.settings | more), {}).work(epoch) as work:
            yield work


def old_month(site: Site, rows: int) -> str:
    """A month that is long over, with so many conversations."""
    at: datetime = site.value("SELECT date_trunc('month', now() - interval '500 days') + interval '1 day'")
    site.ask("SELECT make_context_month($1)", at)
    site.ask(
        "WITH keys AS (INSERT INTO context_archive_keys SELECT 'u', 'old' || n, $1::timestamptz"
        " FROM generate_series(1, $2::int) n RETURNING *)"
        " INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at, archived_at)"
        " SELECT user_id, conversation_id, '[]', archived_at, archived_at FROM keys",
        at,
        rows,
    )
    return f"{at:%Y-%m}"


def endings(site: Site, job: str) -> list[str]:
    return [row["state"] for row in site.ask("SELECT state FROM job_runs WHERE job = $1 ORDER BY id", job)]


def ask(site: Site, job: str) -> None:
    site.ask("INSERT INTO job_runs (job, state, requested_by) VALUES ($1, 'requested', 'me')", job)


@contextmanager
def locked(site: Site, statement: str) -> Iterator[None]:
    """Somebody holds a lock for the length of a `with`."""
    loop = asyncio.new_event_loop()
    opened = connected(site.dsn)
    try:
        holder: Connection = loop.run_until_complete(opened.__aenter__())
        loop.run_until_complete(holder.execute(f"BEGIN; {statement}"))
        yield
        loop.run_until_complete(opened.__aexit__(None, None, None))
    finally:
        loop.close()


# --- the schedule ---


@pytest.mark.parametrize(
    ("job", "setting"), [(ARCHIVE_OLD_CONTEXTS, "archive_at"), (PURGE_EXPIRED_CONTEXTS, "purge_contexts_at")]
)
def test_both_run_daily_each_at_its_time(site: Site, job: str, setting: str) -> None:
    site.ask(FILL, 30)
    month = old_month(site, 7)
    site.ask("UPDATE tierd_migrations SET applied_at = now() - interval '5 days'")
    now: datetime = site.value("SELECT now()")
    due = f"{now.astimezone(UTC) - timedelta(minutes=1):%H:%M}"

    with running(site, **{setting: due}) as controller:
        until(lambda: endings(site, job) == ["done"], what=controller.text)
        _, told = controller.tell("/metrics")
    if job == ARCHIVE_OLD_CONTEXTS:
        assert site.ask(COUNTS) == [{"warm": 0, "archive": 37}]
        assert 'tierd_context_moves_total{move="archived"} 30.0' in told
    else:
        assert site.ask("SELECT month, state, rows FROM context_exports") == [
            {"month": month, "state": "verified", "rows": 7}
        ]
    assert site.value("SELECT requested_by FROM job_runs WHERE job = $1", job) == "schedule"


def test_by_default_the_one_runs_at_three_and_the_other_later() -> None:
    settings = load({"postgres": "postgresql://ann@db/books"})
    at = {name: JOBS[name].at(settings) for name in (ARCHIVE_OLD_CONTEXTS, PURGE_EXPIRED_CONTEXTS)}
    assert [f"{time:%H:%M}" for time in at.values() if time] == ["03:00", "04:00"]
    assert rules_of(settings) == PurgeRules(), "one default each"


# --- the command ---


def test_commands_archive_export_and_drop(site: Site) -> None:
    site.ask(FILL, 30)
    month = old_month(site, 7)
    assert site.tierd("job", ARCHIVE_OLD_CONTEXTS, "--dry-run").stdout == "would archive 30 conversations\n"
    assert site.ask(COUNTS) == [{"warm": 30, "archive": 7}]
    done = site.tierd("job", ARCHIVE_OLD_CONTEXTS, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["counts"] == {
        "due": 30, "moved": 30, "superseded": 0, "batches": 1, "failures": 0
    }  # fmt: skip

    dry = site.tierd("job", PURGE_EXPIRED_CONTEXTS, "--dry-run").stdout
    assert dry.startswith(f"{month}: export (over since")
    assert not (site.objects / "context-archive").exists()
    months = site.value("SELECT count(*) FROM pg_inherits WHERE inhparent = 'user_contexts_archive'::regclass")
    for told in ("1 exported", "1 dropped"):
        assert site.tierd("job", PURGE_EXPIRED_CONTEXTS, **NO_GRACE).stdout == f"of {months} months: {told}\n"
    assert site.ask(COUNTS) == [{"warm": 0, "archive": 30}]
    back = site.tierd("contexts", "restore", month, "--objects", str(site.objects), "--json")
    assert json.loads(back.stdout)["restored"] == 7


def test_what_the_settings_say_is_done(site: Site) -> None:
    site.ask(FILL, 30)
    old_month(site, 7)
    missing = site.tierd("job", ARCHIVE_OLD_CONTEXTS, contexts_tablespace="none")
    assert missing.returncode == 1
    assert 'tablespace "none" does not exist' in missing.stderr
    assert site.tierd("job", ARCHIVE_OLD_CONTEXTS, contexts_warm_days=100).returncode == 0
    assert site.ask(COUNTS) == [{"warm": 30, "archive": 7}]
    site.tierd("job", PURGE_EXPIRED_CONTEXTS, contexts_archive_days=1000)
    assert site.ask("SELECT FROM context_exports") == []
    refused = site.tierd("job", PURGE_EXPIRED_CONTEXTS, contexts_export=False, contexts_purge_share_max=0.05)
    assert (refused.returncode, site.ask(COUNTS)) == (1, [{"warm": 30, "archive": 7}])
    assert "of the archive in a run is more than 5%" in refused.stderr
    site.tierd("job", PURGE_EXPIRED_CONTEXTS, contexts_export=False, contexts_purge_share_max=1.0)
    assert site.ask(COUNTS) == [{"warm": 30, "archive": 0}]
    assert not (site.objects / "context-archive").exists(), "drop only"


@pytest.mark.parametrize("bucket", ["", "A", "../x"])
def test_a_bucket_that_cannot_be_is_refused(bucket: str) -> None:
    with pytest.raises(UsageError, match=r"contexts-bucket.* cannot be a bucket"):
        load({"postgres": "postgresql://ann@db/books", "contexts_bucket": bucket})


def test_progress_is_told_while_it_runs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_jobs, "_TELL_SECONDS", 0.01)
    site.ask(FILL, 1200)
    told = "SELECT count(*) FROM job_runs WHERE progress LIKE '% of 1200 conversations'"

    async def main() -> None:
        async with leading(site) as work, connected(site.dsn) as other:
            await job_runs.request(other, ARCHIVE_OLD_CONTEXTS, dry_run=False, by="me")
            async with other.transaction():
                await other.execute("LOCK TABLE context_archive_keys IN EXCLUSIVE MODE")
                task = asyncio.create_task(run_next(JOBS[ARCHIVE_OLD_CONTEXTS], work))
                await asyncio.to_thread(until, lambda: site.value(told))
            assert await task == "done"

    run(main())


# --- killed ---


def test_sigkill_in_the_middle_of_a_batch_loses_and_doubles_nothing(site: Site) -> None:
    site.ask(FILL, 1200)
    with running(site) as controller:
        controller.wait_for("leading")
        with locked(site, "LOCK TABLE context_archive_keys IN EXCLUSIVE MODE"):
            ask(site, ARCHIVE_OLD_CONTEXTS)
            until(lambda: site.ask(WAITS), what=controller.text)
            controller.kill()
    assert site.tierd("job", ARCHIVE_OLD_CONTEXTS).returncode == 0
    assert endings(site, ARCHIVE_OLD_CONTEXTS) == ["interrupted", "done"]
    assert site.ask(COUNTS) == [{"warm": 0, "archive": 1200}]
    assert site.ask(PLACES) == [{"count": 1200, "distinct": 1200, "keys": 1200}]


def test_sigkill_in_the_middle_of_a_drop_leaves_the_month_to_the_next_leader(site: Site) -> None:
    month = old_month(site, 7)
    site.tierd("job", PURGE_EXPIRED_CONTEXTS)
    with running(site, **NO_GRACE) as controller:
        controller.wait_for("leading")
        with locked(site, "SELECT FROM user_contexts_archive"):
            ask(site, PURGE_EXPIRED_CONTEXTS)
            until(lambda: site.ask(WAITS), what=controller.text)
            controller.kill()
            assert site.value("SELECT state FROM context_exports") == "verified"
    with running(site, **NO_GRACE) as other:
        other.wait_for("leading")
        ask(site, PURGE_EXPIRED_CONTEXTS)
        until(lambda: endings(site, PURGE_EXPIRED_CONTEXTS)[-1] == "done", what=other.text)
    assert endings(site, PURGE_EXPIRED_CONTEXTS) == ["done", "interrupted", "done"]
    assert site.ask(COUNTS) == [{"warm": 0, "archive": 0}]
    assert site.ask("SELECT month, state FROM context_exports") == [{"month": month, "state": "done"}]
