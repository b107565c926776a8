"""What the admin socket answers: one function per request, over the parts of a daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import trio

from tierd.config import size_bytes
from tierd.errors import UsageError
from tierd.node import admin
from tierd.node.catalog import Catalog, walk
from tierd.node.index import ModelRow, OpenRow
from tierd.node.tier_control import TierControl
from tierd.units import display

if TYPE_CHECKING:
    from starlette.requests import Request

    from tierd.node.daemon import Daemon

_NAMES_MAX = 1000


def answers(daemon: Daemon) -> Mapping[tuple[str, str], admin.Answer]:
    """The routes of the admin socket, by method and path."""
    told = _Answers(daemon)
    return {
        ("GET", "/v1/status"): told.status,
        ("GET", "/v1/models"): told.models,
        ("GET", "/v1/opens"): told.opens,
        ("POST", "/v1/warm"): told.warm,
        ("GET", "/v1/warm"): told.warm_progress,
        ("POST", "/v1/pin"): told.pin,
        ("POST", "/v1/evict"): told.evict,
        ("GET", "/v1/plan"): told.plan,
        ("POST", "/v1/check"): told.check,
        ("GET", "/v1/check"): told.check_progress,
    }


class _Answers:
    """Each method takes a request and returns what becomes JSON; blocking work runs in two threads at most."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._slow = trio.CapacityLimiter(2)
        self._control = (
            TierControl(
                daemon.tier,
                daemon.index,
                daemon.settings.source,
                lambda: self._walk().size_bytes,
                daemon.publisher.exchange.wishes.loaded if daemon.publisher is not None else lambda path: None,
            )
            if daemon.tier is not None
            else None
        )

    def _walk(self) -> Catalog:
        return walk(self._daemon.source, self._daemon.settings.models_roots_bytes)

    async def _run(self, function: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(function, limiter=self._slow)

    @property
    def _tier(self) -> TierControl:
        if self._control is None:
            raise UsageError("this mount has no node tier", hint="mount with --cache-dir and a --cache-size above 0")
        return self._control

    async def status(self, _: Request) -> Any:
        return await self._run(self._daemon.status)

    async def models(self, _: Request) -> Any:
        catalog = await self._run(self._walk)
        await self._daemon.recorder.flush()
        return await self._run(lambda: self._model_rows(catalog))

    def _model_rows(self, catalog: Catalog) -> list[Any]:
        rows = {row.model: row for row in self._daemon.index.models()}
        held = self._control.held_by_model() if self._control else {}
        found = []
        for name in sorted(catalog.size_bytes.keys() | rows.keys() | held.keys()):
            size = catalog.size_bytes.get(name)
            described = self._control.describe(name, size, held.get(name, 0)) if self._control else _NO_TIER
            found.append({**model_json(name, size, rows.get(name)), **described})
        return found

    async def opens(self, request: Request) -> Any:
        await self._daemon.recorder.flush()
        model = admin.query(request, "model")
        name = model.encode("utf-8", "surrogateescape") if model else None
        limit = admin.opens_limit(request)
        rows = await self._run(lambda: self._daemon.index.opens(limit, name))
        return [open_json(row) for row in rows]

    async def warm(self, request: Request) -> Any:
        names = _names(await admin.arguments(request))
        return await self._run(lambda: self._tier.warm(names))

    async def warm_progress(self, request: Request) -> Any:
        names = admin.queries(request, "model")[:_NAMES_MAX]
        return await self._run(lambda: self._tier.progress_of(names))

    async def pin(self, request: Request) -> Any:
        arguments = await admin.arguments(request)
        names, pinned = _names(arguments), bool(arguments.get("pinned", True))
        answer = await self._run(lambda: self._tier.pin(names, pinned=pinned))
        if pinned and self._daemon.tier is not None:
            self._daemon.tier.prefetcher.needed()
        return answer

    async def evict(self, request: Request) -> Any:
        arguments = await admin.arguments(request)
        if "until_free" not in arguments:
            names = _names(arguments)
            return await self._run(lambda: self._tier.evict(names))
        try:
            wanted = int(size_bytes(arguments["until_free"]))
        except (ValueError, TypeError) as error:
            raise UsageError(f"--until-free: {error}", hint="for example 100GiB") from None
        return await self._run(lambda: self._tier.evict_until_free(wanted))

    async def plan(self, _: Request) -> Any:
        return await self._run(self._tier.plan)

    async def check(self, request: Request) -> Any:
        arguments = await admin.arguments(request)
        deep, repair = bool(arguments.get("deep")), bool(arguments.get("repair"))
        return await self._run(lambda: self._tier.start_check(deep=deep, repair=repair))

    async def check_progress(self, _: Request) -> Any:
        return self._tier.tell_check()


_NO_TIER = {"node_bytes": 0, "memory_bytes": 0, "pinned": False, "heat": 0.0, "state": "absent"}


def _names(arguments: Mapping[str, Any]) -> list[str]:
    names = arguments.get("models")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError("no model is named", hint="name one or more, as `tierd models` lists them")
    if len(names) > _NAMES_MAX:
        raise UsageError(f"more than {_NAMES_MAX} models are named", hint="name fewer at once")
    return names


def iso_time(at_ns: int) -> str:
    """Nanoseconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def model_json(name: bytes, size: int | None, row: ModelRow | None) -> dict[str, Any]:
    """One model as `tierd models --json` prints it; `size_bytes` is None for a model that left the source."""
    return {
        "model": display(name),
        "size_bytes": size,
        "opens": row.opens if row else 0,
        "loads": row.loads if row else 0,
        "hits": row.hits if row else 0,
        "bytes_read": row.bytes_read if row else 0,
        "first_access": iso_time(row.first_access_ns) if row else None,
        "last_access": iso_time(row.last_access_ns) if row else None,
    }


def open_json(row: OpenRow) -> dict[str, Any]:
    """One open as `tierd opens --json` prints it."""
    return {
        "at": iso_time(row.at_ns),
        "path": display(row.path),
        "model": display(row.model) if row.model is not None else None,
        "uid": row.uid,
        "pod": row.pod,
    }
