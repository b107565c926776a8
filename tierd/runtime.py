"""Where a daemon keeps its state and where its clients find it; shared by the daemon and the command line.

Each mount has a runtime directory named after a hash of its mountpoint (socket paths are limited to
108 bytes, unix(7)), holding `mount.json` and the admin socket.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from tierd.errors import UsageError

_SOCKET = "admin.sock"
_RECORD = "mount.json"
_LOCK = "lock"
_KEEPER = "keeper.sock"
_LINKS_MAX = 40


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What `mount.json` says of a running daemon."""

    mountpoint: str
    source: str
    state_dir: str
    pid: int
    metrics_address: str
    keeper_pid: int | None = None


def _slug(mountpoint: Path) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def resolve_mountpoint(path: Path) -> Path:
    """The path a mountpoint was mounted by, found without asking the mount itself (its daemon may hang)."""
    for _ in range(_LINKS_MAX):
        path = Path(os.path.abspath(path))
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = path.parent / target
    raise UsageError(f"{path}: its links form a loop", hint="name the mountpoint itself")


def runtime_base() -> Path:
    """`/run/tierd` for root, `$XDG_RUNTIME_DIR/tierd` or `/tmp/tierd-UID` for others."""
    if os.geteuid() == 0:
        return Path("/run/tierd")
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg) / "tierd" if xdg else Path(f"/tmp/tierd-{os.geteuid()}")


def default_state_dir(mountpoint: Path) -> Path:
    """`/var/lib/tierd/HASH` for root, `$XDG_STATE_HOME/tierd/HASH` for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/tierd") / _slug(mountpoint)
    xdg = os.environ.get("XDG_STATE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".local" / "state") / "tierd" / _slug(mountpoint)


def default_cache_dir(mountpoint: Path) -> Path:
    """`/var/cache/tierd/HASH` for root, `$XDG_CACHE_HOME/tierd/HASH` for others."""
    if os.geteuid() == 0:
        return Path("/var/cache/tierd") / _slug(mountpoint)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "tierd" / _slug(mountpoint)


def runtime_dir(mountpoint: Path) -> Path:
    """The runtime directory of one mount."""
    return runtime_base() / _slug(mountpoint)


def socket_path(mountpoint: Path) -> Path:
    """The admin socket of one mount."""
    return runtime_dir(mountpoint) / _SOCKET


def keeper_path(mountpoint: Path) -> Path:
    """The socket of a mount's keeper."""
    return runtime_dir(mountpoint) / _KEEPER


def leftovers_of(mountpoint: Path) -> list[Path]:
    """What a mount that ends removes, in this order."""
    directory = runtime_dir(mountpoint)
    return [*(directory / name for name in (_RECORD, _SOCKET, _KEEPER, _LOCK)), directory]


def lock_path(mountpoint: Path) -> Path:
    """The lock that the daemon of a mount holds."""
    return runtime_dir(mountpoint) / _LOCK


def private_dir(path: Path, what: str) -> Path:
    """Make `path` (and its parents) if missing and insist that it is ours alone (0700). Raises UsageError.

    A directory that was there before must be empty, or hold the lock that tells it is a daemon's.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.geteuid():
            raise UsageError(f"{what} {path} belongs to user {found.st_uid}", hint="choose another directory")
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise UsageError(f"{what} {path} is writable for other users", hint="choose another directory")
        if any(path.iterdir()) and not (path / _LOCK).exists():
            raise UsageError(f"{what} {path} holds files of somebody else's", hint="choose an empty directory")
        path.chmod(0o700)
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise UsageError(f"{what} {path}: {reason}", hint="choose a writable directory") from None
    return path


def own_runtime_base() -> None:
    """Make the directory of all runtime directories and insist that it is ours: others could lead clients astray."""
    base = runtime_base()
    try:
        base.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        if not _ours(base):
            raise UsageError(f"runtime directory {base} is not ours alone", hint="set XDG_RUNTIME_DIR")
    except OSError as error:
        raise UsageError(f"runtime directory {base}: {error.strerror}", hint="set XDG_RUNTIME_DIR") from None


def _ours(base: Path) -> bool:
    found = base.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def write_record(record: MountRecord) -> None:
    """Publish a running daemon."""
    path = runtime_dir(Path(record.mountpoint)) / _RECORD
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record)), encoding="utf-8")
    temporary.replace(path)


def remove_record(mountpoint: Path) -> None:
    """Withdraw a daemon's record and socket, and of a dead one the lock and the directory, too."""
    directory = runtime_dir(mountpoint)
    leftovers = (_RECORD, _SOCKET) if is_served(mountpoint) else (_RECORD, _SOCKET, _KEEPER, _LOCK)
    for name in leftovers:
        (directory / name).unlink(missing_ok=True)
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()


def is_served(mountpoint: Path) -> bool:
    """True if a daemon holds the lock of a mountpoint. (A process ID may be a zombie's, or used anew.)"""
    try:
        with lock_path(mountpoint).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def records() -> list[MountRecord]:
    """All mounts whose daemon is alive."""
    found: list[MountRecord] = []
    if not runtime_base().is_dir() or not _ours(runtime_base()):
        return found
    for path in sorted(runtime_base().glob(f"*/{_RECORD}")):
        try:
            record = MountRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if is_served(Path(record.mountpoint)):
            found.append(record)
    return found
