"""What all commands print with: consoles, one-line errors, spinners, sizes; and how they ask a daemon."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tierd import client

out = Console(emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 512)
"""Into a pipe, names are not cut off to fit a terminal."""
err = Console(stderr=True, emoji=False)


def path(text: str) -> Path:
    """A parser of paths: typer's own asks the mount for its attributes, and its daemon may hang."""
    return Path(text)


Mountpoint = Annotated[
    Path | None,
    typer.Argument(parser=path, help="Which mount; may be left out if there is only one.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


def complain(message: str, hint: str) -> None:
    say(err, message, "tierd: ")
    if hint:
        say(err, hint, "hint: ")


def say(console: Console, text: str, label: str = "") -> None:
    """One line, however long; nothing in it is markup."""
    line = Text.assemble((label, "bold"), printable(text))
    console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def spinner(text: str) -> Iterator[Any]:
    """Show that something takes longer than two seconds."""
    with err.status("") as status:
        status.stop()

        def waiting(seconds: float) -> None:
            if seconds > 2:
                status.start()
                status.update(f"{text}: {seconds:.0f} s")

        yield waiting


def fetch(mountpoint: Path | None, path: str, text: str) -> Any:
    record = client.find(mountpoint)
    if not err.is_terminal:
        return client.get(record, path)
    with err.status(text):
        return client.get(record, path)


def flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def printable(text: str) -> str:
    """Names may hold newlines, escape codes and bytes that are not UTF-8; a terminal shall see none of them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def human_bytes(size: int) -> str:
    """A size for people: 1536 is `1.5 KiB`."""
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
