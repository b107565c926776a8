"""Users go on working while a model moves: whatever they do between any two effects holds, and no byte is lost.

They work through the overlay's own code on another node; only the kernel is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.controller.fate import Fate
from tests.controller.moving import Site, site_of
from tests.servers import run
from tierd.node.cold_source import Cold, ColdSource
from tierd.node.sources import Changes, Moved, Ref
from tierd.recall import fetch_from, recall
from tierd.stubs import Origin

NAME = b"weights.bin"
OTHER = b"weights.old"
BYTES = {"weights.bin": os.urandom(3_000), "z.safetensors": os.urandom(2_000), "a.safetensors": os.urandom(2_000)}
TRIES_MAX = 10


@dataclass
class User:
    """Somebody who works on the model through an overlay of their own."""

    site: Site

    @contextmanager
    def _source(self) -> Iterator[tuple[ColdSource, int]]:
        source = ColdSource(self.site.source)
        fd = os.open(self.site.model, os.O_RDONLY)
        try:
            yield source, fd
        finally:
            os.close(fd)
            source.close()

    def unlink(self) -> None:
        with self._source() as (source, fd):
            source.unlink(fd, NAME)

    def rename(self) -> None:
        with self._source() as (source, fd):
            source.rename(fd, NAME, fd, OTHER, 0)

    def replace(self) -> None:
        (self.site.model / "new").write_bytes(b"new")
        with self._source() as (source, fd):
            source.rename(fd, b"new", fd, NAME, 0)

    def chmod(self) -> None:
        with self._source() as (source, fd):
            ref = Ref(fd, NAME, source.key(source.lstat(fd, NAME)))
            source.setattr(ref, Changes(mode=0o600), None)

    def append(self) -> None:
        """As the overlay does: where the bytes are elsewhere, they come back first."""
        with self._source() as (source, fd):
            for _ in range(TRIES_MAX):
                ref = Ref(fd, NAME, source.key(source.lstat(fd, NAME)))
                try:
                    opened, _ = source.open(ref, os.O_RDWR)
                except Moved:
                    continue
                except Cold as cold:
                    self._recall(source, cold)
                    continue
                os.pwrite(opened, b"+", os.fstat(opened).st_size)
                os.close(opened)
                return
        raise AssertionError("it moves all the time")

    def _recall(self, source: ColdSource, cold: Cold) -> None:
        with source.path_of(cold.ref) as path:
            recall(path, origin_of(cold), fetch_from(self.site.store, self.site.settings.bucket))
        source.settle(cold.ref)

    def read(self, name: bytes) -> bytes | None:
        """A file through the overlay."""
        with self._source() as (source, fd):
            try:
                st = source.lstat(fd, name)
            except FileNotFoundError:
                return None
            try:
                opened, _ = source.open(Ref(fd, name, source.key(st)), os.O_RDONLY)
            except Cold as cold:
                return self.site.fetch(origin_of(cold))
            with open(opened, "rb") as file:
                return file.read()

    def mode(self, name: bytes) -> int:
        with self._source() as (source, fd):
            return source.lstat(fd, name).st_mode & 0o7777


def origin_of(cold: Cold) -> Origin:
    assert cold.stub.origin is not None
    return cold.stub.origin


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
def site(schema: str, tmp_path: Path) -> Site:
    return site_of(tmp_path, schema, lease_reports=False)


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
