"""Talks to a running daemon over its admin socket; used by the command line."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tierd.errors import DaemonError, UsageError
from tierd.runtime import MountRecord, records, resolve_mountpoint, socket_path

_TIMEOUT_SECONDS = 120.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fsencode(self._path))


def find(mountpoint: Path | None) -> MountRecord:
    """The daemon of a mountpoint, or the only one there is. Raises UsageError."""
    running = records()
    if mountpoint is not None:
        wanted = str(resolve_mountpoint(mountpoint))
        for record in running:
            if record.mountpoint == wanted:
                return record
        raise UsageError(f"no tierd daemon serves {mountpoint}", hint=_known(running))
    if len(running) != 1:
        how_many = "no tierd daemon is running" if not running else "several tierd daemons are running"
        raise UsageError(how_many, hint=_known(running))
    return running[0]


def _known(running: list[MountRecord]) -> str:
    if not running:
        return "start one: tierd mount SOURCE MOUNTPOINT (daemons of other users are not visible)"
    return "name one of: " + ", ".join(record.mountpoint for record in running)


def get(record: MountRecord, path: str, timeout: float = _TIMEOUT_SECONDS) -> Any:
    """The JSON answer of a daemon. Raises DaemonError."""
    return _ask(record, "GET", path, None, timeout)


def post(record: MountRecord, path: str, arguments: Mapping[str, Any], timeout: float = _TIMEOUT_SECONDS) -> Any:
    """Ask a daemon to do something; its JSON answer. Raises DaemonError, and UsageError if it was asked wrongly."""
    return _ask(record, "POST", path, json.dumps(arguments), timeout)


def _ask(record: MountRecord, method: str, path: str, body: str | None, timeout: float) -> Any:
    connection = _UnixConnection(socket_path(Path(record.mountpoint)), timeout)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DaemonError(
            f"the daemon of {record.mountpoint} (process {record.pid}) does not answer: {error}",
            hint="its log says more; `tierd umount` and `tierd mount` start afresh",
        ) from None
    finally:
        connection.close()
    if response.status == http.client.BAD_REQUEST:
        told = json.loads(answer)
        raise UsageError(told["error"], hint=told["hint"])
    if response.status != http.client.OK:
        raise DaemonError(
            f"the daemon of {record.mountpoint} answered {response.status} to {path}",
            hint="its log says more",
        )
    return json.loads(answer)
