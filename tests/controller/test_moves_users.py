"""Users go on working while a model moves: whatever they do between any two effects holds, and no byte is lost.

They work through the overlay's own code on another node; only the kernel is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.controller.fate import Fate
from tests.controller.moving import Site, site_of
from tests.controller.users import NAME, OTHER, User
from tests.servers import run
from tierd.controller.moves.moves import Moves

BYTES = {"weights.bin": os.urandom(3_000), "z.safetensors": os.urandom(2_000), "a.safetensors": os.urandom(2_000)}
OLD = BYTES["weights.bin"]
SECONDS = 600.0
JOIN_SECONDS = 30.0
LOCKED = ("attributes", "gave attributes", "put back", "was put back", "removed stub")
"""Effects at which the move has the stub's lock: who brings bytes waits for it, so nobody must wait for him."""


@dataclass(frozen=True)
class Deed:
    """What a user does, and then: the bytes of the name, those of the other name, the mode of the one that is there.
    `recalls`: it brings bytes back first. `moved`: the model has another name."""

    act: Callable[[User], None]
    here: bytes | None = None
    there: bytes | None = None
    mode: int = 0o640
    recalls: bool = False
    moved: bool = False


DEEDS = {
    "unlink": Deed(User.unlink),
    "rename": Deed(User.rename, there=OLD),
    "replace": Deed(User.replace, b"new", mode=0o644),
    "chmod": Deed(User.chmod, OLD, mode=0o600),
    "append": Deed(User.append, OLD + b"+", recalls=True),
    "link": Deed(User.link, OLD, OLD),
    "truncate": Deed(User.truncate, OLD[:5], recalls=True),
    "empty": Deed(User.empty, b"", recalls=True),
    "recreate": Deed(User.recreate, b"other", mode=0o644),
    "move the model": Deed(User.move_model, OLD, moved=True),
}
EVERY_CHANGE = ("unlink", "rename", "replace", "chmod", "append")


def check(site: Site, deed: Deed) -> None:
    """It holds, and the other files are what they were."""
    user = User(replace(site, model_id=f"{site.model_id}-moved") if deed.moved else site)
    assert user.read(NAME) == deed.here
    assert user.read(OTHER) == deed.there
    if deed.here is not None or deed.there is not None:
        assert user.mode(NAME if deed.here is not None else OTHER) == deed.mode
    for name in ("a.safetensors", "z.safetensors"):
        assert user.read(name.encode()) == BYTES[name]


class Disturbance:
    """Does a deed at the effect with a number, 0 for none."""

    def __init__(self, site: Site, deed: Deed, last: int) -> None:
        self.fate = Fate(0, self._before, alone=True)
        self._user = User(site)
        self._deed = deed
        self._last = last
        self._thread: threading.Thread | None = None
        self._failed: list[BaseException] = []

    def _before(self, effect: str) -> None:
        if len(self.fate.effects) == self._last:
            if effect not in LOCKED or not self._deed.recalls:
                self._user.act(self._deed.act)
                return
            self._thread = threading.Thread(target=self._act)
            self._thread.start()

    def _act(self) -> None:
        try:
            self._user.act(self._deed.act)
        except BaseException as error:
            self._failed.append(error)

    def join(self) -> None:
        """It is done."""
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            assert not self._thread.is_alive(), "it waits for ever"
        for error in self._failed:
            raise error


async def prepare(site: Site) -> None:
    """A model, hot."""
    site.model.mkdir(parents=True)
    for name, content in BYTES.items():
        (site.model / name).write_bytes(content)
        (site.model / name).chmod(0o640)
    await site.register()


async def demoted(site: Site, deed: Deed, last: int, ending: str) -> list[str]:
    """A demotion during which, at that effect, the deed is done; then it is undone, or its grace ends."""
    await prepare(site)
    disturbance = Disturbance(site, deed, last)
    async with site.leading(disturbance.fate) as moves:
        move = await moves.demote(site.model_id, "test")
        state = await moves.advance(move)
        if last:
            check(site, deed)
        if state == "in_grace" and ending == "undo":
            assert await moves.advance(await moves.undo(site.model_id)) == "done"
            assert await site.value("SELECT tier FROM model_locations WHERE model_id = $1", site.model_id) == "hot"
        elif state == "in_grace":
            await site.end_grace()
            assert await moves.advance(move) == "done"
        else:
            assert state == "abandoned"
    if last:
        check(site, deed)
    assert [name for name in site.litter() if name.endswith(f"/{move}")] == []
    return disturbance.fate.effects


async def ended(site: Site, deed: Deed, last: int, ending: str) -> list[str]:
    """A model that is in its grace, or cold, and what becomes of it, during which the deed is done."""
    await prepare(site)
    async with site.leading() as moves:
        move = await moves.demote(site.model_id, "test")
        assert await moves.advance(move) == "in_grace"
        if ending == "promote":
            await site.end_grace()
            assert await moves.advance(move) == "done"
    disturbance = Disturbance(site, deed, last)
    async with site.leading(disturbance.fate) as moves:
        state = await _end(site, moves, move, ending)
    disturbance.join()
    if last:
        check(site, deed)
    assert state == "done"
    assert [name for name in site.litter() if name.endswith(f"/{move}")] == []
    return disturbance.fate.effects


async def _end(site: Site, moves: Moves, move: int, ending: str) -> str:
    if ending == "undo":
        return await moves.advance(await moves.undo(site.model_id))
    if ending == "promote":
        return await moves.advance(await moves.promote(site.model_id, "test"))
    await site.end_grace()
    return await moves.advance(move)


@pytest.fixture
def site(schema: str, memory_path: Path) -> Site:
    return site_of(memory_path, schema, lease_reports=False)


RARE = [pytest.param(name, marks=pytest.mark.campaign) for name in DEEDS if name not in EVERY_CHANGE]


@pytest.mark.parametrize("ending", ["undo", pytest.param("delete", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", [*EVERY_CHANGE, *RARE])
def test_what_users_do_between_any_two_effects_holds(name: str, ending: str, site: Site) -> None:
    async def main() -> None:
        async with site.connected():
            quiet = await demoted(replace(site, model_id="models/undisturbed"), DEEDS["chmod"], 0, "stay")
            last = quiet.index("committed become cold") + 1
            first = quiet.index("begin switch" if ending == "undo" else "committed plan")
            for number in range(first, last + 1):
                await tried(demoted, site, name, number, ending, quiet)

    run(main(), SECONDS)


ENDINGS = ("undo", "delete", "promote")
TRIED = [(ending, name) for ending in ENDINGS for name in DEEDS if ending == "undo" or name in ("unlink", "append")]
"""What the campaign alone tries is where stubs keep their inodes, and a user meets no file that moves."""


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        pytest.param(ending, name, marks=() if (ending, name) in TRIED else pytest.mark.campaign)
        for ending in ENDINGS
        for name in DEEDS
    ],
)
def test_what_users_do_while_a_model_returns_or_leaves_for_good_holds(name: str, ending: str, site: Site) -> None:
    async def main() -> None:
        async with site.connected():
            quiet = await ended(replace(site, model_id="models/undisturbed"), DEEDS["chmod"], 0, ending)
            for number in range(1, len(quiet) + 1):
                await tried(ended, site, name, number, ending, quiet)

    run(main(), SECONDS)


async def tried(
    run_once: Callable[..., object], site: Site, name: str, number: int, ending: str, quiet: list[str]
) -> None:
    """Once, with a model of its own."""
    try:
        await run_once(replace(site, model_id=f"models/m{number}"), DEEDS[name], number, ending)  # type: ignore[misc]
    except BaseException as error:
        error.add_note(f"{name} at {number}: {quiet[number - 1]}")
        raise
