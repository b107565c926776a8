"""Which hot models are demoted, and why each other one is not. Pure: ages and sizes are arguments, no clock is read.

Two reasons to go: not read for `unused_s`, or the least recently used while hot models hold more than a budget. Bounds
for one day come last, so that a wrong clock, a wrong setting or a catalogue that was restored from somewhere cannot
empty the hot tier before somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_DAY_SECONDS = 86_400
_GIB = 1 << 30
_NODES_NAMED = 3


class HotModel(NamedTuple):
    """A hot model as the catalogue has it. `unused_s` is by the database's clock."""

    model_id: str
    size_bytes: int
    unused_s: float
    pinned: bool = False
    vanished: bool = False
    moving: str = ""
    """What moves it, such as `promote`; empty if nothing does."""
    open_on: tuple[str, ...] = ()
    """Nodes where a file of it is open."""


class Rules(NamedTuple):
    """What is to go. `budget_bytes` 0: no budget; for its sake nothing goes that was read in `budget_spares_s`."""

    unused_s: float
    budget_bytes: int
    budget_spares_s: float


class Caps(NamedTuple):
    """Bounds of a day: models, bytes (0: no bound), share of the hot models (one may always go)."""

    models_max: int
    bytes_max: int
    share_max: float


class Spent(NamedTuple):
    """What was demoted in the last day already."""

    models: int = 0
    size_bytes: int = 0


_NOTHING = Spent()


class Verdict(NamedTuple):
    """What becomes of one model."""

    model: HotModel
    demote: bool
    reason: str


def decide(models: Iterable[HotModel], rules: Rules, caps: Caps, spent: Spent = _NOTHING) -> list[Verdict]:
    """A verdict for each, the least recently used first: in that order they are to be demoted."""
    ordered = sorted(models, key=lambda model: (-model.unused_s, model.model_id))
    reasons = {model.model_id: _why_spared(model) for model in ordered}
    free = [model for model in ordered if not reasons[model.model_id]]
    wanted = {model.model_id: _days_text(model, rules) for model in free if model.unused_s >= rules.unused_s}
    wanted |= _for_the_budget(ordered, [model for model in free if model.model_id not in wanted], wanted, rules)
    capped = _over_the_caps([model for model in free if model.model_id in wanted], len(ordered), caps, spent)
    return [
        Verdict(model, False, reasons[model.model_id] or capped[model.model_id])
        if reasons[model.model_id] or model.model_id in capped
        else Verdict(model, model.model_id in wanted, wanted.get(model.model_id) or _recent_text(model, rules))
        for model in ordered
    ]


def _why_spared(model: HotModel) -> str:
    if model.pinned:
        return "pinned"
    if model.open_on:
        others = len(model.open_on) - _NODES_NAMED
        named = ", ".join(model.open_on[:_NODES_NAMED])
        return f"open on {named}" + (f" and {others} others" if others > 0 else "")
    if model.moving:
        return f"a {model.moving} is under way"
    return "not found in the source" if model.vanished else ""


def _for_the_budget(
    all_hot: Sequence[HotModel], free: Sequence[HotModel], wanted: Iterable[str], rules: Rules
) -> dict[str, str]:
    """Those that must go beside `wanted` so that what stays fits, the least recently used first, with the reason."""
    if not rules.budget_bytes:
        return {}
    going = set(wanted)
    held = sum(model.size_bytes for model in all_hot if not model.vanished)
    excess = held - rules.budget_bytes - sum(model.size_bytes for model in all_hot if model.model_id in going)
    more: dict[str, str] = {}
    for model in free:
        if excess <= 0 or model.unused_s < rules.budget_spares_s:
            break  # all that follow were read later
        if model.size_bytes:
            more[model.model_id] = (
                f"hot models hold {_gib(held)} of {_gib(rules.budget_bytes)}, and this is the least recently used:"
                f" not read for {_days(model.unused_s)}"
            )
            excess -= model.size_bytes
    return more


def _over_the_caps(wanted: Sequence[HotModel], hot: int, caps: Caps, spent: Spent) -> dict[str, str]:
    """Those for which there is no room left today, with the reason."""
    share = max(1, int(caps.share_max * (hot + spent.models)))
    count, size = spent.models, spent.size_bytes
    over: dict[str, str] = {}
    for model in wanted:
        reason = ""
        if count >= caps.models_max:
            reason = f"later: cleanup_models_max is {caps.models_max} a day"
        elif count >= share:
            reason = f"later: cleanup_share_max is {caps.share_max:g} of the hot models a day, which is {share}"
        elif caps.bytes_max and model.size_bytes > caps.bytes_max:
            reason = f"never: alone larger than cleanup_bytes_max, {_gib(caps.bytes_max)} a day"
        elif caps.bytes_max and size + model.size_bytes > caps.bytes_max:
            reason = f"later: cleanup_bytes_max is {_gib(caps.bytes_max)} a day"
        if reason:
            over[model.model_id] = reason
        else:
            count, size = count + 1, size + model.size_bytes
    return over


def _days_text(model: HotModel, rules: Rules) -> str:
    return f"not read for {_days(model.unused_s)}, unused_days is {rules.unused_s / _DAY_SECONDS:g}"


def _recent_text(model: HotModel, rules: Rules) -> str:
    if rules.budget_bytes:
        return f"read {_days(model.unused_s)} ago, and there is room"
    return f"read {_days(model.unused_s)} ago"


def _days(seconds: float) -> str:
    days = int(max(0.0, seconds) // _DAY_SECONDS)
    if days == 0:
        return "less than a day"
    return "1 day" if days == 1 else f"{days} days"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
