"""What a move does to the files of a model in the source: stubs come, files go to the trash, and back. Decides nothing.

A file goes cold in steps, each a single call of the source and each harmless to repeat: its stub is made beside
(`.tierd/drafts/MOVE`), complete with all attributes; what it stands for is written into the layer of its directory; the
stub is renamed into the layer, where the file hides it; the file is renamed into `.tierd/trash/MOVE`. So its name is
there at each moment, once: hot wins. What is in the trash was compared after it got there, because nobody can write
through its name any longer; one that is not what was copied goes back.

Names may be removed, renamed or replaced by users between any two calls: a stub whose file went is removed with it,
and nothing is ever renamed over anything. Blocking, any thread; callers see to it that one process at a time moves.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from tierd.controller.moves.steps import FileState
from tierd.controller.source.announcing import Announcing, At
from tierd.controller.source.file_calls import Looks, alike, copy_attributes, draft_name, looks_of, opened, same
from tierd.controller.source.hot_scan import Subject
from tierd.controller.source.hot_tree import HotTree, is_inode, joined, split, stat_of
from tierd.controller.source.moved_file import ChangedMeanwhile, HotFile, MoveFile
from tierd.objects.keys import shown
from tierd.stub_files import is_cold, locked
from tierd.stubs import COLD_MARK, RESERVED, STUBS
from tierd.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

TRASH: Final = RESERVED + b"/trash"
DRAFTS: Final = RESERVED + b"/drafts"


class Stubbing(Announcing):
    """The files of one move. `move` is its number, and names its trash."""

    def __init__(self, tree: HotTree, subject: Subject, move: int, at: At) -> None:
        super().__init__(tree, subject.base, at)
        self.trash = TRASH + b"/%d" % move
        self.drafts = DRAFTS + b"/%d" % move
        self._touched: set[bytes] = set()
        self._drafted: list[bytes] = []

    # --- stubs come ---

    def draft(self, moving: MoveFile) -> int:
        """The stub of a file, made beside if it is not there; its inode. Raises ChangedMeanwhile."""
        file = moving.file
        if moving.stub is not None and self._is_made(file, moving.stub):
            return moving.stub
        with self._tree.directory(self.drafts, make=True) as drafts:
            for name in file.names():
                with suppress(FileNotFoundError):
                    os.unlink(draft_name(name), dir_fd=drafts)
            first = draft_name(file.path)
            self._at("make stub")
            inode = self._make(file, drafts, first)
            for name in file.links:
                os.link(first, draft_name(name), src_dir_fd=drafts, dst_dir_fd=drafts, follow_symlinks=False)
            self._at("made stub")
        self._drafted.append(first)
        return inode

    def _is_made(self, file: HotFile, stub: int) -> bool:
        """True if each name has it: beside, in the layer, or had it there before its file went to the trash."""
        return all(
            is_inode(self._look(self.drafts, draft_name(name)), stub)
            or is_inode(self._look(self._layer_of(name), split(name)[1]), stub)
            or self._look(*self._in_trash(name)) is not None
            for name in file.names()
        )

    def _make(self, file: HotFile, drafts: int, name: bytes) -> int:
        above, leaf = split(file.path)
        with self._tree.directory_if_there(joined(self._base, above)) as hot:
            source = opened(hot, leaf) if hot is not None else -1
        if source < 0:
            raise ChangedMeanwhile(f"{shown(file.path)} went")
        try:
            stub = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=drafts)
            try:
                copy_attributes(source, stub, COLD_MARK)
                return os.fstat(stub).st_ino
            finally:
                os.close(stub)
        finally:
            os.close(source)

    # --- files go ---

    def take(self, moving: MoveFile) -> int:
        """Put the stub of a file in its place, and the file into the trash; its time of change there.

        Raises ChangedMeanwhile if it is not the file that was copied: it is where it was, or can be put back there.
        """
        file = moving.file
        ctime_ns = file.ctime_ns
        for name in file.names():
            if self._look(*self._in_trash(name)) is not None:  # by somebody who did not come to say so
                compared_ns = self._stat_in_trash(name).st_ctime_ns
                if compared_ns != moving.trash_ctime_ns:
                    raise ChangedMeanwhile(f"{shown(name)} changed in the trash")
                ctime_ns = compared_ns
        for name in file.names():
            if self._look(*self._in_trash(name)) is None:
                ctime_ns = self._take_name(moving, name, ctime_ns)
        return ctime_ns

    def _take_name(self, moving: MoveFile, name: bytes, ctime_ns: int) -> int:
        above, leaf = split(name)
        with (
            self._tree.directory_if_there(joined(self._base, above)) as hot,
            self._tree.directory(joined(self.trash, above), make=True) as trash,
        ):
            if hot is None:
                raise ChangedMeanwhile(f"the directory of {shown(name)} went")
            before = self._expect(moving, hot, name, ctime_ns)
            self._place(name, moving)
            self._at("take")
            try:
                renameat2(hot, leaf, trash, leaf, RENAME_NOREPLACE)
            except FileNotFoundError:
                self.drop_stub(moving, name)
                raise ChangedMeanwhile(f"{shown(name)} went") from None
            self._at("took")
            self._touched |= {joined(self._base, above), joined(self.trash, above), self._layer_of(name)}
            st = self._stat_in_trash(name)
            if not same(st, moving.file) or not alike(st, before):
                self._at("give back")
                with suppress(FileExistsError):  # then both are kept, the newer one in its place
                    renameat2(trash, leaf, hot, leaf, RENAME_NOREPLACE)
                self.drop_stub(moving, name)
                self._at("gave back")
                raise ChangedMeanwhile(f"{shown(name)} changed")
            return st.st_ctime_ns

    def _expect(self, moving: MoveFile, hot: int, name: bytes, ctime_ns: int) -> os.stat_result:
        st = stat_of(hot, split(name)[1])
        if st is None:
            self.drop_stub(moving, name)
            raise ChangedMeanwhile(f"{shown(name)} went")
        if not same(st, moving.file) or st.st_ctime_ns != ctime_ns:
            self.drop_stub(moving, name)
            raise ChangedMeanwhile(f"{shown(name)} changed")
        return st

    def _place(self, name: bytes, moving: MoveFile) -> None:
        """The stub goes into the layer. One that lies there is hidden by the file, and so nobody's: it goes beside."""
        leaf, draft = split(name)[1], draft_name(name)
        with self._tree.directory(self._layer_of(name)) as layer:
            if is_inode(stat_of(layer, leaf), moving.stub):
                return
            with self._tree.directory(self.drafts) as drafts:
                if not is_inode(stat_of(drafts, draft), moving.stub):
                    raise ChangedMeanwhile(f"the stub of {shown(name)} went")
                self._at("place stub")
                try:
                    renameat2(drafts, draft, layer, leaf, RENAME_NOREPLACE)
                except FileExistsError:
                    renameat2(drafts, draft, layer, leaf, RENAME_EXCHANGE)
                self._at("placed stub")

    def drop_stub(self, moving: MoveFile, name: bytes) -> None:
        """Take our stub out of the layer, unless it has got bytes of its own; what it took the place of returns."""
        leaf, draft = split(name)[1], draft_name(name)
        with self._stub(moving, name) as layer:
            if layer is None:
                return
            self._at("drop stub")
            with self._tree.directory(self.drafts, make=True) as drafts:
                if stat_of(drafts, draft) is None:
                    renameat2(layer, leaf, drafts, draft, RENAME_NOREPLACE)
                else:
                    renameat2(layer, leaf, drafts, draft, RENAME_EXCHANGE)
            self._at("dropped stub")

    @contextmanager
    def _stub(self, moving: MoveFile, name: bytes) -> Iterator[int | None]:
        """The layer in which the stub of a name lies, ours and still cold, and nobody brings bytes to it meanwhile."""
        leaf = split(name)[1]
        with self._tree.directory_if_there(self._layer_of(name)) as layer:
            if layer is None or not is_inode(stat_of(layer, leaf), moving.stub):
                yield None
                return
            fd = os.open(leaf, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer)
            try:
                # One that is being brought back is somebody's by now: nobody waits for it within a transaction.
                with ExitStack() as stack:
                    ours = False
                    with suppress(BlockingIOError):
                        st = os.fstat(stack.enter_context(locked(f"/proc/self/fd/{fd}", wait=False)))
                        ours = st.st_ino == moving.stub and is_cold(st) and is_inode(stat_of(layer, leaf), moving.stub)
                    yield layer if ours else None
            finally:
                os.close(fd)

    # --- files return ---

    def return_file(self, moving: MoveFile) -> str:
        """All its names leave the trash for their places; why one of them stays, if one does."""
        taken = moving.state is FileState.SWITCHED
        reasons = [self.put_back(moving, name, taken) for name in moving.file.names()]
        return next(filter(None, reasons), "")

    def put_back(self, moving: MoveFile, name: bytes, taken: bool) -> str:
        """A file leaves the trash for its place, with the attributes that its stub has by now; why not, if it stays.

        `taken`: it is known to have been in the trash. A name that users removed, renamed or wrote to is left alone.
        """
        above, leaf = split(name)
        st = self._look(*self._in_trash(name))
        if st is None:
            hot = self._look(joined(self._base, above), leaf)
            if not taken or is_inode(hot, moving.file.inode):
                self.drop_stub(moving, name)  # hidden; or its file went before it was taken
            return ""
        if self._look(joined(self._base, above), leaf) is not None:
            return "another file has its name"
        with self._stub(moving, name) as layer:
            if layer is None:
                return "its cold file was removed, renamed or written to"
            with (
                self._tree.directory(joined(self._base, above)) as hot_fd,
                self._tree.directory(joined(self.trash, above)) as trash,
            ):
                given = self._follow_stub(moving, layer, leaf, trash)
                self._at("put back")
                try:
                    renameat2(trash, leaf, hot_fd, leaf, RENAME_NOREPLACE)
                except FileExistsError:
                    return "another file has its name"
                self._at("was put back")
                self._follow_stub(moving, layer, leaf, hot_fd, given)  # who changed it meanwhile did so to the stub
                try:
                    self._remove_stub(moving, name, layer)
                except FileNotFoundError:  # a user removed or renamed it this moment: so shall it be
                    _take_back(moving, leaf, hot_fd, trash)
                    return "its cold file was removed or renamed"
                self._at("removed stub")
        self._touched |= {joined(self._base, above), joined(self.trash, above), self._layer_of(name)}
        return ""

    def _remove_stub(self, moving: MoveFile, name: bytes, layer: int) -> None:
        """One of several goes beside, until all are back: the stubs of the other names tell how many there are."""
        leaf = split(name)[1]
        if moving.file.links:
            with self._tree.directory(self.drafts, make=True) as drafts, suppress(FileExistsError):
                renameat2(layer, leaf, drafts, draft_name(name), RENAME_NOREPLACE)
                return
        os.unlink(leaf, dir_fd=layer)

    def _follow_stub(
        self, moving: MoveFile, layer: int, leaf: bytes, directory: int, given: Looks | None = None
    ) -> Looks | None:
        """Let a file look as its stub does, unless it was `given` these looks before; which ones."""
        with ExitStack() as stack:
            fds = [opened(where, leaf) for where in (layer, directory)]
            for fd in fds:
                if fd >= 0:
                    stack.callback(os.close, fd)
            stub, file = fds
            if min(fds) < 0 or not is_inode(os.fstat(file), moving.file.inode):
                return given
            looks = looks_of(stub)
            if looks not in (given, looks_of(file)):
                self._at("attributes")
                # What was written to it through an old descriptor is newer than its stub.
                copy_attributes(stub, file, 0, times=same(os.fstat(file), moving.file))
                self._at("gave attributes")
            return looks

    # --- files end ---

    def is_itself(self, moving: MoveFile) -> bool:
        """True if what is in the trash is what was copied: by size and times. Those that are gone are."""
        found = [self._look(*self._in_trash(name)) for name in moving.file.names()]
        return all(st is None or (same(st, moving.file) and st.st_ctime_ns == moving.trash_ctime_ns) for st in found)

    def in_trash(self, file: HotFile) -> list[bytes]:
        """Those of its names that are there."""
        return [name for name in file.names() if self._look(*self._in_trash(name)) is not None]

    @contextmanager
    def opened_in_trash(self, file: HotFile) -> Iterator[int | None]:
        """A descriptor of it; None if it is not there."""
        for name in self.in_trash(file):
            above, leaf = self._in_trash(name)
            with self._tree.directory(above) as fd:
                file_fd = opened(fd, leaf)
            try:
                yield file_fd
            finally:
                os.close(file_fd)
            return
        yield None

    def discard(self, file: HotFile) -> None:
        """Remove it from the trash, for good."""
        for name in self.in_trash(file):
            above, leaf = self._in_trash(name)
            with self._tree.directory(above) as fd:
                self._at("delete")
                os.unlink(leaf, dir_fd=fd)
                self._at("deleted")

    def clear(self, directory: bytes) -> None:
        """Remove what is empty of the trash or of the drafts; of the drafts also stubs that nobody needs."""
        if directory == self.drafts:
            with self._tree.directory_if_there(directory) as fd:
                for name in os.listdir(fd) if fd is not None else []:
                    os.unlink(name, dir_fd=fd)
        self._at("clear")
        self._tree.remove_empty(directory)
        self._at("cleared")

    def sync(self) -> None:
        """What was made and renamed since the last call is so after a power cut, too. All stubs at once: the first of
        these calls writes for all of them."""
        if self._drafted:
            with self._tree.directory(self.drafts) as drafts:
                for name in self._drafted:
                    stub = opened(drafts, name)
                    if stub >= 0:
                        os.fsync(stub)
                        os.close(stub)
                os.fsync(drafts)
            self._drafted.clear()
        for path in sorted(self._touched):
            with self._tree.directory_if_there(path) as fd:
                if fd is not None:
                    os.fsync(fd)
        self._touched.clear()

    # --- common ---

    def _layer_of(self, name: bytes) -> bytes:
        return joined(joined(self._base, split(name)[0]), RESERVED + b"/" + STUBS)

    def _in_trash(self, name: bytes) -> tuple[bytes, bytes]:
        above, leaf = split(name)
        return joined(self.trash, above), leaf

    def _stat_in_trash(self, name: bytes) -> os.stat_result:
        st = self._look(*self._in_trash(name))
        if st is None:
            raise FileNotFoundError(errno.ENOENT, f"{shown(name)} is no longer in the trash")
        return st

    def _look(self, directory: bytes, name: bytes) -> os.stat_result | None:
        with self._tree.directory_if_there(directory) as fd:
            return stat_of(fd, name) if fd is not None else None


def _take_back(moving: MoveFile, leaf: bytes, hot: int, trash: int) -> None:
    """A file goes to the trash again, but none that somebody put in its place meanwhile."""
    if not is_inode(stat_of(hot, leaf), moving.file.inode):
        return
    with suppress(FileNotFoundError):
        renameat2(hot, leaf, trash, leaf, RENAME_NOREPLACE)
        if not is_inode(stat_of(trash, leaf), moving.file.inode):
            with suppress(FileExistsError):  # then both are kept
                renameat2(trash, leaf, hot, leaf, RENAME_NOREPLACE)
