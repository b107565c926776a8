"""What one user may bring from the object store, on a clock of the test."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

from tierd.node.recall_bounds import HOUR_S, USERS_MAX, RecallBounds

ALICE, BOB = 1000, 1001
BUDGET = 3600


class Rig:
    """Bounds, with a clock and with what is on its way."""

    def __init__(self, models: int = 2, size: int = BUDGET) -> None:
        self.now = 0.0
        self.coming: set[bytes] = set()
        self.refused: list[str] = []
        self.bounds = RecallBounds(
            models, size, is_coming=lambda model: model in self.coming, refused=self.refused.append,
            clock=lambda: self.now,
        )  # fmt: skip

    def load(self, uid: int, model: bytes, size: int = 1) -> bool:
        """Of a model that is on its way from then on, if it may."""
        allowed = self.bounds.may_load(uid, model, lambda: size)
        if allowed:
            self.coming.add(model)
        return allowed


def test_so_many_models_at_once() -> None:
    rig = Rig(models=2)
    assert [rig.load(ALICE, model) for model in (b"a", b"b", b"c")] == [True, True, False]
    assert rig.refused == ["at_once"]
    assert rig.load(BOB, b"c"), "each user has bounds of his own"
    assert rig.load(ALICE, b"a"), "what is on its way goes on"
    rig.now += 60
    assert not rig.load(ALICE, b"d")
    rig.coming.discard(b"a")
    assert rig.load(ALICE, b"d"), "one has come"


def test_a_model_that_has_only_begun_counts() -> None:
    """Its first fill is not there yet when another of its files, or another model, is loaded."""
    rig = Rig(models=1)
    assert rig.bounds.may_load(ALICE, b"a", lambda: BUDGET)
    assert rig.bounds.may_load(ALICE, b"a", lambda: BUDGET), "charged once"
    assert not rig.bounds.may_load(ALICE, b"b", lambda: 0)


def test_so_many_bytes_an_hour() -> None:
    rig = Rig(models=0)
    assert rig.load(ALICE, b"a", BUDGET - 10)
    assert not rig.load(ALICE, b"b", 20)
    assert rig.refused == ["bytes"]
    rig.now += HOUR_S / BUDGET * 10
    assert rig.load(ALICE, b"b", 20), "it refills evenly"
    assert not rig.load(ALICE, b"c", 1)


def test_what_is_larger_than_a_budget_can_come_and_is_paid_for() -> None:
    rig = Rig(models=0)
    assert rig.load(ALICE, b"a", 2 * BUDGET)
    rig.now += HOUR_S
    assert not rig.load(ALICE, b"b", 1)
    rig.now += HOUR_S
    assert rig.load(ALICE, b"b", BUDGET)


def test_no_bounds() -> None:
    rig = Rig(models=0, size=0)
    assert all(rig.load(ALICE, str(number).encode(), 1 << 60) for number in range(100))


async def test_writers_wait_for_their_turn_and_have_an_errno_without_bytes() -> None:
    rig = Rig(models=1)
    entered: list[int] = []

    async def write(uid: int, done: trio.Event) -> None:
        async with rig.bounds.turn(uid, 10):
            entered.append(uid)
            await done.wait()

    done = trio.Event()
    async with trio.open_nursery() as nursery:
        for uid in (ALICE, ALICE, BOB):
            nursery.start_soon(write, uid, done)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(entered) == [ALICE, BOB], "the second one waits, others do not"
        done.set()
    assert sorted(entered) == [ALICE, ALICE, BOB]
    with pytest.raises(OSError, match="quota") as raised:
        async with rig.bounds.turn(ALICE, BUDGET):
            pass
    assert raised.value.errno == errno.EDQUOT
    assert rig.refused == ["bytes"]


def test_users_are_bounded() -> None:
    rig = Rig()
    for uid in range(2 * USERS_MAX):
        rig.load(uid, b"a")
    assert len(rig.bounds._users) == USERS_MAX
