"""What tests look at to see that no descriptor is left open."""

from __future__ import annotations

import os


def open_descriptors() -> set[str]:
    """Which descriptors this process has, and what they lead to."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    return found
