"""When a daily job is due: a time of day in a time zone. Pure: `now` is an argument, no clock is read, nothing is run.

Where clocks are set back, a time comes twice on one day: the first one counts. Where they are set forward past it, it
is as much later as they were set. So there is one instant for each day, and a job that remembers the last one it ran
for runs once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

_DAYS_AROUND = (1, 0, -1, -2)
"""Local days that may hold the last instant before `now`: a time zone can skip a day (Samoa, in December 2011)."""


@dataclass(frozen=True)
class Daily:
    """Once a day, at `at` of the clocks in `zone`."""

    at: time
    zone: ZoneInfo

    def due_on(self, day: date) -> datetime:
        """The instant that belongs to a day, in UTC."""
        # fold=0 is the first of two; in a gap it counts with the offset before it, which lands as much after (PEP 495).
        return datetime.combine(day, self.at.replace(fold=0), tzinfo=self.zone).astimezone(UTC)

    def last_due(self, now: datetime) -> datetime:
        """The latest instant that is not after `now`."""
        today = now.astimezone(self.zone).date()
        instants = (self.due_on(today + timedelta(days=days)) for days in _DAYS_AROUND)
        return max(instant for instant in instants if instant <= now)

    def next_due(self, now: datetime) -> datetime:
        """The earliest instant after `now`."""
        today = now.astimezone(self.zone).date()
        instants = (self.due_on(today + timedelta(days=days)) for days in (-1, 0, 1, 2))
        return min(instant for instant in instants if instant > now)

    def missed(self, now: datetime, since: datetime) -> datetime | None:
        """The instant to run for now: the last one, if it came after `since`. Those before it are not made up for."""
        last = self.last_due(now)
        return last if last > since else None
