"""The generator of the comparer: random calls, most of them on what is there and so likely to do something."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.campaigns.calls_on_a_side import OTHER_USER, Call, Data

NAMES = ("a", "b.safetensors", "c", "d", "e.bin", "f")
ODD_NAMES = ("n" * 255, "n" * 256, "sp ace\n", "\udcff\udcfe", "ä", ".hidden")
ENTRIES_MAX = 40
"""More than that, and what is made is mostly removed again: a look at the whole tree shall stay short."""
SLOTS, MAPS = 10, 3
DEPTH_MAX = 3
MODES = (0o644, 0o666, 0o600, 0o755, 0o777, 0o000, 0o444, 0o4755, 0o2775, 0o1777, 0o6777)
SIZES = (0, 1, 100, 511, 4095, 4096, 4097, 10_000, 65_537, 131_071, 131_072, 140_000)
OFFSETS = (0, 0, 1, 77, 4095, 4096, 8191, 65_536, 100_001, 131_071, 131_072, 200_000)
TIMES_NS = (0, 1, 999_999_999, 1_000_000_000_123_456_789, -1_000_000_000, 1_500_000_000_000_000_001)
ACCESS_MODES = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)
EXTRA_FLAGS = (os.O_CREAT, os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_APPEND, os.O_SYNC,
               os.O_DSYNC, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_NOATIME, os.O_NONBLOCK)  # fmt: skip
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


class Calls:
    """Draws calls; keeps a rough idea of the tree in `kinds`, taken from the plain directory. No hard links on a source
    that is not `faithful`: JuiceFS 0.14 loses files that have several names."""

    def __init__(self, seed: int, model: Path, *, faithful: bool = True) -> None:
        self.random = random.Random(seed)
        self.model = str(model) + "/"
        self.kinds: dict[str, int] = {}
        self.rename_flags = (0, 0, 0, RENAME_NOREPLACE) + (RENAME_EXCHANGE,) * faithful
        self.xattr_flags = (0, 0, 1, 2) if faithful else (0,)
        self.users = (0, 0, 0, OTHER_USER)
        self.data_seed = 0
        draws: list[tuple[int, Callable[[], Call]]] = [
            (90, self._open), (30, self._close), (110, self._read), (30, self._seek), (130, self._write),
            (25, self._truncate), (15, self._on_file), (70, self._map), (40, self._make), (30, self._remove),
            (40, self._rename), (20 * faithful, self._link), (60, self._attributes), (90, self._ask),
        ]  # fmt: skip
        self.draws = [draw for _, draw in draws]
        self.weights = [weight for weight, _ in draws]

    def next(self) -> Call:
        """One call."""
        if len(self.kinds) > ENTRIES_MAX and self.random.random() < 0.3:
            return self._remove()
        return self.random.choices(self.draws, self.weights)[0]()

    def learn(self, call: Call) -> None:
        """What became of the names of a call."""
        for argument in call.arguments:
            if isinstance(argument, str) and argument:
                self.look(argument)

    def look(self, path: str) -> None:
        """What a name is now."""
        try:
            self.kinds[path] = stat.S_IFMT(os.lstat(self.model + path).st_mode)
        except OSError:
            self.kinds.pop(path, None)

    def know(self, found: Iterable[str]) -> None:
        """A look at the whole tree."""
        self.kinds.clear()
        for path in found:
            self.look(path)

    # --- what a call is about ---

    def pick(self, values: Any) -> Any:
        return self.random.choice(values)

    def call(self, name: str, *arguments: Any) -> Call:
        return Call(name, self.pick(self.users), arguments)

    def old(self, *kinds: int) -> str:
        """A path that is there, of one of these kinds if there is one; sometimes any path."""
        if self.random.random() < 0.9:
            fitting = [path for path, kind in self.kinds.items() if not kinds or kind in kinds]
            if fitting:
                return str(self.pick(fitting))
        return self.new()

    def new(self) -> str:
        """A path in a directory that is there, mostly; it may exist."""
        directories = [path for path, kind in self.kinds.items() if kind == stat.S_IFDIR]
        name = self.pick(ODD_NAMES if self.random.random() < 0.05 else NAMES)
        if not directories or self.random.random() < 0.3:
            return str(name)
        above = self.pick(directories if self.random.random() < 0.97 else list(self.kinds))
        return f"{above}/{name}" if above.count("/") < DEPTH_MAX - 1 else str(name)

    def file(self) -> str:
        return self.old(stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK)

    def directory(self) -> str:
        return self.old(stat.S_IFDIR)

    def slot(self) -> int:
        return self.random.randrange(SLOTS)

    def data(self) -> Data:
        self.data_seed += 1
        return Data(self.pick(SIZES), self.data_seed)

    def offset(self) -> int:
        return int(self.pick(OFFSETS)) + (self.random.randrange(5000) if self.random.random() < 0.3 else 0)

    # --- the calls ---

    def _open(self) -> Call:
        flags = self.pick(ACCESS_MODES)
        for _ in range(self.pick((0, 0, 1, 1, 2, 3))):
            flags |= self.pick(EXTRA_FLAGS)
        path = self.new() if flags & os.O_CREAT and self.random.random() < 0.5 else self.file()
        return self.call("open", self.slot(), path, flags, self.pick(MODES[:5]))

    def _close(self) -> Call:
        return self.call("close", self.slot())

    def _read(self) -> Call:
        if self.random.random() < 0.3:
            return self.call("read", self.slot(), self.pick(SIZES))
        return self.call("pread", self.slot(), self.pick(SIZES), self.offset())

    def _seek(self) -> Call:
        return self.call("lseek", self.slot(), self.pick((0, 1, 4096, -1, 150_000)), self.pick((0, 1, 2)))

    def _write(self) -> Call:
        if self.random.random() < 0.4:
            return self.call("write", self.slot(), self.data())
        return self.call("pwrite", self.slot(), self.data(), self.offset())

    def _truncate(self) -> Call:
        if self.random.random() < 0.5:
            return self.call("truncate", self.file(), self.offset())
        return self.call("ftruncate", self.slot(), self.offset())

    def _on_file(self) -> Call:
        slot = self.slot()
        return self.pick([
            lambda: self.call("fsync", slot),
            lambda: self.call("fchmod", slot, self.pick(MODES)),
            lambda: self.call("fchown", slot, self.pick((-1, 0, OTHER_USER)), self.pick((-1, 0, OTHER_USER))),
            lambda: self.call("futimens", slot, self.pick(TIMES_NS)),
            lambda: self.call("fsetxattr", slot, b"v" * self.pick((0, 1, 100))),
        ])()  # fmt: skip

    def _map(self) -> Call:
        slot = self.random.randrange(MAPS)
        return self.pick([
            lambda: Call("map", 0, (slot, self.slot(), self.random.random() < 0.7)),
            lambda: Call("map_read", 0, (slot, self.offset(), self.pick(SIZES))),
            lambda: Call("map_read", 0, (slot, self.offset(), self.pick(SIZES))),
            lambda: Call("map_write", 0, (slot, self.offset(), self.data(), self.random.random() < 0.5)),
            lambda: Call("map_write", 0, (slot, self.offset(), self.data(), True)),
            lambda: Call("unmap", 0, (slot,)),
        ])()  # fmt: skip

    def _make(self) -> Call:
        if self.random.random() < 0.6:
            return self.call("mkdir", self.new(), self.pick(MODES[3:5] if self.random.random() < 0.8 else MODES))
        return self.call("symlink", self.pick((*NAMES, "d/a", "nowhere", "x" * 3000)), self.new())

    def _remove(self) -> Call:
        if self.random.random() < 0.3:
            return self.call("rmdir", self.directory())
        return self.call("unlink", self.file())

    def _rename(self) -> Call:
        old = self.old()
        new = self.old() if self.random.random() < 0.5 else self.new()
        return self.call("rename", old, new, self.pick(self.rename_flags))

    def _link(self) -> Call:
        return self.call("link", self.old(stat.S_IFREG, stat.S_IFLNK), self.new())

    def _attributes(self) -> Call:
        path = self.old()
        return self.pick([
            lambda: self.call("chmod", path, self.pick(MODES)),
            lambda: self.call("chmod", path, 0o777),
            lambda: self.call("chown", path, self.pick((-1, 0, OTHER_USER)), self.pick((-1, 0, OTHER_USER))),
            lambda: self.call("utimens", path, self.pick(TIMES_NS), self.random.random() < 0.5),
            lambda: self.call("touch", path),
            lambda: self.call("setxattr", path, b"v" * self.pick((0, 1, 1000)), self.pick(self.xattr_flags)),
            lambda: self.call("removexattr", path),
        ])()  # fmt: skip

    def _ask(self) -> Call:
        path = self.old()
        return self.pick([
            lambda: self.call("lstat", path),
            lambda: self.call("stat", path),
            lambda: self.call("fstat", self.slot()),
            lambda: self.call("fstat", self.slot()),
            lambda: self.call("access", path, self.pick((os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK))),
            lambda: self.call("listdir", self.directory()),
            lambda: self.call("readlink", self.old(stat.S_IFLNK)),
            lambda: self.call("getxattr", path),
            lambda: self.call("statvfs", path),
        ])()  # fmt: skip
