"""Commands about chat contexts: `tierd contexts`. They show what happened and decide nothing.

What they need is imported when they run: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tierd.cli.controller import Config, Postgres, settings_of
from tierd.console import AsJson, out, print_json, say
from tierd.errors import UsageError

if TYPE_CHECKING:
    from tierd.controller.contexts.restore import Restored
    from tierd.controller.contexts.stats import ContextStats
    from tierd.controller.settings import ControllerSettings

_Objects = Annotated[
    str,
    typer.Option(help="Where exports are: an S3 endpoint (keys from AWS_ACCESS_KEY_ID and the like) or a directory."),
]
_Bucket = Annotated[str, typer.Option(help="The bucket of the exports.")]
_contexts = typer.Typer(help="Look after chat contexts in PostgreSQL and its archive.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.add_typer(_contexts, name="contexts")


@_contexts.command()
def stats(config: Config = None, postgres: Postgres = None, as_json: AsJson = False) -> None:
    """Show what each tier holds: rows, bytes, ages."""
    found = asyncio.run(_stats(settings_of(postgres, config)))
    if as_json:
        print_json(found.as_json())
        return
    table = Table("tier", "rows", "MiB", "oldest, days")
    for tier in found.tiers:
        table.add_row(tier.tier, f"{tier.rows:,}", f"{tier.size_bytes / 2**20:,.1f}", f"{tier.oldest_s / 86_400:.1f}")
    out.print(table)
    say(out, f"{found.due:,} wait for the archive ({found.due_bytes / 2**20:,.1f} MiB)")
    if found.owed:
        say(out, f"{found.owed:,} changes that Redis has not been told of")


@_contexts.command()
def restore(
    month: Annotated[str, typer.Argument(help="Such as 2026-11.")],
    objects: _Objects,
    bucket: _Bucket = "context-archive",
    config: Config = None,
    postgres: Postgres = None,
    as_json: AsJson = False,
) -> None:
    """Bring an exported month back into the archive: what is missing, and was not deleted since."""
    done, later = asyncio.run(_restore(settings_of(postgres, config), objects, bucket, month))
    if as_json:
        names = ("rows", "restored", "replaced", "erased", "present")
        print_json({name: getattr(done, name) for name in names} | {"later": later})
        return
    say(
        out,
        f"{done.restored:,} of {done.rows:,} restored, {done.replaced:,} replaced what an older export had brought;"
        f" {done.present:,} were there, {done.erased:,} deleted",
    )
    if later:
        say(out, f"what went on in later months is in their exports, restore these, too: {', '.join(later)}")


async def _stats(settings: ControllerSettings) -> ContextStats:
    from tierd.contexts.settings import load
    from tierd.controller.contexts.stats import context_stats
    from tierd.postgres import Database

    library = load({}, os.environ)
    redis = library.client() if library.redis is not None else None
    try:
        async with Database(settings) as database:
            return await context_stats(database, redis)
    finally:
        if redis is not None:
            await redis.aclose()


async def _restore(settings: ControllerSettings, objects: str, bucket: str, month: str) -> tuple[Restored, list[str]]:
    from pydantic import ValidationError

    from tierd.controller.contexts.restore import later_exports, restore_contexts
    from tierd.objects.settings import ObjectsSettings, open_store
    from tierd.postgres import Database

    try:
        given = ObjectsSettings(endpoint=objects) if "://" in objects else ObjectsSettings(directory=Path(objects))
    except ValidationError as error:
        raise UsageError(f"--objects: {error.errors()[0]['msg']}", hint="a URL or a directory") from None
    store = open_store(given, os.environ)
    try:
        async with Database(settings) as database:
            space = settings.contexts_tablespace
            done = await restore_contexts(database, store, month, bucket=bucket, tablespace=space)
            return done, await later_exports(database, month)
    finally:
        store.close()
