"""Writes down beside the stubs of a directory what they stand for, before they are there. Touches no file of a model.

Blocking, any thread; each call is harmless to repeat.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from tierd.controller.source.file_calls import opened_directory
from tierd.controller.source.hot_tree import HotTree, joined
from tierd.controller.source.moved_file import ChangedMeanwhile
from tierd.objects.keys import shown
from tierd.stub_files import make_layer, read_origins, write_origins
from tierd.stubs import ORIGINS, RESERVED, Origin

At = Callable[[str], None]
"""Is told of each effect, before and after it; tests end the process there."""


class Announcing:
    """Of the model at `base`."""

    def __init__(self, tree: HotTree, base: bytes, at: At) -> None:
        self._tree = tree
        self._base = base
        self._at = at

    def announce(self, directory: bytes, origins: dict[int, Origin]) -> bool:
        """Write down in a directory what its stubs will stand for; False if it says so already. Raises OSError."""
        with self._tree.directory(joined(self._base, directory)) as fd:
            self._at("make layer")
            make_layer(fd)
            self._at("made layer")
            base = os.open(RESERVED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                with opened_directory(base, ORIGINS) as known:
                    said = read_origins(known)
                    if all(said.get(inode) == origin for inode, origin in origins.items()):
                        return False
                    self._at("write origins")
                    write_origins(base, origins)
                    os.fsync(known)
                    os.fsync(base)
                    said = read_origins(known)
                os.fsync(fd)
                self._at("wrote origins")
                if any(said.get(inode) != origin for inode, origin in origins.items()):
                    # Of an inode number that is used again, and of a clock that went back: wrong bytes otherwise.
                    raise ChangedMeanwhile(f"{shown(directory)} has origins from the future: is the clock right?")
            finally:
                os.close(base)
        return True

    def write_manifest(self, name: bytes, content: bytes) -> None:
        """A copy of the manifest, where `rmdir` through an overlay finds and removes it."""
        with self._tree.directory(joined(self._base, RESERVED + b"/" + ORIGINS)) as fd:
            self._at("write manifest copy")
            draft = name + b".new"
            file_fd = os.open(
                draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=fd
            )
            with open(file_fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file_fd)
            os.rename(draft, name, src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)
            self._at("wrote manifest copy")

    def remove_manifest(self, name: bytes) -> None:
        """What `write_manifest` wrote, if it is there."""
        with self._tree.directory_if_there(joined(self._base, RESERVED + b"/" + ORIGINS)) as fd:
            if fd is not None:
                self._at("remove manifest copy")
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)
                self._at("removed manifest copy")
