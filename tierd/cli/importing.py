"""The command `tierd import`: makes a cold model of objects that are in the bucket already. Asks, waits, and shows.

What it needs is imported when it runs: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tierd import log
from tierd.cli.controller import Config, Postgres, settings_of
from tierd.cli.moves import ask, failure_of, told
from tierd.console import AsJson, err, human_bytes, out, print_json, printable, say
from tierd.errors import UsageError

if TYPE_CHECKING:
    from tierd.controller.models.imports import Found
    from tierd.controller.settings import ControllerSettings


def add_commands(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command("import")(import_model)


def import_model(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Where its objects are in the bucket: PREFIX/PATH.")],
    as_model: Annotated[
        str | None,
        typer.Option("--as", metavar="MODEL", help="What it shall be called. [dim]Default: below the models root[/]"),
    ] = None,
    config: Config = None,
    postgres: Postgres = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be adopted and what is refused, and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a cold model of the objects below PREFIX in the bucket of cold models, which tierd did not write.

    Each object is read once, for its checksums, and is neither changed nor moved. Then the overlay shows its files. Hot
    files stay as they are. What can be no file is refused, and told why.

    Where a controller leads, it does so and this waits; else this does it itself. Exit 1 if it was not done.
    """
    settings = settings_of(postgres, config)
    log.configure("warning", settings.log_format)
    prefix = prefix.strip("/")
    model = as_model or _model_of(prefix, settings.models_root)
    if dry_run:
        _show(prefix, model, _look(prefix, settings), as_json=as_json)
        return
    asked = ask("import", model, settings, prefix)
    detail = (asked.move or {}).get("detail", {})
    refused: list[dict[str, str]] = detail.get("refused", [])
    if as_json:
        print_json(told(asked) | {"refused": refused, "refused_count": detail.get("refused_count", 0)})
    elif asked.succeeded:
        say(out, f"{model}: is cold, {human_bytes(asked.move['size_bytes'] if asked.move else 0)}")
        for one in refused:
            say(err, f"{one['key']}: {one['reason']}", "refused: ")
    if not asked.succeeded:
        raise failure_of("import", model, asked)


def _model_of(prefix: str, roots: tuple[str, ...]) -> str:
    """Where nodes look for models."""
    if any(root == "" or prefix.startswith(f"{root}/") for root in roots):
        return prefix
    return f"{roots[0]}/{prefix}"


def _look(prefix: str, settings: ControllerSettings) -> Found:
    from tierd.controller.models.imports import sort_out
    from tierd.objects.keys import validate_model_id
    from tierd.objects.settings import describe, open_store

    validate_model_id(prefix)
    if settings.objects is None:
        raise UsageError("no object store is named", hint="set objects to its URL or a directory")
    described = describe(settings.objects)
    store = open_store(described, os.environ)
    try:
        return sort_out(prefix, store.list(described.models_bucket, f"{prefix}/"))
    finally:
        store.close()


def _show(prefix: str, model: str, found: Found, *, as_json: bool) -> None:
    if as_json:
        print_json(_told_found(model, found))
        return
    table = Table("what", "object", "size", "why")
    for file in found.files:
        table.add_row("adopt", Text(printable(file.key)), human_bytes(file.size), "")
    for key, reason in found.refused:
        table.add_row("refuse", Text(printable(key)), "", Text(printable(reason)))
    out.print(table)
    ours = f", {found.ours} objects are tierd's own" if found.ours else ""
    size = human_bytes(found.size_bytes)
    say(out, f"would make {model} of {len(found.files)} objects, {size}; {found.refused_count} are refused{ours}")


def _told_found(model: str, found: Found) -> dict[str, Any]:
    return {
        "model": model,
        "files": [{"key": file.key, "size_bytes": file.size} for file in found.files],
        "size_bytes": found.size_bytes,
        "refused": [{"key": key, "reason": reason} for key, reason in found.refused],
        "refused_count": found.refused_count,
        "ours": found.ours,
    }
