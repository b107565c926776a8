"""The command line: the only reader of argv and environment. Prints; does nothing that lasts itself."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table
from rich.text import Text

from tierd import __version__, background, client, console, log
from tierd.cli import contexts as cli_contexts
from tierd.cli import controller as cli_controller
from tierd.cli import importing as cli_import
from tierd.cli import jobs as cli_jobs
from tierd.cli import keeper as cli_keeper
from tierd.cli import moves as cli_moves
from tierd.cli import outputs as cli_outputs
from tierd.cli.tier import add_commands
from tierd.config import MountSettings, load
from tierd.console import (
    AsJson,
    Mountpoint,
    complain,
    fetch,
    flat,
    human_bytes,
    out,
    print_json,
    printable,
    say,
    spinner,
)
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
_WrongCall: Any = typer.BadParameter.__mro__[2]
"""What the parser raises for any wrong call: the base of UsageError, which typer does not export by name."""
_INTERRUPTED = 130
_TICK_SECONDS = 0.1


def main() -> None:
    """Entry point: user errors become one line, a hint and an exit code."""
    try:
        sys.exit(app(prog_name="tierd", standalone_mode=False))
    except background.StartFailed as error:
        if error.code < 0:
            complain(str(error), "its log may say more")
        sys.exit(max(error.code, error.exit_code))
    except TierdError as error:
        complain(str(error), error.hint)
        sys.exit(error.exit_code)
    except _WrongCall as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tierd"
        complain(error.format_message(), f"`{command} --help` explains it")
        sys.exit(UsageError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"tierd {__version__}", highlight=False)
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
    cache_dir: Annotated[
        str | None,
        typer.Option(help="The node tier, on local NVMe. [dim]Default: /var/cache/tierd/…, or below ~/.cache[/]"),
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most it may hold; 0: no node tier. [dim]Default: 200GiB[/]")
    ] = None,
    free_space_ratio: Annotated[
        float | None,
        typer.Option(help="Evict once less of the cache's disk is free. [dim]Default: 0.1[/]"),
    ] = None,
    free_space_target: Annotated[
        float | None, typer.Option(help="Free share at which eviction stops. [dim]Default: half as much again[/]")
    ] = None,
    fill_bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes a second for fills nobody waits for; 0: no limit. [dim]Default: 0[/]"),
    ] = None,
    fill_workers: Annotated[
        int | None, typer.Option(help="Streams read from the source at once. [dim]Default: 4[/]")
    ] = None,
    prefetch: Annotated[
        str | None, typer.Option(metavar="yes|no", help="Bring hot models by itself. [dim]Default: yes[/]")
    ] = None,
    heat_half_life: Annotated[
        float | None, typer.Option(help="Seconds in which a load comes to count half (a week). [dim]Default: 604800[/]")
    ] = None,
    read_ahead_memory: Annotated[
        float | None,
        typer.Option(help="Share of free memory that opened models may fill; 0: no read-ahead. [dim]Default: 0.5[/]"),
    ] = None,
    source_timeout: Annotated[
        float | None, typer.Option(help="Seconds that an open waits for SOURCE if a copy is here. [dim]Default: 2[/]")
    ] = None,
    stale_if_unreachable: Annotated[
        str | None,
        typer.Option(metavar="yes|no", help="Whether it then gets the copy, as it is. [dim]Default: yes[/]"),
    ] = None,
    passthrough: Annotated[
        str | None,
        typer.Option(
            help="auto, on or off: let the kernel read files by itself (Linux 6.9, root); on refuses to start without."
            " [dim]Default: auto[/]"
        ),
    ] = None,
    allow_other: Annotated[
        str | None, typer.Option(metavar="yes|no", help="Let other users in. [dim]Default: as root, yes[/]")
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Tell the controller what is read by way of this Redis, such as redis://HOST:6379/1."
            " [dim]Default: nobody is told[/]",
        ),
    ] = None,
    redis_password_file: Annotated[
        str | None, typer.Option(help="File that holds its password. [dim]Default: none[/]")
    ] = None,
    redis_ca: Annotated[
        str | None, typer.Option(help="Certificates to trust with rediss://. [dim]Default: the system's[/]")
    ] = None,
    node_name: Annotated[
        str | None, typer.Option(help="What the controller calls this mount. [dim]Default: the host name[/]")
    ] = None,
    publish_interval: Annotated[
        float | None, typer.Option(help="Seconds from one report to the controller to the next. [dim]Default: 10[/]")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [dim]Default: info[/]")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json. [dim]Default: auto[/]")] = None,
    log_file: Annotated[
        str | None,
        typer.Option(help="Log there, rotated. [dim]Default: stderr; with --background STATE/daemon.log[/]"),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="URL|DIR",
            help="Where the bytes of cold files are: an S3 endpoint, or a directory. [dim]Default: nowhere[/]",
        ),
    ] = None,
    recalls_per_user: Annotated[
        int | None, typer.Option(help="Cold models that one user brings to the node at a time. [dim]Default: 4[/]")
    ] = None,
    recall_bytes_per_hour: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="How much of cold files one user brings an hour. [dim]Default: 4TiB[/]"),
    ] = None,
    handover: Annotated[
        str | None,
        typer.Option(
            metavar="yes|no",
            help="Let a new daemon go on where one died (Linux 6.9); no: mount again then. [dim]Default: yes[/]",
        ),
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Be a daemon of a mount that `tierd keeper` keeps; SIGTERM leaves it.")
    ] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    template_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Lay the overlay over SOURCE at MOUNTPOINT and serve it until Ctrl-C, SIGTERM or `tierd umount`."""
    settings = load(cli_keeper.given(locals()), os.environ, config)
    if background_:
        _mount_in_background(settings)
    elif template_fd is not None:
        cli_keeper.be_template(settings, template_fd)
    elif attach:
        cli_keeper.attach(settings)
    else:
        cli_keeper.keep(settings, ready_fd)


def _mount_in_background(settings: MountSettings) -> None:
    from tierd.node.preflight import check_paths, warn_if_hiding

    log.configure("warning", settings.log_format)
    checked = check_paths(settings)
    warn_if_hiding(checked.mountpoint)
    assert checked.state_dir is not None
    log_file = settings.log_file or checked.state_dir / "daemon.log"
    arguments = [a for a in sys.argv[1:] if a != "--background"]
    with spinner(f"mounting {checked.mountpoint}") as waiting:
        pid = background.start(arguments, log_file, waiting)
    say(out, f"mounted {checked.source} at {checked.mountpoint} (process {pid}, log {log_file})")


@app.command()
def umount(
    mountpoint: Annotated[Path, typer.Argument(parser=console.path, help="The mountpoint given to `tierd mount`.")],
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
    pid = record.keeper_pid if record.keeper_pid and Path(f"/proc/{record.keeper_pid}").exists() else record.pid
    process = os.pidfd_open(pid)  # readable once the process has ended, pidfd_open(2)
    os.kill(pid, signal.SIGTERM)
    with spinner(f"stopping process {pid}") as waiting:
        started = time.monotonic()
        while not select.select([process], [], [], _TICK_SECONDS)[0]:
            passed = time.monotonic() - started
            if passed > timeout:
                raise DaemonError(
                    f"process {pid} still runs after {timeout:.0f} s",
                    hint="see its log; kill it if it hangs",
                )
            waiting(passed)
    os.close(process)


@app.command()
def status(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """Show what a mount serves, how, and how it fares."""
    told = fetch(mountpoint, "/v1/status", "asking the daemon")
    if as_json:
        print_json(told)
        return
    table = Table(show_header=False, box=None)
    for key, value in told.items():
        table.add_row(Text(key, "bold"), Text(printable(flat(value))))
    out.print(table)


@app.command()
def models(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """List the models below the models roots, and how they were read on this node."""
    found = fetch(mountpoint, "/v1/models", "looking through the models roots")
    if as_json:
        print_json(found)
        return
    table = Table("model", "size", "on node", "in memory", "opens", "loads", "hits", "heat", "last access")
    for column in table.columns[1:8]:
        column.justify = "right"
    for row in found:
        size = "gone" if row["size_bytes"] is None else human_bytes(row["size_bytes"])
        cells = (size, _on_node(row), human_bytes(row["memory_bytes"]) if row["node_bytes"] else "")
        counts = (str(row[key]) for key in ("opens", "loads", "hits"))
        table.add_row(
            Text(printable(row["model"])), *cells, *counts, f"{row['heat']:.2f}", row["last_access"] or "never"
        )
    out.print(table)


def _on_node(row: dict[str, Any]) -> str:
    held = "" if row["state"] == "absent" else human_bytes(row["node_bytes"])
    marks = [row["state"]] if row["state"] in ("partial", "filling") else []
    marks += ["pinned"] if row["pinned"] else []
    return f"{held} ({', '.join(marks)})".strip() if marks else held


@app.command()
def opens(
    mountpoint: Mountpoint = None,
    model: Annotated[str | None, typer.Option(help="Only this model, as `tierd models` names it.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the latest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the latest opens: which file, when, by which user and pod."""
    query = urlencode({"limit": limit, **({"model": model} if model else {})}, errors="surrogateescape")
    found = fetch(mountpoint, f"/v1/opens?{query}", "asking the daemon")
    if as_json:
        print_json(found)
        return
    table = Table("at", "file", "model", "uid", "pod")
    for row in found:
        cells = (
            row["at"],
            printable(row["path"]),
            printable(row["model"] or ""),
            str(row["uid"]),
            row["pod"] or "",
        )
        table.add_row(*(Text(cell) for cell in cells))
    out.print(table)


add_commands(app)
cli_keeper.add_commands(app, mount)
cli_controller.add_commands(app)
cli_jobs.add_commands(app)
cli_moves.add_commands(app)
cli_import.add_commands(app)
cli_outputs.add_commands(app)
cli_contexts.add_commands(app)
