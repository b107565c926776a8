"""Brings a cold model back into the source: all its stubs get their bytes, each in place, and go back to their names.

The tree only: blocking, for a worker thread. Whether it may, and what the database says of it, is the business of the
moves. Each step can be killed and repeated: what is done is seen in the tree itself, and no object is ever touched.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Final, NamedTuple

import structlog

from tierd.controller.source import cold_tree
from tierd.controller.source.cold_tree import StubName
from tierd.controller.source.hot_tree import HotTree, split
from tierd.errors import TierdError
from tierd.recall import Fetch, recall
from tierd.stubs import Origin
from tierd.units import display

log = structlog.get_logger(__name__)

FILES_AT_ONCE: Final = 4
RANGES_AT_ONCE: Final = 8
"""Of all files together; each holds a buffer."""
RESERVE_SHARE: Final = 0.02
"""What of the source's file system stays free."""
_ROUNDS_MAX: Final = 4
"""Names may move while they are brought, from where they are not looked for any more."""


class PromotionError(TierdError):
    """A model cannot be brought back, or not all of it. What was brought stays; nothing is lost."""


class Stopped(Exception):
    """Somebody asked to stop. What is not whole is as cold as before."""


class Need(NamedTuple):
    """What is to be brought: files (inodes, however many names) and their bytes."""

    files: int
    bytes: int


class Promotion:
    """One model of the source. `told` hears of bytes that came, `at` of each effect before and after it; any thread.

    Contract: `run` once; `stop` from any thread.
    """

    def __init__(
        self,
        tree: HotTree,
        model_id: str,
        fetch: Fetch,
        told: Callable[[int], None] = lambda size: None,
        at: Callable[[str], None] = lambda effect: None,
    ) -> None:
        self._tree = tree
        self._model = os.fsencode(model_id)
        self._fetch = fetch
        self._told = told
        self._at = at
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have `run` end soon, with Stopped."""
        self._stopping.set()

    def need(self) -> Need:
        """What would be brought. Raises PromotionError if the bytes of a file cannot be found."""
        return _need(list(cold_tree.stub_names(self._tree, self._model)))

    def require_space(self) -> Need:
        """The same, if there is room for it. Raises PromotionError."""
        need = self.need()
        self._require_space(need)
        return need

    def run(self) -> Need:
        """Bring all; how much that was. Raises PromotionError, ObjectError, OSError, Stopped."""
        done = Need(0, 0)
        for _ in range(_ROUNDS_MAX):
            names = list(cold_tree.stub_names(self._tree, self._model))
            if not names:
                self._clear()
                return done
            need = _need(names)
            self._require_space(need)
            self._bring(names)
            self._settle(names)
            done = Need(done.files + need.files, done.bytes + need.bytes)
        raise PromotionError(
            f"model {display(self._model)}: cold files turn up faster than they are brought back",
            hint="who moves them there? the next try goes on",
        )

    def _require_space(self, need: Need) -> None:
        with self._tree.directory(b"") as top:
            found = os.fstatvfs(top)
        free = found.f_bavail * found.f_frsize
        reserve = int(found.f_blocks * found.f_frsize * RESERVE_SHARE)
        if need.bytes and free - need.bytes < reserve:
            raise PromotionError(
                f"model {display(self._model)}: {need.bytes} bytes are to come back,"
                f" {free} are free in the source and {reserve} of them are to stay so",
                hint="make room there, or demote other models first",
                errno=errno.ENOSPC,
            )

    def _bring(self, names: Sequence[StubName]) -> None:
        """Each inode once. The first failure ends all."""
        stubs = list({stub.inode: stub for stub in names if stub.cold}.values())
        with (
            ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="promote-ranges") as ranges,
            ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="promote") as files,
        ):

            def bring(stub: StubName) -> None:
                self._go_on()
                self._bring_one(stub, ranges)

            running = [files.submit(bring, stub) for stub in stubs]
            try:
                _first_failure(running)
            except BaseException:
                self._stopping.set()
                raise
            finally:
                for future in running:
                    future.cancel()

    def _bring_one(self, stub: StubName, ranges: ThreadPoolExecutor) -> None:
        with _path_of(self._tree, stub) as path:
            if path is None or stub.origin is None:
                return  # it went, or moved: the next round sees
            self._at("bring")
            brought = recall(path, stub.origin, self._fetch, self._progress, ranges)
            self._at("brought")
            if brought:
                model, version = display(os.fsencode(stub.origin.model_id)), stub.origin.version
                log.info("promoted_file", model=model, version=version, path=display(stub.origin.path))

    def _progress(self, size: int) -> None:
        self._go_on()
        self._told(size)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _settle(self, names: Sequence[StubName]) -> None:
        """Names first, then what is known of the stubs: so a name is always one that can be read."""
        placed: defaultdict[bytes, set[int]] = defaultdict(set)
        for stub in names:
            self._go_on()
            self._at("place")
            if cold_tree.place(self._tree, stub):
                placed[stub.directory].add(stub.inode)
            self._at("placed")
        for directory, inodes in placed.items():
            self._at("forget")
            cold_tree.forget(self._tree, directory, inodes)
            self._at("forgot")

    def _clear(self) -> None:
        """What is left of layers that have no stubs, by one that was killed."""
        for directory in (split(self._model)[0], *cold_tree.directories(self._tree, self._model)):
            cold_tree.forget(self._tree, directory, ())


def _need(names: Sequence[StubName]) -> Need:
    origins: dict[int, Origin] = {}
    for stub in names:
        if stub.cold:
            if stub.origin is None:
                where = display(stub.directory + b"/" + stub.name)
                raise PromotionError(
                    f"{where}: nobody knows where its bytes are", hint="a copy of the manifest is beside the objects"
                )
            origins[stub.inode] = stub.origin
    return Need(len(origins), sum(origin.size for origin in origins.values()))


@contextmanager
def _path_of(tree: HotTree, stub: StubName) -> Iterator[str | None]:
    """A path that leads to this inode only; None if the name means something else by now."""
    fd = cold_tree.open_stub(tree, stub)
    try:
        yield None if fd is None else f"/proc/self/fd/{fd}"
    finally:
        if fd is not None:
            os.close(fd)


def _first_failure(running: Sequence[Future[None]]) -> None:
    done, _ = wait(running, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
