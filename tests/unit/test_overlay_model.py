"""Any sequence of calls and of changes beneath, against a plain directory that gets the same ones.

Each call walks its path anew and is retried once after ESTALE, as the kernel does; it must then do, or
fail with, exactly what it does to the plain directory. Nodes remembered from earlier must be what
they were, or stale.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.unit.conftest import Bench, end_bench, make_bench
from tests.unit.kernel import CALLER, FakeKernel
from tierd.node.sources import Changes

paths = st.sampled_from([b"a", b"b", b"d", b"d/a", b"d/b", b"e", b"e/a", b"e/d", b"d/e"])
modes = st.sampled_from([0o600, 0o755, 0o640])
data = st.binary(max_size=20)
times = st.integers(0, 10**18)

operations = st.one_of(
    st.tuples(st.just("create"), paths, st.sampled_from([0, os.O_EXCL, os.O_TRUNC]), data),
    st.tuples(st.just("write"), paths, st.integers(0, 30), data),
    st.tuples(st.just("read"), paths),
    st.tuples(st.just("mkdir"), paths, modes),
    st.tuples(st.just("unlink"), paths),
    st.tuples(st.just("rmdir"), paths),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("exchange"), paths, paths),
    st.tuples(st.just("link"), paths, paths),
    st.tuples(st.just("symlink"), paths, data.filter(lambda d: d and not set(b"\0/.") & set(d))),
    st.tuples(st.just("readlink"), paths),
    st.tuples(st.just("chmod"), paths, modes),
    st.tuples(st.just("truncate"), paths, st.integers(0, 30)),
    st.tuples(st.just("utime"), paths, times),
    st.tuples(st.just("stat"), paths),
    st.tuples(st.just("list"), paths, st.integers(1, 5)),
)
steps = st.one_of(
    st.tuples(st.just("own"), operations),
    st.tuples(st.just("own"), operations),
    st.tuples(st.just("beneath"), operations),
    st.tuples(st.just("hold"), st.tuples(paths, st.sampled_from([os.O_RDONLY, os.O_RDWR]))),
    st.tuples(st.just("use"), st.integers(0, 5)),
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.just("recall"), st.integers(0, 50)),
    st.tuples(st.just("wait"), st.sampled_from([1, 4, 6])),
    st.tuples(st.just("forget descriptors"), st.none()),
)


def no_link(path: str) -> None:
    """The plain directory's open(2) and truncate(2) would follow a link; the overlay's kernel never asks it to."""
    if stat.S_ISLNK(os.lstat(path).st_mode):
        raise OSError(errno.ELOOP, "a link")


class Plain:
    """The operations on a plain directory."""

    def __init__(self, top: Path) -> None:
        self.top = os.fspath(top)

    def at(self, path: bytes) -> str:
        """Where `path` is. A link on the way is an error here, as in `FakeKernel`, which does not follow any."""
        directory, _, name = os.fsdecode(path).rpartition("/")
        if directory and os.path.islink(f"{self.top}/{directory}"):
            raise OSError(errno.ENOTDIR, "a link on the way")
        return f"{self.top}/{directory}/{name}"

    def run(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def open(self, path: bytes, flags: int) -> int:
        return os.open(self.at(path), flags | os.O_NOFOLLOW, 0o644)

    def file(self, path: bytes, flags: int) -> int:
        """Opens directories no more than FUSE's OPEN does."""
        fd = self.open(path, flags)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EISDIR, "a directory")
        return fd

    def create(self, path: bytes, flags: int, content: bytes) -> None:
        fd = self.open(path, flags | os.O_CREAT | os.O_RDWR)
        os.pwrite(fd, content, 0)
        os.close(fd)

    def write(self, path: bytes, offset: int, content: bytes) -> None:
        fd = self.open(path, os.O_WRONLY)
        os.pwrite(fd, content, offset)
        os.close(fd)

    def read(self, path: bytes) -> bytes:
        fd = self.open(path, os.O_RDONLY)
        try:
            return os.pread(fd, 1000, 0)
        finally:
            os.close(fd)

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def rename(self, old: bytes, new: bytes) -> None:
        os.rename(self.at(old), self.at(new))

    def exchange(self, old: bytes, new: bytes) -> None:
        """Without renameat2(2) in `os`: three renames, after the checks that it makes."""
        os.lstat(self.at(old)), os.lstat(self.at(new))
        if os.path.samefile(Path(self.at(old)).parent, self.top) and new.startswith(old + b"/"):
            raise OSError(errno.EINVAL, "into itself")
        if old.startswith(new + b"/"):
            raise OSError(errno.EINVAL, "into itself")
        if old == new or os.lstat(self.at(old)).st_ino == os.lstat(self.at(new)).st_ino:
            return
        aside = f"{self.top}/.aside"
        os.rename(self.at(old), aside)
        os.rename(self.at(new), self.at(old))
        os.rename(aside, self.at(new))

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def symlink(self, path: bytes, target: bytes) -> None:
        os.symlink(target, os.fsencode(self.at(path)))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(os.fsencode(self.at(path)))

    def chmod(self, path: bytes, mode: int) -> None:
        no_link(self.at(path))
        os.chmod(self.at(path), mode)

    def truncate(self, path: bytes, size: int) -> None:
        no_link(self.at(path))
        os.truncate(self.at(path), size)

    def utime(self, path: bytes, at: int) -> None:
        os.utime(self.at(path), ns=(at, at), follow_symlinks=False)

    def stat(self, path: bytes) -> tuple[int, ...]:
        return visible(os.lstat(self.at(path)))

    def list(self, path: bytes, per_reply: int) -> list[bytes]:
        no_link(self.at(path))
        return sorted(os.listdir(os.fsencode(self.at(path))))


def visible(st: os.stat_result) -> tuple[int, ...]:
    """What must be the same on both sides; times and inode numbers cannot be, directory sizes need not."""
    size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
    return st.st_mode, size, st.st_nlink, st.st_uid, st.st_gid


class Overlaid:
    """The operations through the overlay, with the checks that a kernel makes before it asks."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.overlay = kernel.overlay

    async def run(self, name: str, *arguments: Any) -> Any:
        return await self.kernel.retried(lambda: getattr(self, name)(*arguments))

    async def not_a_link(self, path: bytes) -> int:
        found = await self.kernel.entry(path)
        if stat.S_ISLNK(found.attributes.st_mode):
            raise OSError(errno.ELOOP, "a link")
        return found.node_id

    async def absent(self, path: bytes) -> tuple[int, bytes]:
        parent, name = await self.kernel.parent(path)
        try:
            self.kernel.counted(await self.overlay.lookup(parent, name))
        except FileNotFoundError:
            return parent, name
        raise OSError(errno.EEXIST, "there")

    async def open(self, path: bytes, flags: int) -> int:
        try:
            found = await self.kernel.entry(path)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISLNK(found.attributes.st_mode) and not (flags & os.O_CREAT and flags & os.O_EXCL):
                raise OSError(errno.ELOOP, "a link")
            if flags & os.O_ACCMODE == os.O_RDONLY and stat.S_ISDIR(found.attributes.st_mode):
                raise OSError(errno.EISDIR, "a directory")
        return (await self.kernel.open(path, flags)).fh

    async def create(self, path: bytes, flags: int, content: bytes) -> None:
        fh = await self.open(path, flags | os.O_CREAT | os.O_RDWR)
        await self.overlay.write(fh, 0, content)
        await self.overlay.release(fh)

    async def write(self, path: bytes, offset: int, content: bytes) -> None:
        fh = await self.open(path, os.O_WRONLY)
        await self.overlay.write(fh, offset, content)
        await self.overlay.flush(fh)
        await self.overlay.release(fh)

    async def read(self, path: bytes) -> bytes:
        fh = await self.open(path, os.O_RDONLY)
        content = await self.overlay.read(fh, 0, 1000)
        await self.overlay.release(fh)
        return content

    async def mkdir(self, path: bytes, mode: int) -> None:
        self.kernel.counted(await self.overlay.mkdir(*await self.absent(path), mode, CALLER))

    async def unlink(self, path: bytes) -> None:
        await self.kernel.entry(path)
        await self.overlay.unlink(*await self.kernel.parent(path))

    async def rmdir(self, path: bytes) -> None:
        await self.kernel.entry(path)
        await self.overlay.rmdir(*await self.kernel.parent(path))

    async def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        old_parent, old_name = await self.kernel.parent(old)
        new_parent, new_name = await self.kernel.parent(new)
        await self.overlay.rename(old_parent, old_name, new_parent, new_name, flags)

    async def exchange(self, old: bytes, new: bytes) -> None:
        await self.rename(old, new, 2)

    async def link(self, old: bytes, new: bytes) -> None:
        found = await self.kernel.entry(old)
        target = await self.absent(new)
        if stat.S_ISDIR(found.attributes.st_mode):
            raise OSError(errno.EPERM, "a directory")
        self.kernel.counted(await self.overlay.link(found.node_id, *target))

    async def symlink(self, path: bytes, target: bytes) -> None:
        parent, name = await self.absent(path)
        self.kernel.counted(await self.overlay.symlink(parent, name, target, CALLER))

    async def readlink(self, path: bytes) -> bytes:
        found = await self.kernel.entry(path)
        if not stat.S_ISLNK(found.attributes.st_mode):
            raise OSError(errno.EINVAL, "no link")
        return await self.overlay.readlink(found.node_id)

    async def chmod(self, path: bytes, mode: int) -> None:
        await self.overlay.setattr(await self.not_a_link(path), Changes(mode=mode), None)

    async def truncate(self, path: bytes, size: int) -> None:
        node_id = await self.not_a_link(path)
        if stat.S_ISDIR((await self.overlay.getattr(node_id)).attributes.st_mode):
            raise OSError(errno.EISDIR, "a directory")
        await self.overlay.setattr(node_id, Changes(size=size), None)

    async def utime(self, path: bytes, at: int) -> None:
        await self.overlay.setattr(await self.kernel.node(path), Changes(atime_ns=at, mtime_ns=at), None)

    async def stat(self, path: bytes) -> tuple[int, ...]:
        return visible((await self.kernel.entry(path)).attributes)

    async def list(self, path: bytes, per_reply: int) -> list[bytes]:
        node_id = await self.not_a_link(path)
        if not stat.S_ISDIR((await self.overlay.getattr(node_id)).attributes.st_mode):
            raise OSError(errno.ENOTDIR, "no directory")
        return sorted(await self.kernel.list_directory(node_id, per_reply))


class Comparison:
    """Both sides, what is held open on both, and every node ever seen with the inode it stood for."""

    def __init__(self, bench: Bench, twin: Path, clock: MockClock) -> None:
        self.bench = bench
        self.clock = clock
        self.beneath, self.twin = Plain(bench.beneath), Plain(twin)
        self.overlaid = Overlaid(bench.kernel)
        self.held: list[tuple[int, int, int]] = []
        """Handle, descriptor on the plain directory, flags."""
        self.nodes: dict[int, int] = {}

    async def step(self, kind: str, what: Any) -> None:
        await getattr(self, kind.replace(" ", "_"))(what)
        self.bench.overlay.check()
        for node_id, count in self.bench.kernel.lookups.items():
            node = self.bench.overlay.inodes.get(node_id)
            assert node.lookups == count
            assert self.nodes.setdefault(node_id, node.key) == node.key  # type: ignore[arg-type]
            modes = {handle.fh in self.bench.reads.passed_through for handle in node.handles or ()}
            assert len(modes) <= 1, "the kernel answers EIO to opens of one node in two modes"

    async def own(self, operation: tuple[Any, ...]) -> None:
        expected = self.outcome(lambda: self.twin.run(*operation))
        try:
            answer = await self.overlaid.run(*operation)
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        assert answer == expected, operation

    async def beneath_step(self, operation: tuple[Any, ...]) -> None:
        expected = self.outcome(lambda: self.twin.run(*operation))
        assert self.outcome(lambda: self.beneath.run(*operation)) == expected

    def outcome(self, call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    async def hold(self, what: tuple[bytes, int]) -> None:
        path, flags = what
        expected = self.outcome(lambda: self.twin.file(path, flags))
        if isinstance(expected, str):
            return
        fh = await self.bench.kernel.retried(lambda: self.overlaid.open(path, flags))
        self.held.append((fh, expected, flags))

    async def use(self, number: int) -> None:
        """What is open reads, and has the attributes, that it has on the plain directory, unlinked or not."""
        for fh, fd, flags in self.held[number : number + 1]:
            assert await self.bench.overlay.read(fh, 0, 1000) == os.pread(fd, 1000, 0)
            if flags == os.O_RDWR:
                await self.bench.overlay.write(fh, 3, b"held")
                os.pwrite(fd, b"held", 3)
            found = await self.bench.overlay.getattr(self.bench.overlay.files[fh].node.id)
            assert visible(found.attributes) == visible(os.fstat(fd))

    async def drop(self, number: int) -> None:
        for fh, fd, _ in self.held[number : number + 1]:
            await self.bench.overlay.release(fh)
            os.close(fd)
        del self.held[number : number + 1]

    async def recall(self, number: int) -> None:
        """A node from earlier: the same inode, or stale; nothing else."""
        for node_id in list(self.nodes)[number : number + 1]:
            try:
                found = await self.bench.overlay.getattr(node_id)
            except OSError as error:
                assert error.errno == errno.ESTALE  # noqa: PT017 (either is right)
            else:
                assert found.attributes.st_ino == self.nodes[node_id]

    async def wait(self, seconds: float) -> None:
        self.clock.jump(seconds)

    async def forget_descriptors(self, _: None) -> None:
        self.bench.overlay.dirs.close()

    def tree(self, top: str) -> dict[str, tuple[int, ...]]:
        found = {}
        for directory, directories, files in os.walk(top):
            for name in directories + files:
                path = os.path.join(directory, name)
                found[os.path.relpath(path, top)] = visible(os.lstat(path))
        return found

    async def end(self) -> None:
        while self.held:
            await self.drop(0)
        assert self.tree(self.beneath.top) == self.tree(self.twin.top)


async def compare(history: list[tuple[str, Any]], passthrough: bool, top: Path, clock: MockClock) -> None:
    for name in ("source", "twin"):
        (top / name / "d").mkdir(parents=True)
        (top / name / "e").mkdir()
        (top / name / "a").write_bytes(b"content")
        (top / name / "d" / "a").hardlink_to(top / name / "a")
        (top / name / "d" / "b").write_bytes(b"more")
    bench = make_bench(top / "source")
    bench.reads.offers = passthrough
    comparison = Comparison(bench, top / "twin", clock)
    for kind, what in history:
        await comparison.step("beneath_step" if kind == "beneath" else kind, what)
    await comparison.end()
    end_bench(bench)


@settings(max_examples=100)
@given(history=st.lists(steps, min_size=10, max_size=40), passthrough=st.booleans())
def test_like_a_plain_directory(history: list[tuple[str, Any]], passthrough: bool) -> None:
    top = Path(tempfile.mkdtemp(prefix="tierd-model-"))
    before = os.umask(0)
    clock = MockClock()
    try:
        trio.run(compare, history, passthrough, top, clock, clock=clock)
    finally:
        os.umask(before)
        shutil.rmtree(top)
