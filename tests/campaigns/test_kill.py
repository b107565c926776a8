"""The daemon is killed again and again under load: no call fails, none is done twice, no byte is wrong."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns import house
from tests.campaigns.workers import Crew, Names, Told, Worker, appends, lists, open_unlinked, reads, truncates
from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, content
from tests.mounts import OverlayMount

ANSWER_SECONDS = 2.0
"""The bar: a call in flight at a kill is answered within this time at p99."""


def models(mount: OverlayMount, count: int, size: int) -> dict[Path, bytes]:
    """Files of so many models, as pods see them."""
    files = {}
    for number in range(count):
        for shard in range(2):
            name = f"models/m{number}/{shard}.safetensors"
            files[mount.mountpoint / name] = data = content(size + number * 4097, name)
            (mount.source / name).parent.mkdir(parents=True, exist_ok=True)
            (mount.source / name).write_bytes(data)
    return files


def crew_of(mount: OverlayMount, seed: int, *, faithful: bool) -> Crew:
    """Readers, writers, and all that changes names."""
    files = models(mount, 6, 600_000)
    work = mount.mountpoint / "work"
    work.mkdir()
    steps: dict[str, Callable[[Worker], None]] = {
        "reader 1": reads(files),
        "reader 2": reads(files),
        "appender": appends(work / "appends"),
        "truncater": truncates(work / "truncates"),
        "renamer 1": Names(work / "names 1", faithful=faithful).step,
        "renamer 2": Names(work / "names 2", faithful=faithful).step,
        "unlinker": open_unlinked(work / "unlinked"),
        "lister": lists(work / "listed", 300),
    }
    return Crew(steps, seed)


class Kills:
    """Kills of one mount's daemon, and what came of the calls that were in flight."""

    def __init__(self, mount: OverlayMount, seed: int) -> None:
        self.mount = mount
        self.random = random.Random(seed)
        self.at: list[float] = []
        self.resent: list[int] = []
        self._quick = 0

    def kill(self) -> None:
        """One more, at a random moment; then wait until another daemon serves, and ask it what it was sent again."""
        self._quick = self._quick + 1 if self.random.random() < 0.3 and self._quick < 2 else 0
        time.sleep(self.random.uniform(0.02, 0.8) if self._quick else self.random.uniform(1.0, 1.4))
        self.mount.refresh()
        pid = self.mount.pid
        os.kill(pid, 9)
        self.at.append(time.monotonic())
        self.mount.succeeded(pid)
        self.resent.append(self.mount.status()["counters"]["resent"])

    def waits(self, told: list[Told]) -> list[float]:
        """Seconds from each kill to the answer of each call that was in flight."""
        calls = [(start, end) for one in told for start, end, _ in one.slow]
        return sorted(end - at for at in self.at for start, end in calls if start < at < end)


def campaign(mount: OverlayMount, cycles: int, *, faithful: bool = True) -> None:
    """So many kills, and what they are held to."""
    seed = house.seed()
    kills = Kills(mount, seed)
    started = time.monotonic()
    with crew_of(mount, seed, faithful=faithful) as crew:
        while len(kills.at) < cycles and not crew.failed():
            kills.kill()
    waits = kills.waits(crew.told)
    figures: dict[str, Any] = {
        "kills": len(kills.at),
        "hit_requests_in_flight": sum(count > 0 for count in kills.resent),
        "requests_resent": sum(kills.resent),
        "calls": sum(told.calls for told in crew.told),
        "wait_p50_s": round(waits[len(waits) // 2], 3) if waits else None,
        "wait_p99_s": round(waits[int(len(waits) * 0.99)], 3) if waits else None,
        "wait_max_s": round(waits[-1], 3) if waits else None,
        "fills": sum(line["event"] == "filled" for line in mount.log()),
        "evictions": sum(line["event"] == "evicted" for line in mount.log()),
        "seconds": round(time.monotonic() - started),
    }
    wrong = [f"{told.name}: {complaint}" for told in crew.told for complaint in told.wrong]
    house.report("daemon killed", wrong=len(wrong), **figures)
    assert not wrong, "\n".join(wrong[:10])
    assert len(kills.at) == cycles
    mount.expect_log("daemon_died")
    mount.nodes_lost_max = cycles // 20


def settings(source: Path | None = None) -> dict[str, Any]:
    """A node tier that cannot hold all models, so that they come and go."""
    return {"cache_size": 5 * MIB, "prefetch": "yes"}


def test_kills(overlay_mount: MountFactory) -> None:
    campaign(overlay_mount(**settings()), 6)


@pytest.mark.campaign
@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_campaign_kills(overlay_mount: MountFactory, passthrough: str) -> None:
    campaign(overlay_mount(passthrough=passthrough, **settings()), int(os.environ.get("TIERD_KILLS", "500")))


@pytest.mark.campaign
def test_campaign_kills_over_juicefs(
    overlay_mount: MountFactory, juicefs: Path, new_directory: DirectoryFactory
) -> None:
    source = juicefs / "killed"
    source.mkdir()
    campaign(overlay_mount(source, **settings()), int(os.environ.get("TIERD_KILLS", "100")), faithful=False)
