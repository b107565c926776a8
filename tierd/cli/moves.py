"""Commands that move models between the tiers: `tierd demote`, `promote`, `undo`. They ask, wait, and show what came.

What they need is imported when they run: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tierd import log
from tierd.cli.controller import Config, Postgres, settings_of
from tierd.console import AsJson, err, human_bytes, out, print_json, printable, say
from tierd.errors import TierdError

if TYPE_CHECKING:
    from tierd.controller.moves.asking import Asked
    from tierd.controller.settings import ControllerSettings

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="As the catalogue names it, such as models/llama-7b.")]
_Dry = Annotated[bool, typer.Option("--dry-run", help="Tell whether it would be done, and change nothing.")]


class MoveFailed(TierdError):
    """A move that was asked for was refused, or did not come to its end."""


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command in (demote, promote, undo):
        app.command()(command)


def demote(
    model: _Model, config: Config = None, postgres: Postgres = None, dry_run: _Dry = False, as_json: AsJson = False
) -> None:
    """Move MODEL from the hot tier to the object store; its names stay, and it can be read as before.

    Refused while it is pinned or open on a node. Within the grace `tierd undo` brings it back at once.

    Where a controller leads, it does so and this waits; else this does it itself. Exit 1 if it was not done.
    """
    _run("demote", model, settings_of(postgres, config), dry_run=dry_run, as_json=as_json)


def promote(
    model: _Model, config: Config = None, postgres: Postgres = None, dry_run: _Dry = False, as_json: AsJson = False
) -> None:
    """Bring MODEL back from the object store to the hot tier; its objects stay there as an archive.

    Refused if there is no room in the source. It can be read meanwhile.

    Where a controller leads, it does so and this waits; else this does it itself. Exit 1 if it was not done.
    """
    _run("promote", model, settings_of(postgres, config), dry_run=dry_run, as_json=as_json)


def undo(
    model: _Model, config: Config = None, postgres: Postgres = None, dry_run: _Dry = False, as_json: AsJson = False
) -> None:
    """Take back the latest demotion of MODEL, while its files are still in the trash.

    Where a controller leads, it does so and this waits; else this does it itself. Exit 1 if it was not done.
    """
    _run("undo", model, settings_of(postgres, config), dry_run=dry_run, as_json=as_json)


def _run(kind: str, model: str, settings: ControllerSettings, *, dry_run: bool, as_json: bool) -> None:
    log.configure("warning", settings.log_format)
    if dry_run:
        _foresee(kind, model, settings, as_json=as_json)
        return
    asked = ask(kind, model, settings)
    if as_json:
        print_json(told(asked))
    elif asked.succeeded:
        say(out, f"{model}: {_DONE[asked.move['kind'] if asked.move else kind]}")
    if not asked.succeeded:
        raise failure_of(kind, model, asked)


def failure_of(kind: str, model: str, asked: Asked) -> MoveFailed:
    """What to raise for a move that did not come to its end."""
    move = asked.move or {}
    reason = asked.wish.answer or move.get("reason") or move.get("error") or ""
    return MoveFailed(f"{kind} of {model}: {_state_of(asked)}: {reason}", hint=asked.wish.hint)


_DONE = {"demote": "is cold", "promote": "is hot", "undo": "is hot: what had been demoted is back"}


def ask(kind: str, model: str, settings: ControllerSettings, prefix: str = "") -> Asked:
    """Have it done, with a progress bar; what came of it. Raises UsageError, DatabaseError."""
    from tierd.controller.moves.asking import ask_for

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(kind, total=None)

        def tell(asked: Asked) -> None:
            move = asked.move or {}
            total, done = move.get("size_bytes") or None, move.get("done_bytes", 0)
            waiting = f" ({printable(move['error'])})" if move.get("error") else ""
            progress.update(task, description=f"{kind}: {_state_of(asked)}{waiting}", total=total, completed=done)

        return asyncio.run(ask_for(settings, os.environ, kind, model, tell, prefix))


def _state_of(asked: Asked) -> str:
    state: str = asked.move["state"] if asked.move is not None else asked.wish.state
    return state.replace("_", " ")


def told(asked: Asked) -> dict[str, Any]:
    """As JSON."""
    move = asked.move or {}
    grace = move.get("grace_until")
    return {
        "model": asked.wish.model_id,
        "asked": asked.wish.kind,
        "answer": asked.wish.state,
        "reason": asked.wish.answer or move.get("reason") or move.get("error") or "",
        "move": asked.wish.move_id,
        "kind": move.get("kind"),
        "state": move.get("state"),
        "size_bytes": move.get("size_bytes"),
        "done_bytes": move.get("done_bytes"),
        "grace_until": grace.isoformat() if grace is not None else None,
        "succeeded": asked.succeeded,
    }


def _foresee(kind: str, model: str, settings: ControllerSettings, *, as_json: bool) -> None:
    from tierd import postgres
    from tierd.controller import migrate
    from tierd.controller.moves.foresight import Foreseen, foresee

    async def main() -> Foreseen:
        async with postgres.connected(settings) as connection:
            await migrate.require_current(connection)
            return await foresee(connection, settings, kind, model)

    found = asyncio.run(main())
    if as_json:
        print_json({"model": found.model_id, "kind": found.kind, "size_bytes": found.size_bytes})
    else:
        say(out, f"would {found.kind} {found.model_id}, {human_bytes(found.size_bytes)}")
