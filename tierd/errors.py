"""The errors users see: each names what failed and where, carries an errno and hints at the fix.

Handlers of FUSE requests translate `errno` for the kernel (`node/fuse.py`), the command line
translates `exit_code` for the shell (`cli/main.py`); nothing else catches these.
"""

from __future__ import annotations

import errno as _errno


class TierdError(Exception):
    """Something a person can act on.

    `hint` is one line that says what to do; `errno` is what a FUSE caller would see;
    `exit_code` follows the shell's habit: 2 for a wrong call, 1 for everything else.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.hint = hint
        self.errno = errno


class UsageError(TierdError):
    """The request itself is wrong: a bad setting, path or address. Nothing was started."""

    exit_code = 2


class DaemonError(TierdError):
    """The daemon that serves a mountpoint cannot be reached, or did not come up."""


class DatabaseError(TierdError):
    """The controller's database cannot be reached, or is not what this version works with."""
