"""Random operations through the overlay and beneath it, against a plain directory that gets the same ones.

Every operation is done twice: through the mount (or directly on its source) and on a model directory
of the same file system type. Results and errnos must be equal, and so must the whole trees, every few
steps and at the end. The mount has timeouts of 0, so that changes beneath are seen by the very next call and the
comparison can be exact; that the default timeouts only add a bounded delay is tested in
`test_consistency.py`.

In CI the examples are the same each time. `pytest -m campaign` tries new ones; a failure prints the
steps that lead to it and a blob for `@reproduce_failure`.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.calls import outcome, renameat2
from tests.integration.trees import (
    hard_link,
    look,
    mode_links_size,
    replace_file,
    set_attribute,
    set_times,
    soft_link,
    sorted_names,
    write_file,
)
from tests.mounts import OverlayMount

NAMES = ["a", "b", "c", "a/a", "a/b", "a/c", "b/a", "b/b", "a/a/a", "b/a/b"]
FIRST_TREE = ("a/", "b/", "a/a/", "c", "a/b", "b/a")
FIRST_OPEN = (("c", os.O_RDONLY), ("a/b", os.O_RDWR), ("b/a", os.O_RDONLY), ("b/a", os.O_RDWR))
offsets = st.sampled_from([0, 1, 100, 4095, 4096, 10_000, 150_000])
contents = st.builds(lambda letter, size: letter * size, st.sampled_from([b"x", b"yz", b"!"]), offsets)
modes = st.sampled_from([0o644, 0o600, 0o755, 0o000, 0o4755, 0o2775, 0o1777])
sides = st.sampled_from(["through", "through", "beneath"])
_RENAME_FLAGS = st.sampled_from([0, 0, 1, 2])
_OPENS = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_RDONLY,
        os.O_RDWR,
        os.O_WRONLY,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDONLY | os.O_CREAT,
    ]
)


class Place(NamedTuple):
    """Which name an operation takes: mostly one that is there and of the right kind, sometimes any at all."""

    kind: str
    number: int


def _places(*kinds: str) -> st.SearchStrategy[Place]:
    return st.builds(Place, st.sampled_from(kinds), st.integers(0, 30))


KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK}
numbers = st.integers(0, 30)
files = _places("file", "file", "file", "file", "any")
directories = _places("directory", "directory", "any")
things = _places("file", "directory", "link", "any")
new_names = _places("any")


class Handle(NamedTuple):
    """One file, open on both sides."""

    overlay: int
    model: int


class Machine(RuleBasedStateMachine):
    """One example: a new directory on the mount, one like it beside it."""

    mount: ClassVar[OverlayMount]
    models: ClassVar[Path]
    steps_per_look: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        number = len(os.listdir(self.models))
        self.beneath = self.mount.source / f"{number}"
        self.through = self.mount.mountpoint / f"{number}"
        self.model = self.models / f"{number}"
        self.open: list[Handle] = []
        self.ticks = 0
        self.steps = 0
        for base in (self.beneath, self.model):
            base.mkdir()
            for name in FIRST_TREE:
                (base / name).mkdir() if name.endswith("/") else (base / name).write_bytes(name.encode())
        for name, flags in FIRST_OPEN:
            self.open.append(Handle(os.open(self.through / name, flags), os.open(self.model / name, flags)))

    def teardown(self) -> None:
        try:
            self.compare()
        finally:
            for handle in self.open:
                os.close(handle.overlay)
                os.close(handle.model)
            shutil.rmtree(self.through)
        assert not self.beneath.exists()

    def name(self, place: Place) -> str:
        """What a place means in the tree as it is now."""
        found = sorted(
            name for name, facts in look(self.model).facts.items() if KINDS.get(place.kind) == stat.S_IFMT(facts.mode)
        )
        found = found or NAMES
        return found[place.number % len(found)]

    def both(self, side: str, function: Callable[..., Any], *places: Place, rest: tuple[Any, ...] = ()) -> Any:
        """Call on one side of the mount and on the model; the answers must be equal."""
        base = self.through if side == "through" else self.beneath
        names = [self.name(place) for place in places]
        expected = outcome(function, *(self.model / name for name in names), *rest)
        found = outcome(function, *(base / name for name in names), *rest)
        assert found == expected, f"{function.__name__}{names}{rest} {side}: {found!r}, not {expected!r}"
        if side == "beneath":
            for name in names:
                self.distinguish(name)
        return expected

    def distinguish(self, name: str) -> None:
        """Give a file that was changed beneath a time of its own.

        Clocks of file systems tick every few milliseconds; two changes of equal size within one tick
        are the same version, for the overlay as for everybody else.
        """
        path = self.beneath / name
        if not path.is_symlink() and path.is_file():
            self.ticks += 1
            os.utime(path, ns=(0, 1_700_000_000_000_000_000 + self.ticks * 1000))

    # --- names ---

    @rule(side=sides, place=new_names, mode=modes)
    def mkdir(self, side: str, place: Place, mode: int) -> None:
        self.both(side, os.mkdir, place, rest=(mode,))

    @rule(side=sides, place=directories)
    def rmdir(self, side: str, place: Place) -> None:
        self.both(side, os.rmdir, place)

    @rule(side=sides, place=files)
    def unlink(self, side: str, place: Place) -> None:
        self.both(side, os.unlink, place)

    @rule(side=sides, old=things, new=things, flags=_RENAME_FLAGS)
    def rename(self, side: str, old: Place, new: Place, flags: int) -> None:
        self.both(side, renameat2, old, new, rest=(flags,))

    @rule(side=sides, old=directories, new=new_names, flags=_RENAME_FLAGS)
    def rename_directory(self, side: str, old: Place, new: Place, flags: int) -> None:
        self.both(side, renameat2, old, new, rest=(flags,))

    @rule(side=sides, old=files, new=new_names)
    def link(self, side: str, old: Place, new: Place) -> None:
        self.both(side, hard_link, old, new)

    @rule(side=sides, text=st.sampled_from(NAMES), place=new_names)
    def symlink(self, side: str, text: str, place: Place) -> None:
        self.both(side, soft_link, place, rest=(text,))

    @rule(side=sides, place=directories)
    def listing(self, side: str, place: Place) -> None:
        self.both(side, sorted_names, place)

    # --- attributes ---

    @rule(side=sides, place=things, mode=modes)
    def chmod(self, side: str, place: Place, mode: int) -> None:
        self.both(side, os.chmod, place, rest=(mode,))

    @rule(side=sides, place=things, uid=st.sampled_from([0, 1000]), gid=st.sampled_from([0, 1000]))
    def chown(self, side: str, place: Place, uid: int, gid: int) -> None:
        self.both(side, os.lchown, place, rest=(uid, gid))

    @rule(side=sides, place=things, at_ns=st.sampled_from([0, 1, 1_700_000_000_987_654_321]))
    def utime(self, side: str, place: Place, at_ns: int) -> None:
        self.both(side, set_times, place, rest=(at_ns,))

    @rule(side=sides, place=things, value=st.sampled_from([b"", b"1", b"x" * 1000]))
    def setxattr(self, side: str, place: Place, value: bytes) -> None:
        self.both(side, set_attribute, place, rest=(value,))

    @rule(side=sides, place=things)
    def removexattr(self, side: str, place: Place) -> None:
        self.both(side, os.removexattr, place, rest=("user.test",))

    # --- contents ---

    @rule(
        side=sides,
        place=files,
        flags=st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC, os.O_APPEND]),
        offset=offsets,
        data=contents,
    )
    def write(self, side: str, place: Place, flags: int, offset: int, data: bytes) -> None:
        self.both(side, write_file, place, rest=(flags, offset, data))

    @rule(side=sides, place=files, data=contents)
    def replace(self, side: str, place: Place, data: bytes) -> None:
        self.both(side, replace_file, place, rest=(data,))

    @rule(side=sides, place=files, size=offsets)
    def truncate(self, side: str, place: Place, size: int) -> None:
        self.both(side, os.truncate, place, rest=(size,))

    @rule(place=files)
    def read(self, place: Place) -> None:
        self.both("through", Path.read_bytes, place)

    # --- open files ---

    @rule(place=files, flags=_OPENS)
    def open_file(self, place: Place, flags: int) -> None:
        name = self.name(place)
        expected, found = (outcome(os.open, base / name, flags, 0o644) for base in (self.model, self.through))
        if isinstance(expected, int) and isinstance(found, int):
            self.open.append(Handle(found, expected))
        else:
            assert found == expected, f"open({name}, {flags:o}): {found}, not {expected}"

    def on_one(self, number: int, function: Callable[..., Any], *rest: Any) -> None:
        """Call on both descriptors of an open file; the answers must be equal."""
        handle = self.open[number % len(self.open)]
        expected, found = (outcome(function, fd, *rest) for fd in (handle.model, handle.overlay))
        assert found == expected, f"{function.__name__}{rest} on a handle: {found!r}, not {expected!r}"

    @precondition(lambda self: self.open)
    @rule(number=numbers, offset=offsets, size=offsets)
    def read_one(self, number: int, offset: int, size: int) -> None:
        self.on_one(number, os.pread, size, offset)

    @precondition(lambda self: self.open)
    @rule(number=numbers, offset=offsets, data=contents)
    def write_one(self, number: int, offset: int, data: bytes) -> None:
        self.on_one(number, os.pwrite, data, offset)

    @precondition(lambda self: self.open)
    @rule(number=numbers, size=offsets)
    def truncate_one(self, number: int, size: int) -> None:
        self.on_one(number, os.ftruncate, size)

    @precondition(lambda self: self.open)
    @rule(number=numbers, mode=modes)
    def chmod_one(self, number: int, mode: int) -> None:
        self.on_one(number, os.fchmod, mode)

    @precondition(lambda self: self.open)
    @rule(number=numbers)
    def stat_one(self, number: int) -> None:
        self.on_one(number, mode_links_size)

    @precondition(lambda self: self.open)
    @rule(number=numbers)
    def close_one(self, number: int) -> None:
        self.on_one(number, os.close)
        del self.open[number % len(self.open)]

    # --- what holds after each step ---

    @invariant()
    def trees_are_equal(self) -> None:
        self.steps += 1
        if self.steps % self.steps_per_look == 0:
            self.compare()

    def compare(self) -> None:
        """The whole trees: through the mount, beneath it, and the model's."""
        through = look(self.through)
        assert through.facts == look(self.beneath).facts
        assert through.without_times() == look(self.model).without_times()


EACH = settings(max_examples=15)
"""Per data path; two of them make the 30 examples of a run."""
CAMPAIGN = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def run(over: OverlayMount, beside: Path, profile: settings, look_every: int) -> None:
    """Try examples on one mount. A look through a mount that remembers nothing takes a hundred requests."""

    class Here(Machine):
        mount = over
        models = beside
        steps_per_look = look_every

    run_state_machine_as_test(Here, settings=profile)


@pytest.fixture
def exact_mount(overlay_mount: MountFactory, data_path: str) -> OverlayMount:
    """A mount that remembers nothing."""
    return overlay_mount(attr_timeout=0, entry_timeout=0, passthrough=data_path)


@pytest.mark.parametrize("data_path", ["auto", "off"])
def test_the_overlay_is_its_source(exact_mount: OverlayMount, new_directory: DirectoryFactory) -> None:
    run(exact_mount, new_directory("model"), EACH, look_every=8)


@pytest.mark.campaign
@pytest.mark.parametrize("data_path", ["auto", "off"])
def test_campaign_the_overlay_is_its_source(exact_mount: OverlayMount, new_directory: DirectoryFactory) -> None:
    run(exact_mount, new_directory("model"), CAMPAIGN, look_every=4)
