"""What messages of nodes amount to: which batches count, what they add to each model, who reports what. Pure.

A batch counts once: if it is the next one of its boot, or if the node says that nothing older will come. One that was
applied before is a duplicate; one that is ahead of another that is still to come is a gap, and the node sends it again.

All ages are nanoseconds before the moment at which Redis told its time, and each is a difference within one clock: the
node's from access to sending, that of Redis from there on. So no node's calendar matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple
from uuid import UUID

from tierd.statistics import Message, ModelAccess, NumberedBatch, OpenReport, OutputNews

_NS_PER_MS = 1_000_000


class Boot(NamedTuple):
    """An index of a node: what sequences are counted within."""

    node_id: str
    boot: UUID


class Received(NamedTuple):
    """A message, and how long ago it came into the stream, by the clock of Redis."""

    message: Message
    age_ns: int

    @property
    def boot(self) -> Boot:
        """Whose it is."""
        return Boot(self.message.node_id, self.message.boot)

    def without_content(self) -> Received:
        """The same as a batch of nothing, from a node that does not know what is open."""
        message = self.message
        batch = NumberedBatch(sequence=message.batch.sequence, models=()) if message.batch is not None else None
        return self._replace(message=message.model_copy(update={"batch": batch, "report": OpenReport(leases=None)}))


class Known(NamedTuple):
    """What the database knows of a boot: the highest sequence that was applied, and whether this was the node's latest
    boot or another one was; None if there was none or this is a new one."""

    sequence: int
    was_latest: bool | None


@dataclass(slots=True)
class ModelSum:
    """What is to be added to one model."""

    age_ns: int
    hits: int = 0
    size_bytes: int | None = None

    def add(self, access: ModelAccess, age_ns: int) -> None:
        """One batch's part."""
        self.age_ns = min(self.age_ns, age_ns)
        self.hits += access.hits
        self.size_bytes = access.size_bytes or self.size_bytes


@dataclass(slots=True)
class OutputSum:
    """What is to be told of one output; ages are None where nothing was."""

    opens: int = 0
    access_age_ns: int | None = None
    written_age_ns: int | None = None
    removed_age_ns: int | None = None
    ended: int | None = None
    """Version of its object for which no stub stands any more."""

    def add(self, news: OutputNews, age_ns: Callable[[int | None], int | None]) -> None:
        """One batch's part; `age_ns` is how long ago something was."""
        self.opens += news.opens
        self.access_age_ns = _latest(self.access_age_ns, age_ns(news.last_access_ns))
        self.written_age_ns = _latest(self.written_age_ns, age_ns(news.written_ns))
        self.removed_age_ns = _latest(self.removed_age_ns, age_ns(news.removed_ns))
        self.ended = news.ended or self.ended


def _latest(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """The latest of one node. `leases` is None where it reported nothing, or does not know; `contested`: two daemons
    send under this name, so nobody knows all that is open there."""

    boot: UUID
    version: str
    seen_age_ns: int
    leases: tuple[str, ...] | None
    leases_age_ns: int
    contested: bool
    erased: frozenset[int] = frozenset()
    """Erasures of outputs that it confirms."""


@dataclass(slots=True)
class Plan:
    """What one fold writes. `applied` has every boot that sent a batch, with the sequence to acknowledge."""

    applied: dict[Boot, int] = field(default_factory=dict)
    models: dict[str, ModelSum] = field(default_factory=dict)
    outputs: dict[str, OutputSum] = field(default_factory=dict)
    nodes: dict[str, NodeSeen] = field(default_factory=dict)
    results: Counter[str] = field(default_factory=Counter)
    """How many messages were `applied`, a `duplicate`, a `gap`, a `report` alone."""

    @property
    def contested(self) -> list[str]:
        """Names that two daemons use at once."""
        return sorted(node_id for node_id, seen in self.nodes.items() if seen.contested)


def plan(received: Sequence[Received], known: Mapping[Boot, Known]) -> Plan:
    """See the module. `known` has every boot of `received`."""
    made = Plan()
    in_order = sorted((r for r in received if r.message.batch is not None), key=lambda r: (r.boot, _sequence(r)))
    for one in in_order:
        _apply(made, one, known)
    made.results["report"] += len(received) - len(in_order)
    by_node: dict[str, list[Received]] = {}
    for one in received:
        by_node.setdefault(one.message.node_id, []).append(one)
    made.nodes = {node_id: _seen(of_node, known) for node_id, of_node in sorted(by_node.items())}
    return made


def _sequence(one: Received) -> int:
    return one.message.batch.sequence if one.message.batch is not None else 0


def _apply(made: Plan, one: Received, known: Mapping[Boot, Known]) -> None:
    message, batch = one.message, one.message.batch
    assert batch is not None
    highest = made.applied.setdefault(one.boot, known[one.boot].sequence)
    if batch.sequence <= highest:
        made.results["duplicate"] += 1
    elif batch.sequence > max(highest + 1, message.oldest):
        made.results["gap"] += 1
    else:
        made.results["applied"] += 1
        made.applied[one.boot] = batch.sequence
        for access in batch.models:
            age_ns = one.age_ns + max(0, message.sent_ns - access.last_access_ns)
            made.models.setdefault(access.model_id, ModelSum(age_ns)).add(access, age_ns)
        for news in batch.outputs:
            made.outputs.setdefault(news.path, OutputSum()).add(news, partial(_age_ns, one))


def _age_ns(one: Received, at_ns: int | None) -> int | None:
    return None if at_ns is None else one.age_ns + max(0, one.message.sent_ns - at_ns)


def _seen(received: Iterable[Received], known: Mapping[Boot, Known]) -> NodeSeen:
    """Of one node. A new boot is nothing unusual (its index was lost); one that comes back after another is."""
    ordered = sorted(received, key=lambda one: -one.age_ns)
    latest = ordered[-1]
    boots = {one.boot for one in ordered}
    reports = [one for one in ordered if one.message.report is not None]
    said = reports[-1].message.report if reports else None
    return NodeSeen(
        latest.message.boot,
        latest.message.version,
        latest.age_ns,
        said.leases if said is not None else None,
        reports[-1].age_ns if reports else 0,
        contested=len(boots) > 1 or known[latest.boot].was_latest is False,
        erased=frozenset(number for one in reports for number in one.message.report.erased),  # type: ignore[union-attr]
    )


def age_ns(entry: bytes, now_ms: int) -> int:
    """How long ago an entry came into the stream: its ID begins with the time of Redis in milliseconds.

    Never below 0, also if that clock was set back. Raises ValueError for what is no entry ID.
    """
    return max(0, now_ms - int(entry.split(b"-")[0])) * _NS_PER_MS
