"""Commands that steer the node tier: warm, pin, unpin, evict, plan, check. They ask the daemon and show its answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from tierd import client, console
from tierd.cli import jobs as cli_jobs
from tierd.cli.controller import Config, Postgres
from tierd.config import size_bytes
from tierd.console import AsJson, err, fetch, human_bytes, out, print_json, printable
from tierd.errors import DaemonError, UsageError

_POLL_SECONDS = 0.2
_Models = Annotated[list[str], typer.Argument(help="As `tierd models` names them, or the last parts of the name.")]
_On = Annotated[
    Path | None,
    typer.Option(
        "--mount", parser=console.path, help="Which mount; may be left out if there is only one.", show_default=False
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (warm, pin, unpin, evict, plan, check):
        app.command()(command)


def warm(
    models: _Models,
    mount: _On = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return once they are here, with a progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring whole MODELS to this node, before anybody opens them."""
    record = client.find(mount)
    told = client.post(record, "/v1/warm", {"models": models})
    if wait:
        names = urlencode([("model", row["model"]) for row in told["models"]], errors="surrogateescape")
        told = _watch(told, lambda: client.get(record, f"/v1/warm?{names}"), _bytes_of_models, _all_settled)
    if as_json:
        print_json(told)
    else:
        _print_rows(told["models"], "state", "bytes_done", "bytes_total", "reason")
    lacking = [row for row in told["models"] if row["state"] not in ("complete", "filling")]
    if lacking:
        row = lacking[0]
        raise DaemonError(
            f"{row['model']} is not on the node: {row['reason'] or row['state']}",
            hint="`tierd plan` shows what is kept and why; the log says what failed",
        )


def _watch(
    told: Any, ask: Callable[[], Any], amounts: Callable[[Any], tuple[int, int]], settled: Callable[[Any], bool]
) -> Any:
    """Ask again until it is settled, with a progress bar of bytes, rate and time left."""
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        while not settled(told):
            time.sleep(_POLL_SECONDS)
            told = ask()
            done, total = amounts(told)
            progress.update(task, completed=done, total=total)
    return told


def _bytes_of_models(told: Any) -> tuple[int, int]:
    rows = told["models"]
    return sum(row["bytes_done"] for row in rows), sum(row["bytes_total"] for row in rows)


def _all_settled(told: Any) -> bool:
    return all(row["state"] != "filling" for row in told["models"])


def pin(models: _Models, mount: _On = None, as_json: AsJson = False) -> None:
    """Keep MODELS on this node: they are fetched if missing, and never evicted."""
    _set_pins(models, mount, as_json, pinned=True)


def unpin(models: _Models, mount: _On = None, as_json: AsJson = False) -> None:
    """Take the pins of MODELS away."""
    _set_pins(models, mount, as_json, pinned=False)


def _set_pins(models: list[str], mount: Path | None, as_json: bool, *, pinned: bool) -> None:
    told = client.post(client.find(mount), "/v1/pin", {"models": models, "pinned": pinned})
    if as_json:
        print_json(told)
    else:
        _print_rows(told["models"], "pinned")


def evict(
    models: Annotated[list[str] | None, typer.Argument(help="Which; or give --until-free.", show_default=False)] = None,
    until_free: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Evict the least recently used until so much is free.")
    ] = None,
    mount: _On = None,
    as_json: AsJson = False,
) -> None:
    """Remove MODELS from this node; the source keeps them. What is open or pinned stays."""
    if bool(models) == (until_free is not None):
        raise UsageError("name models, or give --until-free SIZE", hint="`tierd evict --help` explains it")
    told = client.post(client.find(mount), "/v1/evict", _what_to_evict(models, until_free))
    if as_json:
        print_json(told)
    else:
        _print_rows(told["models"], "bytes", "kept")
    kept = [row for row in told["models"] if row["kept"]]
    if kept and models:
        raise DaemonError(
            f"{kept[0]['model']} stays: it is {kept[0]['kept']}",
            hint="`tierd unpin` it" if kept[0]["kept"] == "pinned" else "it can go once its last reader has closed it",
        )
    if until_free is not None and told["free_bytes"] < size_bytes(until_free):
        raise DaemonError(
            f"only {human_bytes(told['free_bytes'])} are free now",
            hint="the rest is open, pinned or foreign",
        )


def _what_to_evict(models: list[str] | None, until_free: str | None) -> dict[str, Any]:
    if until_free is None:
        return {"models": models}
    try:
        return {"until_free": size_bytes(until_free)}
    except ValueError as error:
        raise UsageError(f"--until-free: {error}", hint="for example 100GiB") from None


def plan(
    mount: _On = None,
    controller: Annotated[
        bool, typer.Option("--controller", help="Show what the controller would demote next, instead of this node.")
    ] = False,
    config: Config = None,
    postgres: Postgres = None,
    as_json: AsJson = False,
) -> None:
    """Show what prefetch and eviction would do now, each line with its reason. Changes nothing."""
    if controller:
        cli_jobs.plan(config, postgres, as_json=as_json)
        return
    if postgres:
        raise UsageError("--postgres is for the controller's plan", hint="add --controller")
    told = fetch(mount, "/v1/plan", "looking at models and disk")
    if as_json:
        print_json(told)
        return
    out.print(
        f"node tier {human_bytes(told['held_bytes'])} of {human_bytes(told['limit_bytes'])},"
        f" {human_bytes(told['free_bytes'])} free, {human_bytes(told['surplus_bytes'])} too many",
        highlight=False,
    )
    table = Table("what", "model", "size", "reason")
    for what, rows in (("evict", told["evict"]), ("keep", told["keep"])):
        for row in rows:
            table.add_row(what, Text(printable(row["model"])), human_bytes(row["bytes"]), row["reason"])
    for row in told["prefetch"]:
        what = "prefetch" if row["take"] else "leave"
        table.add_row(what, Text(printable(row["model"])), human_bytes(row["bytes"]), printable(row["reason"]))
    out.print(table)


def check(
    mount: _On = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare checksums.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch damaged files again; remove leftovers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the node tier. A damaged copy is dropped at once, so that no pod reads it; exit 1 if there was one."""
    record = client.find(mount)
    told = client.post(record, "/v1/check", {"deep": deep, "repair": repair})
    told = _watch(told, lambda: client.get(record, "/v1/check"), _bytes_of_check, lambda row: row["state"] != "running")
    if as_json:
        print_json(told)
    else:
        out.print(
            f"{told['files_total']} copies, {human_bytes(told['bytes_total'])}: {told['problems_total']} damaged,"
            f" {told['leftovers']} leftovers{' removed' if repair else ''}",
            highlight=False,
        )
        if told.get("files_open"):
            out.print(f"{told['files_open']} of open models were read from memory, as far as they are there")
        for row in told["problems"]:
            out.print(Text(f"{printable(row['path'])}: {printable(row['problem'])}"))
    if told["problems_total"]:
        done = "dropped and asked for again" if repair else "dropped: the next open reads the source"
        raise DaemonError(f"{told['problems_total']} damaged copies were {done}", hint="is the disk all right?")


def _bytes_of_check(told: Any) -> tuple[int, int]:
    return told["bytes_done"], told["bytes_total"]


def _print_rows(rows: list[dict[str, Any]], *keys: str) -> None:
    table = Table("model", *(key.replace("_", " ") for key in keys))
    for row in rows:
        cells = (human_bytes(row[key]) if "bytes" in key else printable(str(row[key])) for key in keys)
        table.add_row(Text(printable(row["model"])), *(Text(cell) for cell in cells))
    out.print(table)
