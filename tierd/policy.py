"""Pure decisions: opens grouped into loads, what leaves the node tier, what may enter it. No clock, no files.

`at` and `now` are arguments. All times are nanoseconds since the epoch, all sizes bytes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

NS = 1_000_000_000
GIB = 1 << 30


@dataclass(slots=True)
class _Run:
    """The load that a model is in, or was last in."""

    active: int
    last_ns: int
    hit: bool | None = None  # None until the first open was judged


class LoadGrouper:
    """Groups the opens of each model into loads: first open to last close, plus an idle gap.

    Invariant: a run with `active > 0` is never forgotten; idle runs are, at most `capacity` are kept
    (the least recently used go first; forgetting one can only count a later open as a new load).
    """

    def __init__(self, idle_gap_s: float, capacity: int = 10_000) -> None:
        self._gap_ns = int(idle_gap_s * NS)
        self._capacity = capacity
        self._runs: OrderedDict[bytes, _Run] = OrderedDict()

    def opened(self, model: bytes, at_ns: int) -> bool:
        """Note an open; True if it begins a new load."""
        run = self._runs.get(model)
        begins = run is None or (run.active == 0 and at_ns - run.last_ns > self._gap_ns)
        if run is None or begins:
            run = self._runs[model] = _Run(0, at_ns)
        run.active += 1
        run.last_ns = max(run.last_ns, at_ns)
        self._runs.move_to_end(model)
        self._shrink()
        return begins

    def closed(self, model: bytes, at_ns: int) -> None:
        """Note the close of a descriptor whose open was noted."""
        run = self._runs.get(model)
        if run is None:
            return
        run.active = max(0, run.active - 1)
        run.last_ns = max(run.last_ns, at_ns)
        self._runs.move_to_end(model)
        self._shrink()

    def served(self, model: bytes, *, from_node: bool) -> int:
        """What the open just noted adds to the hits: a load is a hit while every open in it was from the node tier.

        1 for the open that begins a load if it was, -1 for the first one after it that was not, else 0.
        """
        run = self._runs.get(model)
        if run is None:
            return 0
        first, was = run.hit is None, bool(run.hit)
        run.hit = from_node and (first or was)
        return int(run.hit) - int(was)

    def active(self, model: bytes) -> int:
        """How many descriptors of the model are open now."""
        run = self._runs.get(model)
        return run.active if run else 0

    def __len__(self) -> int:
        return len(self._runs)

    def _shrink(self) -> None:
        surplus = len(self._runs) - self._capacity
        if surplus <= 0:
            return
        idle = (model for model, run in self._runs.items() if run.active == 0)
        for model in list(itertools.islice(idle, surplus)):
            del self._runs[model]


def heat_now(heat: float, at_ns: int, now_ns: int, half_life_s: float) -> float:
    """What loads that weighed `heat` at `at_ns` weigh at `now_ns`: half for each `half_life_s` (above 0) between.

    Time that ran backwards changes nothing. Decay keeps the order: of two models whose heat was taken to the same
    time, the hotter one stays hotter until the other is loaded.
    """
    return float(heat * 0.5 ** (max(0, now_ns - at_ns) / NS / half_life_s))


@dataclass(frozen=True, slots=True)
class Resident:
    """What the node tier holds of one model; each model at most once in a collection.

    `last_access_ns` is the last open or close, or when the bytes came if that is later (else what prefetch brings
    would be the least recently used at once); `heat` is decayed to now (`heat_now`).
    """

    model: bytes
    held_bytes: int
    last_access_ns: int
    heat: float
    leased: bool
    pinned: bool


@dataclass(frozen=True, slots=True)
class Space:
    """The cache's file system as measured (`total_bytes`, `free_bytes`) and the node tier's own books.

    `held_bytes` are committed copies, `reserved_bytes` are promised to running fills. Reservations are allocated
    on disk when they are made, so `free_bytes` excludes both. `limit_bytes` is the most that the node tier may hold.
    """

    total_bytes: int
    free_bytes: int
    held_bytes: int
    reserved_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Free ratios: eviction starts below `start` and goes on up to `stop`. ValueError unless 0 <= start < stop < 1."""

    start: float = 0.10
    stop: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop < 1:
            raise ValueError(f"watermarks {self.start} and {self.stop}: need 0 <= start < stop < 1")


def surplus_bytes(space: Space, marks: Watermarks, *, evicting: bool) -> int:
    """How many bytes must leave now, 0 if none; `evicting` says whether the last answer was above 0.

    Over the size limit: what is too much. Free ratio below `start`: as many as bring it to `stop`, and so until it
    is there, so that eviction works in few large steps.
    """
    low = space.free_bytes < (marks.stop if evicting else marks.start) * space.total_bytes
    return _shortfall(0, space, marks.stop if low else 0.0)


def lru(residents: Iterable[Resident]) -> Iterator[Resident]:
    """Those that may be evicted, the least recently used first, equals by name.

    A heap, not a sort: eviction wants the first few of many (figures: `bench.ranking`).
    """
    found = [resident for resident in residents if _evictable(resident)]
    order = [(resident.last_access_ns, resident.model, place) for place, resident in enumerate(found)]
    heapq.heapify(order)
    while order:
        yield found[heapq.heappop(order)[2]]


def next_victim(
    residents: Iterable[Resident], *, colder_than: float | None = None, spare: bytes | None = None
) -> Resident | None:
    """The least recently used that may be evicted, is not `spare` and, if given, strictly colder than `colder_than`."""
    fitting = (
        resident
        for resident in residents
        if _evictable(resident) and resident.model != spare and (colder_than is None or resident.heat < colder_than)
    )
    return min(fitting, key=lambda resident: (resident.last_access_ns, resident.model), default=None)


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a fill may start: `victims` must leave first; `refused` tells a person why not, None if it may."""

    victims: tuple[Resident, ...]
    refused: str | None


def admit(
    need_bytes: int, model: bytes, heat: float, residents: Iterable[Resident], space: Space, marks: Watermarks
) -> Admission:
    """May a fill of `need_bytes` for `model` start, and who leaves for it?

    `heat` counts the load that wants the fill. Afterwards the size limit holds and the free ratio is at least
    `start`. Victims are the least recently used of those strictly colder, none of them in vain.
    """
    room = _shortfall(need_bytes, space, marks.start)
    if not room:
        return Admission((), None)
    others = [one for one in residents if one.model != model]
    refused = refusal(need_bytes, model, heat, others, space, marks)
    colder = (one for one in others if one.heat < heat)
    return Admission((), refused) if refused else Admission(_needed(room, _until(room, lru(colder))), None)


def refusal(
    need_bytes: int, model: bytes, heat: float, residents: Iterable[Resident], space: Space, marks: Watermarks
) -> str | None:
    """What `admit` would say in `refused`, from no more of `residents` than it takes to tell: none if there is room."""
    room = _shortfall(need_bytes, space, marks.start)
    colder_bytes = hotter_bytes = 0
    if room and need_bytes <= _most(space, marks.start):
        for resident in residents:
            if resident.model == model or not _evictable(resident):
                continue
            if resident.heat >= heat:
                hotter_bytes += resident.held_bytes
                continue
            colder_bytes += resident.held_bytes
            if colder_bytes >= room:
                break
    return _refusal(need_bytes, space, marks.start, colder_bytes, hotter_bytes)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that prefetch could bring; `missing_bytes` are those not on the node, `heat` is decayed to now."""

    model: bytes
    missing_bytes: int
    heat: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What prefetch would do with one model: fetch `need_bytes` after `victims` left (if `take`), and why."""

    model: bytes
    need_bytes: int
    take: bool
    victims: tuple[bytes, ...]
    reason: str


def prefetch_order(
    candidates: Iterable[Candidate],
    residents: Iterable[Resident],
    space: Space,
    marks: Watermarks,
    min_heat: float,
) -> list[Choice]:
    """What prefetch would do now: the pinned first, then the hottest, each with what the earlier ones left.

    Each is judged as `admit` does, with three differences. A pin outweighs any heat. The free ratio stays at least
    `stop`, so that eviction has nothing to do afterwards. The coldest leave first, not the least recently used, for
    they are the ones who would not come back. Asking again and again ends: who comes is hotter than who leaves.
    """
    leavers = _Leavers(residents)
    left: dict[bytes, int] = {}
    choices = []
    for candidate in sorted(candidates, key=lambda one: (not one.pinned, -one.heat, one.model)):
        need = candidate.missing_bytes + left.get(candidate.model, 0)
        if candidate.model in left:
            found = Admission((), "has to leave for hotter models")
        else:
            found = _consider(candidate, space, marks, min_heat, leavers)
        names = tuple(victim.model for victim in found.victims)
        choices.append(Choice(candidate.model, need, found.refused is None, names, _reason(candidate, found)))
        if found.refused is None:
            left.update((victim.model, victim.held_bytes) for victim in found.victims)
            growth = need - _held(found.victims)
            space = replace(space, free_bytes=space.free_bytes - growth, held_bytes=space.held_bytes + growth)
    return choices


def _consider(candidate: Candidate, space: Space, marks: Watermarks, min_heat: float, leavers: _Leavers) -> Admission:
    need = candidate.missing_bytes
    if need == 0:
        return Admission((), "on the node already")
    if not candidate.pinned and candidate.heat < min_heat:
        return Admission((), f"prefetch begins at heat {_heat_text(min_heat)}")
    leavers.keep(candidate.model, math.inf if candidate.pinned else candidate.heat)
    refused = _refusal(need, space, marks.stop, leavers.colder_bytes, leavers.hotter_bytes)
    return Admission((), refused) if refused else Admission(leavers.take(_shortfall(need, space, marks.stop)), None)


class _Leavers:
    """Who may leave for whom, over admissions whose heat never rises: whoever is too hot once stays for good.

    Invariants: `colder_bytes` is what `_colder` holds; `hotter_bytes` is held by those who stay for their heat alone;
    `_order` has all of `_colder`, the coldest first, and some who stay or have left, which are skipped.
    """

    def __init__(self, residents: Iterable[Resident]) -> None:
        order = sorted(filter(_evictable, residents), key=lambda one: (one.heat, one.last_access_ns, one.model))
        self._order = deque(order)
        self._colder = {resident.model: resident for resident in order}
        self.colder_bytes = _held(order)
        self.hotter_bytes = 0

    def keep(self, model: bytes, heat: float) -> None:
        """From now on `model` stays, and so do those as hot as `heat` or hotter."""
        own = self._colder.pop(model, None)
        self.colder_bytes -= own.held_bytes if own else 0
        while self._order and self._order[-1].heat >= heat:
            hot = self._order.pop()
            if self._colder.pop(hot.model, None):
                self.colder_bytes -= hot.held_bytes
                self.hotter_bytes += hot.held_bytes

    def take(self, room: int) -> tuple[Resident, ...]:
        """Remove the coldest that hold `room` bytes together (`colder_bytes` at most), none in vain."""
        taken = _until(room, (one for one in _drain(self._order) if one.model in self._colder))
        victims = _needed(room, taken)
        for victim in victims:
            self.colder_bytes -= self._colder.pop(victim.model).held_bytes
        self._order.extendleft(one for one in reversed(taken) if one.model in self._colder)
        return victims


def _evictable(resident: Resident) -> bool:
    return resident.held_bytes > 0 and not resident.leased and not resident.pinned


def _held(residents: Iterable[Resident]) -> int:
    return sum(resident.held_bytes for resident in residents)


def _drain(waiting: deque[Resident]) -> Iterator[Resident]:
    while waiting:
        yield waiting.popleft()


def _until(room: int, order: Iterator[Resident]) -> list[Resident]:
    """The first that hold `room` bytes together; no more than these are taken from `order`."""
    taken: list[Resident] = []
    while room > 0:
        taken.append(next(order))
        room -= taken[-1].held_bytes
    return taken


def _needed(room: int, taken: list[Resident]) -> tuple[Resident, ...]:
    """Those of `taken` who must leave for `room` bytes: the last ones stay if the others are enough."""
    spare = _held(taken) - room
    victims = deque[Resident]()
    for resident in reversed(taken):
        if resident.held_bytes <= spare:
            spare -= resident.held_bytes
        else:
            victims.appendleft(resident)
    return tuple(victims)


def _refusal(need_bytes: int, space: Space, free_ratio: float, colder_bytes: int, hotter_bytes: int) -> str | None:
    """Why `need_bytes` cannot have room, None if they can."""
    most = _most(space, free_ratio)
    room = _shortfall(need_bytes, space, free_ratio)
    if need_bytes > most:
        return f"needs {_gib(need_bytes)}, more than the node tier may ever hold ({_gib(most)})"
    if room <= colder_bytes:
        return None
    if room <= colder_bytes + hotter_bytes:
        return "would have to push out models as hot or hotter"
    return (
        f"{_gib(room)} would have to leave, but only {_gib(colder_bytes + hotter_bytes)} is neither leased nor pinned"
    )


def _most(space: Space, free_ratio: float) -> int:
    """The bytes that a node tier may hold that has the disk for itself."""
    return min(space.limit_bytes, space.total_bytes - _at_least(free_ratio, space))


def _at_least(free_ratio: float, space: Space) -> int:
    """The bytes that must be free for this ratio."""
    return math.ceil(free_ratio * space.total_bytes)


def _shortfall(need_bytes: int, space: Space, free_ratio: float) -> int:
    """How many bytes must leave so that `need_bytes` more keep to the size limit and the free ratio; 0 if none."""
    over = space.held_bytes + space.reserved_bytes + need_bytes - space.limit_bytes
    missing = _at_least(free_ratio, space) + need_bytes - space.free_bytes
    return max(0, over, missing)


def _reason(candidate: Candidate, found: Admission) -> str:
    who = "pinned" if candidate.pinned else f"heat {_heat_text(candidate.heat)}"
    if found.refused is not None:
        return f"{who}, {found.refused}"
    if not found.victims:
        return f"{who}, fits"
    colder = "" if candidate.pinned else " colder"
    return f"{who}, pushes out {len(found.victims)}{colder} model{'s' if len(found.victims) > 1 else ''}"


def _heat_text(heat: float) -> str:
    return f"{heat:.3g}" if heat < 1000 else f"{heat:.0f}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3g} GiB"
