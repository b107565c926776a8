"""Which model a path belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.units import (
    COMPONENT_DIRS,
    MARKER_NAMES,
    WEIGHT_SUFFIXES,
    display,
    looks_like_model,
    model_of,
    root_of,
    split,
)

ROOTS = (b"models", b"hot-models")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        pytest.param(b"models/llama-7b/model.safetensors", b"models/llama-7b", id="directory"),
        pytest.param(b"hot-models/llama-7b/model.gguf", b"hot-models/llama-7b", id="second root"),
        pytest.param(b"models/llama-7b/model-00001-of-00002.SAFETENSORS", b"models/llama-7b", id="upper case ending"),
        pytest.param(b"models/llama-7b/config.json", b"models/llama-7b", id="marker file"),
        pytest.param(b"models/meta-llama/Llama-3-8B/model.gguf", b"models/meta-llama/Llama-3-8B", id="org/name"),
        pytest.param(
            b"models/meta-llama/Llama-3-8B/vocab.txt", b"models/meta-llama/Llama-3-8B", id="org/name, any file"
        ),
        pytest.param(b"models/a/b/c/d/e.bin", b"models/a/b", id="org/name, deep"),
        pytest.param(b"models/tiny.gguf", b"models/tiny.gguf", id="single file"),
        pytest.param(b"models/tiny.GGUF", b"models/tiny.GGUF", id="single file, upper case"),
        pytest.param(b"models/README.md", None, id="README in the root"),
        pytest.param(b"models/config.json", None, id="marker in the root is no model"),
        pytest.param(b"models/meta-llama/README.md", None, id="README at org level"),
        pytest.param(b"models/meta-llama/.gitattributes", None, id="hidden file at org level"),
        pytest.param(b"models/.cache/x/model.safetensors", None, id="hidden directory"),
        pytest.param(b"models/.hidden.gguf", None, id="hidden file"),
        pytest.param(b"models/org/.tmp/model.safetensors", None, id="hidden directory at model level"),
        pytest.param(b"models", None, id="the root itself"),
        pytest.param(b"models/", None, id="the root itself, with a slash"),
        pytest.param(b"modelsx/a/model.gguf", None, id="a name that only begins like a root"),
        pytest.param(b"outputs/a/model.gguf", None, id="another tree"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_model_by_name_alone(path: bytes, model: bytes | None) -> None:
    assert model_of(path, ROOTS) == model


@pytest.mark.parametrize("hub", [b"", b"hub/", b"huggingface/hub/"])
@pytest.mark.parametrize(
    "rest",
    [b"blobs/0a1b", b"refs/main", b"snapshots/c0ffee/model.safetensors", b"snapshots/c0ffee/unet/config.json"],
)
def test_hugging_face_cache_tree_is_one_model(hub: bytes, rest: bytes) -> None:
    tree = b"models/" + hub + b"models--meta-llama--Llama-3-8B"
    assert model_of(tree + b"/" + rest, ROOTS) == tree


def test_file_named_like_a_cache_tree_is_not_one() -> None:
    assert model_of(b"models/models--org--name", ROOTS) is None
    assert model_of(b"models/hub/models--org--name", ROOTS) is None


def test_locks_of_a_hugging_face_cache_belong_to_no_model() -> None:
    assert model_of(b"models/hub/.locks/models--org--name/0a1b.lock", ROOTS) is None


@pytest.mark.parametrize("component", sorted(COMPONENT_DIRS))
def test_parts_of_a_model_are_not_models(component: bytes) -> None:
    """diffusers components, ONNX exports and the like: no evidence from the disk is needed for the known ones."""
    assert model_of(b"models/sdxl/" + component + b"/model.bin", ROOTS) == b"models/sdxl"
    assert model_of(b"models/sdxl/" + component.upper() + b"/deep/model.bin", ROOTS) == b"models/sdxl"


def test_weights_beside_an_unknown_part_make_its_parent_the_model() -> None:
    asked: list[bytes] = []

    def is_model_dir(directory: bytes) -> bool:
        asked.append(directory)
        return directory == b"models/odd"

    assert model_of(b"models/odd/my_part/x.bin", ROOTS, is_model_dir) == b"models/odd"
    assert model_of(b"models/org/name/x.bin", ROOTS, is_model_dir) == b"models/org/name"
    assert asked == [b"models/odd", b"models/org"]


def test_small_file_of_a_model_directory_belongs_to_it_once_there_is_evidence() -> None:
    assert model_of(b"models/llama/vocab.txt", ROOTS) is None
    assert model_of(b"models/llama/vocab.txt", ROOTS, lambda directory: directory == b"models/llama") == b"models/llama"


@pytest.mark.parametrize(
    ("path", "roots", "model"),
    [
        (b"models/vision/vit/a.bin", (b"models", b"models/vision"), b"models/vision/vit"),
        (b"models/vision/vit/a.bin", (b"models/vision", b"models"), b"models/vision/vit"),
        (b"models/vision/org/vit/a.bin", (b"models", b"models/vision"), b"models/vision/org/vit"),
        (b"models/text/bert/a.bin", (b"models", b"models/vision"), b"models/text/bert"),
        (b"a/weights.bin", (b"",), b"a"),
        (b"org/a/weights.bin", (b"",), b"org/a"),
        (b"a.gguf", (b"",), b"a.gguf"),
        (b"notes.txt", (b"",), None),
        (b"models/a/b.bin", (b"", b"models"), b"models/a"),
        (b"models/a/b.bin", (), None),
    ],
)
def test_roots_nest_and_may_be_the_source_itself(path: bytes, roots: Sequence[bytes], model: bytes | None) -> None:
    assert model_of(path, roots) == model


def test_longest_root_wins() -> None:
    assert root_of(b"a/b/c", (b"", b"a", b"a/b", b"a/b/c/d")) == b"a/b"
    assert root_of(b"a/b", (b"a/b",)) == b"a/b"
    assert root_of(b"ab", (b"a",)) is None


@pytest.mark.parametrize("ending", WEIGHT_SUFFIXES)
def test_each_weights_ending_marks_a_directory(ending: bytes) -> None:
    assert looks_like_model([b"README.md", b"x" + ending.upper()])


def test_what_marks_a_directory() -> None:
    assert all(looks_like_model([name]) for name in MARKER_NAMES)
    assert not looks_like_model([])
    assert not looks_like_model([b"README.md", b"bin", b"model.safetensors.index.json", b".gitattributes"])


names = st.one_of(
    st.sampled_from(
        [
            b"models",
            b"hub",
            b"models--org--name",
            b"unet",
            b"a.gguf",
            b"config.json",
            b"README.md",
            b".git",
            b".",
            b"..",
            b"",
        ]
    ),
    st.binary(max_size=6),
)
paths = st.one_of(st.lists(names, max_size=7).map(b"/".join), st.binary(max_size=60))
root_sets = st.lists(
    st.lists(names.filter(lambda n: n not in (b"", b".", b"..") and b"/" not in n), max_size=3).map(b"/".join),
    max_size=3,
)


@settings(max_examples=100)
@given(path=paths, roots=root_sets, evidence=st.sets(paths))
def test_a_model_lies_below_its_root_and_above_its_file(path: bytes, roots: list[bytes], evidence: set[bytes]) -> None:
    model = model_of(path, roots, evidence.__contains__)
    if model is None:
        return
    root = root_of(path, roots)
    assert root is not None
    assert root_of(model, roots) == root or root_of(model, roots) == model, "a model may itself be a root"
    parts = split(model)
    assert split(path)[: len(parts)] == parts
    assert len(parts) > len(split(root))
    assert not any(part.startswith(b".") for part in parts[len(split(root)) :][:2])


@settings(max_examples=100)
@given(path=paths, roots=root_sets, evidence=st.sets(paths), name=st.sampled_from([b"w.safetensors", b"z.gguf"]))
def test_weights_laid_directly_into_a_model_belong_to_it(
    path: bytes, roots: list[bytes], evidence: set[bytes], name: bytes
) -> None:
    """What is a model by one of its files is one by others, once the directory gives evidence itself."""
    model = model_of(path, roots, evidence.__contains__)
    if model is None or split(model) == split(path) or model in roots:
        return  # a single file, or a directory that is itself a root
    assert model_of(model + b"/" + name, roots, {*evidence, model}.__contains__) == model


@given(st.binary(max_size=40))
def test_display_keeps_every_byte(path: bytes) -> None:
    assert display(path).encode("utf-8", "surrogateescape") == path
