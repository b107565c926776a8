"""Starts a mount: everything that can be refused is found first, then this process becomes its keeper.

What it has imported is not lost: a fork of it stays as the template of daemons.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import structlog

from tierd import web
from tierd.config import MountSettings
from tierd.node import admin, handing, packets, preflight, template
from tierd.node.sources import Root, find_root
from tierd.runtime import keeper_path, leftovers_of, socket_path

log = structlog.get_logger(__name__)

_LEVELS = ("debug", "info", "warning", "error")
ROOT = str(Path(__file__).resolve().parents[2])
"""Where the package lies that keepers run from."""


def launch(
    settings: MountSettings,
    daemon: Callable[[socket.socket], int] | None,
    *,
    start_log: Callable[[], None],
    quiet: bool,
    arguments: list[str],
) -> NoReturn:
    """Check, lock, listen; then keep the mount. Raises UsageError, and leaves nothing behind then.

    `daemon` runs one in a fork of this process (None: they will connect); `arguments` start another template, of newer
    code. `start_log` is called once nothing can be refused any longer. `quiet`: standard error is somebody's who waits
    for its end.
    """
    preflight.raise_descriptor_limit()  # a keeper has as many files as all its daemons
    checked = preflight.check_paths(settings)
    preflight.check_fuse(allow_other=allows_other(settings))
    with ExitStack() as stack:
        listener = stack.enter_context(web.listen(checked.metrics, "--metrics HOST:PORT"))
        assert checked.state_dir is not None
        locks = stack.enter_context(preflight.exclusive(checked.state_dir, checked.mountpoint))
        cache = stack.enter_context(preflight.exclusive_cache(checked))
        root = find_root(checked.source)
        stack.callback(os.close, root.fd)
        sockets = stack.enter_context(_sockets(checked.mountpoint))
        start_log()
        for event, details in cache.remarks:
            log.warning(event, **details)
        preflight.warn_if_hiding(checked.mountpoint)
        kept = stack.pop_all()
    held = {
        packets.METRICS_LISTENER: listener.fileno(),
        packets.ADMIN_LISTENER: sockets[0].fileno(),
        packets.SOURCE_ROOT: root.fd,
        **dict(zip(packets.LOCKS, [*locks, *cache.locks], strict=False)),
    }
    state = _state(checked, held, cache.directory, root)
    state |= {"listener": sockets[1].fileno(), "quiet": quiet}
    with kept:  # whatever was entered is left only if this process cannot become a keeper
        if daemon is None:
            handing.become(sys.executable, ROOT, {**state, "argv": [], "template": None})
        argv = [sys.executable, "-m", "tierd", *arguments]
        template_fd = _fork_template(daemon, [*held.values(), sockets[1].fileno()])
        handing.become(sys.executable, ROOT, {**state, "argv": argv, "template": template_fd})


def _fork_template(daemon: Callable[[socket.socket], int], not_theirs: list[int]) -> int:
    """The keeper's end of a template, which is a fork of this process."""
    ours, theirs = packets.pair()
    sys.stderr.flush()
    if os.fork() == 0:
        theirs.close()
        for fd in not_theirs:
            os.close(fd)
        os._exit(template.serve(ours, daemon))
    return theirs.detach()


def allows_other(settings: MountSettings) -> bool:
    """Whether other users get in."""
    return os.geteuid() == 0 if settings.allow_other is None else settings.allow_other


@contextmanager
def _sockets(mountpoint: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The admin socket and the keeper's, for the length of a `with`."""
    path = keeper_path(mountpoint)
    kept = admin.bind_private(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), path)
    with kept, admin.unix_listener(socket_path(mountpoint)) as listener:
        try:
            yield listener, kept
        finally:
            path.unlink()
            socket_path(mountpoint).unlink()


def _state(settings: MountSettings, held: dict[int, int], cache_dir: Path | None, root: Root) -> dict[str, Any]:
    """What a keeper knows (see `keeper.Keeper`)."""
    assert settings.state_dir is not None
    told = {
        "source": str(settings.source),
        "mountpoint": str(settings.mountpoint),
        "state_dir": str(settings.state_dir),
        "cache_dir": str(cache_dir) if cache_dir is not None else None,
        "root": [root.device, root.inode, root.xattrs, root.acls],
    }
    as_json = settings.log_format != "console" and (settings.log_file is not None or not sys.stderr.isatty())
    return {
        "told": told,
        "held": held,
        "mountpoint": str(settings.mountpoint),
        "allow_other": allows_other(settings),
        "restarts": 0,
        "resend": False,
        "served": False,
        "daemon": None,
        "asker": None,
        "log_file": str(settings.log_file) if settings.log_file is not None else None,
        "log_json": as_json or settings.log_format == "json",
        "log_levels": _LEVELS[_LEVELS.index(settings.log_level) :],
        "remove": [str(path) for path in leftovers_of(settings.mountpoint)],
        "remove_if_alone": [str(settings.state_dir / "lock")],
    }
