"""Everything that must hold before a mount is made: paths, nesting, locks, ports. Leaves nothing behind on failure."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import psutil
import structlog

from tierd.config import MountSettings
from tierd.errors import UsageError
from tierd.node.handing import clean_up
from tierd.runtime import (
    default_cache_dir,
    default_state_dir,
    is_served,
    leftovers_of,
    lock_path,
    own_runtime_base,
    private_dir,
    resolve_mountpoint,
    runtime_dir,
)

_LOCK_TRIES = 5
_LOCK_PAUSE_SECONDS = 0.02

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, proc(5)."""

    mountpoint: Path
    fstype: str
    device: str
    """`MAJOR:MINOR`, as /sys/class/bdi names it."""


def mounts() -> list[Mount]:
    """What is mounted, in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        fstype = fields[fields.index(b"-", 6) + 1]
        found.append(Mount(Path(os.fsdecode(_unescape(fields[4]))), fstype.decode(), fields[2].decode()))
    return found


def _unescape(field: bytes) -> bytes:
    for code in (b"040", b"011", b"012"):
        field = field.replace(b"\\" + code, bytes([int(code, 8)]))
    return field.replace(b"\\134", b"\\")


def mount_at(mountpoint: Path) -> Mount | None:
    """The topmost mount at exactly this path."""
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == mountpoint), None)


def check_paths(settings: MountSettings) -> MountSettings:
    """The settings with absolute, resolved paths and a state directory. Raises UsageError."""
    source = _existing_dir(settings.source, "source", "mount JuiceFS there first")
    _revive(resolve_mountpoint(settings.mountpoint))
    mountpoint = _existing_dir(settings.mountpoint, "mountpoint", f"mkdir -p {settings.mountpoint}")
    if source == mountpoint:
        raise UsageError(f"source and mountpoint are the same directory {source}", hint="choose another mountpoint")
    if source.is_relative_to(mountpoint):
        raise UsageError(
            f"source {source} is below the mountpoint {mountpoint}", hint="tierd would read through itself"
        )
    if mountpoint.is_relative_to(source):
        raise UsageError(
            f"mountpoint {mountpoint} is below the source {source}",
            hint="choose a mountpoint outside of the source",
        )
    busy = mount_at(mountpoint)
    if busy is not None:
        raise UsageError(
            f"mountpoint {mountpoint} is busy: {busy.fstype} is mounted there",
            hint=f"tierd umount {mountpoint}",
        )
    state_dir = absolute(settings.state_dir or default_state_dir(mountpoint))
    for path, what in ((state_dir, "state directory"), (settings.log_file, "log file")):
        if path is not None and absolute(path).is_relative_to(mountpoint):
            raise UsageError(f"{what} {path} is below the mountpoint {mountpoint}", hint="choose a path outside of it")
    if settings.log_file is not None:
        _check_log_file(settings.log_file, state_dir)
    return settings.model_copy(update={"source": source, "mountpoint": mountpoint, "state_dir": state_dir})


def warn_if_hiding(mountpoint: Path) -> None:
    """A mountpoint that is not empty is allowed."""
    if any(mountpoint.iterdir()):
        log.warning("mountpoint_not_empty", mountpoint=str(mountpoint), note="its files are hidden while mounted")


def absolute(path: Path) -> Path:
    """`path` without links or `..`; what does not exist yet is kept as written."""
    return Path(os.path.realpath(path))


def _check_log_file(path: Path, state_dir: Path) -> None:
    """The state directory, where it usually lies, is made later."""
    number = 0 if path.parent.is_dir() or absolute(path.parent) == state_dir else errno.ENOENT
    if path.is_dir():
        number = errno.EISDIR
    if number:
        raise UsageError(f"log file {path}: {os.strerror(number)}", hint="choose another with --log-file")


def _existing_dir(path: Path, what: str, hint: str) -> Path:
    try:
        resolved = path.resolve(strict=True)
        if not resolved.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its links form a loop"
        raise UsageError(f"{what} {path}: {reason}", hint=hint) from None
    return resolved


def _revive(mountpoint: Path) -> None:
    """Clear away what a killed daemon of ours left: a tierd mount that answers ENOTCONN (statfs(2) is never cached)."""
    found = mount_at(mountpoint)
    if found is None or found.fstype != "fuse.tierd" or is_served(mountpoint):
        return
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            log.warning("dead_mount_cleared", mountpoint=str(mountpoint))
            detach(mountpoint)


def detach(mountpoint: Path) -> None:
    """Unmount lazily. Raises UsageError that says why it could not be."""
    command = ["umount", "-l", str(mountpoint)]
    if os.geteuid() != 0:
        command = ["fusermount3", "-u", "-z", str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"{command[0]} exited {done.returncode}"
        raise UsageError(f"cannot unmount {mountpoint}: {reason}", hint="is it mounted, and by you?")


class Cache(NamedTuple):
    """Where the node tier lies, None for nowhere; what the log shall say of that; and the descriptors of its locks."""

    directory: Path | None
    remarks: tuple[tuple[str, dict[str, str]], ...]
    locks: list[int]


@contextmanager
def exclusive_cache(settings: MountSettings) -> Iterator[Cache]:
    """The directory of the node tier, made and locked for the length of a `with`.

    Raises UsageError for a directory that was named and is of no use; the default one is then left out with a remark.
    """
    if settings.cache_size == 0:
        yield Cache(None, (), [])
        return
    with ExitStack() as stack:
        try:
            directory, lock = stack.enter_context(_cache(settings))
        except UsageError as error:
            if settings.cache_dir is not None:
                raise
            yield Cache(None, (("no_node_tier", {"reason": str(error), "hint": error.hint}),), [])
            return
        yield Cache(directory, _remarks(directory), [lock])


@contextmanager
def _cache(settings: MountSettings) -> Iterator[tuple[Path, int]]:
    wanted = absolute(settings.cache_dir or default_cache_dir(settings.mountpoint))
    for place, what in ((settings.mountpoint, "mountpoint"), (settings.source, "source")):
        if wanted.is_relative_to(place):
            raise UsageError(f"cache directory {wanted} is below the {what} {place}", hint="choose a local disk")
    directory = private_dir(wanted, "cache directory")
    with _lock(directory / "lock", f"cache directory {directory}") as lock:
        _check_cache_space(directory, settings.free_space_ratio)
        yield directory, lock


def _remarks(directory: Path) -> tuple[tuple[str, dict[str, str]], ...]:
    found = fstype_of(directory)
    if found not in ("tmpfs", "ramfs"):
        return ()
    cost = "copies take memory from pods, and are gone after a restart of the machine"
    return (("cache_in_memory", {"directory": str(directory), "fstype": found, "cost": cost}),)


def _check_cache_space(directory: Path, ratio_min: float) -> None:
    """A nearly full root file system must not be filled further."""
    disk = psutil.disk_usage(str(directory))
    low = disk.free < ratio_min * (disk.used + disk.free)
    if low and directory.stat().st_dev == Path("/").stat().st_dev:
        raise UsageError(
            f"cache directory {directory} is on the root file system, which has too little room"
            f" ({disk.free >> 20} MiB free, {100 - disk.percent:.0f} %)",
            hint="choose a disk of its own with --cache-dir, or lower --free-space-ratio",
        )


def fstype_of(path: Path) -> str:
    """The type of the file system that a directory lies on, such as ext4; empty if unknown."""
    found = [mount for mount in mounts() if absolute(path).is_relative_to(mount.mountpoint)]
    return max(found, key=lambda mount: len(mount.mountpoint.parts)).fstype if found else ""


@contextmanager
def exclusive(state_dir: Path, mountpoint: Path) -> Iterator[list[int]]:
    """Hold the locks of a state directory and of a mountpoint for the length of a `with`; their descriptors.

    Raises UsageError.
    """
    state = private_dir(state_dir, "state directory")
    own_runtime_base()
    with _lock(state / "lock", f"state directory {state}") as state_lock:
        runtime = private_dir(runtime_dir(mountpoint), "runtime directory")
        with _lock(lock_path(mountpoint), f"mountpoint {mountpoint}") as mount_lock:
            try:
                yield [state_lock, mount_lock]
            finally:
                lock_path(mountpoint).unlink()
                with suppress(OSError):  # not empty: something of somebody else's
                    runtime.rmdir()
                _forget_if_unused(state)


@contextmanager
def _held_again(state_dir: Path, mountpoint: Path, cache_dir: Path | None) -> Iterator[None]:
    directories = [state_dir, runtime_dir(mountpoint), *([cache_dir] if cache_dir is not None else [])]
    with ExitStack() as stack:
        for directory in directories:
            stack.enter_context(_lock(directory / "lock", str(directory)))
        try:
            yield
        finally:
            clean_up({"remove": leftovers_of(mountpoint), "remove_if_alone": [state_dir / "lock"]})


def hold_locks_of(state_dir: Path, mountpoint: Path, cache_dir: Path | None) -> ExitStack:
    """Take the locks of a mount that is there and whose keeper has died; to be left when the mount has ended, which
    removes what a mount leaves. Raises UsageError."""
    with ExitStack() as stack:
        stack.enter_context(_held_again(state_dir, mountpoint, cache_dir))
        return stack.pop_all()


def _forget_if_unused(state: Path) -> None:
    """A daemon that was refused leaves no lock behind where there was nothing before."""
    if os.listdir(state) == ["lock"]:
        (state / "lock").unlink()


@contextmanager
def _lock(path: Path, what: str) -> Iterator[int]:
    file = _take_lock(path)
    if file is None:
        owner = path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
        raise UsageError(
            f"{what} is in use by another tierd (process {owner})", hint="stop that one, or choose another"
        )
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


def _take_lock(path: Path) -> IO[str] | None:
    """The locked file, or None if it is taken.

    A client that only looks (`runtime.is_served`) is waited for. A lock that its holder removed after we
    opened it would be held by nobody's name: then the new one is taken.
    """
    for _ in range(_LOCK_TRIES):
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except (BlockingIOError, FileNotFoundError):
            time.sleep(_LOCK_PAUSE_SECONDS)
        file.close()
    return None


def check_fuse(*, allow_other: bool) -> None:
    """The machine can mount FUSE at all. Raises UsageError."""
    if not Path("/dev/fuse").exists():
        raise UsageError("/dev/fuse is missing", hint="modprobe fuse, or give the container /dev/fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise UsageError("/dev/fuse may not be opened", hint="run as root or grant access to /dev/fuse")
    if allow_other and os.geteuid() != 0 and not _user_allow_other():
        raise UsageError(
            "allow_other needs root or user_allow_other in /etc/fuse.conf",
            hint="--allow-other no, or run as root",
        )


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def raise_descriptor_limit() -> int:
    """Allow as many descriptors as the hard limit does; the limit in force."""
    process = psutil.Process()
    _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
    return int(hard)
