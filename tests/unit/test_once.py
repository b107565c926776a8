"""Requests that are sent again: each operation, killed at each of its steps, whatever happened beneath since."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Reads
from tests.unit.kernel import number_of
from tierd.node.cold_source import ColdSource
from tierd.node.estate import read
from tierd.node.heir import intents_of
from tierd.node.journal import Journal
from tierd.node.ledger import DONE, FAILED, INTENT, RESENT, ROOT_ID, Ledger, records
from tierd.node.once import CLOCK_SLACK_NS, Inode, Once
from tierd.node.overlay import Overlay
from tierd.node.reach import Caller
from tierd.node.sources import Changes, Moved, Ref, version_of

UNIQUE = 42
SECOND_NS = 1_000_000_000


class Killed(BaseException):
    """The daemon died at this instruction."""


class Daemons:
    """One daemon after the other on a directory and a ledger. `kill` says where the next call ends."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.top.mkdir()
        self.source = ColdSource(top)
        self.ledger = Ledger()
        self.now_ns: int | None = None
        self.kill = "nowhere"
        self.start()

    def start(self) -> None:
        """A daemon that knows what the ledger says."""
        self.once = Once(
            self.ledger,
            self.source.key,
            intents_of(read(self.ledger.fd)),
            clock_ns=lambda: self.now_ns or time.time_ns(),
        )

    def performed(self, function: Callable[[], Any]) -> Any:
        """The call itself, and a death before or after it."""
        if self.kill == "before":
            raise Killed
        result = function()
        if self.kill == "after":
            raise Killed
        return result

    def kinds(self) -> list[int]:
        return [kind for kind, _ in records(self.ledger.fd)]

    # --- the operations, as the overlay makes them ---

    def make(self, unique: int = UNIQUE) -> str:
        fd = self.source.root_fd

        def perform() -> str:
            self.performed(lambda: os.mkdir("name", dir_fd=fd))
            return "made"

        return self.once.make(unique, lambda: self.source.lstat(fd, b"name"), perform, lambda st: "adopted")

    def unlink(self, unique: int = UNIQUE) -> object:
        fd = self.source.root_fd

        def perform(about: Callable[[os.stat_result], None]) -> str:
            about(self.source.lstat(fd, b"name"))
            self.performed(lambda: os.unlink("name", dir_fd=fd))
            return "removed"

        return self.once.remove(unique, lambda: self.source.lstat(fd, b"name"), perform)

    def rename(self, unique: int = UNIQUE, flags: int = 0) -> object:
        fd = self.source.root_fd

        def perform(about: Callable[[os.stat_result, os.stat_result | None], None]) -> str:
            old, new = self.source.lstat_many(fd, [b"name", b"new"])
            if old is None:
                raise FileNotFoundError(errno.ENOENT, "no such name")
            about(old, new)
            self.performed(lambda: self.source.rename(fd, b"name", fd, b"new", flags))
            return "renamed"

        def look() -> tuple[os.stat_result | None, os.stat_result | None]:
            old, new = self.source.lstat_many(fd, [b"name", b"new"])
            return old, new

        return self.once.rename(unique, look, perform)

    def exchange(self, unique: int = UNIQUE) -> object:
        return self.rename(unique, 2)

    def truncate(self, unique: int = UNIQUE) -> str:
        def perform(truncating: bool) -> str:
            if truncating:
                self.performed(lambda: os.truncate(self.top / "name", 3))
            return "truncated" if truncating else "left alone"

        return self.once.truncate(unique, 3, lambda: self.source.lstat(self.source.root_fd, b"name"), perform)

    def unset(self, unique: int = UNIQUE) -> str:
        def perform() -> str:
            self.performed(lambda: os.removexattr(self.top / "name", "user.x"))
            return "removed"

        return self.once.unset(unique, perform, lambda: "gone")

    def again(self, operation: str) -> Any:
        """The kernel sends the request again, to the next daemon."""
        self.kill = "nowhere"
        self.start()
        return getattr(self, operation)(UNIQUE | RESENT)

    def die_in(self, operation: str, where: str) -> None:
        """`before` the call, `after` it and before it is written down, or `unanswered`: after that."""
        self.kill = where
        if where == "unanswered":
            getattr(self, operation)()
        else:
            with pytest.raises(Killed):
                getattr(self, operation)()


def number_from(call: Callable[[], object]) -> int | None:
    """The errno that a call ends with."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    made = Daemons(tmp_path / "source")
    yield made
    made.source.close()
    made.ledger.close()


def prepare(daemons: Daemons, operation: str) -> None:
    """What the operation needs to be there."""
    if operation != "make":
        (daemons.top / "name").write_bytes(b"content")
    if operation == "exchange":
        (daemons.top / "new").write_bytes(b"other")
    if operation == "unset":
        os.setxattr(daemons.top / "name", "user.x", b"1")


def state(daemons: Daemons) -> dict[str, object]:
    """What lies beneath."""
    found: dict[str, object] = {}
    for path in daemons.top.iterdir():
        found[path.name] = "directory" if path.is_dir() else (path.read_bytes(), os.listxattr(path))
    return found


OPERATIONS = {
    "make": ("made", "adopted", {"name": "directory"}),
    "unlink": ("removed", Inode, {}),
    "rename": ("renamed", tuple, {"new": (b"content", [])}),
    "exchange": ("renamed", tuple, {"new": (b"content", []), "name": (b"other", [])}),
    "truncate": ("truncated", "left alone", {"name": (b"con", [])}),
    "unset": ("removed", "gone", {"name": (b"content", [])}),
}
"""What an operation answers if it does something, what if it was done before, and what it leaves."""


def is_answer(answer: object, expected: object) -> bool:
    return isinstance(answer, expected) if isinstance(expected, type) else answer == expected


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("where", ["never seen", "before", "after", "unanswered"])
@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_each_takes_effect_once_wherever_daemons_die(daemons: Daemons, operation: str, where: str, deaths: int) -> None:
    """With one death after the other: also the daemon that was sent the request again dies before it answers."""
    fresh, repeated, left = OPERATIONS[operation]
    prepare(daemons, operation)
    if where != "never seen":
        daemons.die_in(operation, where)
    answer = daemons.again(operation)
    assert is_answer(answer, fresh if where in ("never seen", "before") else repeated)
    assert state(daemons) == left
    for _ in range(deaths):
        assert is_answer(daemons.again(operation), repeated)
        assert state(daemons) == left


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_intent_is_there_before_the_call_and_that_it_is_done_after_it(daemons: Daemons, operation: str) -> None:
    prepare(daemons, operation)
    seen = []

    def performed(function: Callable[[], Any]) -> Any:
        seen.append(daemons.kinds())
        result = function()
        seen.append(daemons.kinds())
        return result

    daemons.performed = performed  # type: ignore[method-assign]
    getattr(daemons, operation)()
    assert seen == [[INTENT], [INTENT]]
    assert daemons.kinds() == [INTENT, DONE]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_requests_that_need_no_care_write_nothing(daemons: Daemons, operation: str) -> None:
    """What has no unique number cannot be sent again."""
    prepare(daemons, operation)
    getattr(daemons, operation)(0)
    assert daemons.kinds() == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_new_is_not_taken_for_what_was_sent_again(daemons: Daemons, operation: str) -> None:
    """A number without the mark is another request, even if an intent has it."""
    prepare(daemons, operation)
    daemons.die_in(operation, "unanswered")
    daemons.start()
    daemons.kill = "nowhere"
    if operation in ("exchange", "truncate"):
        assert getattr(daemons, operation)(UNIQUE) == OPERATIONS[operation][0]
        return
    expected = {"make": errno.EEXIST, "unset": errno.ENODATA}.get(operation, errno.ENOENT)
    assert number_from(lambda: getattr(daemons, operation)(UNIQUE)) == expected


# --- what was refused ---


def refuse(daemons: Daemons, operation: str) -> int:
    """Make it fail; the errno it fails with."""
    if operation == "make":
        (daemons.top / "name").mkdir()
        return errno.EEXIST
    if operation == "unset":
        (daemons.top / "name").write_bytes(b"content")
        return errno.ENODATA
    if operation == "truncate":
        (daemons.top / "name").mkdir()
        return errno.EISDIR
    if operation == "unlink":
        (daemons.top / "name").mkdir()
        return errno.EISDIR
    (daemons.top / "name").mkdir()
    (daemons.top / "new").write_bytes(b"")
    return errno.ENOTDIR


@pytest.mark.parametrize("operation", ["make", "unlink", "rename", "truncate", "unset"])
def test_what_was_refused_is_refused_again(daemons: Daemons, operation: str) -> None:
    """A directory that another node made this moment was taken for ours: both were told that they had made it."""
    number = refuse(daemons, operation)
    before = state(daemons)
    for _ in range(3):
        assert number_from(getattr(daemons, operation)) == number
        assert daemons.kinds()[-2:] == [INTENT, FAILED]
        assert number_from(lambda: daemons.again(operation)) == number
    assert state(daemons) == before


def test_what_was_refused_may_be_done_when_it_is_sent_again(daemons: Daemons) -> None:
    refuse(daemons, "make")
    with pytest.raises(FileExistsError):
        daemons.make()
    (daemons.top / "name").rmdir()
    assert daemons.again("make") == "made"


# --- what happens beneath meanwhile ---


def test_a_name_that_somebody_made_long_before_is_not_ours(daemons: Daemons) -> None:
    """Killed before the call; what is there has a change time before the intent."""
    (daemons.top / "name").mkdir()
    daemons.now_ns = os.stat(daemons.top / "name").st_ctime_ns + CLOCK_SLACK_NS + 1
    daemons.die_in("make", "before")
    with pytest.raises(FileExistsError):
        daemons.again("make")


def test_a_source_s_clock_may_be_a_little_behind(daemons: Daemons) -> None:
    daemons.now_ns = time.time_ns() + CLOCK_SLACK_NS // 2
    daemons.die_in("make", "after")
    assert daemons.again("make") == "adopted"


def test_a_made_name_that_is_gone_again_is_made_again(daemons: Daemons) -> None:
    for where in ("after", "unanswered"):
        daemons.die_in("make", where)
        (daemons.top / "name").rmdir()
        assert daemons.again("make") == "made"
        (daemons.top / "name").rmdir()


@pytest.mark.parametrize("where", ["before", "after", "unanswered"])
def test_another_file_under_a_removed_name_stays(daemons: Daemons, where: str) -> None:
    prepare(daemons, "unlink")
    keep = os.open(daemons.top / "name", os.O_RDONLY)  # its inode number is not used again
    daemons.die_in("unlink", where)
    (daemons.top / "other").write_bytes(b"other")
    (daemons.top / "other").rename(daemons.top / "name")
    answer = daemons.again("unlink")
    assert isinstance(answer, Inode)
    assert answer.key == os.fstat(keep).st_ino
    assert state(daemons) == {"name": (b"other", [])}
    os.close(keep)


def test_a_removed_name_is_told_with_what_it_was(daemons: Daemons) -> None:
    prepare(daemons, "unlink")
    st = os.stat(daemons.top / "name")
    daemons.die_in("unlink", "after")
    assert daemons.again("unlink") == Inode(daemons.source.key(st), version_of(st))


def test_a_renamed_file_is_told_with_what_it_replaced(daemons: Daemons) -> None:
    prepare(daemons, "exchange")
    moved, replaced = (Inode(os.stat(path).st_ino, version_of(os.stat(path)))
                       for path in (daemons.top / "name", daemons.top / "new"))  # fmt: skip
    daemons.die_in("rename", "after")
    assert daemons.again("rename") == (moved, replaced)


def test_a_name_made_anew_after_a_rename_stays(daemons: Daemons) -> None:
    prepare(daemons, "rename")
    daemons.die_in("rename", "after")
    (daemons.top / "name").write_bytes(b"anew")
    assert isinstance(daemons.again("rename"), tuple)
    assert state(daemons) == {"name": (b"anew", []), "new": (b"content", [])}


def test_a_rename_onto_another_link_of_the_file_is_none(daemons: Daemons) -> None:
    """rename(2): both are left."""
    prepare(daemons, "rename")
    (daemons.top / "new").hardlink_to(daemons.top / "name")
    for where in ("before", "after", "unanswered"):
        daemons.die_in("rename", where)
        daemons.again("rename")
        assert state(daemons) == {"name": (b"content", []), "new": (b"content", [])}


def test_what_was_written_after_a_truncation_stays(daemons: Daemons) -> None:
    prepare(daemons, "truncate")
    daemons.die_in("truncate", "unanswered")
    (daemons.top / "name").write_bytes(b"written since")
    assert daemons.again("truncate") == "left alone"
    assert state(daemons) == {"name": (b"written since", [])}


def test_an_attribute_set_anew_stays(daemons: Daemons) -> None:
    """It was removed again."""
    prepare(daemons, "unset")
    daemons.die_in("unset", "unanswered")
    os.setxattr(daemons.top / "name", "user.x", b"2")
    assert daemons.again("unset") == "gone"
    assert state(daemons) == {"name": (b"content", ["user.x"])}


# --- a thread of the dead daemon that was still at it ---


def late(daemons: Daemons, call: Callable[[], Any]) -> None:
    """Between the look at the source and the call of the next daemon, that of the dead one takes effect."""
    perform = daemons.performed

    def performed(function: Callable[[], Any]) -> Any:
        call()
        daemons.performed = perform  # type: ignore[method-assign]
        return perform(function)

    daemons.performed = performed  # type: ignore[method-assign]


def test_a_directory_that_appears_in_the_last_moment_is_ours(daemons: Daemons) -> None:
    daemons.die_in("make", "before")
    late(daemons, lambda: os.mkdir(daemons.top / "name"))
    assert daemons.again("make") == "adopted"
    assert daemons.again("make") == "adopted"


def test_a_name_that_goes_in_the_last_moment_is_removed(daemons: Daemons) -> None:
    prepare(daemons, "unlink")
    daemons.die_in("unlink", "before")
    late(daemons, lambda: os.unlink(daemons.top / "name"))
    assert isinstance(daemons.again("unlink"), Inode)
    assert isinstance(daemons.again("unlink"), Inode)


def test_a_file_that_moves_in_the_last_moment_is_renamed(daemons: Daemons) -> None:
    prepare(daemons, "rename")
    daemons.die_in("rename", "before")
    late(daemons, lambda: os.rename(daemons.top / "name", daemons.top / "new"))
    assert isinstance(daemons.again("rename"), tuple)
    assert isinstance(daemons.again("rename"), tuple)


def test_an_attribute_that_goes_in_the_last_moment_is_removed(daemons: Daemons) -> None:
    prepare(daemons, "unset")
    daemons.die_in("unset", "before")
    late(daemons, lambda: os.removexattr(daemons.top / "name", "user.x"))
    assert daemons.again("unset") == "gone"
    assert daemons.again("unset") == "gone"


# --- through the overlay ---


class Line:
    """Overlays one after the other over one source and one ledger."""

    def __init__(self, source: ColdSource) -> None:
        self.source, self.ledger = source, Ledger()

    def overlay(self) -> Overlay:
        once = Once(self.ledger, self.source.key, intents_of(read(self.ledger.fd)))
        return Overlay(self.source, Journal(10), Reads(), event_dropped=lambda: None, ledger=self.ledger, once=once)


@pytest.fixture
def line(daemons: Daemons) -> Iterator[Line]:
    made = Line(daemons.source)
    yield made
    made.ledger.close()


ME = Caller(os.getuid(), os.getgid(), os.getpid(), UNIQUE)
ME_AGAIN = ME._replace(unique=UNIQUE | RESENT)


async def test_a_link_that_was_only_meant_is_made(
    line: Line, daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was looked for as one of the inode: that it was not there yet was taken for a node that had moved."""
    (daemons.top / "a").write_bytes(b"content")
    first = line.overlay()
    entry = await first.lookup(ROOT_ID, b"a")

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(first.source, "link", dies)
        with pytest.raises(Killed):
            await first.link(entry.node_id, ROOT_ID, b"b", UNIQUE)
    for expected in (1, 2):
        second = line.overlay()
        entry = await second.lookup(ROOT_ID, b"a")
        linked = await second.link(entry.node_id, ROOT_ID, b"b", UNIQUE | RESENT)
        assert linked.node_id == entry.node_id
        assert [parent.id for parent, _ in second.inodes.get(entry.node_id).names()] == [ROOT_ID] * 2, expected
        assert os.stat(daemons.top / "b").st_nlink == 2


async def test_a_file_created_and_not_answered_is_opened(line: Line, daemons: Daemons) -> None:
    first = line.overlay()
    opened, _ = await first.create(ROOT_ID, b"a", os.O_RDWR | os.O_EXCL, 0o600, ME)
    await first.write(opened.fh, 0, b"content")
    second = line.overlay()
    opened, entry = await second.create(ROOT_ID, b"a", os.O_RDWR | os.O_EXCL, 0o600, ME_AGAIN)
    assert await second.read(opened.fh, 0, 10) == b"content"
    assert entry.attributes.st_ino == os.stat(daemons.top / "a").st_ino
    for overlay in (first, second):
        for fh in list(overlay.files):
            await overlay.release(fh)


@pytest.mark.parametrize("kind", ["mkdir", "mknod", "symlink"])
async def test_what_was_made_and_not_answered_is_told_of(line: Line, daemons: Daemons, kind: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {"mkdir": (0o700,), "mknod": (0o100600, 0), "symlink": (b"target",)}
    made = await getattr(line.overlay(), kind)(ROOT_ID, b"a", *arguments[kind], ME)
    again = await getattr(line.overlay(), kind)(ROOT_ID, b"a", *arguments[kind], ME_AGAIN)
    assert again.attributes.st_ino == made.attributes.st_ino
    assert await number_of(getattr(line.overlay(), kind)(ROOT_ID, b"a", *arguments[kind], ME)) == "EEXIST"


async def test_removals_and_renames_not_answered(line: Line, daemons: Daemons) -> None:
    for name in ("a", "b"):
        (daemons.top / name).write_bytes(name.encode())
    (daemons.top / "d").mkdir()
    calls: list[Callable[[Overlay, int], Any]] = [
        lambda overlay, unique: overlay.rename(ROOT_ID, b"a", ROOT_ID, b"b", 2, unique),
        lambda overlay, unique: overlay.rename(ROOT_ID, b"a", ROOT_ID, b"c", 0, unique + 2),
        lambda overlay, unique: overlay.unlink(ROOT_ID, b"b", unique + 4),
        lambda overlay, unique: overlay.rmdir(ROOT_ID, b"d", unique + 6),
    ]
    for call in calls:
        await call(line.overlay(), UNIQUE)
        await call(line.overlay(), UNIQUE | RESENT)
    assert {path.name: path.read_bytes() for path in daemons.top.iterdir()} == {"c": b"b"}


async def test_a_truncation_not_answered_keeps_the_rest_of_what_was_asked(line: Line, daemons: Daemons) -> None:
    (daemons.top / "a").write_bytes(b"content")
    first = line.overlay()
    entry = await first.lookup(ROOT_ID, b"a")
    await first.setattr(entry.node_id, Changes(size=3), None, UNIQUE)
    (daemons.top / "a").write_bytes(b"more")
    second = line.overlay()
    entry = await second.lookup(ROOT_ID, b"a")
    await second.setattr(entry.node_id, Changes(size=3, mode=0o640), None, UNIQUE | RESENT)
    assert (daemons.top / "a").read_bytes() == b"more"
    assert os.stat(daemons.top / "a").st_mode & 0o777 == 0o640


async def test_a_truncation_through_a_descriptor_takes_effect_once(line: Line, daemons: Daemons) -> None:
    (daemons.top / "a").write_bytes(b"content")
    for unique in (UNIQUE, UNIQUE | RESENT):
        overlay = line.overlay()
        entry = await overlay.lookup(ROOT_ID, b"a")
        opened = await overlay.open(entry.node_id, os.O_WRONLY, ME)
        await overlay.setattr(entry.node_id, Changes(size=3), opened.fh, unique)
        assert (daemons.top / "a").read_bytes() == (b"con" if unique == UNIQUE else b"more")
        (daemons.top / "a").write_bytes(b"more")
        await overlay.release(opened.fh)


async def test_an_attribute_that_was_removed_and_set_anew_stays(line: Line, daemons: Daemons) -> None:
    (daemons.top / "a").touch()
    for unique in (UNIQUE, UNIQUE | RESENT):
        os.setxattr(daemons.top / "a", "user.x", b"%d" % unique)
        overlay = line.overlay()
        entry = await overlay.lookup(ROOT_ID, b"a")
        await overlay.removexattr(entry.node_id, b"user.x", unique)
    assert os.listxattr(daemons.top / "a") == ["user.x"]


async def test_an_append_sent_again_lands_where_it_was(line: Line, daemons: Daemons) -> None:
    """The kernel says where; a descriptor of the source that appends would write it twice."""
    (daemons.top / "a").write_bytes(b"content ")
    for _ in range(2):
        overlay = line.overlay()
        entry = await overlay.lookup(ROOT_ID, b"a")
        opened = await overlay.open(entry.node_id, os.O_WRONLY | os.O_APPEND, ME)
        await overlay.write(opened.fh, 8, b"appended")
        await overlay.release(opened.fh)
    overlay = line.overlay()
    created, _ = await overlay.create(ROOT_ID, b"b", os.O_WRONLY | os.O_APPEND, 0o600, ME)
    for _ in range(2):
        await overlay.write(created.fh, 0, b"appended")
    await overlay.release(created.fh)
    assert (daemons.top / "a").read_bytes() == b"content appended"
    assert (daemons.top / "b").read_bytes() == b"appended"


def test_an_inode_that_moved_is_no_name() -> None:
    """`Moved` is how a source says that a name means another inode."""
    ledger = Ledger()
    source = ColdSource(Path("/"))
    once = Once(ledger, source.key, intents_of(_estate_with_intent(ledger)))

    def look() -> os.stat_result:
        return source.stat(Ref(source.root_fd, b"no such name", 1))

    with pytest.raises(Moved):
        look()
    assert once.make(UNIQUE | RESENT, look, lambda: "made", lambda st: "adopted") == "made"
    source.close()
    ledger.close()


def _estate_with_intent(ledger: Ledger) -> Any:
    ledger.intent(UNIQUE, (0).to_bytes(8, "little"))
    return read(ledger.fd)
