"""A source with cold files looks, call by call, like one whose files are all hot. No kernel."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cold import freeze, origins_of, stub_of
from tierd.node import stub_layer
from tierd.node.cold_source import Cold, ColdSource
from tierd.node.sources import Changes, Creator, Moved, PosixSource, Ref
from tierd.stub_files import is_cold, locked, warm, write_origins
from tierd.stubs import RESERVED, Origin, OriginsDamaged, decode, encode
from tierd.syscalls import RENAME_EXCHANGE

OWN = Creator(os.geteuid(), os.getegid())
SIZE = 5000
NAMES = (b"a", b"b", b"c", b"d", b"e")
DIRECTORIES = (b"", b"one", b"two")
SEEDS, STEPS = 60, 60


@pytest.fixture
def source(tmp_path: Path) -> Iterator[ColdSource]:
    """An empty source."""
    (tmp_path / "source").mkdir()
    made = ColdSource(tmp_path / "source")
    yield made
    made.close()


@pytest.fixture
def model(source: ColdSource) -> Path:
    """A directory with two cold files and a hot one."""
    where = source.path / "m"
    where.mkdir()
    for name in ("a", "b", "hot"):
        (where / name).write_bytes(os.urandom(SIZE))
    os.utime(where / "a", ns=(1_000_000_007, 2_000_000_009))
    (where / "a").chmod(0o640)
    freeze({where / "a": None, where / "b": None})
    return where


@pytest.fixture
def fd(model: Path) -> Iterator[int]:
    """That directory, for names."""
    opened = os.open(model, os.O_RDONLY)
    yield opened
    os.close(opened)


def ref_of(source: ColdSource, fd: int, name: bytes) -> Ref:
    """Where the inode of a name is."""
    return Ref(fd, name, source.key(source.lstat(fd, name)))


# --- one by one ---


def test_a_cold_file_is_told_as_it_was(source: ColdSource, fd: int) -> None:
    st = source.lstat(fd, b"a")
    assert (st.st_size, st.st_mtime_ns, stat.S_IMODE(st.st_mode)) == (SIZE, 2_000_000_009, 0o640)
    assert source.stat(ref_of(source, fd, b"a")).st_size == SIZE
    assert source.forced_stat(ref_of(source, fd, b"a")).st_size == SIZE


def test_names_are_listed_once_and_ours_never(source: ColdSource, model: Path, fd: int) -> None:
    (model / "a").write_bytes(b"hot again")
    assert sorted(source.list_names(fd)) == [b"a", b"b", b"hot"]
    found = source.lstat_many(fd, [b"a", b"b", b"hot", b"gone", RESERVED])
    assert [st and st.st_size for st in found[:4]] == [9, SIZE, SIZE, None]


def test_ours_cannot_be_reached(source: ColdSource, fd: int) -> None:
    with pytest.raises(FileNotFoundError):
        source.lstat(fd, RESERVED)
    for attempt in (
        lambda: source.mkdir(fd, RESERVED, 0o755, OWN),
        lambda: source.create(fd, RESERVED, os.O_WRONLY, 0o644, OWN),
        lambda: source.symlink(fd, RESERVED, b"x", OWN),
        lambda: source.mknod(fd, RESERVED, stat.S_IFREG, 0, OWN),
        lambda: source.link(ref_of(source, fd, b"hot"), fd, RESERVED),
        lambda: source.rename(fd, b"hot", fd, RESERVED, 0),
    ):
        with pytest.raises(PermissionError):
            attempt()
    with pytest.raises(FileNotFoundError):
        source.rename(fd, RESERVED, fd, b"x", 0)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_its_bytes_are_asked_for_by_name(source: ColdSource, fd: int, flags: int) -> None:
    with pytest.raises(Cold) as raised:
        source.open(ref_of(source, fd, b"a"), flags)
    assert raised.value.stub.origin is not None
    assert raised.value.stub.origin[:4] == ("models/m", 1, b"a", SIZE)


def test_truncation_makes_it_hot_and_the_same_inode(source: ColdSource, model: Path, fd: int) -> None:
    ref = ref_of(source, fd, b"a")
    opened, version = source.open(ref, os.O_WRONLY | os.O_TRUNC)
    os.write(opened, b"new")
    os.close(opened)
    assert version.size == 0
    st = source.stat(ref)
    assert (st.st_size, stat.S_IMODE(st.st_mode)) == (3, 0o640)
    assert st.st_mtime_ns > 2_000_000_009
    opened, _ = source.open(ref, os.O_RDONLY)
    assert os.read(opened, 10) == b"new"
    os.close(opened)


def test_what_is_written_to_one_name_is_there_by_the_other(source: ColdSource, model: Path, fd: int) -> None:
    """Each of two names had bytes of its own after one of them was truncated."""
    source.link(ref_of(source, fd, b"a"), fd, b"z")
    opened, _ = source.open(ref_of(source, fd, b"z"), os.O_WRONLY | os.O_TRUNC)
    os.write(opened, b"new")
    os.close(opened)
    assert source.lstat(fd, b"a").st_size == 3
    assert source.lstat(fd, b"a").st_nlink == 2


def test_bytes_are_not_taken_away_from_whoever_brings_them(source: ColdSource, model: Path, fd: int) -> None:
    """A truncation waits for a recall, on this node or another."""
    with locked(str(stub_of(model / "a"))) as bringing:
        waiting = threading.Thread(target=source.open, args=(ref_of(source, fd, b"a"), os.O_WRONLY | os.O_TRUNC))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        warm(bringing)
        before = os.fstat(bringing).st_mtime_ns
    waiting.join(10)
    assert (model / "a").stat().st_mtime_ns >= before


def test_setting_another_size_needs_its_bytes(source: ColdSource, fd: int) -> None:
    with pytest.raises(Cold):
        source.setattr(ref_of(source, fd, b"a"), Changes(size=10), None)
    assert source.setattr(ref_of(source, fd, b"a"), Changes(size=0), None).after.st_size == 0


def test_a_stub_that_a_file_hides_means_nothing(source: ColdSource, model: Path, fd: int) -> None:
    ref = ref_of(source, fd, b"a")
    (model / "a").write_bytes(b"hot again")
    for attempt in (lambda: source.stat(ref), lambda: source.open(ref, 0), lambda: source.getxattr(ref, b"user.x")):
        with pytest.raises(Moved):
            attempt()


def test_removing_a_name_removes_both(source: ColdSource, model: Path, fd: int) -> None:
    """The file first, and the cold one would turn up again."""
    (model / "a").write_bytes(b"hot again")
    source.unlink(fd, b"a")
    assert source.list_names(fd) == [b"hot", b"b"] or sorted(source.list_names(fd)) == [b"b", b"hot"]


def test_renaming_a_file_takes_the_stub_that_it_hides_away(source: ColdSource, model: Path, fd: int) -> None:
    """Else its old name would turn up again; a demotion leaves it like this for a moment, or when it is killed."""
    (model / "a").write_bytes(b"hot again")
    source.rename(fd, b"a", fd, b"new", 0)
    assert sorted(source.list_names(fd)) == [b"b", b"hot", b"new"]
    (model / "b").write_bytes(b"hot again")
    source.rename(fd, b"b", fd, b"hot", RENAME_EXCHANGE)
    assert sorted(source.list_names(fd)) == [b"b", b"hot", b"new"]
    assert stub_of(model / "b").exists()


def test_a_directory_with_a_cold_file_is_not_empty(source: ColdSource, model: Path, fd: int) -> None:
    (model / "hot").unlink()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        source.rmdir(source.root_fd, b"m")
    for name in (b"a", b"b"):
        source.unlink(fd, name)
    source.rmdir(source.root_fd, b"m")
    assert not model.exists()


def test_a_moved_stub_is_known_where_it_goes(source: ColdSource, model: Path, fd: int) -> None:
    (source.path / "n").mkdir()
    to = os.open(source.path / "n", os.O_RDONLY)
    try:
        source.rename(fd, b"a", to, b"z", 0)
        with pytest.raises(Cold) as raised:
            source.open(ref_of(source, to, b"z"), os.O_RDONLY)
        assert raised.value.stub.origin is not None
        assert raised.value.stub.origin.path == b"a", "its object has the name that it was demoted by"
    finally:
        os.close(to)


def test_what_nobody_knows_is_not_moved(source: ColdSource, model: Path, fd: int) -> None:
    for file in origins_of(model):
        file.write_bytes(b"torn")
    (source.path / "n").mkdir()
    to = os.open(source.path / "n", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            source.rename(fd, b"a", to, b"z", 0)
        assert source.lstat(fd, b"a").st_size == 0
    finally:
        os.close(to)


def become_hot(model: Path, name: str) -> None:
    """As the end of an undo or of a promotion."""
    warm_one = stub_of(model / name)
    warm_one.write_bytes(b"back")
    warm_one.chmod(0o644)
    warm_one.rename(model / name)


def test_a_cold_file_that_becomes_hot_while_it_is_removed_is_removed(source: ColdSource, model: Path, fd: int) -> None:
    """`about` is told between the look and the call. It was ENOENT for a file that was there."""
    told: list[os.stat_result] = []

    def about(st: os.stat_result) -> None:
        if not told:
            become_hot(model, "a")
        told.append(st)

    source.unlink(fd, b"a", about)
    assert len(told) == 2
    assert b"a" not in source.list_names(fd)
    with pytest.raises(FileNotFoundError):
        source.unlink(fd, b"a")


def test_a_cold_file_that_becomes_hot_while_it_is_renamed_is_renamed(source: ColdSource, model: Path, fd: int) -> None:
    told: list[os.stat_result] = []

    def about(st: os.stat_result, _: os.stat_result | None) -> None:
        if not told:
            become_hot(model, "a")
        told.append(st)

    source.rename(fd, b"a", fd, b"z", 0, about)
    assert (model / "z").read_bytes() == b"back"
    assert b"a" not in source.list_names(fd)


def test_origins_overrule_those_of_a_clock_that_went_ahead(source: ColdSource, model: Path, fd: int) -> None:
    """An inode number may be used again: what it stood for must not be read for the new file."""
    base = os.open(model / ".tierd", os.O_PATH)
    inode = stub_of(model / "a").stat().st_ino
    (model / ".tierd/origins/09999999999999999999-aaaaaaaa.json").write_bytes(
        encode({inode: Origin("models/m", 1, b"old", 3, "0" * 64)})
    )
    write_origins(base, {inode: Origin("models/m", 2, b"a", 7, "0" * 64)})
    write_origins(base, {inode: Origin("models/m", 3, b"a", 8, "0" * 64)})
    os.close(base)
    stub = source._stub_at(fd, b"a")
    assert stub is not None
    assert stub.origin is not None
    assert stub.origin.version == 3


def test_new_origins_are_seen_at_once(source: ColdSource, model: Path, fd: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(stub_layer, "_SETTLED_NS", 0)
    assert source.lstat(fd, b"a").st_size == SIZE
    base = os.open(model / ".tierd", os.O_PATH)
    os.utime(model / ".tierd/origins", ns=(1, 1))
    write_origins(base, {stub_of(model / "a").stat().st_ino: Origin("models/m", 2, b"a", 7, "0" * 64)})
    os.close(base)
    assert source.lstat(fd, b"a").st_size == 7


def test_that_there_are_no_stubs_is_known_for_a_second(source: ColdSource, monkeypatch: Any) -> None:
    clock = [100.0]
    source.layers._clock = lambda: clock[0]
    where = source.path / "m"
    where.mkdir()
    (where / "a").write_bytes(b"bytes")
    opened = os.open(where, os.O_RDONLY)
    assert source.lstat_many(opened, [b"x"]) == [None]
    freeze({where / "a": None})
    assert source.lstat_many(opened, [b"a"]) == [None]
    clock[0] += 1.1
    assert source.lstat(opened, b"a").st_size == 5
    os.close(opened)


def test_a_link_in_the_place_of_ours_is_not_followed(source: ColdSource, tmp_path: Path) -> None:
    (tmp_path / "outside/cold").mkdir(parents=True)
    (tmp_path / "outside/cold/secret").touch()
    (source.path / "m").mkdir()
    (source.path / "m/.tierd").symlink_to(tmp_path / "outside")
    opened = os.open(source.path / "m", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        source.lstat(opened, b"secret")
    os.close(opened)


@pytest.mark.parametrize("data", [
    b"", b"{", b"[]", b'{"format": 2, "origins": []}', b'{"format": 1, "origins": [1]}', b"[" * 100_000,
    *(encode({1: Origin("m", 1, b"p", 1, "0" * 64)}).replace(*change) for change in (
        (b'"inode": 1', b'"inode": -1'), (b'"inode": 1', b'"inode": true'), (b'"size": 1', b'"size": 1.5'),
        (b'"path": "p"', b'"path": ""'), (b'"path": "p"', b'"path": "\\ud800"'), (b"0" * 64, b"0" * 63),
        (b'"model_id": "m"', b'"model_id": "m\\u0000"'), (b'"version": 1', b'"version": null'),
    )),
])  # fmt: skip
def test_damaged_origins_are_refused(data: bytes) -> None:
    with pytest.raises(OriginsDamaged):
        decode(data)


def test_origins_are_read_as_written() -> None:
    origins = {7: Origin("models/ä", 3, b"x/\xff\n", 0, "a" * 64), 1 << 62: Origin("m", 0, b"p", 1 << 62, "0" * 64)}
    assert decode(encode(origins)) == origins


def test_a_file_that_becomes_hot_between_two_looks_is_there(
    source: ColdSource, model: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undo puts a file back and removes its stub; a listing in between had neither."""

    def put_back(name: str) -> None:
        (model / name).write_bytes(bytes(SIZE))
        stub_of(model / name).unlink(missing_ok=True)

    def find(layer: stub_layer.Layer, name: bytes) -> stub_layer.Stub | None:
        put_back(os.fsdecode(name))
        return true_find(layer, name)

    def names(layer: stub_layer.Layer) -> list[bytes]:
        put_back("b")
        return true_names(layer)

    true_find, true_names = stub_layer.Layer.find, stub_layer.Layer.names
    monkeypatch.setattr(stub_layer.Layer, "find", find)
    monkeypatch.setattr(stub_layer.Layer, "names", names)
    assert source.lstat(fd, b"a").st_size == SIZE
    assert sorted(source.list_names(fd)) == [b"a", b"b", b"hot"]


# --- beside a source that is all hot ---


class Pair:
    """A plain directory, and a source where files become cold all the time; the same calls on both."""

    def __init__(self, base: Path) -> None:
        self.sides = [PosixSource(base / "plain"), ColdSource(base / "cold")]
        for side in self.sides:
            for directory in DIRECTORIES[1:]:
                os.mkdir(directory, dir_fd=side.root_fd)
        self.cold = self.sides[1]
        assert isinstance(self.cold, ColdSource)
        self.cold.layers._clock = iter(range(0, 10**9, 10)).__next__  # type: ignore[assignment]

    def close(self) -> None:
        for side in self.sides:
            side.close()

    def on_both(self, call: Callable[[PosixSource], Any]) -> None:
        """The same answer, or the same error."""
        answers = [answer(call, side) for side in self.sides]
        if answers[1] == "EINVAL" != answers[0]:  # a cold and a hot name cannot be exchanged
            for directory in DIRECTORIES:
                heat(self.cold.path / os.fsdecode(directory))
            answers[1] = answer(call, self.cold)
        assert answers[0] == answers[1], str(call)

    def compare(self) -> None:
        """Names, attributes and links."""
        plain, cold = (tree(side) for side in self.sides)
        assert cold == plain

    def freeze_some(self, rng: random.Random) -> None:
        """On the one side only."""
        for directory in DIRECTORIES:
            where = self.cold.path / os.fsdecode(directory)
            if not where.is_dir():
                continue
            files = [
                path for path in where.iterdir() if path.is_file() and not path.is_symlink() and path.stat().st_size
            ]
            links: dict[int, list[Path]] = {}
            for path in files:
                links.setdefault(path.stat().st_ino, []).append(path)
            whole = [group for group in links.values() if len(group) == group[0].stat().st_nlink]
            if whole:
                freeze(dict.fromkeys(rng.choice(whole)))


def answer(call: Callable[[PosixSource], Any], side: PosixSource) -> Any:
    """What a call returns, or its error; cold bytes are brought."""
    try:
        return call(side)
    except Cold as cold:
        thaw(side, cold)
        return call(side)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tree(side: PosixSource) -> dict[bytes, tuple[Any, ...]]:
    """What lies there."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for directory in DIRECTORIES:
        try:
            fd = os.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=side.root_fd)
        except OSError as error:
            found[directory + b"/"] = (error.errno,)
            continue
        try:
            names = sorted(side.list_names(fd))
            for name, st in zip(names, side.lstat_many(fd, names), strict=True):
                assert st is not None
                assert side.lstat(fd, name) == st
                size = st.st_size if stat.S_ISREG(st.st_mode) else 0
                links = st.st_nlink if stat.S_ISREG(st.st_mode) else 0
                found[directory + b"/" + name] = (st.st_mode, size, links, st.st_uid)
        finally:
            os.close(fd)
    return found


def thaw(side: PosixSource, cold: Cold) -> None:
    """Bring the bytes: a file in the place of all names of the stub."""
    assert isinstance(side, ColdSource)
    assert cold.stub.origin is not None
    heat_stub(side.path, cold.stub.attributes.st_ino, cold.stub.origin.size)


def heat(where: Path) -> None:
    """Bring all of a directory."""
    stubs = where / ".tierd/cold"
    for stub in list(stubs.iterdir()) if stubs.is_dir() else []:
        if not stub.exists():  # it went with another name of its inode
            continue
        origins = {k: v for file in origins_of(where) for k, v in decode(file.read_bytes()).items()}
        top = where if (where / "one").exists() or where.name == "cold" else where.parent
        heat_stub(top, stub.stat().st_ino, origins[stub.stat().st_ino].size if stub.stat().st_ino in origins else 0)


def heat_stub(top: Path, inode: int, size: int) -> None:
    """Make hot all names of a stub."""
    first: Path | None = None
    for stub in [path for path in top.rglob(".tierd/cold/*") if path.stat().st_ino == inode]:
        target = stub.parents[2] / stub.name
        st = stub.stat()
        if first is None and is_cold(st):
            stub.write_bytes(bytes(size))
            os.utime(stub, ns=(st.st_atime_ns, st.st_mtime_ns))
            os.chmod(stub, st.st_mode & 0o6777)
        first = target
        if not target.exists():
            stub.rename(target)


class RandomCall:
    """One call on random names."""

    def __init__(self, rng: random.Random) -> None:
        self.directories = [rng.choice(DIRECTORIES), rng.choice(DIRECTORIES)]
        self.one, self.two = rng.choice(NAMES), rng.choice(NAMES)
        self.size, self.flags, self.time_ns = (
            rng.choice((0, 0, 1, SIZE)),
            rng.choice((0, 0, 1, 2)),
            rng.randrange(10**9),
        )
        kinds = (self.create, self.create, self.mkdir, self.unlink, self.rmdir, self.rename, self.rename, self.link,
                 self.change, self.truncate, self.write)  # fmt: skip
        self.act: Callable[[PosixSource, int, int], Any] = rng.choice(kinds)

    def __str__(self) -> str:
        names = f"{self.directories[0]!r}/{self.one!r} {self.directories[1]!r}/{self.two!r}"
        return f"{self.act.__name__} {names} size {self.size} flags {self.flags}"

    def __call__(self, side: PosixSource) -> Any:
        fds = [os.open(d or b".", os.O_PATH | os.O_DIRECTORY, dir_fd=side.root_fd) for d in self.directories]
        try:
            return self.act(side, fds[0], fds[1])
        finally:
            for fd in fds:
                os.close(fd)

    def ref(self, side: PosixSource, fd: int) -> Ref:
        return Ref(fd, self.one, side.key(side.lstat(fd, self.one)))

    def create(self, side: PosixSource, fd: int, other: int) -> Any:
        opened, st, _ = side.create(fd, self.one, os.O_WRONLY, 0o644, OWN)
        os.ftruncate(opened, SIZE)
        os.close(opened)
        return st.st_mode

    def mkdir(self, side: PosixSource, fd: int, other: int) -> Any:
        return side.mkdir(fd, self.one, 0o755, OWN).st_mode

    def unlink(self, side: PosixSource, fd: int, other: int) -> Any:
        if stat.S_ISDIR(side.lstat(fd, self.one).st_mode):
            return "EISDIR or EPERM, as the file system likes"
        return side.unlink(fd, self.one).before.st_size

    def rmdir(self, side: PosixSource, fd: int, other: int) -> Any:
        return side.rmdir(fd, self.one).before.st_mode

    def rename(self, side: PosixSource, fd: int, other: int) -> Any:
        moved, replaced = side.rename(fd, self.one, other, self.two, self.flags)
        return moved.after.st_mode, replaced is not None and replaced.before.st_mode

    def link(self, side: PosixSource, fd: int, other: int) -> Any:
        return side.link(self.ref(side, fd), other, self.two).after.st_nlink

    def change(self, side: PosixSource, fd: int, other: int) -> Any:
        changes = Changes(mode=0o600 | self.time_ns % 8, mtime_ns=self.time_ns)
        return side.setattr(self.ref(side, fd), changes, None).after.st_mode

    def truncate(self, side: PosixSource, fd: int, other: int) -> Any:
        return side.setattr(self.ref(side, fd), Changes(size=self.size), None).after.st_size

    def write(self, side: PosixSource, fd: int, other: int) -> Any:
        opened, version = side.open(self.ref(side, fd), os.O_RDWR | (os.O_TRUNC if self.flags else 0))
        os.close(opened)
        return version.size


@pytest.mark.parametrize("part", range(6))
def test_random_calls_have_the_same_effect(tmp_path: Path, part: int) -> None:
    for seed in range(part * SEEDS // 6, (part + 1) * SEEDS // 6):
        rng = random.Random(seed)
        base = tmp_path / str(seed)
        for name in ("plain", "cold"):
            (base / name).mkdir(parents=True)
        pair = Pair(base)
        try:
            for step in range(STEPS):
                pair.on_both(RandomCall(rng))
                if step % 4 == 0:
                    pair.freeze_some(rng)
                pair.compare()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {step}: {error}") from error
        finally:
            pair.close()
