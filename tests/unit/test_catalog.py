"""The walk that finds models and sums up their sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.cold import freeze
from tierd.node import catalog as catalog_module
from tierd.node.catalog import Catalog, files_of
from tierd.node.catalog import walk as walk_source
from tierd.node.cold_source import ColdSource
from tierd.node.recorder import ModelDirs
from tierd.units import model_of

ROOTS = (b"models", b"hot-models")


def walk(source: Path, roots: Sequence[bytes]) -> Catalog:
    """What a walk over a source finds."""
    opened = ColdSource(source)
    try:
        return walk_source(opened, roots)
    finally:
        opened.close()


def fill(top: Path, files: dict[str, int]) -> None:
    """Files of so many bytes."""
    for name, size in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"x" * size)


def test_sizes_are_those_of_all_files_of_a_model(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "models/llama/config.json": 1,
            "models/llama/tokens/vocab.txt": 10,
            "models/llama/model.safetensors": 100,
            "models/org/name/model.gguf": 1000,
            "models/org/README.md": 5,
            "models/tiny.gguf": 7,
            "models/notes.txt": 9,
            "models/.cache/x/y.gguf": 9,
            "hot-models/a/x.bin": 3,
            "outputs/a/x.bin": 9,
        },
    )
    found = walk(tmp_path, ROOTS)
    assert found.complete
    assert found.size_bytes == {
        b"models/llama": 111,
        b"models/org/name": 1000,
        b"models/tiny.gguf": 7,
        b"hot-models/a": 3,
    }


def test_a_hugging_face_tree_counts_its_blobs_once(tmp_path: Path) -> None:
    tree = tmp_path / "models" / "hub" / "models--org--name"
    fill(tree, {"blobs/0a": 100, "refs/main": 40})
    for snapshot in ("one", "two"):
        (tree / "snapshots" / snapshot).mkdir(parents=True)
        (tree / "snapshots" / snapshot / "model.safetensors").symlink_to("../../blobs/0a")
    assert walk(tmp_path, ROOTS).size_bytes == {b"models/hub/models--org--name": 140}


def test_hard_links_count_once(tmp_path: Path) -> None:
    fill(tmp_path, {"models/a/x.bin": 100})
    (tmp_path / "models" / "a" / "y.bin").hardlink_to(tmp_path / "models" / "a" / "x.bin")
    assert walk(tmp_path, ROOTS).size_bytes == {b"models/a": 100}


@pytest.mark.parametrize(
    "roots", [(b"models", b"models/vision"), (b"models/vision", b"models"), (b"", b"models"), (b"models", b"models")]
)
def test_roots_that_nest_count_nothing_twice(tmp_path: Path, roots: Sequence[bytes]) -> None:
    fill(tmp_path, {"models/vision/vit/x.bin": 100, "models/vision/vit/y.bin": 10, "models/text/x.bin": 1})
    found = walk(tmp_path, roots)
    assert sum(found.size_bytes.values()) == 111
    assert found.files == 3


def test_the_source_itself_as_root(tmp_path: Path) -> None:
    fill(tmp_path, {"a/x.bin": 1, "org/b/x.bin": 2, "c.gguf": 4, "notes.txt": 8})
    assert walk(tmp_path, (b"",)).size_bytes == {b"a": 1, b"org/b": 2, b"c.gguf": 4}


def test_links_out_of_the_tree_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "outside", {"x.bin": 100})
    source = tmp_path / "source"
    fill(source, {"models/a/config.json": 1})
    (source / "models" / "b").symlink_to(tmp_path / "outside")
    (source / "models" / "a" / "x.bin").symlink_to(tmp_path / "outside" / "x.bin")
    assert walk(source, ROOTS).size_bytes == {b"models/a": 1}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/models/\xff"
    os.makedirs(directory)
    Path(os.fsdecode(directory + b"/x.bin")).write_bytes(b"1")
    assert walk(tmp_path, ROOTS).size_bytes == {b"models/\xff": 1}


def test_missing_roots_are_empty(tmp_path: Path) -> None:
    with capture_logs() as logs:
        found = walk(tmp_path, ROOTS)
    assert (found.size_bytes, found.complete, logs) == ({}, True, [])


def test_it_gives_up_somewhere_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "FILES_MAX", 3)
    fill(tmp_path, {f"models/a/{number}.bin": 1 for number in range(10)})
    found = walk(tmp_path, ROOTS)
    assert not found.complete
    assert sum(found.size_bytes.values()) == 3


def test_it_agrees_with_what_opens_are_recorded_under(tmp_path: Path) -> None:
    """`tierd models` joins the two by name: a model must have the same one in both."""
    files = {
        "models/llama/config.json": 1,
        "models/llama/my_part/vocab.txt": 1,
        "models/llama/a/b/c.txt": 1,
        "models/org/name/deep/x.bin": 1,
        "models/org/README.md": 1,
        "models/sdxl/unet/model.bin": 1,
        "models/hub/models--o--n/snapshots/1/x.bin": 1,
        "models/tiny.gguf": 1,
        "models/loose/notes.txt": 1,
    }
    fill(tmp_path, files)
    source = ColdSource(tmp_path)
    recorded = {model_of(name.encode(), ROOTS, ModelDirs(source)) for name in files} - {None}
    source.close()
    assert recorded == walk(tmp_path, ROOTS).size_bytes.keys()


def test_cold_files_count_as_they_did(tmp_path: Path) -> None:
    """A model whose weights are cold is still one, and as large."""
    fill(tmp_path, {"models/llama/x.safetensors": 100, "models/llama/notes.txt": 5, "models/tiny.gguf": 7})
    before = walk(tmp_path, ROOTS).size_bytes
    freeze({tmp_path / "models/llama/x.safetensors": None, tmp_path / "models/tiny.gguf": None})
    assert walk(tmp_path, ROOTS).size_bytes == before == {b"models/llama": 105, b"models/tiny.gguf": 7}
    source = ColdSource(tmp_path)
    found = files_of(source, b"models/llama", lambda path: b"models/llama")
    assert [(file.path, file.identity.size) for file in found] == [
        (b"models/llama/notes.txt", 5),
        (b"models/llama/x.safetensors", 100),
    ]
    source.close()
