"""What is a model: pure rules over paths, no file system.

Paths are bytes relative to the source, without a leading slash. A model is named by its path
(`models/llama-7b`), because two roots may hold models of one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

WEIGHT_SUFFIXES = (
    b".safetensors", b".gguf", b".ggml", b".bin", b".pt", b".pth", b".ckpt", b".onnx", b".msgpack",
    b".h5", b".npz", b".npy", b".tflite", b".engine", b".plan", b".pdparams", b".mlmodel",
)  # fmt: skip
"""Endings of files that hold weights, as the common frameworks write them."""

MARKER_NAMES = frozenset(
    {b"config.json", b"model_index.json", b"params.json", b"adapter_config.json", b"tokenizer.json"}
)
"""Small files that sit beside weights and mark their directory as a model."""

COMPONENT_DIRS = frozenset(
    {
        b"unet", b"vae", b"vae_1_0", b"vae_decoder", b"vae_encoder", b"text_encoder", b"text_encoder_2",
        b"text_encoder_3", b"tokenizer", b"tokenizer_2", b"tokenizer_3", b"scheduler", b"transformer",
        b"safety_checker", b"feature_extractor", b"image_encoder", b"image_processor", b"controlnet", b"prior",
        b"original", b"onnx", b"openvino", b"tensorrt", b"coreml", b"flax", b"metal", b"gguf", b"fp16", b"bf16",
        b"int8", b"int4", b"fp8", b"checkpoints", b"snapshots", b"blobs", b"refs", b"lora", b"adapter",
        b"adapters", b"weights", b"assets", b"config", b"configs", b"1_pooling", b"2_dense", b"2_normalize",
    }
)  # fmt: skip
"""Sub-directories that are parts of one model (diffusers, ONNX exports, quantised variants), in lower case."""

HUB_PREFIX = b"models--"
"""Directory name prefix of a Hugging Face cache tree: `models--ORG--NAME/{blobs,refs,snapshots}`."""


def split(path: bytes) -> list[bytes]:
    """The components of a relative path; empty ones are left out."""
    return [part for part in path.split(b"/") if part]


def root_of(path: bytes, roots: Iterable[bytes]) -> bytes | None:
    """The longest of `roots` that `path` lies below (or is), or None."""
    best: bytes | None = None
    for root in roots:
        inside = root in (b"", path) or path.startswith(root + b"/")
        if inside and (best is None or len(root) > len(best)):
            best = root
    return best


def looks_like_model(names: Iterable[bytes]) -> bool:
    """True if a directory holding these names is a model: weights or a marker file lie directly in it."""
    return any(name in MARKER_NAMES or name.lower().endswith(WEIGHT_SUFFIXES) for name in names)


def holds_weights(path: bytes) -> bool:
    """True if a file holds weights, by its name."""
    return path.lower().endswith(WEIGHT_SUFFIXES)


def model_of(
    path: bytes, roots: Sequence[bytes], is_model_dir: Callable[[bytes], bool] = lambda _: False
) -> bytes | None:
    """The model that the file at `path` belongs to, or None if it belongs to none.

    `roots` are the models roots. `is_model_dir` tells of a directory whether weights lie directly in
    it (see `looks_like_model`); without that knowledge `ROOT/a/b/file` is taken for organisation `a`,
    model `b`, unless `b` is a known part of a model (`unet`, `onnx`, ...). Hidden entries (a leading
    dot) belong to no model.
    """
    root = root_of(path, roots)
    if root is None:
        return None
    rest = split(path[len(root) :])
    if not rest or any(part.startswith(b".") for part in rest[:2]):
        return None
    prefix = [root] if root else []
    for depth, part in enumerate(rest[:-1]):
        if part.startswith(HUB_PREFIX):
            return b"/".join(prefix + rest[: depth + 1])
    if len(rest) == 1:
        return path if looks_like_model([rest[0]]) and rest[0] not in MARKER_NAMES else None
    first = b"/".join([*prefix, rest[0]])
    if len(rest) == 2:
        return first if looks_like_model([rest[1]]) or is_model_dir(first) else None
    if rest[1].lower() in COMPONENT_DIRS or is_model_dir(first):
        return first
    return b"/".join([*prefix, *rest[:2]])


def display(path: bytes) -> str:
    """A path as text for people, logs and JSON; bytes that are not UTF-8 become surrogate escapes (PEP 383)."""
    return path.decode("utf-8", "surrogateescape")
