"""What tests look at to see that no descriptor is left open."""

from __future__ import annotations

import os


def open_descriptors() -> set[str]:
    """Which descriptors this process has, and what they lead to. Not ledgers, which outlive what writes them."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if "tierd-ledger" not in target:
            found.add(f"{fd} {target}")
    return found
