"""Moves whose process ends between any two effects: what is done, who looks meanwhile, and what must be true after.

Every effect counts: each call that changes the source, each object, each transaction, before and after it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tests.controller.fate import Fate, Killed
from tests.controller.moving import Site
from tests.controller.users import User
from tierd.controller.moves.moves import Moves
from tierd.controller.source.moved_file import MoveRefused
from tierd.errors import TierdError
from tierd.stubs import COLD_MARK

_TRIES = 3
FILES = {"config.json": b"{}", "model-1.safetensors": os.urandom(70_000), "model-2.safetensors": os.urandom(5_000)}
FILES |= {"unet/weights.bin": os.urandom(3_000), "empty": b""}
NAMES = [*FILES, "unet/same.safetensors"]


def bytes_of(name: str) -> bytes:
    return FILES["model-2.safetensors" if name == "unet/same.safetensors" else name]


async def wish(site: Site, moves: Moves) -> None:
    """Somebody asks for a demotion that there is none of yet."""
    if await site.value("SELECT count(*) FROM moves WHERE subject = $1", site.model_id) == 0:
        await moves.demote(site.model_id, "not read for a while")


async def demote(site: Site, moves: Moves) -> None:
    await wish(site, moves)
    await moves.resume_all()


async def demote_and_delete(site: Site, moves: Moves) -> None:
    await demote(site, moves)
    await site.end_grace()
    await moves.resume_all()


async def undo(site: Site, moves: Moves) -> None:
    with suppress(MoveRefused):  # it is undone already
        await moves.undo(site.model_id)
    await moves.resume_all()


async def promote(site: Site, moves: Moves) -> None:
    if await site.value("SELECT count(*) FROM moves WHERE subject = $1 AND kind = 'promote'", site.model_id) == 0:
        await moves.promote(site.model_id, "asked for")
    await moves.resume_all()


@dataclass(frozen=True)
class Case:
    """`prepare`, which nobody disturbs, then `act`; whoever looks finds `changed` files with other bytes."""

    act: Callable[[Site, Moves], Awaitable[None]]
    states: list[str]
    tier: str
    prepare: Callable[[Site, Moves], Awaitable[None]] | None = None
    meddle: Callable[[Site, str], None] = lambda site, effect: None
    changed: str = ""
    renamed: str = ""
    lost: str = ""


def append_once(site: Site, effect: str) -> None:
    """A user writes to a file of which there is a stub already."""
    path = site.model / "unet/weights.bin"
    if effect == "take" and path.exists() and path.stat().st_size == len(FILES["unet/weights.bin"]):
        with path.open("ab") as file:
            file.write(b"+")


def rename_once(site: Site, effect: str) -> None:
    """A user renames a file whose stub was put in its place this moment."""
    stub = site.model / "unet/.tierd/cold/weights.bin"
    if effect in ("placed stub", "take") and stub.exists() and (site.model / "unet/weights.bin").exists():
        (site.model / "unet/weights.bin").rename(site.model / "unet/weights.bin.old")


def write_to_trash_once(site: Site, effect: str) -> None:
    """A program writes through a descriptor from before the demotion."""
    if effect == "begin delete files":
        for path in (site.source / ".tierd/trash").rglob("weights.bin"):
            if path.stat().st_size == len(FILES["unet/weights.bin"]):
                with path.open("ab") as file:
                    file.write(b"+")


async def demote_and_lose(site: Site, moves: Moves) -> None:
    """The object store loses an object within the grace."""
    await demote(site, moves)
    for path in (site.root / "objects").glob(f"*/{site.model_id}/v1/config.json"):
        path.unlink()


CASES = {
    "demote": Case(demote, ["in_grace"], "cold"),
    "delete": Case(demote_and_delete, ["done"], "cold", prepare=demote),
    "undo": Case(undo, ["abandoned", "done"], "hot", prepare=demote),
    "promote": Case(promote, ["done", "done"], "hot", prepare=demote_and_delete),
    "abandon": Case(demote, ["abandoned"], "hot", meddle=append_once, changed="unet/weights.bin"),
    "renamed": Case(demote, ["abandoned"], "hot", meddle=rename_once, renamed="unet/weights.bin"),
    "object lost": Case(demote_and_delete, ["abandoned"], "hot", prepare=demote_and_lose, lost="config.json"),
}


Kill = Callable[["Bench", Site, int], Awaitable[list[str]]]
"""Does what a case does and ends at the effect with a number, 0 for none; the effects that it came by."""


class Bench:
    """One model for each kill, all in one source."""

    def __init__(self, site: Site, case: Case) -> None:
        self._site = site
        self.case = case
        self._numbers = 0
        self._mtime_ns = 0

    async def new(self) -> Site:
        self._numbers += 1
        site = replace(self._site, model_id=f"models/m{self._numbers}")
        site.make_model(FILES)
        self._mtime_ns = (site.model / "config.json").stat().st_mtime_ns  # JuiceFS keeps microseconds
        await site.register()
        if self.case.prepare is not None:
            async with site.leading() as moves:
                await self.case.prepare(site, moves)
        return site

    async def each(self, numbers: Iterable[int], effects: Sequence[str], kill: Kill | None = None) -> None:
        """Kill at each of these."""
        async with self._site.connected():
            for last in numbers:
                try:
                    await self.one(last, kill or leave)
                except BaseException as error:
                    error.add_note(f"killed at {last}: {effects[last - 1]}")
                    raise

    async def one(self, last: int, kill: Kill) -> list[str]:
        """Kill at that effect; look; go on to the end; look again. The effects that were come by."""
        async with self._site.connected():
            return await self._one(last, kill)

    async def _one(self, last: int, kill: Kill) -> list[str]:
        site, case = await self.new(), self.case
        created = await site.value("SELECT created_at FROM model_locations WHERE model_id = $1", site.model_id)
        effects = await kill(self, site, last)
        assert_bytes(site, case)
        async with site.leading(Fate(0, lambda effect: case.meddle(site, effect))) as moves:
            await case.act(site, moves)
        assert_bytes(site, case)
        await self._assert_end(site, created)
        return effects

    async def _assert_end(self, site: Site, created: object) -> None:
        case = self.case
        row = await site.value("SELECT (tier, created_at) FROM model_locations WHERE model_id = $1", site.model_id)
        assert row == (case.tier, created)
        query = "SELECT array_agg(state ORDER BY id) FROM moves WHERE subject = $1"
        assert await site.value(query, site.model_id) == case.states
        found = site.snapshot()
        names = {name if case.tier == "hot" else cold_name(name) for name in NAMES if name != "empty"} | {"empty"}
        if case.renamed:
            names = names - {case.renamed} | {f"{case.renamed}.old"}
            assert (site.model / f"{case.renamed}.old").read_bytes() == bytes_of(case.renamed)
        assert {name for name in found if name.startswith(("config", "model", "unet/", "empty", ".tierd"))} == names
        for name in names - {case.changed}:
            mode, _, _, (mtime_ns, links), xattrs = found[name]
            mark = COLD_MARK if case.tier == "cold" and name != "empty" else 0
            assert (mode, mtime_ns) == (oct(0o100640 | mark), self._mtime_ns), name
            assert links == (2 if "same" in name or "model-2" in name else 1)
            assert xattrs == (("user.origin", b"hub"),)
        move = await site.value("SELECT min(id) FROM moves WHERE subject = $1", site.model_id)
        # Else whoever resumes all moves looks at those of each kill before: that takes longer and longer.
        await site.execute("UPDATE moves SET state = 'done', finished_at = now() WHERE state = 'in_grace'")
        litter = [name for name in site.litter() if name.endswith(f"/{move}")]
        assert litter == ([f".tierd/trash/{move}"] if case.states == ["in_grace"] else [])


def cold_name(name: str) -> str:
    path = Path(name)
    return str(path.parent / ".tierd/cold" / path.name)


def assert_bytes(site: Site, case: Case) -> None:
    """Each file is there, and right."""
    for name in NAMES:
        if name == case.lost and name not in site.hot_names():
            assert list((site.source / ".tierd/trash").glob(f"*/{name}")), name
            continue
        if name == case.renamed and not (site.model / name).exists():
            continue
        found = site.read(name)
        right = bytes_of(name)
        assert found == right or (name == case.changed and found == right + b"+"), name


async def leave(bench: Bench, site: Site, last: int) -> list[str]:
    """The process goes, as far as anybody can see: what it raised nobody catches, its transactions end."""
    case = bench.case
    fate = Fate(last, lambda effect: case.meddle(site, effect))
    with suppress(Killed):
        async with site.leading(fate) as moves:
            await case.act(site, moves)
    return fate.effects


def failing(number: int) -> Kill:
    """A call that fails, which is harder than a death: whoever made it goes on, and does what it does then."""

    async def fail(bench: Bench, site: Site, last: int) -> list[str]:
        case = bench.case

        def before(effect: str) -> None:
            case.meddle(site, effect)
            if len(fate.effects) == last:
                raise OSError(number, os.strerror(number))

        fate = Fate(0, before, alone=True)
        async with site.leading(fate) as moves:
            for _ in range(_TRIES):
                with suppress(OSError):
                    await case.act(site, moves)
        return fate.effects

    return fail


async def unmounted(bench: Bench, site: Site, last: int) -> list[str]:
    """After the kill the next leader finds an empty directory where the source was mounted; then the source is back."""
    effects = await leave(bench, site, last)
    aside = site.root / "aside"
    os.rename(site.source, aside)
    site.source.mkdir()
    try:
        async with site.leading() as moves:
            with suppress(TierdError):
                await moves.look_around()
                await bench.case.act(site, moves)
        assert list(site.source.iterdir()) == []
    finally:
        site.source.rmdir()
        os.rename(aside, site.source)
    return effects


async def watched(bench: Bench, site: Site, last: int) -> list[str]:
    """Nobody is killed; between any two effects somebody opens and reads the whole model through an overlay."""
    case = bench.case

    def look(effect: str) -> None:
        case.meddle(site, effect)
        user = User(site)
        for name in NAMES:
            found, right = user.read_path(name), bytes_of(name)
            excused = name in (case.renamed, case.lost) or (name == case.changed and found == right + b"+")
            assert found == right or excused, f"{name} after {effect}"

    fate = Fate(last, look)
    async with site.leading(fate) as moves:
        await case.act(site, moves)
    return fate.effects
