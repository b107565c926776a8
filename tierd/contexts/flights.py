"""One call for all who want the same at the same time. Remembers no results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Flights(Generic[_Key, _Value]):
    """Contract: one event loop. A call goes on while anybody waits for it, and is cancelled with the last one."""

    def __init__(self) -> None:
        self._flying: dict[_Key, tuple[asyncio.Task[_Value], list[int]]] = {}

    async def run(self, key: _Key, call: Callable[[], Awaitable[_Value]]) -> _Value:
        """What `call()` gives, or raises; it is called unless somebody's call for `key` is under way."""
        if key not in self._flying:
            task: asyncio.Task[_Value] = asyncio.ensure_future(_awaited(call))
            self._flying[key] = (task, [0])
            task.add_done_callback(lambda _: self._land(key, task))
        task, waiting = self._flying[key]
        waiting[0] += 1
        try:
            return await asyncio.shield(task)
        finally:
            waiting[0] -= 1
            if not waiting[0] and not task.done():
                self._land(key, task)  # who comes from now on shall not be cancelled with it
                task.cancel()

    def forget(self, key: _Key) -> None:
        """Who comes from now on starts a call of their own: what the one under way finds may be older."""
        self._flying.pop(key, None)

    def forget_all(self) -> None:
        """The same for every key."""
        self._flying.clear()

    def _land(self, key: _Key, task: asyncio.Task[_Value]) -> None:
        if key in self._flying and self._flying[key][0] is task:
            del self._flying[key]
        if task.done() and not task.cancelled():
            task.exception()  # looked at, whoever still waits


async def _awaited(call: Callable[[], Awaitable[_Value]]) -> _Value:
    return await call()
