"""What a daemon sets of its own process and of its mount: priority, garbage collection, read-ahead."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path
from typing import Any

import structlog

from tierd.node import preflight

log = structlog.get_logger(__name__)

_PASSTHROUGH_KERNEL = (6, 9)
_NICENESS = -10


def raise_priority() -> None:
    """Answer before the processes that wait for the answer: on a busy node each hop between threads waits for a CPU."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    except PermissionError:
        log.debug("priority_unchanged", reason="needs root or CAP_SYS_NICE")


def calm_garbage_collector() -> None:
    """Collect rarely: a full pass over 100,000 nodes takes as long as a hundred requests, and finds nothing.

    Nodes and handles hold no cycles but (handle, node), which release takes apart.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


def tune_mount(mountpoint: Path, read_ahead_kib: int) -> None:
    """Give the mount a larger read-ahead: the default of 128 KiB costs a request to the daemon per 128 KiB."""
    found = preflight.mount_at(mountpoint)
    knob = Path(f"/sys/class/bdi/{found.device}/read_ahead_kb") if found else None
    try:
        if knob is not None:
            knob.write_text(str(read_ahead_kib), encoding="ascii")
    except OSError as error:
        log.warning("read_ahead_not_set", knob=str(knob), reason=error.strerror, cost="slower sequential reads")


def passthrough_ability(*, enabled: bool) -> dict[str, Any]:
    """Whether this kernel and process could use FUSE passthrough (Linux 6.9, CAP_SYS_ADMIN)."""
    release = platform.release().split("-")[0].split(".")
    kernel = tuple(int(part) for part in release[:2] if part.isdigit()) >= _PASSTHROUGH_KERNEL
    return {"kernel": kernel, "privileged": os.geteuid() == 0, "enabled": enabled}
