"""Log lines: one each, for machines and for people, into standard error or a rotated file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tierd import log as tierd_log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging is global."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


def lines(text: str) -> list[dict[str, Any]]:
    """Each line as JSON."""
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_an_event_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="json")
    structlog.get_logger("tierd.x").info("mounted", mountpoint="/mnt/a\nb", number=5, name="\udcff\x1b[31m모델")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.isascii()
    (line,) = lines(captured.err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "mounted",
        "level": "info",
        "logger": "tierd.x",
        "mountpoint": "/mnt/a\nb",
        "number": 5,
        "name": "\udcff\x1b[31m모델",
    }


def test_auto_is_json_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure()
    structlog.get_logger("tierd.x").warning("something")
    assert lines(capsys.readouterr().err)[0]["level"] == "warning"


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "a library's"])
def test_an_exception_is_one_line_of_json(capsys: pytest.CaptureFixture[str], foreign: bool) -> None:
    tierd_log.configure(style="json")
    logger = logging.getLogger("hypercorn.error") if foreign else structlog.get_logger("tierd.x")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.exception("handler_failed")
    (line,) = lines(capsys.readouterr().err)
    assert line["event"] == "handler_failed"
    assert line["level"] == "error"
    assert "Traceback (most recent call last)" in line["exception"]
    assert "ValueError: first\nsecond" in line["exception"]


def test_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="console")
    structlog.get_logger("tierd.x").info("mounted", mountpoint="/mnt")
    text = capsys.readouterr().err
    assert "mounted" in text
    assert "mountpoint=/mnt" in text
    assert "\x1b" not in text, "no colours where there is no terminal"


def test_console_shows_no_control_characters_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="console")
    structlog.get_logger("tierd.x").info("opened", path="a\x1b[31m\nb\rc")
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "\r" not in text


def test_console_shows_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="console")
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger("tierd.x").exception("handler_failed")
    text = capsys.readouterr().err
    assert "ValueError" in text
    assert "why" in text


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure("warning", "json")
    logger = structlog.get_logger("tierd.x")
    logger.info("quiet")
    logger.warning("loud")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["loud"]


def test_libraries_are_quieter_than_we_are(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure("debug", "json")
    logging.getLogger("hypercorn.error").info("quiet")
    logging.getLogger("hypercorn.error").warning("loud %s", "enough")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["loud enough"]


def test_file_gets_json_and_is_rotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "daemon.log"
    tierd_log.configure(file=file)
    logger = structlog.get_logger("tierd.x")
    for _ in range(50):
        logger.info("big", text="x" * 1_000_000)
    assert capsys.readouterr().err == ""
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["daemon.log", "daemon.log.1", "daemon.log.2", "daemon.log.3"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * 10 * 1024 * 1024


def test_configured_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="json")
    tierd_log.configure(style="json")
    structlog.get_logger("tierd.x").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_libraries_do_not_repeat_with_tracebacks_what_we_say_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tierd_log.configure(style="json")
    logging.getLogger("asyncpg.pool").warning("Failed to restore the pool connection floor; retrying", exc_info=True)
    assert capsys.readouterr().err == ""
