"""The node tier on a disk that is too small: what leaves, what may not come in, and what readers notice (nothing)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, Model, command, idle, leftovers, make_model, metric, of_tier
from tests.mounts import OverlayMount, wait_until

EVICTION_SECONDS = 15.0
IDLE_SECONDS = 0.1

DiskFactory = Callable[..., Path]


@pytest.fixture
def disk(new_directory: DirectoryFactory) -> Iterator[DiskFactory]:
    """`disk(64)` mounts an ext4 file system of that many MiB, on a loop device, until the end of the test."""
    with ExitStack() as stack:

        def make(mib: int, *options: str) -> Path:
            top = new_directory("disk")
            image, where = top / "image", top / "mnt"
            with image.open("wb") as file:
                file.truncate(mib * MIB)
            where.mkdir()
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", *options, image], check=True)
            subprocess.run(["mount", "-o", "loop", image, where], check=True)
            stack.callback(subprocess.run, ["umount", "-l", where], check=True)
            return where

        yield make


@pytest.fixture
def small(disk: DiskFactory, overlay_mount: MountFactory) -> OverlayMount:
    """A mount whose node tier has a disk of 64 MiB to itself; eviction begins at 20 % and ends at 40 %."""
    cache = disk(64) / "cache"
    made = overlay_mount(
        cache_dir=cache, free_space_ratio=0.2, free_space_target=0.4, prefetch="no", load_idle_gap=IDLE_SECONDS
    )
    made.cache_dir = cache
    return made


@pytest.fixture
def limited(overlay_mount: MountFactory) -> OverlayMount:
    """A mount whose node tier may hold 13 MiB."""
    return overlay_mount(cache_size="13MiB", prefetch="no", load_idle_gap=IDLE_SECONDS)


def on_node(mount: OverlayMount) -> set[str]:
    """The models that the node holds completely."""
    return {name.removeprefix("models/") for name, row in mount.models().items() if row["state"] == "complete"}


def fill_up(disk: Path, leave: int) -> Path:
    """Somebody else's file, which leaves so many bytes of a disk free."""
    ballast = disk / "ballast"
    size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return ballast


def free_ratio(mount: OverlayMount) -> float:
    """What `tierd status` says is free."""
    told: float = of_tier(mount)["free_ratio"]
    return told


def arrived(model: Model) -> None:
    """Load it and wait until the node has it; somebody may have files open."""
    model.read()
    model.await_state("complete")
    model.row()


def test_a_disk_that_others_fill_gets_its_room_back(small: OverlayMount) -> None:
    models = [make_model(small, f"m{number}", 5 * MIB).filled() for number in range(6)]
    assert len(on_node(small)) == 6
    total = os.statvfs(small.cache_dir).f_blocks * os.statvfs(small.cache_dir).f_frsize
    ballast = fill_up(small.cache_dir.parent, int(0.1 * total))
    wait_until(lambda: free_ratio(small) >= 0.4, EVICTION_SECONDS, lambda: f"40 % are free: {of_tier(small)}")
    assert on_node(small) == {"m4", "m5"}, "the least recently used leave, and no more than needed"
    assert metric(small, 'tierd_evictions_total{reason="watermark"}') == 4
    models[0].read()
    idle(small)
    assert free_ratio(small) >= 0.2
    ballast.unlink()
    models[1].filled()


def test_eviction_does_not_begin_above_its_start(small: OverlayMount) -> None:
    """Between the two marks nothing leaves, and what fits still comes in."""
    for number in range(3):
        make_model(small, f"m{number}", 5 * MIB).filled()
    total = os.statvfs(small.cache_dir).f_blocks * os.statvfs(small.cache_dir).f_frsize
    fill_up(small.cache_dir.parent, int(0.35 * total))
    make_model(small, "m3", MIB).filled()
    assert on_node(small) == {"m0", "m1", "m2", "m3"}
    assert of_tier(small)["evictions"] == 0


def test_a_full_disk_is_a_miss(small: OverlayMount) -> None:
    ballast = fill_up(small.cache_dir.parent, 2 * MIB)
    model = make_model(small, "m", 5 * MIB)
    model.read()
    model.read()
    idle(small)
    assert model.row()["state"] == "absent"
    assert "m is not on the node" in command(small, "warm", "m", "--wait", code=1)
    small.expect_log("nothing_to_evict")
    wait_until(lambda: any(line["event"] == "nothing_to_evict" for line in small.log()), EVICTION_SECONDS, "it is said")
    ballast.unlink()
    make_model(small, "later", 5 * MIB).filled()


def test_space_runs_out_in_the_middle(disk: DiskFactory, overlay_mount: MountFactory) -> None:
    """No more inodes: what admission could not foresee. Fills stop, nothing is left of them, reads are right."""
    cache = disk(64, "-b", "4096", "-N", "16") / "cache"
    mount = overlay_mount(cache_dir=cache, prefetch="no")
    mount.cache_dir = cache
    mount.expect_log("fill_ended")
    models = [make_model(mount, f"m{number}", 3 * MIB) for number in range(4)]
    for model in models:
        model.read()
        idle(mount)
    assert 0 < len(on_node(mount)) < 4
    assert metric(mount, 'tierd_fills_total{outcome="no_space"}') > 0
    assert (leftovers(mount), of_tier(mount)["reserved_bytes"]) == ([], 0)
    for model in models:
        model.read()


def test_the_least_recently_used_leaves_first(limited: OverlayMount) -> None:
    for name in "abcad":
        make_or_find(limited, name).filled()
    assert on_node(limited) == {"a", "c", "d"}


def make_or_find(mount: OverlayMount, name: str) -> Model:
    """A model of 4 MiB, made when it is first asked for."""
    if not (mount.source / "models" / name).exists():
        make_model(mount, name, 4 * MIB)
    return Model(
        mount, f"models/{name}", {"a.safetensors": (mount.source / f"models/{name}/a.safetensors").read_bytes()}
    )


def test_what_is_open_or_pinned_stays(limited: OverlayMount) -> None:
    """However long ago they were loaded, and however cold they are."""
    a, b, c, d, e = (make_model(limited, name, 4 * MIB) for name in "abcde")
    with a.through().open("rb", buffering=0) as reader:
        for model in (a, b, c):
            arrived(model)
        command(limited, "pin", "b")
        arrived(d)
        assert on_node(limited) == {"a", "b", "d"}
        arrived(e)
        assert on_node(limited) == {"a", "b", "e"}
        assert reader.read(9 * MIB) == a.files["a.safetensors"]
    assert of_tier(limited)["held_bytes"] <= 13 * MIB


def test_what_is_colder_is_not_admitted(limited: OverlayMount) -> None:
    """A scan over many models must not wash the hot ones out."""
    hot = [make_model(limited, f"hot{number}", 6 * MIB).filled() for number in range(2)]
    for loads in (2, 3):
        for model in hot:
            wait_until(lambda model=model, loads=loads: _loaded(model) >= loads, 10, "it is loaded again")  # type: ignore[misc]
    cold = make_model(limited, "cold", 6 * MIB)
    refused = of_tier(limited)["fills_refused"]
    cold.read()
    assert of_tier(limited)["fills_refused"] == refused + 1
    assert on_node(limited) == {"hot0", "hot1"}
    assert "hot" in command(limited, "warm", "cold", "--wait", code=1)
    huge = make_model(limited, "huge", 14 * MIB)
    huge.read()
    idle(limited)
    assert "may ever hold" in command(limited, "warm", "huge", "--wait", code=1)
    assert on_node(limited) == {"hot0", "hot1"}


def _loaded(model: Model) -> int:
    """Load it once more, after the gap that tells loads apart."""
    time.sleep(2 * IDLE_SECONDS)
    model.read()
    model.mount.settled()
    return int(model.row()["loads"])


def test_a_pin_outweighs_heat(limited: OverlayMount) -> None:
    for number in range(2):
        make_model(limited, f"m{number}", 6 * MIB).filled()
    make_model(limited, "pinned", 6 * MIB)
    command(limited, "pin", "pinned")
    command(limited, "warm", "pinned", "--wait")
    assert on_node(limited) == {"m1", "pinned"}
