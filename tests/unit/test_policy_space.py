"""What leaves the node tier and what may enter it: heat, LRU, watermarks, admission, prefetch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.policy import (
    GIB,
    NS,
    Admission,
    Candidate,
    Choice,
    Resident,
    Space,
    Watermarks,
    admit,
    heat_now,
    lru,
    next_victim,
    prefetch_order,
    refusal,
    surplus_bytes,
)

MARKS = Watermarks(0.10, 0.20)
DAY_NS = 86400 * NS
WEEK_S = 7 * 86400.0


def resident(
    name: str, held: int = 10, at: int = 0, heat: float = 1.0, *, leased: bool = False, pinned: bool = False
) -> Resident:
    return Resident(name.encode(), held, at, heat, leased, pinned)


def disk(*, total: int = 1000, free: int, held: int = 0, reserved: int = 0, limit: int | None = None) -> Space:
    """A disk, by default without a size limit of its own for the node tier."""
    return Space(total, free, held, reserved, total if limit is None else limit)


def names(residents: Iterable[Resident]) -> list[str]:
    return [one.model.decode() for one in residents]


def after(space: Space, need: int, gone: Iterable[Resident]) -> Space:
    """Once `gone` have left and `need` bytes came."""
    growth = need - sum(one.held_bytes for one in gone)
    return replace(space, free_bytes=space.free_bytes - growth, held_bytes=space.held_bytes + growth)


def evictable(one: Resident) -> bool:
    return one.held_bytes > 0 and not one.leased and not one.pinned


def fits(space: Space, free_ratio: float) -> bool:
    """The definition of the limits."""
    inside = space.held_bytes + space.reserved_bytes <= space.limit_bytes
    return inside and space.free_bytes >= free_ratio * space.total_bytes


heats = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 4.0])
all_residents = st.lists(
    st.builds(
        Resident,
        st.integers(0, 12).map(lambda number: b"m%d" % number),
        st.one_of(st.just(0), st.integers(1, 300)),
        st.integers(0, 4),
        heats,
        st.sampled_from([False, False, False, True]),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=10,
    unique_by=lambda one: one.model,
)


@st.composite
def tiers(draw: st.DrawFn) -> tuple[list[Resident], Space]:
    """A disk whose books agree: what is held, promised, free and used by others adds up."""
    residents = draw(all_residents)
    held = sum(one.held_bytes for one in residents)
    reserved, free, others = draw(st.integers(0, 50)), draw(st.integers(0, 500)), draw(st.integers(0, 300))
    total = held + reserved + free + others
    limit = draw(st.one_of(st.just(total), st.integers(0, total)))
    return residents, Space(total, free, held, reserved, limit)


watermarks = st.sampled_from([MARKS, Watermarks(), Watermarks(0, 0.5), Watermarks(0.3, 0.31)])


# --- heat ---


def test_heat_halves_with_each_half_life() -> None:
    at = 1_700_000_000 * NS
    assert heat_now(8.0, at, at, WEEK_S) == 8.0
    assert heat_now(8.0, at, at + 7 * DAY_NS, WEEK_S) == pytest.approx(4.0)
    assert heat_now(8.0, at, at + 21 * DAY_NS, WEEK_S) == pytest.approx(1.0)
    assert heat_now(8.0, at, at + 7 * DAY_NS, math.inf) == 8.0


def test_a_clock_that_ran_backwards_never_raises_heat() -> None:
    assert heat_now(8.0, 10 * DAY_NS, 0, 3600.0) == 8.0


def test_heat_of_long_ago_is_none() -> None:
    """A heat that was never set is at 0, the epoch: no overflow on the way."""
    assert heat_now(1e9, 0, 2**62, 1e-9) == 0.0


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 2**61), st.integers(0, 2**61), st.floats(1e-3, 1e9))
def test_heat_only_falls_and_keeps_its_order(heat: float, other: float, at: int, now: int, half_life: float) -> None:
    assert 0 <= heat_now(heat, at, now, half_life) <= heat
    assert heat_now(heat, at, max(at, now), half_life) >= heat_now(heat, at, max(at, now) + DAY_NS, half_life)
    cooler, hotter = sorted((heat, other))
    assert heat_now(cooler, at, now, half_life) <= heat_now(hotter, at, now, half_life)


# --- who is least recently used ---


def test_lru_is_by_time_then_by_name_and_leaves_out_what_stays() -> None:
    residents = [
        resident("new", at=9),
        resident("b", at=1),
        resident("leased", at=0, leased=True),
        resident("pinned", at=0, pinned=True),
        resident("empty", held=0, at=0),
        resident("a", at=1),
    ]
    assert names(lru(residents)) == ["a", "b", "new"]
    assert names(lru(iter(residents))) == ["a", "b", "new"]
    assert names(lru([])) == []


def test_next_victim() -> None:
    residents = [resident("hot", at=0, heat=5.0), resident("warm", at=1, heat=2.0), resident("cold", at=2, heat=0.5)]
    assert names([next_victim(residents) or resident("none")]) == ["hot"]
    assert next_victim(residents, spare=b"hot") == residents[1]
    assert next_victim(residents, colder_than=5.0) == residents[1], "strictly colder"
    assert next_victim(residents, colder_than=2.0) == residents[2]
    assert next_victim(residents, colder_than=0.5) is None
    assert next_victim(residents[:1], spare=b"hot") is None
    assert next_victim([]) is None


@given(all_residents, st.one_of(st.none(), heats), st.one_of(st.none(), st.just(b"m3")))
def test_lru_and_next_victim_against_the_definition(
    residents: list[Resident], colder_than: float | None, spare: bytes | None
) -> None:
    order = sorted(filter(evictable, residents), key=lambda one: (one.last_access_ns, one.model))
    assert list(lru(residents)) == order
    fitting = [one for one in order if one.model != spare and (colder_than is None or one.heat < colder_than)]
    assert next_victim(residents, colder_than=colder_than, spare=spare) == (fitting[0] if fitting else None)


# --- watermarks ---


@pytest.mark.parametrize(("start", "stop"), [(0.2, 0.1), (0.1, 0.1), (-0.1, 0.1), (0.5, 1.0), (math.nan, 0.1)])
def test_watermarks_that_make_no_sense(start: float, stop: float) -> None:
    with pytest.raises(ValueError, match="start < stop"):
        Watermarks(start, stop)


@pytest.mark.parametrize(
    ("free", "evicting", "surplus"),
    [
        (100, False, 0),
        (99, False, 101),
        (0, False, 200),
        (150, False, 0),
        (150, True, 50),
        (199, True, 1),
        (200, True, 0),
        (900, True, 0),
    ],
)
def test_eviction_starts_below_the_one_mark_and_stops_at_the_other(free: int, evicting: bool, surplus: int) -> None:
    assert surplus_bytes(disk(free=free), MARKS, evicting=evicting) == surplus


def test_what_exceeds_the_size_limit_must_leave_however_empty_the_disk() -> None:
    space = disk(free=900, held=80, reserved=30, limit=100)
    assert surplus_bytes(space, MARKS, evicting=False) == 10
    assert surplus_bytes(replace(space, held_bytes=70), MARKS, evicting=False) == 0
    assert surplus_bytes(replace(space, free_bytes=95), MARKS, evicting=False) == 105, "the larger of the two"


@given(tiers(), watermarks, st.booleans(), st.integers(0, 100))
def test_surplus_is_what_it_takes(
    tier: tuple[list[Resident], Space], marks: Watermarks, evicting: bool, more: int
) -> None:
    _, space = tier
    surplus = surplus_bytes(space, marks, evicting=evicting)
    assert surplus >= 0
    gone = replace(space, free_bytes=space.free_bytes + surplus, held_bytes=space.held_bytes - surplus)
    if surplus:
        assert surplus_bytes(gone, marks, evicting=False) == 0, "eviction of that much ends it"
    assert surplus_bytes(gone, marks, evicting=True) == 0 or not evicting
    assert surplus_bytes(space, marks, evicting=True) >= surplus_bytes(space, marks, evicting=False)
    assert (surplus_bytes(space, marks, evicting=False) == 0) == fits(space, marks.start)
    assert (surplus_bytes(space, marks, evicting=True) == 0) == fits(space, marks.stop)
    emptier = replace(space, free_bytes=space.free_bytes + more)
    assert surplus_bytes(emptier, marks, evicting=evicting) <= surplus, "more room never asks for more"


# --- admission ---


def test_what_has_room_pushes_nobody_out() -> None:
    assert admit(100, b"new", 0.0, [resident("cold", heat=0.0)], disk(free=200), MARKS) == Admission((), None)


def test_the_least_recently_used_of_the_colder_leave() -> None:
    residents = [
        resident("hot", 50, at=0, heat=3.0),
        resident("equal", 50, at=1, heat=2.0),
        resident("own", 50, at=2, heat=0.1),
        resident("leased", 50, at=3, heat=0.1, leased=True),
        resident("pinned", 50, at=4, heat=0.1, pinned=True),
        resident("old", 50, at=5, heat=1.9),
        resident("newer", 50, at=6, heat=0.1),
        resident("newest", 50, at=7, heat=0.1),
    ]
    found = admit(90, b"own", 2.0, residents, disk(free=100, held=400), MARKS)
    assert (names(found.victims), found.refused) == (["old", "newer"], None)


def test_a_refusal_looks_at_no_more_than_it_takes_to_tell() -> None:
    """Who fits without anybody leaving is told so at once, however much the node holds."""

    def residents(count: int) -> Iterable[Resident]:
        yield from (resident(f"{number}", 10) for number in range(count))
        pytest.fail("one too many was looked at")

    def refused(need: int, count: int, heat: float = 2.0, free: int = 100) -> str | None:
        return refusal(need, b"new", heat, residents(count), disk(free=free), Watermarks(0.0, 0.1))

    assert refused(100, 0) is None
    assert refused(101, 1) is None
    assert refused(120, 2) is None
    assert refused(1001, 0) is not None, "more than there will ever be"


@given(tiers(), st.integers(0, 1500), heats, watermarks)
def test_a_refusal_is_what_admission_says(
    tier: tuple[list[Resident], Space], need: int, heat: float, marks: Watermarks
) -> None:
    residents, space = tier
    told = refusal(need, b"m3", heat, residents, space, marks)
    assert told == admit(need, b"m3", heat, residents, space, marks).refused
    others = [one for one in residents if evictable(one) and one.model != b"m3"]
    all_gone = after(space, need, [one for one in others if one.heat < heat])
    assert (told is None) == (fits(all_gone, marks.start) or fits(after(space, need, ()), marks.start))


def test_nobody_leaves_in_vain() -> None:
    """The small one is older, but the large one must leave anyway and is enough."""
    residents = [resident("small", 5, at=0, heat=0.0), resident("large", 500, at=1, heat=0.0)]
    found = admit(100, b"new", 1.0, residents, disk(free=100), MARKS)
    assert names(found.victims) == ["large"]


def test_the_size_limit_is_kept() -> None:
    space = disk(free=900, held=60, reserved=20, limit=100)
    assert admit(20, b"new", 1.0, [], space, MARKS).refused is None
    old = resident("old", 60, heat=0.0)
    assert admit(21, b"new", 1.0, [old], space, MARKS) == Admission((old,), None)


def test_refusals_say_why() -> None:
    space = Space(100 * GIB, 15 * GIB, 60 * GIB, 0, 70 * GIB)
    hot, leased = resident("hot", 30 * GIB, heat=9.0), resident("leased", 30 * GIB, heat=0.0, leased=True)
    refused = {need: admit(need * GIB, b"new", 2.0, [hot, leased], space, MARKS) for need in (5, 20, 60, 71)}
    assert {need: found.refused for need, found in refused.items()} == {
        5: None,
        20: "would have to push out models as hot or hotter",
        60: "55 GiB would have to leave, but only 30 GiB is neither leased nor pinned",
        71: "needs 71 GiB, more than the node tier may ever hold (70 GiB)",
    }
    assert all(found.victims == () for found in refused.values())
    small = replace(space, limit_bytes=1000 * GIB)
    assert admit(91 * GIB, b"new", 2.0, [hot], small, MARKS).refused == (
        "needs 91 GiB, more than the node tier may ever hold (90 GiB)"
    )


@settings(max_examples=200)
@given(tiers(), watermarks, st.integers(0, 600), heats, st.sampled_from([b"m0", b"m1", b"new"]))
def test_admission_keeps_its_promises(
    tier: tuple[list[Resident], Space], marks: Watermarks, need: int, heat: float, model: bytes
) -> None:
    residents, space = tier
    found = admit(need, model, heat, residents, space, marks)
    colder = [one for one in residents if evictable(one) and one.heat < heat and one.model != model]
    assert (found.refused is None) == fits(after(space, need, colder), marks.start), "refused only if nothing helps"
    if found.refused is not None:
        assert found.victims == ()
        return
    victims = found.victims
    assert not any(one.leased or one.pinned or one.model == model or one.heat >= heat for one in victims)
    assert fits(after(space, need, victims), marks.start)
    for spared in victims:
        assert not fits(after(space, need, [one for one in victims if one != spared]), marks.start), "in vain"
    order = list(lru(colder))
    assert list(victims) == [one for one in order if one in victims], "in LRU order"
    if victims:
        newer = order[: order.index(victims[-1])]
        assert not fits(after(space, need, newer), marks.start), "nobody leaves if older ones are enough"


@given(tiers(), watermarks, st.integers(1, 600), heats)
def test_who_asks_for_less_or_is_hotter_is_never_worse_off(
    tier: tuple[list[Resident], Space], marks: Watermarks, need: int, heat: float
) -> None:
    residents, space = tier
    if admit(need, b"new", heat, residents, space, marks).refused is None:
        assert admit(need - 1, b"new", heat, residents, space, marks).refused is None
        assert admit(need, b"new", heat + 1, residents, space, marks).refused is None
        roomier = replace(space, free_bytes=space.free_bytes + 1, total_bytes=space.total_bytes + 1)
        assert admit(need, b"new", heat, residents, roomier, marks).refused is None


# --- prefetch ---


def candidate(name: str, missing: int = 100, heat: float = 1.0, *, pinned: bool = False) -> Candidate:
    return Candidate(name.encode(), missing, heat, pinned)


def choose(
    candidates: list[Candidate], residents: list[Resident], space: Space, min_heat: float = 0.0
) -> dict[str, Choice]:
    """The choices by name, in their order."""
    return {one.model.decode(): one for one in prefetch_order(candidates, residents, space, MARKS, min_heat)}


def test_the_pinned_come_first_then_the_hottest_then_by_name() -> None:
    found = choose(
        [candidate("b"), candidate("a"), candidate("hot", heat=9.0), candidate("pin", heat=0.0, pinned=True)],
        [],
        disk(free=500),
        min_heat=0.5,
    )
    assert list(found) == ["pin", "hot", "a", "b"]
    assert [one.take for one in found.values()] == [True, True, True, False], "free stays at the mark of 200"


def test_each_line_says_why() -> None:
    residents = [
        resident("warm", 100, heat=2.0),
        resident("cool", 40, heat=0.3),
        resident("cold", 40, heat=0.2),
        resident("there", 10, heat=3.5),
    ]
    found = choose(
        [
            candidate("there", 0, heat=3.5),
            candidate("first", 50, heat=3.21),
            candidate("large", 900, heat=3.0),
            candidate("second", 100, heat=1.5),
            candidate("third", 120, heat=1.4),
            candidate("rare", 10, heat=0.4),
            candidate("pin", 25, heat=0.0, pinned=True),
        ],
        residents,
        disk(free=245, held=190),
        min_heat=0.5,
    )
    assert {name: (one.take, one.victims, one.reason.partition(", ")[2]) for name, one in found.items()} == {
        "pin": (True, (), "fits"),
        "there": (False, (), "on the node already"),
        "first": (True, (b"cold",), "pushes out 1 colder model"),
        "large": (False, (), "needs 8.38e-07 GiB, more than the node tier may ever hold (7.45e-07 GiB)"),
        "second": (False, (), "would have to push out models as hot or hotter"),
        "third": (False, (), "would have to push out models as hot or hotter"),
        "rare": (False, (), "prefetch begins at heat 0.5"),
    }
    assert found["pin"].reason == "pinned, fits"
    assert found["first"].reason == "heat 3.21, pushes out 1 colder model"
    assert choose([candidate("busy", heat=12345.6)], [], disk(free=900))["busy"].reason == "heat 12346, fits"


def test_a_pin_outweighs_heat_but_neither_leases_nor_pins() -> None:
    residents = [
        resident("hot", 50, heat=9.0),
        resident("leased", 50, heat=0.0, leased=True),
        resident("pinned", 50, heat=0.0, pinned=True),
    ]
    space = disk(free=200, held=150)
    found = choose([candidate("pin", 50, heat=0.0, pinned=True)], residents, space)["pin"]
    assert (found.take, found.victims, found.reason) == (True, (b"hot",), "pinned, pushes out 1 model")
    found = choose([candidate("pin", 51, heat=0.0, pinned=True)], residents, space)["pin"]
    assert (found.take, found.victims) == (False, ())


def test_the_coldest_leave_for_prefetch_not_the_least_recently_used() -> None:
    """Else the old but warm one would come back, at the cost of the cold one."""
    residents = [resident("warm", 100, at=0, heat=2.0), resident("cold", 100, at=9, heat=0.1)]
    found = choose([candidate("hot", 100, heat=5.0)], residents, disk(free=200, held=200))["hot"]
    assert found.victims == (b"cold",)


def test_what_an_earlier_choice_pushed_out_does_not_come_back_for_a_later_one() -> None:
    residents = [resident("part", 60, heat=1.0)]
    found = choose(
        [candidate("hot", 60, heat=5.0), candidate("part", 40, heat=1.0)], residents, disk(free=200, held=60)
    )
    assert found["hot"].victims == (b"part",)
    assert found["part"] == Choice(b"part", 100, False, (), "heat 1, has to leave for hotter models")


def test_nobody_leaves_for_himself() -> None:
    """Not even if what is held was judged a moment later, a little colder."""
    found = choose([candidate("part", 40, heat=1.0)], [resident("part", 60, heat=0.9)], disk(free=200, held=60))
    assert (found["part"].take, found["part"].victims) == (False, ())


def test_each_choice_counts_towards_the_size_limit() -> None:
    found = choose([candidate("a", 60), candidate("b", 60)], [], disk(free=900, limit=100))
    assert [one.take for one in found.values()] == [True, False]


def test_what_a_choice_leaves_over_is_there_for_the_next() -> None:
    residents = [resident("large", 100, heat=0.1)]
    found = choose([candidate("a", 40), candidate("b", 60)], residents, disk(free=200, held=100))
    assert [(one.take, one.victims) for one in found.values()] == [(True, (b"large",)), (True, ())]


@st.composite
def tiers_with_candidates(draw: st.DrawFn) -> tuple[list[Resident], Space, list[Candidate]]:
    """Every resident may be incomplete, and some models are not there at all."""
    residents, space = draw(tiers())
    known = [Candidate(one.model, draw(st.sampled_from([0, 0, 30, 120])), one.heat, one.pinned) for one in residents]
    missing = [
        Candidate(b"new%d" % number, draw(st.integers(1, 300)), draw(heats), draw(st.booleans()))
        for number in range(draw(st.integers(0, 5)))
    ]
    return residents, space, draw(st.permutations(known + missing))


def carried_out(
    residents: list[Resident], space: Space, candidates: list[Candidate], choices: list[Choice]
) -> tuple[list[Resident], Space, list[Candidate]]:
    """The world after these choices; what was fetched counts as unused for ever, which tempts LRU most."""
    now = {one.model: one for one in residents}
    wanted = {one.model: one for one in candidates}
    for choice in filter(lambda one: one.take, choices):
        gone = [now.pop(name) for name in choice.victims]
        space = after(space, choice.need_bytes, gone)
        wanted.update(
            (one.model, replace(wanted[one.model], missing_bytes=wanted[one.model].missing_bytes + one.held_bytes))
            for one in gone
        )
        come = wanted[choice.model]
        held = now[choice.model].held_bytes if choice.model in now else 0
        leased = choice.model in now and now[choice.model].leased
        now[choice.model] = Resident(come.model, held + choice.need_bytes, 0, come.heat, leased, come.pinned)
        wanted[choice.model] = replace(come, missing_bytes=0)
    return list(now.values()), space, list(wanted.values())


@settings(max_examples=200)
@given(tiers_with_candidates(), watermarks, st.sampled_from([0.0, 1.0]))
def test_prefetch_keeps_its_promises(
    world: tuple[list[Resident], Space, list[Candidate]], marks: Watermarks, min_heat: float
) -> None:
    residents, space, candidates = world
    choices = prefetch_order(candidates, residents, space, marks, min_heat)
    known, wanted = {one.model: one for one in residents}, {one.model: one for one in candidates}
    keys = [(not wanted[one.model].pinned, -wanted[one.model].heat, one.model) for one in choices]
    assert keys == sorted(keys)
    assert len(choices) == len(candidates)
    taken = [one for one in choices if one.take]
    gone = [name for one in taken for name in one.victims]
    assert len(gone) == len(set(gone))
    assert not {one.model for one in taken} & set(gone), "what is chosen is not pushed out again, nor the reverse"
    assert all(one.reason and (one.take or not one.victims) for one in choices)
    for choice in taken:
        asked = wanted[choice.model]
        assert choice.need_bytes > 0
        assert asked.pinned or asked.heat >= min_heat
        for victim in (known[name] for name in choice.victims):
            assert evictable(victim)
            assert asked.pinned or victim.heat < asked.heat
    for choice in choices:
        held = known[choice.model].held_bytes if choice.model in set(gone) else 0
        assert choice.need_bytes == wanted[choice.model].missing_bytes + held


@settings(max_examples=200)
@given(tiers_with_candidates(), watermarks, st.sampled_from([0.0, 1.0]))
def test_prefetch_and_eviction_do_not_chase_each_other(
    world: tuple[list[Resident], Space, list[Candidate]], marks: Watermarks, min_heat: float
) -> None:
    residents, space, candidates = world
    for _ in range(4):
        choices = prefetch_order(candidates, residents, space, marks, min_heat)
        if not any(one.take for one in choices):
            return
        residents, space, candidates = carried_out(residents, space, candidates, choices)
        assert fits(space, marks.stop)
        assert surplus_bytes(space, marks, evicting=True) == 0, "eviction has nothing to do, even if it was at work"
    pytest.fail("prefetch goes on for ever")


@given(tiers_with_candidates(), watermarks, heats)
def test_prefetch_of_one_agrees_with_admission(
    world: tuple[list[Resident], Space, list[Candidate]], marks: Watermarks, heat: float
) -> None:
    residents, space, _ = world
    (choice,) = prefetch_order([Candidate(b"new", 100, heat, False)], residents, space, marks, 0.0)
    stricter = Watermarks(marks.stop, (1 + marks.stop) / 2)
    assert choice.take == (admit(100, b"new", heat, residents, space, stricter).refused is None)
