"""Runs a tierd command in this process and says how much memory it took at most: `python -m … FILE WORD...`.

The high-water mark of memory (proc(5), VmHWM) is that of this program alone: what a parent sees of its child after
wait4(2) also counts the parent, from between fork and exec.
"""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

from tierd.cli.main import main


def peak_bytes() -> int:
    """The most that this process had in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    where = Path(sys.argv[1])
    atexit.register(lambda: where.write_text(str(peak_bytes()), encoding="ascii"))
    sys.argv = ["tierd", *sys.argv[2:]]
    main()
