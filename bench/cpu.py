"""What a move costs: seconds, and seconds of processors of this process and of a server. Measures nothing by itself.

Seconds of processors say the same beside others who use the machine, which the speed does not. What the kernel's own
threads do, such as writing dirty pages to the disk, is in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil


class Cost(NamedTuple):
    """Of one move, in seconds."""

    wall: float
    client: float
    server: float


def cost_of(move: Callable[[], None], server: int, *ours: int) -> Cost:
    """Of a move by this process and by those with the IDs `ours`, served by that one and those that it started."""
    clients = [psutil.Process(), *map(psutil.Process, ours)]
    first = psutil.Process(server)
    servers = [first, *first.children(recursive=True)]
    client_before, server_before, began = _used(clients), _used(servers), time.perf_counter()
    move()
    wall = time.perf_counter() - began
    return Cost(wall, _used(clients) - client_before, _used(servers) - server_before)


def _used(processes: Sequence[psutil.Process]) -> float:
    """User and system."""
    return sum(float(times.user + times.system) for times in (process.cpu_times() for process in processes))
