"""The overlay against a plain directory once more (`test_model_based.py`), while its daemon dies and it is remounted.

A kill comes while the operations after it run; each must still do what it does on the plain directory, once. What is
open stays open through a kill, and is closed before a remount.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, run_state_machine_as_test

from tests.campaigns import house
from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.test_model_based import Machine
from tests.mounts import OverlayMount
from tierd.node.peer import QUICK_SECONDS

LOOK_EVERY = 8
TROUBLES = st.sampled_from([0, 100, 300, 1000, 3000, None])
"""A kill so many microseconds later; or a remount."""
MAY_BE_LOGGED = ("daemon_died", "fill_ended", "fill_not_begun")


class Lives:
    """Of the daemons of one mount. Each serves long enough not to count as one that cannot be kept alive."""

    def __init__(self, mount: OverlayMount) -> None:
        self.mount = mount
        self.kills = 0
        self.hits = 0
        self.remounts = 0
        self._killer = threading.Thread()
        self._killer.start()
        self._killed = 0

    def kill_in(self, seconds: float) -> None:
        """Return at once; whatever is called next runs beside the kill."""
        self.await_successor()
        time.sleep(QUICK_SECONDS)
        self._killed = self.mount.pid
        self._killer = threading.Timer(seconds, os.kill, (self._killed, 9))
        self._killer.start()
        self.kills += 1

    def await_successor(self) -> None:
        """Until the mount is in no danger."""
        self._killer.join()
        if self._killed:
            self.mount.succeeded(self._killed)
            self._killed = 0
            self.hits += self.mount.status()["counters"]["resent"] > 0

    def remount(self) -> None:
        """Take the mount down, which is held to all that mounts are held to, and begin anew."""
        self.await_successor()
        assert self.mount.close() == []
        self.mount.start()
        self.remounts += 1


class Mortal(Machine):
    """See the module."""

    lives: ClassVar[Lives]

    def __init__(self) -> None:
        super().__init__()
        self.troubles: dict[int, int | None] = {}

    @initialize(troubles=st.dictionaries(st.integers(1, 40), TROUBLES, min_size=2, max_size=5))
    def expect(self, troubles: dict[int, int | None]) -> None:
        self.troubles = dict(troubles)

    @invariant()
    def trouble_comes(self) -> None:
        """After the step that it was drawn for."""
        if self.steps in self.troubles:
            delay_us = self.troubles.pop(self.steps)
            if delay_us is not None:
                self.lives.kill_in(delay_us / 1e6)
                return
            for handle in self.open:
                os.close(handle.overlay)
                os.close(handle.model)
            self.open.clear()
            self.lives.remount()


def run(over: OverlayMount, beside: Path, examples: int) -> None:
    """Try examples on one mount."""
    over.allow_log(*MAY_BE_LOGGED)
    story, started = Lives(over), time.monotonic()

    class Here(Mortal):
        mount = over
        models = beside
        steps_per_look = LOOK_EVERY
        lives = story

    profile = settings(
        max_examples=examples, stateful_step_count=50, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    run_state_machine_as_test(Here, settings=profile)
    story.await_successor()
    house.report("model with deaths", examples=examples, kills=story.kills, hit_requests_in_flight=story.hits,
                 remounts=story.remounts, seconds=round(time.monotonic() - started))  # fmt: skip
    assert story.kills
    assert story.remounts


@pytest.fixture
def exact_mount(overlay_mount: MountFactory, data_path: str) -> OverlayMount:
    """A mount that remembers nothing."""
    return overlay_mount(attr_timeout=0, entry_timeout=0, passthrough=data_path)


@pytest.mark.parametrize("data_path", ["auto", "off"])
def test_deaths_change_nothing(exact_mount: OverlayMount, new_directory: DirectoryFactory) -> None:
    run(exact_mount, new_directory("model"), 2)


@pytest.mark.campaign
@pytest.mark.parametrize("data_path", ["auto", "off"])
def test_campaign_deaths_change_nothing(exact_mount: OverlayMount, new_directory: DirectoryFactory) -> None:
    run(exact_mount, new_directory("model"), 150)
