"""The node tier on disk: which copies there are, and the one order in which they come, are found broken, and go.

What one copy is, is in `copies.py`. The directory is all there is: the inventory is rebuilt from it at every start.

Order of a commit: data written and synced, renamed to `NAME`, sealed by a synced and renamed `NAME.meta`,
directory synced. So a copy is there once its `.meta` is, and whatever a crash leaves behind is a leftover that
`recover` removes.

Contract: blocking, for worker threads; the inventory is guarded by a lock and may be asked from any thread.
Nothing here decides what to keep: see `policy.py` and `tier.py`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from tierd.node.copies import (
    CHUNK_BYTES,
    FILL,
    META,
    OPEN_FLAGS,
    SUM_BYTES,
    Copy,
    Damaged,
    Draft,
    Identity,
    Removed,
    checksum,
    load_copy,
    read_meta,
    seal_of,
    write_meta,
)
from tierd.node.readonly import open_view
from tierd.units import display

__all__ = ["Copy", "Damaged", "Identity", "Store", "opened", "seal_of"]

log = structlog.get_logger(__name__)

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about a copy: it is a miss this time, and stays."""
_OUR_NAME: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+-[0-9a-f]+(\.meta)?(\.fill)?")


class _Held:
    """The copies of one model by name, and their bytes: a running total, for each miss asks for it."""

    __slots__ = ("bytes", "copies")

    def __init__(self) -> None:
        self.bytes = 0
        self.copies: dict[str, Copy] = {}

    def add(self, copy: Copy) -> None:
        self.copies[copy.name] = copy
        self.bytes += copy.identity.size

    def remove(self, copy: Copy) -> None:
        del self.copies[copy.name]
        self.bytes -= copy.identity.size


class Store:
    """See the module. `removed` is told of each copy that was removed, from any thread."""

    def __init__(self, directory: Path, *, removed: Callable[[Copy], None] = lambda copy: None) -> None:
        self.directory = directory
        self._removed = removed
        self._lock = threading.Lock()
        self._by_inode: dict[int, Copy] = {}
        self._held: dict[bytes, _Held] = {}
        """What there is of each model; models without a copy are not in it."""
        self.held_bytes = 0
        self.reserved_bytes = 0
        self._drafts: set[str] = set()
        self.damaged = 0
        """Copies found changed or torn since the start, and dropped."""
        self._next_name = 0
        self._stamp = time.time_ns()
        self._dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._view_fd, self.read_only_view = open_view(directory)
        self.recovered = self._recover()

    def close(self) -> None:
        """Give the descriptors back; copies that are open stay readable."""
        os.close(self._dir_fd)
        os.close(self._view_fd)

    @property
    def place(self) -> str:
        """A path that leads to the directory, whatever became of its name."""
        return f"/proc/self/fd/{self._dir_fd}"

    # --- inventory ---

    def find(self, inode: int) -> Copy | None:
        """The copy of a source inode, of whatever version."""
        return self._by_inode.get(inode)

    def copies(self) -> list[Copy]:
        """All copies, as of now."""
        with self._lock:
            return list(self._by_inode.values())

    def __len__(self) -> int:
        return len(self._by_inode)

    def held_by_model(self) -> dict[bytes, int]:
        """Committed bytes of each model that has any."""
        with self._lock:
            return {model: held.bytes for model, held in self._held.items()}

    def copies_of(self, model: bytes) -> list[Copy]:
        """The copies of one model."""
        with self._lock:
            held = self._held.get(model)
            return list(held.copies.values()) if held is not None else []

    # --- reading ---

    def open(self, copy: Copy) -> int:
        """A read-only descriptor of the copy's bytes. Raises Damaged, and drops the copy, if it was tampered with."""
        try:
            fd = os.open(copy.name, OPEN_FLAGS, dir_fd=self._view_fd)
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES or self._drop_damaged(copy, f"cannot be opened: {error.strerror}"):
                raise Damaged(error.strerror) from None
            raise Removed from None
        if seal_of(os.fstat(fd)) != copy.seal:
            os.close(fd)
            raise Damaged("was changed by hand") if self._drop_damaged(copy, "was changed by hand") else Removed
        return fd

    def _drop_damaged(self, copy: Copy, reason: str) -> bool:
        """False if somebody else removed it before."""
        with self._lock:
            now = self._by_inode.get(copy.identity.inode)
        if now is not None and now.name == copy.name:
            copy = now  # relabelled since the caller found it: the file is the same
        if not self.remove(copy):
            return False
        log.warning("copy_damaged", path=display(copy.path), file=copy.name, reason=reason, cost="a miss")
        self.damaged += 1
        return True

    def verify(
        self, copy: Copy, *, deep: bool, cached: bool = False, progress: Callable[[int], None] = lambda _: None
    ) -> str | None:
        """What is wrong with a copy, or None. `deep` reads its bytes and reports how many to `progress`.

        It reads them from the disk; if `cached`, from wherever the kernel has them, and leaves them there.
        """
        try:
            fd = self.open(copy)
        except Removed:
            return None
        except Damaged as damage:
            return str(damage)
        try:
            return self._verify_bytes(copy, fd, progress, cached=cached) if deep else None
        finally:
            os.close(fd)

    def _verify_bytes(self, copy: Copy, fd: int, progress: Callable[[int], None], *, cached: bool) -> str | None:
        problem = None
        if not cached:
            # Pages that were read long ago say nothing about the disk now. They are clean: the commit synced them.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            for index, expected in enumerate(self.sums(copy)):
                data = os.pread(fd, CHUNK_BYTES, index * CHUNK_BYTES)
                if not cached:
                    os.posix_fadvise(fd, index * CHUNK_BYTES, len(data), os.POSIX_FADV_DONTNEED)
                progress(len(data))
                if checksum(memoryview(data)) != expected:
                    problem = f"chunk {index} has the wrong checksum"
                    break
        except (OSError, ValueError) as error:
            problem = str(error)
        if problem is None or not self._drop_damaged(copy, problem):
            return None
        with suppress(OSError):
            os.fsync(self._dir_fd)  # its seal is whole: after a power cut it must not be there again
        return problem

    def sums(self, copy: Copy) -> Iterator[bytes]:
        """The checksum of each chunk, from the disk. Raises OSError, ValueError."""
        _, sums = read_meta(self._dir_fd, copy.name)
        for start in range(0, len(sums), SUM_BYTES):
            yield sums[start : start + SUM_BYTES]

    # --- writing ---

    def begin(self, identity: Identity, path: bytes, model: bytes) -> Draft:
        """Reserve space for a copy. Raises OSError, with ENOSPC if there is none."""
        with self._lock:
            self._next_name += 1
            name = f"{identity.inode:x}-{self._stamp:x}-{self._next_name:x}"
            self._drafts.add(name)
            self.reserved_bytes += identity.size
        fd = -1
        try:
            fd = os.open(name + FILL, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._dir_fd)
            os.posix_fallocate(fd, 0, identity.size)
        except OSError:
            if fd >= 0:
                os.close(fd)
                with suppress(OSError):
                    os.unlink(name + FILL, dir_fd=self._dir_fd)
            self._end_draft(name, identity.size)
            raise
        return Draft(name, identity, path, model, fd)

    def _end_draft(self, name: str, size: int) -> bool:
        """False if it ended already."""
        with self._lock:
            if name not in self._drafts:
                return False
            self._drafts.discard(name)
            self.reserved_bytes -= size
            return True

    def commit(self, draft: Draft) -> Copy:
        """Make a draft whose chunks are all written a copy; it replaces the one of the same inode. Raises OSError."""
        if draft.name not in self._drafts:
            raise OSError(errno.ECANCELED, "the draft was abandoned")
        os.fdatasync(draft.fd)
        os.rename(draft.name + FILL, draft.name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        seal = seal_of(os.fstat(draft.fd))
        if seal.size != draft.identity.size:
            raise OSError(errno.EIO, "the draft is not as long as its file")
        copy = Copy(draft.name, draft.identity, draft.path, draft.model, seal)
        write_meta(self._dir_fd, copy, bytes(draft.sums))
        os.fsync(self._dir_fd)
        with self._lock:
            if draft.name not in self._drafts:
                raise OSError(errno.ECANCELED, "the draft was abandoned")
            self.reserved_bytes -= draft.identity.size
            self._drafts.discard(draft.name)
            before = self._by_inode.get(copy.identity.inode)
            self._add(copy)
        if before is not None:
            self._unlink(before)
            self._removed(before)
        return copy

    def abandon(self, draft: Draft) -> None:
        """Forget a draft (also one whose commit failed); its space returns once it is closed.

        May be called again, and does nothing to what was committed: a daemon that stops meets commits that run.
        """
        if not self._end_draft(draft.name, draft.identity.size):
            return
        for name in (draft.name + META, draft.name + META + FILL, draft.name, draft.name + FILL):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._dir_fd)

    def remove(self, copy: Copy) -> int:
        """Delete a copy; how many bytes that frees once nobody has it open. May be called again (then 0)."""
        with self._lock:
            if copy.removed:
                return 0
            self._forget(copy)
        self._unlink(copy)
        self._removed(copy)
        return copy.identity.size

    def relabel(self, copy: Copy, identity: Identity, path: bytes, model: bytes) -> Copy:
        """The same bytes are known to be another ctime's, or lie under another name now. Raises OSError, ValueError."""
        _, sums = read_meta(self._dir_fd, copy.name)
        renewed = Copy(copy.name, identity, path, model, copy.seal)
        with self._lock:
            if copy.removed:
                return copy
            write_meta(self._dir_fd, renewed, sums)
            self._forget(copy)
            self._add(renewed)
        self._removed(copy)
        return renewed

    def _add(self, copy: Copy) -> None:
        before = self._by_inode.get(copy.identity.inode)
        if before is not None:
            self._forget(before)
        self._by_inode[copy.identity.inode] = copy
        self.held_bytes += copy.identity.size
        self._held.setdefault(copy.model, _Held()).add(copy)

    def _forget(self, copy: Copy) -> None:
        copy.removed = True
        del self._by_inode[copy.identity.inode]
        self.held_bytes -= copy.identity.size
        of_model = self._held[copy.model]
        of_model.remove(copy)
        if not of_model.copies:
            del self._held[copy.model]

    def _unlink(self, copy: Copy) -> None:
        """The seal goes first: without it the data is a leftover."""
        for name in (copy.name + META, copy.name):
            try:
                os.unlink(name, dir_fd=self._dir_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("copy_not_removed", file=name, reason=error.strerror)

    # --- leftovers ---

    def leftovers(self) -> list[str]:
        """Files of ours that belong to no copy and to no draft. What others keep in the directory is not ours."""
        with self._lock:
            ours = {entry for copy in self._by_inode.values() for entry in (copy.name, copy.name + META)}
            ours |= {entry for name in self._drafts for entry in (name, name + FILL, name + META, name + META + FILL)}
            return sorted(filter(_OUR_NAME.fullmatch, set(os.listdir(self._dir_fd)) - ours))

    def remove_leftovers(self) -> int:
        """Remove them; how many went."""
        return sum(self._remove_leftover(name) for name in self.leftovers())

    # --- start ---

    def _recover(self) -> dict[str, int]:
        """Take up what is whole, remove what is not; how many of each."""
        counts = {"copies": 0, "leftovers": 0, "damaged": 0}
        names = filter(_OUR_NAME.fullmatch, os.listdir(self._dir_fd))
        found = []
        for name in (name.removesuffix(META) for name in names if name.endswith(META)):
            try:
                found.append(load_copy(self._dir_fd, name))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("copy_dropped", file=name, reason=str(error))
                counts["damaged"] += 1
        for copy in sorted(found, key=lambda copy: copy.seal.ctime_ns):
            self._add(copy)  # a crash may have left two versions of a file: the one committed last wins
        counts["copies"] = len(self._by_inode)
        counts["leftovers"] = self.remove_leftovers()
        return counts

    def _remove_leftover(self, name: str) -> bool:
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=self._dir_fd)
                return True
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.warning("leftover_not_removed", file=name, reason=error.strerror)
        return False

    def check(self) -> None:
        """Assert the invariants; for tests."""
        with self._lock:
            assert self.held_bytes == sum(copy.identity.size for copy in self._by_inode.values())
            assert self.held_bytes == sum(held.bytes for held in self._held.values())
            for model, held in self._held.items():
                assert held.bytes == sum(copy.identity.size for copy in held.copies.values())
                assert all(copy.model == model and not copy.removed for copy in held.copies.values())
            assert len(self._by_inode) == sum(len(held.copies) for held in self._held.values())
            assert self.reserved_bytes >= 0
            assert not any(copy.removed for copy in self._by_inode.values())


@contextmanager
def opened(store: Store, copy: Copy) -> Iterator[int]:
    """A descriptor of a copy for the length of a `with`. Raises Damaged."""
    fd = store.open(copy)
    try:
        yield fd
    finally:
        os.close(fd)
