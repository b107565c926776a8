"""Models in the layout of Hugging Face: writes them with random weights, loads them with safetensors.

The bytes depend on the seed only and do not compress, so neither a compressing store nor a wrong byte
goes unnoticed: writing and loading return the same checksum when every page arrived in its place.
"""

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

HIDDEN = 4096
ROW_BYTES = HIDDEN * 2  # float16
TENSOR_ROWS_MAX = 4096  # 32 MiB, the size of an attention projection in a 7B model
CHUNK_ROWS = 512  # 4 MiB in memory at a time
PAGE_WORDS = 512  # 4 KiB of uint64
INDEX = "model.safetensors.index.json"
LAYER_TENSORS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

Progress = Callable[[int], None]
"""Called with the bytes that were written or loaded since the last call."""


@dataclass(frozen=True)
class WriteResult:
    """What was written: bytes of weights (without headers), tensors, and their checksum."""

    seconds: float
    bytes: int
    tensors: int
    checksum: str


@dataclass(frozen=True)
class LoadResult:
    """What was loaded, in which time. The checksum is made with the clock stopped."""

    seconds: float
    bytes: int
    tensors: int
    checksum: str


class _Checksum:
    """Sums of 4 KiB pages, hashed per tensor: an order of magnitude faster than hashing the bytes."""

    def __init__(self) -> None:
        self._tensors: dict[str, hashlib.blake2b] = {}

    def add(self, tensor: str, words: npt.NDArray[np.uint64]) -> None:
        sums = words.reshape(-1, PAGE_WORDS).sum(axis=1, dtype=np.uint64)
        self._tensors.setdefault(tensor, hashlib.blake2b(digest_size=16)).update(sums.tobytes())

    def hexdigest(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for name, digest in sorted(self._tensors.items()):
            total.update(name.encode() + b"\0" + digest.digest())
        return total.hexdigest()


def write_model(
    directory: Path | str, total_bytes: int, shards: int, seed: int = 0, progress: Progress | None = None
) -> WriteResult:
    """Writes `total_bytes` of float16 weights (rounded down to 8 KiB) in `shards` files, all synced.

    Memory use is 4 MiB, whatever the size. The directory is made; files of the same name are replaced.
    Raises `ValueError` when there would be an empty shard.
    """
    rows = total_bytes // ROW_BYTES
    if shards < 1 or rows < shards:
        raise ValueError(f"{total_bytes} bytes do not fill {shards} shards of at least {ROW_BYTES} bytes")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    checksum = _Checksum()
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        shard_rows = rows * (shard + 1) // shards - rows * shard // shards
        tensors = dict(_tensor_rows(shard_rows, first=len(weight_map)))
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        random = np.random.Generator(np.random.SFC64([seed, shard]))
        _write_shard(target / name, tensors, random, checksum, progress)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": rows * ROW_BYTES}, "weight_map": weight_map}
    for file, content in {INDEX: index, **_small_files(len(weight_map))}.items():
        _write_json(target / file, content)
    _sync_directory(target)
    seconds = time.perf_counter() - start
    return WriteResult(seconds, rows * ROW_BYTES, len(weight_map), checksum.hexdigest())


def load_model(directory: Path | str, progress: Progress | None = None) -> LoadResult:
    """Loads every tensor of every shard through safetensors' mmap, as inference servers do.

    Each tensor is copied out of the mapping and then dropped, so memory use is one tensor.
    Raises `OSError` or `safetensors.SafetensorError` for files that are missing or damaged.
    """
    source = Path(directory)
    checksum = _Checksum()
    loaded_bytes = tensors = 0
    start = time.perf_counter()
    json.loads((source / "config.json").read_bytes())
    weight_map: dict[str, str] = json.loads((source / INDEX).read_bytes())["weight_map"]
    seconds = time.perf_counter() - start
    for shard in sorted(set(weight_map.values())):
        start = time.perf_counter()
        with safe_open(source / shard, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                tensor: npt.NDArray[np.float16] = weights.get_tensor(name)
                seconds += time.perf_counter() - start
                checksum.add(name, tensor.reshape(-1).view(np.uint64))
                loaded_bytes += tensor.nbytes
                tensors += 1
                if progress:
                    progress(tensor.nbytes)
                start = time.perf_counter()
        seconds += time.perf_counter() - start
    return LoadResult(seconds, loaded_bytes, tensors, checksum.hexdigest())


def _tensor_rows(rows: int, first: int) -> Iterator[tuple[str, int]]:
    """Names and sizes of one shard's tensors, numbered on from `first`."""
    number = first
    while rows > 0:
        layer, kind = divmod(number, len(LAYER_TENSORS))
        yield f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight", min(rows, TENSOR_ROWS_MAX)
        rows -= TENSOR_ROWS_MAX
        number += 1


def _write_shard(
    path: Path,
    tensors: dict[str, int],
    random: np.random.Generator,
    checksum: _Checksum,
    progress: Progress | None,
) -> None:
    with path.open("wb") as file:
        file.write(_header(tensors))
        for name, rows in tensors.items():
            for chunk_start in range(0, rows, CHUNK_ROWS):
                words = min(CHUNK_ROWS, rows - chunk_start) * ROW_BYTES // 8
                chunk = random.integers(0, 2**64, size=words, dtype=np.uint64)
                checksum.add(name, chunk)
                file.write(chunk.data)
                if progress:
                    progress(chunk.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: dict[str, int]) -> bytes:
    """The safetensors header: length as little-endian u64, then JSON padded with spaces to 8 bytes.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, rows in tensors.items():
        end = offset + rows * ROW_BYTES
        header[name] = {"dtype": "F16", "shape": [rows, HIDDEN], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _small_files(tensors: int) -> dict[str, Any]:
    layers = -(-tensors // len(LAYER_TENSORS))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "vocab_size": len(vocabulary),
            "torch_dtype": "float16",
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "model_max_length": HIDDEN},
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": []},
        },
    }


def _write_json(path: Path, content: object) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
