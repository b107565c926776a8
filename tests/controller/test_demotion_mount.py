"""Pods see nothing of a demotion, nor of its undo: in a real mount names, attributes and bytes are always there."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.controller.moving import MODEL, Site, opened_site
from tests.servers import run
from tierd.controller.moves.steps import MoveState
from tierd.objects.directory import DirectoryStore

NAMES = ("config.json", "model-1.safetensors", "model-2.safetensors", "unet/weights.bin", "unet/same.safetensors")


class Pod:
    """Looks at a model all the time, and notes whatever is not as it was at first."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._first = self._look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.complaints: list[str] = []
        self.looks = 0

    def __enter__(self) -> Pod:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set() and len(self.complaints) < 10:
            try:
                found = self._look()
                differing = [name for name in found if found[name] != self._first[name]]
                self.complaints += [f"{name}: {found[name]}, not {self._first[name]}"[:200] for name in differing]
            except OSError as error:
                self.complaints.append(str(error))
            self.looks += 1

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {"": sorted(os.listdir(self._model)), "unet": sorted(os.listdir(self._model / "unet"))}
        assert not (self._model / "absent").exists()  # the daemon remembers for a second that there are no stubs
        assert not (self._model / "unet/absent").exists()
        for name in NAMES:
            path = self._model / name
            st = path.stat()
            with path.open("rb") as file:
                found[name] = (st.st_size, st.st_mode, st.st_mtime_ns, st.st_nlink, file.read())
        return found


@pytest.fixture(params=["directory", "juicefs"])
def site(request: pytest.FixtureRequest, schema: str, new_directory: DirectoryFactory) -> Site:
    root = new_directory("moves")
    (root / "objects").mkdir()
    if request.param == "juicefs":
        (root / "source").symlink_to(tempfile.mkdtemp(dir=request.getfixturevalue("juicefs")))
    else:
        (root / "source").mkdir()
    site = opened_site(root, schema, DirectoryStore(root / "objects"), settle=3.0)
    site.make_model()
    return site


def test_pods_see_nothing_of_it(site: Site, overlay_mount: MountFactory) -> None:
    mount = overlay_mount(site.source, objects=str(site.root / "objects"), prefetch="no")
    mount.allow_log("fill_ended")  # one that the switch overtakes

    async def main() -> None:
        await site.register("gpu-1")
        async with site.leading() as moves:
            with Pod(mount.mountpoint / MODEL) as pod:
                move = await moves.demote(MODEL, "test")
                assert await moves.advance(move) is MoveState.IN_GRACE
                assert site.hot_names() == {"empty"}
                assert await moves.advance(await moves.undo(MODEL)) is MoveState.DONE
                again = await moves.demote(MODEL, "test")
                assert await moves.advance(again) is MoveState.IN_GRACE
                await site.end_grace()
                assert await moves.advance(again) is MoveState.DONE
            assert pod.complaints == []
            assert pod.looks > 3

    run(main())
    (mount.mountpoint / MODEL / "config.json").unlink()
    for name in ("weights.bin", "same.safetensors"):
        (mount.mountpoint / MODEL / "unet" / name).unlink()
    (mount.mountpoint / MODEL / "unet").rmdir()
    assert not (site.model / "unet").exists()
