"""Processes of a mount as commands start them: keeper, template, daemon; and `tierd keeper`, `tierd upgrade`."""

from __future__ import annotations

import inspect
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import structlog
import typer

from tierd import background, client, log
from tierd.config import MountSettings, load
from tierd.console import AsJson, Mountpoint, complain, out, print_json, say, spinner
from tierd.errors import DaemonError, TierdError, UsageError
from tierd.runtime import keeper_path, resolve_mountpoint

_UPGRADE_SECONDS = 60.0
_TICK_SECONDS = 0.1
_ANSWER_BYTES_MAX = 1 << 16


def add_commands(app: typer.Typer, mount: Callable[..., None]) -> None:
    """Register the commands of this module. `keeper` takes what `mount` takes."""

    def keeper(**options: Any) -> None:
        take_over = options.pop("take_over")
        settings = load(given(options), os.environ, options["config"])
        if take_over:
            _take_over(settings.mountpoint)
        keep(settings, None, starts_daemons=False)

    signature = inspect.signature(mount, eval_str=True)
    left_out = ("background_", "ready_fd", "template_fd", "attach")
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in left_out]
    option = Annotated[bool, typer.Option("--take-over", help="Go on as the keeper of the mount that is there.")]
    extra = inspect.Parameter("take_over", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
    keeper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters), extra]
    )
    keeper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, extra]}
    keeper.__doc__ = (
        "Mount and keep the mount, for daemons of other units or pods: `tierd mount --attach`.\n\n"
        "A rollout of the daemon then ends neither the mount nor a call of a pod. The keeper ends with SIGTERM."
    )
    app.command()(keeper)
    app.command()(upgrade)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that are settings and were set. Raises UsageError if a password is among them."""
    if urlsplit(options.get("redis") or "").password is not None:
        raise UsageError(
            "--redis: everybody on this machine can read a password on a command line", hint="--redis-password-file"
        )
    return {name: value for name, value in options.items() if name in MountSettings.model_fields and value is not None}


def keep(settings: MountSettings, ready_fd: int | None, *, starts_daemons: bool = True) -> None:
    """This process becomes the keeper of a new mount, and does not return."""
    from tierd.node import launch

    _import_daemon(settings)
    log.configure("error" if ready_fd is not None else settings.log_level, settings.log_format)
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
    launch.launch(
        settings,
        (lambda sock: daemon(settings, sock, ready_fd)) if starts_daemons else None,
        start_log=lambda: _start_log(settings),
        quiet=ready_fd is not None,
        arguments=sys.argv[1:],
    )


def _import_daemon(settings: MountSettings) -> None:
    """What daemons import takes a while: it is imported before they are forked."""
    import tierd.node.daemon

    if settings.redis is not None:
        import tierd.node.publish_setup  # noqa: F401


def _start_log(settings: MountSettings) -> None:
    log.configure(settings.log_level, settings.log_format, settings.log_file)


def be_template(settings: MountSettings, fd: int) -> None:
    """This process forks daemons of a mount that is there, for its keeper."""
    from tierd.node import template

    _import_daemon(settings)
    _start_log(settings)
    sys.exit(template.serve(socket.socket(fileno=fd), lambda sock: daemon(settings, sock, None)))


def attach(settings: MountSettings) -> None:
    """This process is a daemon of a mount that somebody else keeps. Raises DaemonError."""
    _import_daemon(settings)  # before connecting: the keeper should not wait for who has connected
    sock = _connect(settings.mountpoint)
    _start_log(settings)
    sys.exit(daemon(settings, sock, None, attached=True))


def daemon(settings: MountSettings, sock: socket.socket, ready_fd: int | None, *, attached: bool = False) -> int:
    """Be a daemon; its exit code. A user error is told once, and the keeper that it was meant."""
    from tierd.node.daemon import Daemon
    from tierd.node.keeping import Keeping

    keeping = Keeping(sock)

    def ready() -> None:
        if ready_fd is not None and keeping.restarts == 0:
            background.tell_ready(ready_fd)

    code = 0
    try:
        Daemon(settings, keeping, ready=ready, attached=attached).run()
    except TierdError as error:
        complain(str(error), error.hint)
        if keeping.restarts:  # whoever started the mount does not listen any more
            structlog.get_logger(__name__).error("daemon_cannot_serve", reason=str(error), hint=error.hint)
        code = error.exit_code
    keeping.farewell(code)
    return code


def _connect(mountpoint: Path) -> socket.socket:
    path = resolve_mountpoint(mountpoint)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(os.fsencode(keeper_path(path)))
    except OSError as error:
        sock.close()
        raise DaemonError(
            f"no keeper serves {path}: {error.strerror}", hint=f"tierd keeper SOURCE {path}, or tierd mount"
        ) from None
    return sock


def _take_over(mountpoint: Path) -> None:
    """This process becomes the keeper that another one is, with all that it has. Raises UsageError."""
    from tierd.node import handing, launch, preflight

    preflight.raise_descriptor_limit()
    path = resolve_mountpoint(mountpoint)
    with _connect(path):
        pass
    handing.become_by(sys.executable, launch.ROOT, str(keeper_path(path)))


def upgrade(mountpoint: Mountpoint = None, as_json: AsJson = False) -> None:
    """Have the keeper and the daemon of a mount go on as the version of this command.

    No call fails and nothing is unmounted; calls wait for some tenths of a second.
    """
    from tierd.node import launch, packets

    path = Path(client.find(mountpoint).mountpoint)
    with _connect(path) as sock:
        packets.send(sock, b"U" + json.dumps({"python": sys.executable, "root": launch.ROOT}).encode())
        sock.settimeout(_TICK_SECONDS)
        told = _await_answer(sock, path)
    if "error" in told:
        raise DaemonError(f"{path} was not upgraded: {told['error']}", hint="the log of the mount says why")
    if as_json:
        print_json(told)
    else:
        say(out, f"upgraded {path} (keeper {told['keeper_pid']}, daemon {told['pid']})")


def _await_answer(sock: socket.socket, path: Path) -> dict[str, Any]:
    waited = 0.0
    with spinner(f"upgrading {path}") as waiting:
        while waited < _UPGRADE_SECONDS:
            try:
                data = sock.recv(_ANSWER_BYTES_MAX)
            except TimeoutError:
                waited += _TICK_SECONDS
                waiting(waited)
                continue
            if not data:
                break
            told: dict[str, Any] = json.loads(data)
            return told
    raise UsageError(f"the keeper of {path} did not say how the upgrade went", hint="see `tierd status` and the log")
