"""`tierd outputs delete`: asks the controller to delete outputs of a user everywhere, and waits until that is so.

What it needs is imported when it runs: a node daemon shall not carry the controller's libraries.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tierd import log
from tierd.cli.controller import Config, Postgres, settings_of
from tierd.cli.jobs import with_connection
from tierd.console import AsJson, err, human_bytes, out, print_json, printable, say
from tierd.errors import TierdError, UsageError

if TYPE_CHECKING:
    from tierd.controller.outputs.deletion import Deletion
    from tierd.controller.settings import ControllerSettings


class NotDeleted(TierdError):
    """A deletion that was asked for has not come to its end everywhere. It goes on."""


def delete_outputs(
    user: Annotated[str, typer.Option(help="Whose outputs.")],
    output: Annotated[
        UUID | None, typer.Option(help="Only the one with this UUID; else all that the user has.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be deleted, and change nothing.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="For how many seconds to wait for the end.")] = 600.0,
    config: Config = None,
    postgres: Postgres = None,
    as_json: AsJson = False,
) -> None:
    """Delete outputs of a user everywhere: source, object store, every node, the books. Nothing can take it back.

    Where a controller leads, it does so and this waits; else this does it itself. Ctrl-C ends the waiting; what was
    asked for goes on. Exit 1 if it has not come to its end, or not every node has confirmed that it has nothing.
    """
    settings = settings_of(postgres, config)
    log.configure("warning", settings.log_format)
    count, size = _foresee(settings, user, output)
    if dry_run:
        if as_json:
            print_json({"user": user, "outputs": count, "bytes": size})
        else:
            say(out, f"would delete {count} registered outputs of {user}, {human_bytes(size)}")
        return
    if not yes:
        _confirm(f"Delete {count} outputs of {printable(user)} ({human_bytes(size)}) for good?")
    found = _delete(settings, user, output, wait)
    if as_json:
        print_json(_told(user, found))
    if not found.deleted_everywhere:
        raise _failure(user, found)
    if not as_json:
        say(out, f"{found.outputs} outputs of {user} are deleted everywhere")


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked whether it is meant", hint="say --yes, or look first with --dry-run")
    typer.confirm(question, abort=True, err=True)


def _foresee(settings: ControllerSettings, user: str, output: UUID | None) -> tuple[int, int]:
    from tierd.controller.outputs import deletion as output_deletion

    return with_connection(settings, lambda c: output_deletion.foresee(c, user, output))


def _delete(settings: ControllerSettings, user: str, output: UUID | None, wait_s: float) -> Deletion:
    from tierd import outputs_api

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("delete", total=None)

        def tell(found: Deletion) -> None:
            progress.update(task, description="delete", total=found.outputs or None, completed=found.deleted)

        return asyncio.run(outputs_api.delete_outputs_async(user, output, settings=settings, timeout=wait_s, tell=tell))


def _told(user: str, found: Deletion) -> dict[str, Any]:
    return {
        "user": user,
        "outputs": found.outputs,
        "hidden": found.hidden,
        "deleted": found.deleted,
        "unconfirmed_nodes": list(found.nodes),
        "error": found.error,
        "deleted_everywhere": found.deleted_everywhere,
    }


def _failure(user: str, found: Deletion) -> NotDeleted:
    if found.gone:
        nodes = ", ".join(map(printable, found.nodes))
        return NotDeleted(
            f"outputs of {printable(user)} are deleted, but not confirmed by {nodes}",
            hint="they confirm when they report; `tierd catalogue forget-node` for one that is gone for good",
        )
    return NotDeleted(
        f"{found.deleted} of {found.outputs} outputs of {printable(user)} are deleted: {found.error or 'it goes on'}",
        hint="it goes on, if `tierd controller` runs; call it again to see how far it is",
    )
