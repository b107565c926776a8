"""What is left in the object store of a user all of whose outputs were deleted: objects that no row knows, manifests.

A row is what makes an object one to be kept. What was made after the deletion was asked for has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from tierd.controller.moves.workshop import Fence, Workshop
from tierd.controller.outputs import erasure_sql as sql
from tierd.controller.outputs.backup import day_id
from tierd.errors import UsageError
from tierd.objects.keys import object_key, parse_key
from tierd.objects.store import Listed, ObjectMissing

_KEYS_AT_ONCE: Final = 1000
_MANIFEST: Final = ".manifest"


class Sweep:
    """See the module. `root` is the outputs root."""

    def __init__(self, workshop: Workshop, root: bytes) -> None:
        self._shop = workshop
        self._root = root
        self._bucket = workshop.settings.outputs_bucket

    async def run(self, user: str) -> None:
        """Raises NotLeaderError, DatabaseError, ObjectError."""
        above = day_id(self._root, user.encode())
        prefix = object_key(above, 1, b"x").removesuffix("v1/x")
        found = iter(self._shop.store.list(self._bucket, prefix))
        while keys := await self._shop.run(_some, found):
            async with self._shop.fenced("sweep", None) as fence:
                dead = await self._dead(fence, user, above, keys)
                todo = dead
                done = await self._shop.effect(self._delete, fence, todo)
            while todo := todo[done:]:
                async with self._shop.fenced("sweep", None) as fence:
                    done = await self._shop.effect(self._delete, fence, todo)

    async def _dead(self, fence: Fence, user: str, above: str, keys: Sequence[str]) -> list[str]:
        """Those that nothing keeps. What tierd did not write stays."""
        files: dict[str, str] = {}
        days: dict[str, str] = {}
        for key in keys:
            name = _name_of(key, above)
            if name is not None and key.endswith("/" + _MANIFEST):
                days[key] = name.rpartition("/")[0]
            elif name is not None:
                files[key] = name
        living = {row["filename"] for row in await fence.connection.fetch(sql.LIVING, user, list(set(files.values())))}
        root = self._root.decode()
        used = await fence.connection.fetch(sql.LIVING_DAYS, user, list(set(days.values())), root)
        in_use = {row["d"] for row in used}
        return [key for key, name in files.items() if name not in living] + [
            key for key, day in days.items() if day not in in_use
        ]

    def _delete(self, fence: Fence, keys: Sequence[str]) -> int:
        done = 0
        for key in fence.batch(keys):
            fence.at("sweep object")
            self._shop.store.delete(self._bucket, key)
            fence.at("swept object")
            done += 1
        return done


def _some(found: Iterator[Listed]) -> list[str]:
    with suppress(ObjectMissing):  # there is no bucket
        return [one.key for one in itertools.islice(found, _KEYS_AT_ONCE)]
    return []


def _name_of(key: str, above: str) -> str | None:
    """What lies below the user's directory; None of what is none of ours."""
    head, _, last = key.rpartition("/")
    with suppress(UsageError, UnicodeDecodeError):
        name = parse_key(f"{head}/x" if last == _MANIFEST else key)
        if name.model_id.startswith(above + "/"):
            return f"{name.model_id.removeprefix(above + '/')}/{name.path.decode()}"
    return None
