"""Commands that work on the controller's side: `tierd db`. They show what happened and decide nothing.

What they need is imported when they run: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tierd.console import AsJson, out, print_json, printable, say
from tierd.errors import DatabaseError, UsageError

if TYPE_CHECKING:
    from tierd.controller.migrate import Migration, State
    from tierd.controller.settings import ControllerSettings

Config = Annotated[
    Path | None,
    typer.Option(envvar="TIERDCTL_CONFIG", help="YAML file with the controller's settings.", show_default=False),
]
Postgres = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Which database: postgresql://USER@HOST:PORT/DATABASE. The password comes from environment or file.",
        show_default=False,
    ),
]
_db = typer.Typer(
    help="Look after the controller's database.\n\n"
    "Its settings are TIERDCTL_NAME in the environment, or `name: value` in a YAML file (--config).",
    no_args_is_help=True,
)


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.add_typer(_db, name="db")


@_db.command()
def migrate(config: Config = None, postgres: Postgres = None, as_json: AsJson = False) -> None:
    """Bring the schema up to date. Safe to repeat, and while others do the same."""
    done = asyncio.run(_migrate(settings_of(postgres, config)))
    if as_json:
        print_json({"applied": [str(migration) for migration in done]})
    else:
        for migration in done:
            say(out, f"applied {migration}")
        if not done:
            say(out, "nothing to do")


@_db.command()
def status(config: Config = None, postgres: Postgres = None, as_json: AsJson = False) -> None:
    """Show which migrations the database has and lacks; exit 1 if it lacks any."""
    state = asyncio.run(_state(settings_of(postgres, config)))
    if as_json:
        print_json(_told(state))
    else:
        table = Table("migration", "applied at")
        for row in state.applied:
            table.add_row(Text(printable(str(row))), f"{row.applied_at:%Y-%m-%d %H:%M:%S %Z}")
        for migration in state.pending:
            table.add_row(Text(str(migration)), "pending")
        out.print(table)
    if state.pending:
        raise DatabaseError(f"the database lacks migration {state.pending[0]}", hint="run `tierd db migrate`")


def settings_of(postgres: str | None, config: Path | None) -> ControllerSettings:
    """From options, environment and file. Raises UsageError, for a password among the options, too."""
    from tierd.controller.settings import PostgresUrl, load

    settings = load({"postgres": postgres}, os.environ, config)
    if postgres and PostgresUrl.parse(postgres).password:
        raise UsageError(
            "--postgres holds a password, and everybody on this machine can read a command line",
            hint="put it into TIERDCTL_POSTGRES, TIERDCTL_POSTGRES_PASSWORD or a file, see docs/OPERATIONS.md",
        )
    return settings


async def _migrate(settings: ControllerSettings) -> tuple[Migration, ...]:
    from tierd import postgres
    from tierd.controller import migrate

    async with postgres.connected(settings) as connection:
        return await migrate.migrate(connection, migrate.known())


async def _state(settings: ControllerSettings) -> State:
    from tierd import postgres
    from tierd.controller import migrate

    async with postgres.connected(settings) as connection:
        return await migrate.state(connection, migrate.known())


def _told(state: State) -> dict[str, Any]:
    return {
        "applied": [
            {"version": row.version, "name": row.name, "sha256": row.sha256, "applied_at": row.applied_at.isoformat()}
            for row in state.applied
        ],
        "pending": [{"version": migration.version, "name": migration.name} for migration in state.pending],
    }
