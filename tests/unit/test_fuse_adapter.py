"""Between pyfuse3 and the overlay: every error becomes an errno, nothing else gets out."""

from __future__ import annotations

import errno
import inspect
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from tests.unit.conftest import Bench
from tierd.errors import TierdError
from tierd.metrics import Metrics
from tierd.node import fuse
from tierd.node.fuse import OPERATIONS, FuseOperations
from tierd.node.ledger import ROOT_ID
from tierd.node.reach import Caller
from tierd.node.sources import Moved


class Failing:
    """An overlay in which everything fails the same way."""

    source = SimpleNamespace(acls=False)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
        async def fail(*_: Any) -> None:
            raise self.error

        return fail


def adapter(overlay: Any) -> FuseOperations:
    """The adapter over an overlay, or what stands for one."""
    metrics = Metrics(CollectorRegistry(), operations=OPERATIONS)
    return FuseOperations(overlay, metrics, congested=lambda: False, attr_timeout_s=1.5, entry_timeout_s=2.5)


CONTEXT = SimpleNamespace(uid=os.getuid(), gid=os.getgid(), pid=os.getpid(), umask=0)
ARGUMENTS: dict[str, Any] = {
    "attr": pyfuse3.EntryAttributes(),
    "fields": pyfuse3.SetattrFields(),
    "ctx": CONTEXT,
    "name": b"n",
    "name_old": b"n",
    "name_new": b"n",
    "new_name": b"n",
    "target": b"t",
    "value": b"v",
    "buf": b"b",
    "datasync": False,
    "token": None,
}
"""By parameter name; whatever is not here is a number."""


async def call(operations: FuseOperations, operation: str) -> Any:
    """Call a handler as pyfuse3 does: all arguments in order."""
    function = inspect.unwrap(getattr(pyfuse3.Operations, operation))
    names = list(inspect.signature(function).parameters)[1:]
    return await getattr(operations, operation)(*(ARGUMENTS.get(name, 1) for name in names))


def counted(metrics: Metrics) -> dict[str, float]:
    """Errors by errno label."""
    return {
        sample.labels["errno"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "tierd_request_errors_total" and sample.value
    }


def test_every_request_that_pyfuse3_makes_is_timed_and_wrapped() -> None:
    """A handler added later must not be forgotten: an exception that is no FUSEError ends the whole mount."""
    ours = {
        name
        for name, function in vars(FuseOperations).items()
        if hasattr(pyfuse3.Operations, name) and callable(function) and not name.startswith("__")
    }
    assert ours == {*OPERATIONS, "forget"}
    assert not set(OPERATIONS) & {"access", "poll", "init", "stacktrace"}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_defect_is_eio_a_traceback_and_a_count(operation: str) -> None:
    operations = adapter(Failing(ValueError("a defect")))
    with capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as caught:
        await call(operations, operation)
    assert caught.value.errno == errno.EIO
    assert [(line["event"], line["operation"], line["log_level"]) for line in logs] == [
        ("handler_failed", operation, "error")
    ]
    assert logs[0]["exc_info"], "the traceback is logged"
    assert operations.metrics.totals()["handler_failures"] == 1
    assert counted(operations.metrics) == {"EIO": 1}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_error_of_the_source_is_its_errno(operation: str) -> None:
    operations = adapter(Failing(OSError(errno.EDQUOT, "quota")))
    with capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as caught:
        await call(operations, operation)
    assert caught.value.errno == errno.EDQUOT
    assert logs == []
    assert operations.metrics.totals()["handler_failures"] == 0
    assert counted(operations.metrics) == {"EDQUOT": 1}


class Hearing:
    """An overlay that is told something and refuses it."""

    source = SimpleNamespace(acls=False)
    told: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
        async def refuse(*args: Any) -> None:
            self.told = args
            raise OSError(errno.EROFS, "refused")

        return refuse


@pytest.mark.parametrize(
    "operation",
    ["setattr", "mknod", "mkdir", "symlink", "unlink", "rmdir", "rename", "link", "create", "removexattr"],
)
async def test_the_number_of_a_request_that_must_not_be_done_twice_is_told(operation: str) -> None:
    """Without it nothing would be written down of it."""
    overlay = Hearing()
    metrics = Metrics(CollectorRegistry(), operations=OPERATIONS)
    operations = FuseOperations(
        overlay,  # type: ignore[arg-type]
        metrics,
        congested=lambda: False,
        caller_of=lambda pid: (pid, 4711),
        attr_timeout_s=1.5,
        entry_timeout_s=2.5,
    )
    with pytest.raises(pyfuse3.FUSEError):
        await call(operations, operation)
    callers = [argument.unique for argument in overlay.told if isinstance(argument, Caller)]
    assert callers == [4711] or 4711 in overlay.told


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Moved(), errno.ESTALE),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (OSError("without a number"), errno.EIO),
        (BlockingIOError(errno.EAGAIN, "later"), errno.EAGAIN),
        (KeyError(5), errno.EIO),
        (AssertionError(), errno.EIO),
        (RecursionError(), errno.EIO),
        (UnicodeEncodeError("utf-8", "x", 0, 1, "why"), errno.EIO),
        (TierdError("the store is full", errno=errno.ENOSPC), errno.ENOSPC),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_what_an_error_becomes(error: Exception, number: int) -> None:
    operations = adapter(Failing(error))
    with capture_logs(), pytest.raises(pyfuse3.FUSEError) as caught:
        await call(operations, "getattr")
    assert caught.value.errno == number


async def test_cancellation_passes() -> None:
    """It ends the daemon, not the request."""

    class Slow(Failing):
        def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
            async def wait(*_: Any) -> None:
                await trio.sleep_forever()

            return wait

    operations = adapter(Slow(ValueError()))
    with trio.CancelScope() as scope:
        scope.cancel()
        await call(operations, "getattr")
    assert scope.cancelled_caught
    assert operations.metrics.totals()["handler_failures"] == 0


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_each_request_is_timed_once(operation: str) -> None:
    operations = adapter(Failing(OSError(errno.ENOENT, "gone")))
    with pytest.raises(pyfuse3.FUSEError):
        await call(operations, operation)
    timed = {
        sample.labels["operation"]: sample.value
        for family in operations.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "tierd_request_seconds_count" and sample.value
    }
    assert timed == {operation: 1}


async def test_forget_is_total(bench: Bench) -> None:
    operations = adapter(bench.overlay)
    (bench.beneath / "a").touch()
    entry = await operations.lookup(pyfuse3.InodeT(ROOT_ID), pyfuse3.FileNameT(b"a"), CONTEXT)  # type: ignore[arg-type]
    await operations.forget([(entry.st_ino, 1), (entry.st_ino, 1), (999, 5), (ROOT_ID, 1), (0, 0)])  # type: ignore[list-item]
    assert len(bench.overlay.inodes) == 1


async def test_attributes_are_those_of_the_source(bench: Bench) -> None:
    operations = adapter(bench.overlay)
    file = bench.beneath / "a"
    file.write_bytes(b"x" * 5000)
    os.utime(file, ns=(1_000_000_000_000_000_001, 1_000_000_000_000_000_003))
    file.chmod(0o4751)
    entry = await operations.lookup(ROOT_ID, b"a", CONTEXT)  # type: ignore[arg-type]
    bench.kernel.lookups[entry.st_ino] += 1
    st = file.stat()
    for name in (
        "st_mode",
        "st_nlink",
        "st_uid",
        "st_gid",
        "st_rdev",
        "st_size",
        "st_blksize",
        "st_blocks",
        "st_atime_ns",
        "st_mtime_ns",
        "st_ctime_ns",
    ):
        assert getattr(entry, name) == getattr(st, name), name
    assert (entry.attr_timeout, entry.entry_timeout) == (1.5, 2.5)
    assert entry.st_ino != st.st_ino


async def test_a_file_from_creation_to_release(bench: Bench) -> None:
    operations: Any = adapter(bench.overlay)
    info, entry = await operations.create(ROOT_ID, b"a", 0o640, os.O_RDWR, CONTEXT)
    bench.kernel.lookups[entry.st_ino] += 1
    assert info.keep_cache
    assert await operations.write(info.fh, 0, b"12345") == 5
    assert operations.metrics.totals()["written_bytes"] == 5
    assert await operations.read(info.fh, 1, 3) == b"234"
    changed = pyfuse3.EntryAttributes()
    changed.st_size, changed.st_mode, changed.st_mtime_ns = 2, stat.S_IFREG | 0o600, 7
    fields = SimpleNamespace(
        update_size=True,
        update_mode=True,
        update_mtime=True,
        update_atime=False,
        update_uid=False,
        update_gid=False,
    )
    entry = await operations.setattr(entry.st_ino, changed, fields, info.fh, CONTEXT)
    assert (entry.st_size, stat.S_IMODE(entry.st_mode), entry.st_mtime_ns) == (2, 0o600, 7)
    await operations.fsync(info.fh, True)
    await operations.flush(info.fh)
    await operations.release(info.fh)
    assert (bench.beneath / "a").read_bytes() == b"12"


async def test_statfs_is_that_of_the_source(bench: Bench) -> None:
    told = await adapter(bench.overlay).statfs(CONTEXT)  # type: ignore[arg-type]
    st = os.statvfs(bench.beneath)
    assert (told.f_bsize, told.f_frsize, told.f_blocks, told.f_namemax) == (
        st.f_bsize,
        st.f_frsize,
        st.f_blocks,
        st.f_namemax,
    )


async def test_replies_wait_while_the_way_to_the_kernel_is_full(bench: Bench) -> None:
    full = [True, True, False]
    metrics = Metrics(CollectorRegistry(), operations=OPERATIONS)
    operations: Any = FuseOperations(
        bench.overlay, metrics, congested=lambda: full.pop(0), attr_timeout_s=1, entry_timeout_s=1
    )
    assert (await operations.getattr(ROOT_ID, CONTEXT)).st_ino == ROOT_ID
    assert full == []


def test_only_one_module_imports_pyfuse3() -> None:
    package = Path(fuse.__file__).parents[1]
    importers = {path.name for path in package.rglob("*.py") if "import pyfuse3" in path.read_text(encoding="utf-8")}
    assert importers == {"fuse.py"}
