"""Cold models in a source with an object store beside it, and what a pod would see of them; for tests of moves."""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cold import freeze
from tierd.node.cold_bytes import ColdBytes
from tierd.node.cold_source import Cold, ColdSource
from tierd.node.sources import Ref
from tierd.objects.keys import object_key
from tierd.objects.store import ObjectStore
from tierd.stubs import Origin

BUCKET = "cold-models"
Looks = dict[str, tuple[Any, ...]]
"""By path: kind, mode, times, links, and the bytes or where a link leads."""
_AUDITED = ("os.", "open", "shutil.")


@dataclass
class Frozen:
    """A source, and a store in the directory `objects`."""

    source: Path
    store: ObjectStore
    objects: Path

    def freeze(self, model_id: str, version: int = 1) -> None:
        """Make the files of a model cold, as a demotion does: objects first."""
        top = self.source / model_id
        files = [path for path in ([top] if top.is_file() else sorted(top.rglob("*"))) if self._has_bytes(path)]
        told: dict[Path, Origin | None] = {}
        for path in files:
            inside = os.fsencode(path.name if path == top else str(path.relative_to(top)))
            stored = self.store.put_file(BUCKET, object_key(model_id, version, inside), path, path.stat().st_size)
            told[path] = Origin(model_id, version, inside, *stored)
        freeze(told, model_id, version)

    def _has_bytes(self, path: Path) -> bool:
        st = path.lstat()
        return stat.S_ISREG(st.st_mode) and st.st_size > 0 and ".tierd" not in path.parts

    def looks(self, model_id: str) -> Looks:
        """A model as the overlay shows it: all names, attributes, and every byte."""
        source = ColdSource(self.source)
        try:
            found: Looks = {}
            fd = source.open_path(os.fsencode(model_id), os.O_RDONLY)
            try:
                self._look(source, fd, "", found)
            finally:
                os.close(fd)
            return found
        finally:
            source.close()

    def _look(self, source: ColdSource, fd: int, above: str, found: Looks) -> None:
        for name in source.list_names(fd):
            st = source.lstat(fd, name)
            path = f"{above}{os.fsdecode(name)}"
            kind, mode = stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode)
            if stat.S_ISDIR(st.st_mode):
                found[path] = (kind, mode)
                below = source.open_dir(Ref(fd, name, source.key(st)))
                try:
                    self._look(source, below, f"{path}/", found)
                finally:
                    os.close(below)
            elif stat.S_ISLNK(st.st_mode):
                found[path] = (kind, os.readlink(name, dir_fd=fd))
            else:
                content = self._read(source, Ref(fd, name, source.key(st)))
                assert len(content) == st.st_size
                found[path] = (kind, mode, st.st_uid, st.st_mtime_ns, st.st_nlink, content)

    def _read(self, source: ColdSource, ref: Ref) -> bytes:
        try:
            fd, version = source.open(ref, os.O_RDONLY)
        except Cold as error:
            origin = error.stub.origin
        else:
            try:
                return os.pread(fd, version.size, 0)
            finally:
                os.close(fd)
        assert origin is not None
        content = bytearray(origin.size)
        ColdBytes(self.store, BUCKET).read(origin, memoryview(content), 0)
        return bytes(content)

    def layers(self, model_id: str) -> list[Path]:
        """What is left of stubs in a model."""
        return sorted((self.source / model_id).rglob(".tierd"))


def killed_after(calls: int, work: Callable[[], Any]) -> bool:
    """Do it in a process that is killed (SIGKILL) at its call number `calls` to the file system; False if it ended
    before. Reads count too. Raises AssertionError if the work failed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            _die_at(calls)
            work()
            code = 0
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFSIGNALED(status)


def _die_at(calls: int) -> None:
    left = calls

    def hook(event: str, _: tuple[Any, ...]) -> None:
        nonlocal left
        if event.startswith(_AUDITED) and event != "os.kill":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
