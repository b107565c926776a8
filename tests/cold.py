"""Makes files cold as a demotion leaves them, for tests that have no controller."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from tierd.stub_files import make_layer, write_origins
from tierd.stubs import COLD_MARK, ORIGINS, RESERVED, STUBS, Origin


def freeze(paths: Mapping[Path, Origin | None], model_id: str = "models/m", version: int = 1) -> dict[Path, Origin]:
    """Put stubs in the place of files, hard links among them kept; what they stand for (given, or told by the file)."""
    stubs: dict[int, Path] = {}
    told: dict[Path, Origin] = {}
    for path, origin in paths.items():
        st = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        told[path] = origin or Origin(model_id, version, os.fsencode(path.name), st.st_size, digest)
        stub = stub_of(path)
        make_layer_of(path.parent)
        if st.st_ino in stubs:
            os.link(stubs[st.st_ino], stub)
        else:
            stub.touch()
            for name in os.listxattr(path):
                os.setxattr(stub, name, os.getxattr(path, name))
            os.chown(stub, st.st_uid, st.st_gid)
            os.chmod(stub, st.st_mode & 0o6777 | COLD_MARK)
            os.utime(stub, ns=(st.st_atime_ns, st.st_mtime_ns))
            stubs[st.st_ino] = stub
        base = os.open(path.parent / os.fsdecode(RESERVED), os.O_PATH)
        write_origins(base, {stub.stat().st_ino: told[path]})
        os.close(base)
        path.unlink()
    return told


def make_layer_of(directory: Path) -> None:
    """What stubs need in a directory."""
    fd = os.open(directory, os.O_RDONLY)
    make_layer(fd)
    os.close(fd)


def stub_of(path: Path) -> Path:
    """Where the stub of a file is."""
    return path.parent / os.fsdecode(RESERVED) / os.fsdecode(STUBS) / path.name


def origins_of(directory: Path) -> list[Path]:
    """The files that say what a directory's stubs stand for."""
    return sorted((directory / os.fsdecode(RESERVED) / os.fsdecode(ORIGINS)).iterdir())
