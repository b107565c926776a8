"""Logging for every process of tierd: structured, one line an event, readable for people or as JSON."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Literal

import structlog

from tierd.errors import UsageError

_FILE_BYTES_MAX = 10 * 1024 * 1024
_FILES_KEPT = 3


def configure(
    level: str = "info", style: Literal["auto", "console", "json"] = "auto", file: Path | None = None
) -> None:
    """Log to standard error, or to a file that is rotated at 10 MiB (three old ones are kept).

    `auto` is `console` on a terminal and `json` elsewhere.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = _rotating(file)
    people = style == "console" or (style == "auto" and file is None and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=people and sys.stderr.isatty())]
        if people
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=True)]
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("hypercorn").setLevel(logging.WARNING)
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    logging.getLogger("asyncpg").setLevel(logging.ERROR)  # its pool warns, with tracebacks, of what our statements say
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _rotating(file: Path) -> logging.Handler:
    try:
        return logging.handlers.RotatingFileHandler(
            file, maxBytes=_FILE_BYTES_MAX, backupCount=_FILES_KEPT, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise UsageError(f"log file {file}: {error.strerror}", hint="choose another with --log-file") from None
