"""Users go on working while a model moves: whatever they do between any two effects holds, and no byte is lost.

They work through the overlay's own code on another node; only the kernel is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.controller.fate import Fate
from tests.controller.moving import Site, site_of
from tests.controller.users import NAME, OTHER, User
from tests.servers import run

BYTES = {"weights.bin": os.urandom(3_000), "z.safetensors": os.urandom(2_000), "a.safetensors": os.urandom(2_000)}
OLD = BYTES["weights.bin"]
DEEDS: dict[str, tuple[Callable[[User], None], bytes | None, bytes | None, int]] = {
    "unlink": (User.unlink, None, None, 0),
    "rename": (User.rename, None, OLD, 0o640),
    "replace": (User.replace, b"new", None, 0o644),
    "chmod": (User.chmod, OLD, None, 0o600),
    "append": (User.append, OLD + b"+", None, 0o640),
}
"""What is done, and then: the bytes of the name, those of the other name, and the mode of the one that is there."""


def check(site: Site, deed: str) -> None:
    _, here, there, mode = DEEDS[deed]
    user = User(site)
    assert user.read(NAME) == here
    assert user.read(OTHER) == there
    if here is not None or there is not None:
        assert user.mode(NAME if here is not None else OTHER) == mode
    for name in ("a.safetensors", "z.safetensors"):
        assert user.read(name.encode()) == BYTES[name]


async def disturbed(site: Site, deed: str, last: int, ending: str) -> list[str]:
    """A demotion during which, at that effect, the deed is done; then it is undone, or its grace ends."""
    site.model.mkdir(parents=True)
    for name, content in BYTES.items():
        (site.model / name).write_bytes(content)
        (site.model / name).chmod(0o640)
    await site.register()
    fate = Fate(0, lambda effect: DEEDS[deed][0](User(site)) if len(fate.effects) == last else None)
    async with site.leading(fate) as moves:
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
    return fate.effects


@pytest.fixture
def site(schema: str, memory_path: Path) -> Site:
    return site_of(memory_path, schema, lease_reports=False)


@pytest.mark.parametrize("ending", ["undo", pytest.param("delete", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("deed", DEEDS)
def test_what_users_do_between_any_two_effects_holds(deed: str, ending: str, site: Site) -> None:
    effects = run(disturbed(replace(site, model_id="models/undisturbed"), "chmod", 0, "stay"))
    last = effects.index("committed become cold") + 1
    first = effects.index("begin switch" if ending == "undo" else "committed plan")
    for number in range(first, last + 1):
        try:
            run(disturbed(replace(site, model_id=f"models/m{number}"), deed, number, ending))
        except BaseException as error:
            error.add_note(f"{deed} at {number}: {effects[number - 1]}")
            raise
