"""`tierd.models`, as programs on a node use it, with real mounts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.cold import freeze
from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, of_tier
from tests.mounts import OverlayMount
from tierd.errors import TierdError, UsageError
from tierd.models import ModelNotFoundError, ModelNotLocalError, get_model_path, get_model_path_async
from tierd.objects.directory import DirectoryStore
from tierd.objects.keys import object_key

BYTES = os.urandom(5 * MIB)


@pytest.fixture
def mount(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> OverlayMount:
    """A hot model and a cold one."""
    source, objects = new_directory("source"), new_directory("objects")
    store = DirectoryStore(objects)
    store.ensure_bucket("cold-models")
    for name in ("hot", "org/cold"):
        path = source / "models" / name / "x.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(BYTES)
    store.put_file("cold-models", object_key("models/org/cold", 1, b"x.safetensors"), path, len(BYTES))
    freeze({path: None}, "models/org/cold")
    return overlay_mount(source, objects=str(objects), prefetch="no")


@pytest.mark.parametrize("model_id", ["hot", "models/hot", "org/cold"])
def test_it_waits_until_the_model_is_here(mount: OverlayMount, model_id: str) -> None:
    path = get_model_path(model_id, root=mount.mountpoint, wait=True)
    assert path == mount.mountpoint / "models" / model_id.removeprefix("models/")
    assert of_tier(mount)["copies"] == 1
    assert (path / "x.safetensors").read_bytes() == BYTES


def test_without_waiting_it_can_be_read_at_once(mount: OverlayMount) -> None:
    assert (get_model_path("org/cold", root=mount.mountpoint) / "x.safetensors").read_bytes() == BYTES


def test_in_asyncio(mount: OverlayMount) -> None:
    async def main() -> Path:
        return await get_model_path_async("hot", root=mount.mountpoint, wait=True, timeout=30)

    assert asyncio.run(main()) == mount.mountpoint / "models/hot"
    assert of_tier(mount)["copies"] == 1


@pytest.mark.parametrize(
    ("model_id", "error"),
    [
        ("unknown", ModelNotFoundError),
        ("../etc", UsageError),
        ("/etc", UsageError),
        ("", UsageError),
        ("a\0b", UsageError),
    ],
)
def test_errors_are_typed(mount: OverlayMount, model_id: str, error: type[TierdError]) -> None:
    with pytest.raises(error) as raised:
        get_model_path(model_id, root=mount.mountpoint)
    assert raised.value.hint


def test_no_mount_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        get_model_path("hot", root=tmp_path)


def test_what_does_not_come_says_why(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> None:
    source = new_directory("source")
    (source / "models/m").mkdir(parents=True)
    (source / "models/m/x.safetensors").write_bytes(BYTES)
    mount = overlay_mount(source, cache_size="1MiB", prefetch="no")
    with pytest.raises(ModelNotLocalError, match="is not on the node"):
        get_model_path("m", root=mount.mountpoint, wait=True, timeout=30)


def test_it_does_not_wait_longer_than_it_may(mount: OverlayMount) -> None:
    with pytest.raises(ModelNotLocalError, match="after 0 s"):
        get_model_path("hot", root=mount.mountpoint, wait=True, timeout=0)
