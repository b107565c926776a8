"""A node tier under test: models to put into it, what it holds of them, and waiting for what it does by itself."""

from __future__ import annotations

import io
import os
import random
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.mounts import OverlayMount, wait_until
from tierd.cli.main import main

MIB = 1 << 20
FILL_SECONDS = 20.0


def content(size: int, seed: object) -> bytes:
    """Bytes that no two files, and no two chunks of a file, have in common."""
    return random.Random(str(seed)).randbytes(size)


@dataclass(frozen=True)
class Model:
    """A model of a mount: its files' names and bytes as the test made them."""

    mount: OverlayMount
    name: str
    files: Mapping[str, bytes]

    @cached_property
    def size(self) -> int:
        """All bytes."""
        return sum(map(len, self.files.values()))

    def through(self, file: str = "a.safetensors") -> Path:
        """A file as pods see it."""
        return self.mount.mountpoint / self.name / file

    def beneath(self, file: str = "a.safetensors") -> Path:
        """The same file in the source."""
        return self.mount.source / self.name / file

    def read(self) -> None:
        """Load it: every file, and every byte is right."""
        for file, data in self.files.items():
            assert self.through(file).read_bytes() == data, f"{file} has wrong bytes"

    def filled(self) -> Model:
        """Load it and wait until the node has it and its last reader is gone."""
        self.read()
        self.await_state("complete")
        self.mount.settled()
        self.row()  # records it
        return self

    def row(self) -> dict[str, Any]:
        """What `tierd models` says."""
        return self.mount.models().get(self.name, {})

    def await_state(self, state: str, seconds: float = FILL_SECONDS) -> None:
        """Wait until it is `complete`, `absent`, ..."""
        wait_until(lambda: bool(self.row().get("state") == state), seconds, lambda: f"{state}; it is {self.row()}")

    def await_row(self, **expected: object) -> None:
        """Wait until `tierd models` says all this: accesses are recorded some time after they happened."""

        def holds() -> bool:
            row = self.row()
            return {key: row.get(key) for key in expected} == expected

        wait_until(holds, FILL_SECONDS, lambda: f"{expected}; it is {self.row()}")


def make_model(mount: OverlayMount, name: str, files: Mapping[str, int] | int) -> Model:
    """Put a model into the source; `files` are sizes by name, or the size of its only file."""
    sizes = {"a.safetensors": files} if isinstance(files, int) else files
    made = Model(mount, f"models/{name}", {file: content(size, (name, file)) for file, size in sizes.items()})
    for file, data in made.files.items():
        path = made.beneath(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return made


def of_tier(mount: OverlayMount) -> dict[str, Any]:
    """What `tierd status` says of the node tier."""
    told: dict[str, Any] = mount.status()["node_tier"]
    return told


def metric(mount: OverlayMount, series: str) -> float:
    """The value of one series of /metrics; 0 if it is not there."""
    with urllib.request.urlopen(f"http://{mount.record.metrics_address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(series + " ")), 0.0)


def idle(mount: OverlayMount) -> None:
    """Wait until nothing is on its way into the node tier."""
    wait_until(
        lambda: not (of_tier(mount)["fills_active"] or of_tier(mount)["fills_queued"]),
        FILL_SECONDS,
        lambda: f"all fills ended, but {of_tier(mount)}",
    )


def data_files(mount: OverlayMount) -> list[Path]:
    """The files of the cache directory that hold bytes of whole copies."""
    return sorted(path.with_suffix("") for path in mount.cache_dir.glob("*.meta"))


def leftovers(mount: OverlayMount) -> list[str]:
    """Files of the cache directory that belong to no copy."""
    ours = {name for path in data_files(mount) for name in (path.name, path.name + ".meta")} | {"lock"}
    return sorted(set(os.listdir(mount.cache_dir)) - ours)


def data_file(model: Model, file: str = "a.safetensors") -> Path:
    """The file of the cache directory that holds the bytes of a model's file."""
    inode = model.beneath(file).stat().st_ino
    found = [path for path in data_files(model.mount) if path.name.startswith(f"{inode:x}-")]
    assert len(found) == 1, f"one copy of {model.name}/{file}, not {found}"
    return found[0]


def command(mount: OverlayMount, *words: str, code: int = 0) -> str:
    """A command on this mount that ends with `code`: what it printed, or complained of. Runs in this process."""
    out, err, ended = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tierd", *words, "--mount", str(mount.mountpoint)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            ended = end.code
    assert (ended or 0) == code, f"{words} exited {ended}: {err.getvalue()}{out.getvalue()}"
    if code:
        lines = err.getvalue().splitlines()
        assert [line.partition(":")[0] for line in lines] == ["tierd", "hint"], err.getvalue()
    return err.getvalue() if code else out.getvalue()
