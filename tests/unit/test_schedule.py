"""Daily jobs are due once a day, whatever the clocks do."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.controller.jobs.schedule import Daily

BERLIN = ZoneInfo("Europe/Berlin")
SEOUL = ZoneInfo("Asia/Seoul")
ZONES = (
    "UTC",
    "Asia/Seoul",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Asia/Kolkata",
)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_time_of_day_is_that_of_the_zone() -> None:
    assert Daily(time(2), SEOUL).due_on(date(2026, 1, 12)) == utc("2026-01-11T17:00")
    assert Daily(time(2), ZoneInfo("UTC")).due_on(date(2026, 1, 12)) == utc("2026-01-12T02:00")


def test_a_time_that_clocks_skip_is_as_much_later() -> None:
    """On 29 March 2026 clocks went from 02:00 to 03:00 in Berlin."""
    assert Daily(time(2, 30), BERLIN).due_on(date(2026, 3, 29)) == utc("2026-03-29T01:30")  # 03:30 there


def test_a_time_that_comes_twice_counts_the_first_time() -> None:
    """On 25 October 2026 clocks go from 03:00 back to 02:00 in Berlin."""
    assert Daily(time(2, 30), BERLIN).due_on(date(2026, 10, 25)) == utc("2026-10-25T00:30")


def test_a_day_that_a_zone_skips_adds_no_run() -> None:
    """Samoa had no 30 December 2011."""
    daily = Daily(time(2), ZoneInfo("Pacific/Apia"))
    assert len({daily.due_on(date(2011, 12, day)) for day in (29, 30, 31)}) == 2


def test_what_was_missed_is_made_up_for_once() -> None:
    daily = Daily(time(2), ZoneInfo("UTC"))
    last = daily.due_on(date(2026, 5, 1))
    now = utc("2026-05-09T14:00")
    due = daily.missed(now, last)
    assert due == utc("2026-05-09T02:00")
    assert due is not None
    assert daily.missed(now, due) is None
    assert daily.missed(utc("2026-05-10T01:59"), due) is None
    assert daily.missed(utc("2026-05-10T02:00"), due) == utc("2026-05-10T02:00")


def test_a_new_installation_makes_up_for_nothing() -> None:
    daily = Daily(time(2), ZoneInfo("UTC"))
    assert daily.missed(utc("2026-05-09T14:00"), since=utc("2026-05-09T13:00")) is None


@pytest.mark.parametrize("zone", ZONES)
@given(
    start=st.datetimes(datetime(2011, 1, 1), datetime(2035, 1, 1)),  # noqa: DTZ001 (made aware below)
    at=st.times().map(lambda at: at.replace(microsecond=0)),
    hours=st.lists(st.integers(1, 60), min_size=1, max_size=40),
)
def test_each_instant_is_run_for_once(zone: str, start: datetime, at: time, hours: list[int]) -> None:
    """Whoever looks every now and then runs for each instant once, and for the last one of those it slept through."""
    daily = Daily(at, ZoneInfo(zone))
    now = start.replace(tzinfo=UTC)
    last, ran = now, []
    for step in hours:
        before, now = now, now + timedelta(hours=step)
        due = daily.missed(now, last)
        due_then = daily.next_due(before)
        assert (due is not None) == (due_then <= now)
        if due is not None:
            assert due <= now
            ran.append(due)
            last = due
    assert ran == sorted(set(ran))
    assert all(later - earlier > timedelta(hours=20) for earlier, later in pairwise(ran))
    assert daily.last_due(now) <= now < daily.next_due(now)
