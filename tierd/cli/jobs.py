"""Commands of the controller's daily work: `tierd controller`, `tierd job`, `tierd catalogue`, the plan. They show it.

What they need is imported when they run: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from tierd import log
from tierd.cli.controller import Config, Postgres, settings_of
from tierd.console import AsJson, err, human_bytes, out, print_json, printable, say
from tierd.controller.jobs.names import JOB_HELP
from tierd.errors import DatabaseError

if TYPE_CHECKING:
    from tierd.controller.jobs.runs import Run
    from tierd.controller.models.candidates import Situation
    from tierd.controller.settings import ControllerSettings
    from tierd.postgres import Connection

_T = TypeVar("_T")
_Dry = Annotated[bool, typer.Option("--dry-run", help="Tell what it would do, and change nothing.")]
_Model = Annotated[str, typer.Argument(metavar="MODEL", help="As the catalogue names it, such as models/llama-7b.")]
_SETTINGS = (
    "Its settings are TIERDCTL_NAME in the environment, or `name: value` in a YAML file (--config);"
    " docs/OPERATIONS.md lists them."
)
_jobs = typer.Typer(
    help="Run a job of the controller once, or see how they went.\n\n"
    "Where a controller leads, it runs the job and this waits for the end; else this does it itself. " + _SETTINGS,
    no_args_is_help=True,
)
_catalogue = typer.Typer(
    help="Look at the controller's catalogue of models and nodes; pin models.\n\n" + _SETTINGS, no_args_is_help=True
)


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(controller)
    app.add_typer(_jobs, name="job")
    app.add_typer(_catalogue, name="catalogue")


def controller(config: Config = None, postgres: Postgres = None) -> None:
    """Move models between the hot and the cold tier until SIGTERM: the controller process.

    Start two if you like: one leads, the other takes over within seconds. It needs PostgreSQL (`tierd db migrate`
    first), the JuiceFS mount that the nodes use (source), an object store (objects), and the nodes' Redis (redis).

    Every day at cleanup_at it demotes models that nobody has read for unused_days; `tierd plan --controller` shows
    which, and `tierd job cleanup-unused-models --dry-run` tries it. /metrics, /healthz and /readyz are at metrics.

    Its settings are TIERDCTL_NAME in the environment, or `name: value` in a YAML file (--config).
    """
    from tierd.controller.main import Controller

    settings = settings_of(postgres, config)
    log.configure(settings.log_level, settings.log_format)

    async def run() -> None:
        await Controller(settings, os.environ).run()

    asyncio.run(run())


# --- jobs ---


@_jobs.command("list")
def list_runs(
    config: Config = None,
    postgres: Postgres = None,
    job: Annotated[str | None, typer.Option(help="Only this job.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many runs, the latest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the latest runs of jobs: by the schedule, and those that were asked for."""
    from tierd.controller.jobs import runs as job_runs

    runs = with_connection(settings_of(postgres, config), lambda c: job_runs.latest(c, limit, job))
    if as_json:
        print_json([_told_run(run) for run in runs])
        return
    table = Table("run", "job", "by", "began", "ended", "state", "result")
    for run in runs:
        name = f"{run.job} (dry run)" if run.dry_run else run.job
        cells = (name, run.requested_by, _at(run.started_at), _at(run.finished_at), run.state)
        table.add_row(str(run.id), *(Text(printable(cell)) for cell in (*cells, run.result or run.progress)))
    out.print(table)


def _add_job(name: str, text: str) -> None:
    @_jobs.command(name, help=text)
    def run_job(
        config: Config = None, postgres: Postgres = None, dry_run: _Dry = False, as_json: AsJson = False
    ) -> None:
        _run_job(name, settings_of(postgres, config), dry_run=dry_run, as_json=as_json)


for _name, _text in JOB_HELP.items():
    _add_job(_name, f"{_text}\n\nExit 1 if it was refused, failed or was cut off; the last line says why.")


def _run_job(name: str, settings: ControllerSettings, *, dry_run: bool, as_json: bool) -> None:
    from tierd.controller.jobs.oneshot import run_job
    from tierd.controller.jobs.registry import JOBS

    log.configure("warning", settings.log_format)
    with err.status(name) as status:

        def tell(run: Run) -> None:
            status.update(f"{name}: {printable(run.progress) or run.state}")

        run = asyncio.run(run_job(settings, os.environ, JOBS[name], dry_run=dry_run, tell=tell))
    if as_json:
        print_json(_told_run(run))
    elif run.state == "done":
        say(out, run.result)
    if run.state != "done":
        raise DatabaseError(f"{name} {run.state}: {run.result}", hint="`tierd job list` shows all runs")


def _told_run(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "job": run.job,
        "dry_run": run.dry_run,
        "state": run.state,
        "by": run.requested_by,
        "due_at": _iso(run.due_at),
        "requested_at": _iso(run.requested_at),
        "started_at": _iso(run.started_at),
        "finished_at": _iso(run.finished_at),
        "progress": run.progress,
        "result": run.result,
        "counts": dict(run.counts),
    }


# --- the catalogue ---


@_catalogue.command("list")
def list_models(
    config: Config = None,
    postgres: Postgres = None,
    tier: Annotated[Literal["hot", "cold"] | None, typer.Option(help="Only models of this tier.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that the controller knows: tier, size, last access, pins, moves."""
    from tierd.controller.models import catalogue

    rows = with_connection(settings_of(postgres, config), lambda c: catalogue.rows(c, tier))
    if as_json:
        times = ("last_access", "created_at", "vanished_at")
        print_json([dict(row) | {key: _iso(row[key]) for key in times} for row in rows])
        return
    table = Table("model", "tier", "size", "files", "last access", "")
    for row in rows:
        marks = ["pinned"] if row["pinned"] else []
        marks += [f"{row['move']}: {row['move_state']}"] if row["move"] else []
        marks += [f"not in the source since {_at(row['vanished_at'])}"] if row["vanished_at"] else []
        files = "" if row["files"] is None else str(row["files"])
        cells = (row["tier"], human_bytes(row["size_bytes"]), files, _at(row["last_access"]), ", ".join(marks))
        table.add_row(Text(printable(row["model_id"])), *cells)
    out.print(table)


@_catalogue.command("pin")
def pin_model(model: _Model, config: Config = None, postgres: Postgres = None) -> None:
    """Keep MODEL in the hot tier: the controller never demotes it by itself. (`tierd pin` keeps it on one node.)"""
    _set_pinned(settings_of(postgres, config), model, pinned=True)


@_catalogue.command("unpin")
def unpin_model(model: _Model, config: Config = None, postgres: Postgres = None) -> None:
    """Take the pin of MODEL away."""
    _set_pinned(settings_of(postgres, config), model, pinned=False)


def _set_pinned(settings: ControllerSettings, model: str, *, pinned: bool) -> None:
    from tierd.controller.models import catalogue

    with_connection(settings, lambda c: catalogue.set_pinned(c, model, pinned=pinned))


@_catalogue.command("nodes")
def list_nodes(config: Config = None, postgres: Postgres = None, as_json: AsJson = False) -> None:
    """List the registered nodes, and whether each reports what is open there; nothing is demoted while one does not."""
    from tierd.controller import nodes

    settings = settings_of(postgres, config)
    reports = with_connection(settings, lambda c: nodes.reports(c, settings.lease_report_max_age))
    if as_json:
        print_json([report._asdict() | {"last_seen": _iso(report.last_seen)} for report in reports])
        return
    table = Table("node", "version", "last seen", "open models", "reports")
    for report in reports:
        cells = (report.version, _at(report.last_seen), str(report.leases), "yes" if report.fresh else "NO")
        table.add_row(Text(printable(report.node_id)), *(Text(printable(cell)) for cell in cells))
    out.print(table)


@_catalogue.command("forget-node")
def forget_node(
    node: Annotated[str, typer.Argument(metavar="NODE", help="As `tierd catalogue nodes` names it.")],
    config: Config = None,
    postgres: Postgres = None,
) -> None:
    """Take NODE off the list: it is gone for good, and nothing waits for its reports. One that reports comes back."""
    from tierd.controller import nodes

    settings = settings_of(postgres, config)

    async def forget(connection: Connection) -> None:
        async with connection.transaction():
            await nodes.forget(connection, node, settings.lease_report_max_age)

    with_connection(settings, forget)


# --- the plan ---


def plan(config: Path | None, postgres: str | None, *, as_json: bool) -> None:
    """What the next cleanup would demote, and what spares the others. Changes nothing."""
    from tierd.controller.models import candidates

    settings = settings_of(postgres, config)
    situation = with_connection(settings, partial(candidates.look, settings=settings))
    if as_json:
        print_json(_told_plan(situation))
        return
    going = situation.going
    size = sum(verdict.model.size_bytes for verdict in going)
    say(out, f"{len(going)} of {len(situation.verdicts)} hot models would be demoted, {human_bytes(size)}")
    if situation.refusal:
        say(out, f"but nothing is demoted now: {situation.refusal}")
    table = Table("what", "model", "size", "reason")
    for verdict in situation.verdicts:
        what = "demote" if verdict.demote else "keep"
        cells = (verdict.model.model_id, human_bytes(verdict.model.size_bytes), verdict.reason)
        table.add_row(what, *(Text(printable(cell)) for cell in cells))
    out.print(table)
    say(out, _INVISIBLE, "note: ")


_INVISIBLE = (
    "who reads a model beside the overlay (from the JuiceFS mount itself) is not seen; pin what is used so:"
    " `tierd catalogue pin`"
)


def _told_plan(situation: Situation) -> dict[str, Any]:
    return {
        "refusal": situation.refusal,
        "hot_bytes": situation.hot_bytes,
        "demoted_today": situation.spent.models,
        "demoted_today_bytes": situation.spent.size_bytes,
        "nodes": [{"node": one.node_id, "reports": one.fresh, "age_s": one.age_s} for one in situation.nodes],
        "models": [
            {
                "model": verdict.model.model_id,
                "demote": verdict.demote,
                "reason": verdict.reason,
                "size_bytes": verdict.model.size_bytes,
                "unused_s": verdict.model.unused_s,
            }
            for verdict in situation.verdicts
        ],
    }


# --- ---


def with_connection(settings: ControllerSettings, ask: Callable[[Connection], Coroutine[Any, Any, _T]]) -> _T:
    """Ask the database, if it is of this version."""

    async def main() -> _T:
        from tierd import postgres
        from tierd.controller import migrate

        async with postgres.connected(settings) as connection:
            await migrate.require_current(connection)
            return await ask(connection)

    return asyncio.run(main())


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None


def _at(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S %Z}" if at is not None else ""
