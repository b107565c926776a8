"""What a move costs: seconds, and seconds of processors of this process and of a server. Measures nothing by itself.

Seconds of processors say the same beside others who use the machine, which the speed does not. What the kernel's own
threads do, such as writing dirty pages to the disk, is in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import psutil


class Cost(NamedTuple):
    """Of one move, in seconds."""

    wall: float
    client: float
    server: float


def cost_of(move: Callable[[], None], server: int) -> Cost:
    """Of a move within this process, served by the process with that ID and those it started."""
    client_before, server_before, began = _used(psutil.Process()), _used_by_all(server), time.perf_counter()
    move()
    wall = time.perf_counter() - began
    return Cost(wall, _used(psutil.Process()) - client_before, _used_by_all(server) - server_before)


def _used_by_all(server: int) -> float:
    first = psutil.Process(server)
    return sum(_used(process) for process in (first, *first.children(recursive=True)))


def _used(process: psutil.Process) -> float:
    """User and system."""
    times = process.cpu_times()
    return float(times.user + times.system)
