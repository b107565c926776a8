"""Has images packed anew by a process of its own (`png_recode.py`), so that no image can harm the controller."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Final

from tierd.controller.outputs.png_recode import STAYS
from tierd.errors import TierdError, UsageError

SECONDS_MAX: Final = 300.0
_REASON_CHARS_MAX: Final = 200


class CannotRecode(TierdError):
    """An image stays as it is; `str()` says why."""


def require_library() -> None:
    """Raises UsageError if there is nothing to decode images with."""
    if find_spec("PIL") is None:
        raise UsageError("Pillow is not installed, so no image is compressed", hint="pip install 'tierd[images]'")


async def recoded(content: bytes) -> bytes:
    """The same image in other bytes, which were decoded and compared. Raises CannotRecode."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tierd.controller.outputs.png_recode"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        result, told = await asyncio.wait_for(process.communicate(content), SECONDS_MAX)
    except TimeoutError:
        raise CannotRecode(f"it takes more than {SECONDS_MAX:.0f} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == 0:
        return result
    lines = told.decode("utf-8", "replace").split("\n")
    reason = next((line for line in reversed(lines) if line.strip()), "")[:_REASON_CHARS_MAX]
    raise CannotRecode(
        reason if process.returncode == STAYS else f"its decoder ended with {process.returncode}: {reason}"
    )
