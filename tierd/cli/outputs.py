"""Commands for generated outputs: `tierd outputs`. They show what the controller's books say, fetch a copy,
and have files put back.

What they need is imported when they run: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer
from rich.table import Table
from rich.text import Text

from tierd import log
from tierd.cli.controller import Config, Postgres, settings_of
from tierd.cli.jobs import with_connection
from tierd.cli.output_delete import delete_outputs
from tierd.console import AsJson, err, human_bytes, out, print_json, printable, say
from tierd.errors import DatabaseError, UsageError

if TYPE_CHECKING:
    from tierd.controller.jobs.runs import Run
    from tierd.controller.outputs.books import Standing
    from tierd.controller.outputs.deletion import UnderWay
    from tierd.controller.outputs.restore import Wish
    from tierd.controller.settings import ControllerSettings
    from tierd.postgres import Connection

_DAY = "%Y-%m-%d"
_Tier = Literal["hot", "cold", "unbacked", "vanished"]
_outputs = typer.Typer(
    help="Look at generated outputs: which there are, how they stand, what is left alone.\n\n"
    "Its settings are TIERDCTL_NAME in the environment, or `name: value` in a YAML file (--config);"
    " docs/OPERATIONS.md lists them.",
    no_args_is_help=True,
)


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module, and `delete`."""
    _outputs.command("delete")(delete_outputs)
    app.add_typer(_outputs, name="outputs")


@_outputs.command("list")
def list_outputs(
    config: Config = None,
    postgres: Postgres = None,
    user: Annotated[str | None, typer.Option(help="Only those of this user.")] = None,
    tier: Annotated[
        _Tier | None,
        typer.Option(help="Only these; unbacked: without a compared copy; vanished: not in the source."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the latest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the latest outputs: whose, of which kind and size, where their bytes are, how often they were read."""
    from tierd.controller.outputs import listing as output_list

    rows = with_connection(settings_of(postgres, config), lambda c: output_list.rows(c, user, tier, limit))
    if as_json:
        print_json([dict(row) | {key: _iso(row[key]) for key in _TIMES} for row in rows])
        return
    table = Table("output", "user", "file", "size", "where", "reads", "created")
    for row in rows:
        size = "" if row["size_bytes"] is None else human_bytes(row["size_bytes"])
        cells = (row["output_id"], row["user_id"], row["filename"], size, _where(row), str(row["access_count"]))
        table.add_row(*(Text(printable(cell)) for cell in (*cells, f"{row['created_at']:%Y-%m-%d %H:%M:%S %Z}")))
    out.print(table)


_TIMES = ("created_at", "last_accessed", "vanished_at")


def _where(row: Any) -> str:
    if row["vanished_at"] is not None:
        return "cold, not in the source" if row["cold_storage"] else "nowhere"
    found = [name for name in ("hot", "cold") if row[f"{name}_storage"]]
    return ", ".join(found) + (f" ({row['error']})" if row["error"] else "")


@_outputs.command("stats")
def show_stats(config: Config = None, postgres: Postgres = None, as_json: AsJson = False) -> None:
    """Count outputs and bytes by tier; name the files below the outputs root that are left alone, and why."""
    from tierd.controller.outputs import books as output_books
    from tierd.controller.outputs import deletion as output_deletion
    from tierd.controller.outputs import listing as output_list

    async def ask(connection: Connection) -> tuple[Standing, UnderWay, list[Any]]:
        found = await output_books.standing(connection), await output_deletion.under_way(connection)
        return *found, list(await output_list.faults(connection))

    standing, deletions, faults = with_connection(settings_of(postgres, config), ask)
    if as_json:
        tiers = {tier: {"outputs": count, "bytes": size} for tier, (count, size) in standing.tiers.items()}
        told = [fault | {"seen_at": _iso(fault["seen_at"])} for fault in faults]
        oldest = round(standing.oldest_unbacked_s, 3)
        deleting = deletions.outputs | {"oldest_s": round(deletions.oldest_s, 3)}
        found = {"tiers": tiers, "oldest_unbacked_s": oldest, "deletions": deleting}
        print_json(found | {"faults": standing.faults, "left_alone": told})
        return
    table = Table("tier", "outputs", "bytes")
    for tier, (count, size) in standing.tiers.items():
        table.add_row(tier, str(count), human_bytes(size))
    out.print(table)
    if standing.oldest_unbacked_s:
        say(out, f"the oldest output without a compared copy is {standing.oldest_unbacked_s:.0f} s old")
    if any(deletions.outputs.values()) or deletions.oldest_s:
        say(out, "deletions: " + ", ".join(f"{count} {state}" for state, count in deletions.outputs.items()))
    if deletions.oldest_s:
        say(out, f"the oldest that has not deleted everything was asked for {deletions.oldest_s:.0f} s ago")
    if not faults:
        return
    left = Table("left alone", "why")
    for fault in faults:
        left.add_row(Text(printable(fault["path"])), Text(printable(fault["reason"])))
    out.print(left)


@_outputs.command("get")
def get_output(
    output: Annotated[UUID, typer.Argument(metavar="OUTPUT", help="Its UUID.")],
    file: Annotated[Path | None, typer.Argument(help="Where to; its own name in this directory by default.")] = None,
    config: Config = None,
    postgres: Postgres = None,
) -> None:
    """Fetch the backup of OUTPUT from the object store into a new FILE, and compare it. Needs objects."""
    from tierd.controller.outputs import listing as output_list
    from tierd.objects.settings import describe, open_store

    settings = settings_of(postgres, config)
    if settings.objects is None:
        raise UsageError("no object store is named", hint="set objects to its URL or a directory")
    described = describe(settings.objects)
    backup = with_connection(settings, lambda c: output_list.backup_of(c, output, settings.outputs_root_bytes))
    target = file if file is not None else Path(backup.name)
    store = open_store(described, os.environ)
    try:
        output_list.fetch(store, described.outputs_bucket, backup, target)
    finally:
        store.close()
    say(out, f"{target}: {human_bytes(backup.stored.size)}, SHA-256 {backup.stored.sha256}")


@_outputs.command("restore")
def restore_outputs(
    output: Annotated[list[UUID] | None, typer.Argument(metavar="[OUTPUT]...", help="Their UUIDs.")] = None,
    config: Config = None,
    postgres: Postgres = None,
    user: Annotated[str | None, typer.Option(help="Those of this user.")] = None,
    first: Annotated[datetime | None, typer.Option("--from", formats=[_DAY], help="Of this day and later.")] = None,
    last: Annotated[datetime | None, typer.Option("--to", formats=[_DAY], help="Of this day and earlier.")] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Read files that are there, too, and replace damaged ones.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it would do, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put outputs back into the hot tier from their backup, where the file was lost beside the overlay.

    A file that is there is never replaced, but with --damaged one that has other bytes although its time is that of
    the backup. What is cold is not lost, and what its user removed stays removed. Exit 1 if one could not be restored.
    """
    from tierd.controller.outputs.restore import Wish

    if not output and user is None and first is None and last is None:
        raise UsageError("which outputs?", hint="name UUIDs, or --user, --from, --to")
    first_day, last_day = (f"{day:%Y/%m/%d}" if day is not None else None for day in (first, last))
    wish = Wish(output or None, user, first_day, last_day, damaged, dry_run)
    counts, left_alone = asyncio.run(_restored(wish, settings_of(postgres, config)))
    if as_json:
        print_json({"dry_run": dry_run, "counts": counts, "left_alone": left_alone})
    else:
        told = [f"{count} {what}" for what, count in sorted(counts.items())]
        say(out, ("dry run: " if dry_run else "") + (", ".join(told) or "there are no such outputs"))
        for one in left_alone:
            say(out, printable(f"{one['output_id']}: {one['why']}" + (f": {one['reason']}" if one["reason"] else "")))
    if counts.get("failed"):
        raise DatabaseError(f"{counts['failed']} outputs were not restored", hint="the reasons are above; try again")


async def _restored(wish: Wish, settings: ControllerSettings) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Have it done by whoever leads, or here. Raises UsageError, DatabaseError."""
    from tierd import postgres
    from tierd.controller import migrate
    from tierd.controller.jobs.names import RESTORE_OUTPUTS
    from tierd.controller.jobs.oneshot import run_job
    from tierd.controller.jobs.registry import JOBS
    from tierd.controller.outputs import restore as output_restore
    from tierd.controller.workplace import holder

    log.configure("warning", settings.log_format)
    async with postgres.connected(settings) as connection:
        await migrate.require_current(connection)
        number = await output_restore.ask(connection, wish, holder())
        try:
            with err.status("restore") as status:

                def tell(run: Run) -> None:
                    status.update(f"restore: {printable(run.progress) or run.state}")

                run = await run_job(settings, os.environ, JOBS[RESTORE_OUTPUTS], dry_run=False, tell=tell)
            answer = await output_restore.answer_to(connection, number)
        finally:
            await output_restore.withdraw(connection, number)
    if answer is None:
        raise DatabaseError(f"{RESTORE_OUTPUTS} {run.state}: {run.result}", hint="`tierd job list` shows all runs")
    return answer


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
