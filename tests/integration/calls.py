"""System calls as tests want them: those that Python does not offer, and errnos as values."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def outcome(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a call returned, or the name of its errno."""
    try:
        return function(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
