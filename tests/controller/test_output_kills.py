"""Outputs go cold, come back and are read all the while, though processes end between any two effects of a move.

The steps are those of models (`test_moves_kills.py`); what differs is tried here: a day's directory as the subject,
backups as the objects, and a row for each output. Every effect is tried, and between any two of them each is read.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from tests.controller.fate import Fate, Killed
from tests.controller.outputs import House, Leader, read
from tests.servers import run
from tierd.controller.moves.output_days import Day
from tierd.controller.source.moved_file import MoveRefused

DATE = "2026/01/12"
SECONDS = 600.0


@dataclass
class Outputs:
    """Some of one user and day, with their bytes by path below the outputs root."""

    house: House
    user: str
    files: dict[str, bytes]

    @property
    def subject(self) -> str:
        return f"outputs/{self.user}/{DATE}"

    @property
    def day(self) -> Day:
        return Day("outputs", self.user, DATE, [path.split("/", 1)[1] for path in self.files])

    def assert_readable(self, _: str = "") -> None:
        """At each moment each is there, and right."""
        for path, content in self.files.items():
            assert read(self.house, path) == content, path

    async def go_on(self, leader: Leader) -> None:
        """As a leader does with all moves."""
        for (move,) in await self.house.rows("SELECT id FROM moves WHERE subject = $1 ORDER BY id", self.subject):
            await leader.work.moves.advance(move)

    async def moves(self, kind: str) -> int:
        """How many of that kind there have been."""
        query = "SELECT count(*) FROM moves WHERE subject = $1 AND kind = $2"
        ((count,),) = await self.house.rows(query, self.subject, kind)
        return int(count)


async def demote(outputs: Outputs, leader: Leader) -> None:
    if not await outputs.moves("demote"):
        await leader.work.moves.demote_outputs(outputs.day, "old")
    await outputs.go_on(leader)


async def demote_and_delete(outputs: Outputs, leader: Leader) -> None:
    await demote(outputs, leader)
    await outputs.house.rows("UPDATE moves SET grace_until = now() WHERE subject = $1 RETURNING 1", outputs.subject)
    await outputs.go_on(leader)


async def undo(outputs: Outputs, leader: Leader) -> None:
    with suppress(MoveRefused):  # it is undone already
        await leader.work.moves.undo(outputs.subject)
    await outputs.go_on(leader)
    await leader.back_up()


async def promote(outputs: Outputs, leader: Leader) -> None:
    """They were read often: the leader brings them, and whoever looks for backups finds that they are hot."""
    if not await outputs.moves("promote"):
        query = "UPDATE generated_outputs SET recent_reads = 5, reads_since = now() WHERE user_id = $1 RETURNING 1"
        await outputs.house.rows(query, outputs.user)
        await leader.work.output_work.promotion.round()
    await outputs.go_on(leader)
    await leader.back_up()


@dataclass(frozen=True)
class Case:
    """`prepare`, which nobody disturbs, then `act`."""

    act: Callable[[Outputs, Leader], Awaitable[None]]
    states: list[str]
    hot: bool
    prepare: Callable[[Outputs, Leader], Awaitable[None]] | None = None


CASES = {
    "demote": Case(demote, ["in_grace"], hot=False),
    "delete": Case(demote_and_delete, ["done"], hot=False, prepare=demote),
    "undo": Case(undo, ["abandoned", "done"], hot=True, prepare=demote),
    "promote": Case(promote, ["done", "done"], hot=True, prepare=demote_and_delete),
}


class Bench:
    """A user with outputs of one day for each kill, all in one source."""

    def __init__(self, house: House, case: Case) -> None:
        self._house = house
        self._case = case
        self._numbers = 0

    async def new(self) -> Outputs:
        self._numbers += 1
        user = f"user{self._numbers}"
        files = {
            self._house.make(f"{user}/{DATE}", ending, content, str(uuid4())): content
            for ending, content in (("png", os.urandom(2000)), ("wav", os.urandom(500)))
        }
        outputs = Outputs(self._house, user, files)
        async with self._house.leading() as leader:
            await leader.scan()
            await leader.back_up()
            if self._case.prepare is not None:
                await self._case.prepare(outputs, leader)
        return outputs

    async def one(self, last: int) -> list[str]:
        """Kill at that effect; look; go on to the end; look again. The effects that were come by."""
        outputs = await self.new()
        created = await self._created(outputs)
        fate = Fate(last, outputs.assert_readable)
        with suppress(Killed):
            async with self._house.leading(fate) as leader:
                await self._case.act(outputs, leader)
        outputs.assert_readable()
        async with self._house.leading(Fate(0, outputs.assert_readable)) as leader:
            await self._case.act(outputs, leader)
        await self._assert_end(outputs, created)
        return fate.effects

    async def _created(self, outputs: Outputs) -> list[tuple[object, ...]]:
        query = "SELECT output_id, created_at FROM generated_outputs WHERE user_id = $1 ORDER BY 1"
        return await self._house.rows(query, outputs.user)

    async def _assert_end(self, outputs: Outputs, created: list[tuple[object, ...]]) -> None:
        case, house = self._case, self._house
        outputs.assert_readable()
        assert await self._created(outputs) == created, "nothing becomes younger by a move"
        states = await house.rows("SELECT state FROM moves WHERE subject = $1 ORDER BY id", outputs.subject)
        assert [state for (state,) in states] == case.states
        query = "SELECT hot_storage, cold_storage, version, pending_since FROM generated_outputs WHERE user_id = $1"
        assert await house.rows(query, outputs.user) == [(case.hot, True, 1, None)] * len(outputs.files)
        assert [(house.outputs / path).exists() for path in outputs.files] == [case.hot] * len(outputs.files)
        (move,) = (await house.rows("SELECT min(id) FROM moves WHERE subject = $1", outputs.subject))[0]
        kept = [f".tierd/trash/{move}"] if case.states == ["in_grace"] else []
        assert litter(house, move) == kept


def litter(house: House, move: int) -> list[str]:
    """What a move left at the top of the source."""
    source = house.root / "source"
    found: list[Path] = [path for path in (source / ".tierd").glob("*/*") if path.name == str(move)]
    return sorted(str(path.relative_to(source)) for path in found)


@pytest.fixture
def house(tmp_path: Path, schema: str) -> House:
    return House(tmp_path, schema)


@pytest.mark.parametrize("name", CASES)
def test_killed_between_any_two_effects(name: str, house: House) -> None:
    bench = Bench(house, CASES[name])
    with capture_logs():
        effects = run(bench.one(0), seconds=SECONDS)
        assert len(effects) > 15
        for last in range(1, len(effects) + 1):
            try:
                run(bench.one(last), seconds=SECONDS)
            except BaseException as error:
                error.add_note(f"killed at {last}: {effects[last - 1]}")
                raise
