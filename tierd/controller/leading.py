"""Leads whenever nobody else does: takes the lock, has the work done, stops it when the lock is lost. Does no work.

One session of PostgreSQL is held all the time: while another controller leads it asks for the lock, while this one
leads it is the lock. As soon as the session is gone, or does not answer, the work is cancelled, and all begins anew
with another epoch. What the work destroys is fenced besides (`leader.py`): this only is quicker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Final

import structlog

from tierd.controller.leader import NotLeaderError, begin_epoch
from tierd.controller.migrate import SchemaError, require_current
from tierd.controller.settings import ControllerSettings
from tierd.controller.tasks import Pause, reason_of, together
from tierd.errors import DatabaseError, TierdError
from tierd.postgres import Connection, connected

log = structlog.get_logger(__name__)

STANDBY_SECONDS: Final = 1.0
_WATCH_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)
"""From one try to reach the database to the next; the last one again and again."""

Work = Callable[[int], Awaitable[None]]


class Phase(Enum):
    """What a controller is at; the value is for people."""

    STARTING = "not connected yet"
    AWAY = "the database is away"
    STANDBY = "another controller leads"
    LEADING = "leads"


class Standing:
    """What this process is at. Each change is logged once, and told to `changed`."""

    def __init__(self, changed: Callable[[Phase, int], None] = lambda _phase, _epoch: None) -> None:
        self.phase = Phase.STARTING
        self.epoch = 0
        self._changed = changed

    def away(self, error: DatabaseError) -> None:
        """The database cannot be reached, or was lost."""
        if self._enter(Phase.AWAY):
            log.warning("database_away", reason=str(error), hint=error.hint, consequence="no work until it is back")

    def standby(self, error: NotLeaderError) -> None:
        """Somebody else leads."""
        if self._enter(Phase.STANDBY):
            log.info("standby", reason=str(error))

    def leading(self, epoch: int) -> None:
        """We lead."""
        if self._enter(Phase.LEADING, epoch):
            log.info("leading", epoch=epoch)

    def lost(self, error: Exception) -> None:
        """We led, and do no longer."""
        if self._enter(Phase.STANDBY):
            log.warning("leadership_lost", reason=reason_of(error), consequence="all work stopped, and begins anew")

    def why_not_ready(self) -> str:
        """Empty while it leads or could take over at once."""
        return "" if self.phase in (Phase.STANDBY, Phase.LEADING) else self.phase.value

    def _enter(self, phase: Phase, epoch: int = 0) -> bool:
        changed = (self.phase, self.epoch) != (phase, epoch)
        self.phase, self.epoch = phase, epoch
        self._changed(phase, epoch)
        return changed


async def lead(
    settings: ControllerSettings, holder: str, standing: Standing, work: Work, *, pause: Pause = asyncio.sleep
) -> None:
    """Do `work(epoch)` whenever we lead, until cancelled. Raises SchemaError, and nothing else that time may heal."""
    failures = 0
    while True:
        reached = False
        try:
            async with connected(settings) as session:
                await require_current(session)
                reached = True
                epoch = await _begin(session, holder, standing, pause)
                await _hold(session, epoch, standing, work, settings.shutdown_timeout / 2)
        except SchemaError:
            raise
        except NotLeaderError as error:
            standing.lost(error)
        except DatabaseError as error:
            if standing.phase is Phase.LEADING:
                standing.lost(error)  # away, or only our session: the next try tells
            else:
                standing.away(error)
        except (TierdError, OSError) as error:
            hint = error.hint if isinstance(error, TierdError) else ""
            log.error("work_impossible", reason=reason_of(error), hint=hint)
        except Exception:
            log.exception("work_defect", consequence="all work stopped, and begins anew")
        failures = 1 if reached else failures + 1
        await pause(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS)) - 1])


async def lead_once(settings: ControllerSettings, holder: str, work: Work) -> bool:
    """Do `work(epoch)` as the leader; False if somebody else leads. Raises DatabaseError, and what the work raises."""
    async with connected(settings) as session:
        await require_current(session)
        try:
            epoch = await begin_epoch(session, holder)
        except NotLeaderError:
            return False
        await _hold(session, epoch, Standing(), work, settings.shutdown_timeout / 2)
    return True


async def _begin(session: Connection, holder: str, standing: Standing, pause: Pause) -> int:
    while True:
        try:
            return await begin_epoch(session, holder)
        except NotLeaderError as error:
            standing.standby(error)
        await pause(STANDBY_SECONDS)


async def _hold(session: Connection, epoch: int, standing: Standing, work: Work, patience_s: float) -> None:
    """Do the work for as long as the session lives. Raises DatabaseError if that ends first.

    Work that does not end, because a thread waits for a source that hangs, is waited for; but the session is given up
    after a while, so that somebody else can lead. (Such a thread keeps even a killed process, and its sockets.)
    """

    async def do() -> None:
        await work(epoch)

    standing.leading(epoch)
    await together(_watch(session), do(), late_s=patience_s, late=session.terminate)


async def _watch(session: Connection) -> None:
    """Ends with the session: a server that closes it is heard at once, one that is silent soon."""
    gone = asyncio.Event()
    session.add_termination_listener(lambda _: gone.set())
    while True:
        try:
            await asyncio.wait_for(gone.wait(), _WATCH_SECONDS)
        except TimeoutError:
            await _ask(session)
        else:
            raise DatabaseError("the session that leads was ended", hint="did the server restart, or a pooler?")


async def _ask(session: Connection) -> None:
    try:
        await asyncio.wait_for(session.fetchval("SELECT 1"), _ANSWER_SECONDS)
    except TimeoutError:
        raise DatabaseError(
            f"the session that leads got no answer for {_ANSWER_SECONDS:.0f} s", hint="is the server overloaded?"
        ) from None
