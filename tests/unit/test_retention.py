"""Which hot models are to go: the policy alone, without a database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.controller.models.retention import Caps, HotModel, Rules, Spent, Verdict, decide

DAY = 86_400.0
GIB = 1 << 30
RULES = Rules(unused_s=30 * DAY, budget_bytes=0, budget_spares_s=DAY)
_SHARE = "later: cleanup_share_max is {} of the hot models a day, which is {}"
NO_CAPS = Caps(models_max=1_000_000, bytes_max=0, share_max=1.0)


def model(name: str, days: float, size: int = GIB, **more: Any) -> HotModel:
    return HotModel(name, size, days * DAY, **more)


def gone(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.model.model_id for verdict in verdicts if verdict.demote]


def reasons(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {verdict.model.model_id: verdict.reason for verdict in verdicts}


def test_what_nobody_read_for_long_goes_the_longest_unused_first() -> None:
    found = decide([model("a", 31), model("b", 29.9), model("c", 400), model("d", 30)], RULES, NO_CAPS)
    assert gone(found) == ["c", "a", "d"]
    assert reasons(found) == {
        "c": "not read for 400 days, unused_days is 30",
        "a": "not read for 31 days, unused_days is 30",
        "d": "not read for 30 days, unused_days is 30",
        "b": "read 29 days ago",
    }


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"pinned": True}, "pinned"),
        ({"open_on": ("n1", "n2")}, "open on n1, n2"),
        ({"open_on": tuple("abcdef")}, "open on a, b, c and 3 others"),
        ({"moving": "promote"}, "a promote is under way"),
        ({"vanished": True}, "not found in the source"),
    ],
)
def test_what_spares_a_model(more: dict[str, Any], reason: str) -> None:
    rules = RULES._replace(budget_bytes=1)
    assert decide([model("a", 400, **more)], rules, NO_CAPS) == [Verdict(model("a", 400, **more), False, reason)]


def test_the_least_recently_used_go_until_the_budget_holds_the_rest() -> None:
    models = [model("a", 5, 3 * GIB), model("b", 9, GIB), model("c", 2, GIB), model("d", 0.5, GIB)]
    found = decide(models, RULES._replace(budget_bytes=5 * GIB), NO_CAPS)
    assert gone(found) == ["b"]
    assert reasons(found)["b"] == (
        "hot models hold 6.0 GiB of 5.0 GiB, and this is the least recently used: not read for 9 days"
    )
    assert reasons(found)["a"] == "read 5 days ago, and there is room"
    assert gone(decide(models, RULES._replace(budget_bytes=4 * GIB), NO_CAPS)) == ["b", "a"]


def test_what_goes_by_age_makes_room_and_what_was_read_today_stays() -> None:
    models = [model("old", 40, 2 * GIB), model("b", 9, GIB), model("new", 0.5, 9 * GIB)]
    assert gone(decide(models, RULES._replace(budget_bytes=10 * GIB), NO_CAPS)) == ["old"]
    assert gone(decide(models, RULES._replace(budget_bytes=1), NO_CAPS)) == ["old", "b"]


@pytest.mark.parametrize(
    ("caps", "spent", "left", "reason"),
    [
        (NO_CAPS._replace(models_max=3), Spent(), 3, "later: cleanup_models_max is 3 a day"),
        (NO_CAPS._replace(models_max=3), Spent(2, 0), 1, "later: cleanup_models_max is 3 a day"),
        (NO_CAPS._replace(share_max=0.2), Spent(), 2, _SHARE.format(0.2, 2)),
        (NO_CAPS._replace(share_max=0.01), Spent(), 1, _SHARE.format(0.01, 1)),
        (NO_CAPS._replace(share_max=0.01), Spent(1, 0), 0, _SHARE.format(0.01, 1)),
        (NO_CAPS._replace(bytes_max=4 * GIB), Spent(), 4, "later: cleanup_bytes_max is 4.0 GiB a day"),
        (NO_CAPS._replace(bytes_max=4 * GIB), Spent(1, 3 * GIB), 1, "later: cleanup_bytes_max is 4.0 GiB a day"),
        (NO_CAPS._replace(bytes_max=GIB - 1), Spent(), 0, "never: alone larger than cleanup_bytes_max, 1.0 GiB a day"),
    ],
)  # fmt: skip
def test_a_clock_that_jumped_does_not_empty_the_hot_tier(caps: Caps, spent: Spent, left: int, reason: str) -> None:
    """All models look a thousand years old."""
    found = decide([model(f"m{number}", 365_000 + number) for number in range(10)], RULES, caps, spent)
    assert len(gone(found)) == left
    assert {verdict.reason for verdict in found if not verdict.demote} == {reason}
    assert gone(found) == [f"m{9 - number}" for number in range(left)], "the least recently used first"


@given(
    st.lists(
        st.builds(
            HotModel,
            st.text("abc", min_size=1, max_size=6),
            st.integers(0, 10 * GIB),
            st.floats(-DAY, 100 * DAY),
            pinned=st.booleans(),
            vanished=st.booleans(),
            moving=st.sampled_from(["", "demote"]),
            open_on=st.sampled_from([(), ("n",)]),
        ),
        unique_by=lambda one: one.model_id,
        max_size=30,
    ),
    st.builds(Rules, st.floats(1, 60 * DAY), st.integers(0, 50 * GIB), st.floats(0, 5 * DAY)),
    st.builds(Caps, st.integers(1, 30), st.integers(0, 50 * GIB), st.floats(0.01, 1)),
    st.builds(Spent, st.integers(0, 10), st.integers(0, 50 * GIB)),
)
def test_bounds_and_reasons_always_hold(models: list[HotModel], rules: Rules, caps: Caps, spent: Spent) -> None:
    found = decide(models, rules, caps, spent)
    assert sorted(verdict.model.model_id for verdict in found) == sorted(one.model_id for one in models)
    going = [verdict.model for verdict in found if verdict.demote]
    assert len(going) + spent.models <= max(caps.models_max, spent.models)
    assert len(going) <= max(1, caps.share_max * (len(models) + spent.models))
    if caps.bytes_max and going:
        assert sum(one.size_bytes for one in going) + spent.size_bytes <= caps.bytes_max
    for one in going:
        assert (one.pinned, one.open_on, one.moving, one.vanished) == (False, (), "", False)
        assert one.unused_s >= min(rules.unused_s, rules.budget_spares_s)
    assert all(verdict.reason for verdict in found)
