"""The command line: the only reader of argv and environment. Prints; does nothing that lasts itself."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierd import __version__, background, client, log
from tierd.config import MountSettings, load
from tierd.errors import DaemonError, TierdError, UsageError

app = typer.Typer(
    name="tierd",
    help="Puts model files where GPUs need them: an overlay over JuiceFS that records who reads what.\n\n"
    "Start with [bold]tierd mount SOURCE MOUNTPOINT[/bold], look with [bold]tierd models[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every option of `mount` can also be set as TIERD_NAME in the environment or as `name: value` in a"
    " YAML file (--config); flags win over environment, environment over the file.",
)
_out = Console(emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 512)
"""Into a pipe, names are not cut off to fit a terminal."""
_err = Console(stderr=True, emoji=False)
_WrongCall: Any = typer.BadParameter.__mro__[2]
"""What the parser raises for any wrong call: the base of UsageError, which typer does not export by name."""
_INTERRUPTED = 130
_TICK_SECONDS = 0.1

_Mountpoint = Annotated[
    Path | None, typer.Argument(help="Which mount; may be left out if there is only one.", show_default=False)
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


def main() -> None:
    """Entry point: user errors become one line, a hint and an exit code."""
    try:
        sys.exit(app(prog_name="tierd", standalone_mode=False))
    except background.StartFailed as error:
        if error.code < 0:
            _complain(str(error), "its log may say more")
        sys.exit(max(error.code, error.exit_code))
    except TierdError as error:
        _complain(str(error), error.hint)
        sys.exit(error.exit_code)
    except _WrongCall as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tierd"
        _complain(error.format_message(), f"`{command} --help` explains it")
        sys.exit(UsageError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)


def _complain(message: str, hint: str) -> None:
    _say(_err, message, "tierd: ")
    if hint:
        _say(_err, hint, "hint: ")


def _say(console: Console, text: str, label: str = "") -> None:
    """One line, however long; nothing in it is markup."""
    line = Text.assemble((label, "bold"), _printable(text))
    console.print(line, highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        _out.print(f"tierd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def mount(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The JuiceFS mount (or any directory) to lay the overlay over.")
    ],
    mountpoint: Annotated[
        str, typer.Argument(metavar="MOUNTPOINT", help="Where pods shall see it; must exist, outside of SOURCE.")
    ],
    background_: Annotated[
        bool, typer.Option("--background", help="Return once the mount answers; `tierd umount` ends it.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(envvar="TIERD_CONFIG", help="YAML file with settings.", show_default=False)
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(help="Index and log of this mount. [dim]Default: /var/lib/tierd/…, or below ~/.local/state[/]"),
    ] = None,
    models_root: Annotated[
        list[str] | None,
        typer.Option(help="Where models lie, relative to SOURCE; repeatable. [dim]Default: models, hot-models[/]"),
    ] = None,
    outputs_root: Annotated[
        str | None, typer.Option(help="Where generated outputs lie. [dim]Default: outputs[/]")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve /metrics, /healthz and /readyz. Port 0: any. [dim]Default: 127.0.0.1:9568[/]",
        ),
    ] = None,
    metrics_models: Annotated[
        int | None, typer.Option(help="Models that get metric series of their own. [dim]Default: 50[/]")
    ] = None,
    load_idle_gap: Annotated[
        float | None, typer.Option(help="Seconds without an open file that end a load. [dim]Default: 30[/]")
    ] = None,
    attr_timeout: Annotated[
        float | None, typer.Option(help="Seconds the kernel may trust attributes. [dim]Default: 1[/]")
    ] = None,
    entry_timeout: Annotated[
        float | None, typer.Option(help="Seconds the kernel may trust names. [dim]Default: 1[/]")
    ] = None,
    read_ahead_kib: Annotated[
        int | None, typer.Option(help="Kernel read-ahead of the mount in KiB. [dim]Default: 1024[/]")
    ] = None,
    journal_capacity: Annotated[
        int | None, typer.Option(help="Accesses that may wait to be recorded. [dim]Default: 65536[/]")
    ] = None,
    history_rows: Annotated[
        int | None, typer.Option(help="Opens kept for `tierd opens`. [dim]Default: 100000[/]")
    ] = None,
    max_files_known: Annotated[
        int | None, typer.Option(help="Files kept in the index, latest first. [dim]Default: 1000000[/]")
    ] = None,
    passthrough: Annotated[
        str | None,
        typer.Option(
            help="auto, on or off: let the kernel read files by itself (Linux 6.9, root); on refuses to start without."
            " [dim]Default: auto[/]"
        ),
    ] = None,
    allow_other: Annotated[
        bool | None,
        typer.Option("--allow-other/--no-allow-other", help="Let other users in. [dim]Default: as root, yes[/]"),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [dim]Default: info[/]")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json. [dim]Default: auto[/]")] = None,
    log_file: Annotated[
        str | None,
        typer.Option(help="Log there, rotated. [dim]Default: stderr; with --background STATE/daemon.log[/]"),
    ] = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Lay the overlay over SOURCE at MOUNTPOINT and serve it until Ctrl-C, SIGTERM or `tierd umount`."""
    given = {
        name: value for name, value in locals().items() if name in MountSettings.model_fields and value is not None
    }
    settings = load(given, os.environ, config)
    if background_:
        _mount_in_background(settings)
    else:
        _serve(settings, ready_fd)


def _serve(settings: MountSettings, ready_fd: int | None) -> None:
    from tierd.node.daemon import Daemon

    log.configure("error" if ready_fd is not None else settings.log_level, settings.log_format)
    Daemon(
        settings,
        start_log=lambda: log.configure(settings.log_level, settings.log_format, settings.log_file),
        ready=lambda: background.tell_ready(ready_fd) if ready_fd is not None else None,
    ).run()


def _mount_in_background(settings: MountSettings) -> None:
    from tierd.node.preflight import check_paths, warn_if_hiding

    log.configure("warning", settings.log_format)
    checked = check_paths(settings)
    warn_if_hiding(checked.mountpoint)
    assert checked.state_dir is not None
    log_file = settings.log_file or checked.state_dir / "daemon.log"
    arguments = [a for a in sys.argv[1:] if a != "--background"]
    with _spinner(f"mounting {checked.mountpoint}") as waiting:
        pid = background.start(arguments, log_file, waiting)
    _say(_out, f"mounted {checked.source} at {checked.mountpoint} (process {pid}, log {log_file})")


@contextmanager
def _spinner(text: str) -> Iterator[Any]:
    """Show that something takes longer than two seconds."""
    with _err.status("") as status:
        status.stop()

        def waiting(seconds: float) -> None:
            if seconds > 2:
                status.start()
                status.update(f"{text}: {seconds:.0f} s")

        yield waiting


@app.command()
def umount(
    mountpoint: Annotated[Path, typer.Argument(help="The mountpoint given to `tierd mount`.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon to end.")] = 30.0,
) -> None:
    """Stop the daemon of MOUNTPOINT cleanly; clears a mount whose daemon is gone."""
    from tierd.node.preflight import detach, mount_at
    from tierd.runtime import remove_record, resolve_mountpoint

    path = resolve_mountpoint(mountpoint)
    try:
        record = client.find(path)
    except UsageError:
        left = mount_at(path)
        if left is None or left.fstype != "fuse.tierd":
            raise UsageError(f"{path} is not a tierd mount", hint="`tierd status` lists the mounts") from None
        detach(path)
        remove_record(path)
        return
    process = os.pidfd_open(record.pid)  # readable once the process has ended, pidfd_open(2)
    os.kill(record.pid, signal.SIGTERM)
    with _spinner(f"stopping process {record.pid}") as waiting:
        started = time.monotonic()
        while not select.select([process], [], [], _TICK_SECONDS)[0]:
            passed = time.monotonic() - started
            if passed > timeout:
                raise DaemonError(
                    f"process {record.pid} still runs after {timeout:.0f} s",
                    hint="see its log; kill it if it hangs",
                )
            waiting(passed)
    os.close(process)


def _fetch(mountpoint: Path | None, path: str, text: str) -> Any:
    record = client.find(mountpoint)
    if not _err.is_terminal:
        return client.get(record, path)
    with _err.status(text):
        return client.get(record, path)


@app.command()
def status(mountpoint: _Mountpoint = None, as_json: _AsJson = False) -> None:
    """Show what a mount serves, how, and how it fares."""
    told = _fetch(mountpoint, "/v1/status", "asking the daemon")
    if as_json:
        _print_json(told)
        return
    table = Table(show_header=False, box=None)
    for key, value in told.items():
        table.add_row(Text(key, "bold"), Text(_printable(_flat(value))))
    _out.print(table)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@app.command()
def models(mountpoint: _Mountpoint = None, as_json: _AsJson = False) -> None:
    """List the models below the models roots, and how they were read on this node."""
    found = _fetch(mountpoint, "/v1/models", "looking through the models roots")
    if as_json:
        _print_json(found)
        return
    table = Table("model", "size", "opens", "loads", "hits", "last access")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in found:
        size = "gone" if row["size_bytes"] is None else human_bytes(row["size_bytes"])
        counts = (str(row[key]) for key in ("opens", "loads", "hits"))
        table.add_row(Text(_printable(row["model"])), size, *counts, row["last_access"] or "never")
    _out.print(table)


@app.command()
def opens(
    mountpoint: _Mountpoint = None,
    model: Annotated[str | None, typer.Option(help="Only this model, as `tierd models` names it.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the latest first.")] = 20,
    as_json: _AsJson = False,
) -> None:
    """List the latest opens: which file, when, by which user and pod."""
    query = urlencode({"limit": limit, **({"model": model} if model else {})}, errors="surrogateescape")
    found = _fetch(mountpoint, f"/v1/opens?{query}", "asking the daemon")
    if as_json:
        _print_json(found)
        return
    table = Table("at", "file", "model", "uid", "pod")
    for row in found:
        cells = (
            row["at"],
            _printable(row["path"]),
            _printable(row["model"] or ""),
            str(row["uid"]),
            row["pod"] or "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    _out.print(table)


def _printable(text: str) -> str:
    """Names may hold newlines, escape codes and bytes that are not UTF-8; a terminal shall see none of them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def human_bytes(size: int) -> str:
    """A size for people: 1536 is `1.5 KiB`."""
    number = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
