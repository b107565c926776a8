"""Ways in which the two files of a copy may be torn by crashes and other versions, and damaged by hand."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.unit.copies import (
    flip,
    forge_meta,
)
from tierd.node.copies import Copy
from tierd.node.store import Store


def meta_only(data: Path, meta: Path) -> None:
    data.unlink()


def data_only(data: Path, meta: Path) -> None:
    meta.unlink()


def uncommitted(data: Path, meta: Path) -> None:
    meta.unlink()
    data.rename(f"{data}.fill")


def half_a_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, meta.stat().st_size // 2)
    meta.rename(f"{meta}.fill")


def torn_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, meta.stat().st_size - 1)


def longer_meta(data: Path, meta: Path) -> None:
    meta.write_bytes(meta.read_bytes() + b"\0")


def empty_meta(data: Path, meta: Path) -> None:
    os.truncate(meta, 0)


def zeroed_meta(data: Path, meta: Path) -> None:
    meta.write_bytes(bytes(meta.stat().st_size))


def flipped_path(data: Path, meta: Path) -> None:
    flip(meta, meta.read_bytes().index(b"llama"))


def flipped_sum(data: Path, meta: Path) -> None:
    flip(meta, meta.stat().st_size - 20)


def wrong_magic(data: Path, meta: Path) -> None:
    meta.write_bytes(b"Xierd" + meta.read_bytes()[5:])


def newer_format(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "format": 2})


def other_chunks(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "chunk_bytes": 4096})


def header_is_a_list(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: [1])


def header_lacks_a_field(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: header.pop("seal") and None)


def header_has_other_types(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "path": 1})


def identity_too_long(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "identity": [*header["identity"], 1]})


def identity_of_another_size(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: {**header, "identity": [7, 1, 1, 1]})


def sums_missing(data: Path, meta: Path) -> None:
    forge_meta(meta, lambda header: header, lambda sums: sums[:-16])


def data_shorter(data: Path, meta: Path) -> None:
    os.truncate(data, 1)


def data_as_long_again(data: Path, meta: Path) -> None:
    size = data.stat().st_size
    os.truncate(data, 1)
    os.truncate(data, size)


def data_is_a_link(data: Path, meta: Path) -> None:
    data.rename(f"{data}.fill")
    data.symlink_to(f"{data.name}.fill")


def data_is_a_pipe(data: Path, meta: Path) -> None:
    data.unlink()
    os.mkfifo(data)


def meta_is_a_pipe(data: Path, meta: Path) -> None:
    meta.unlink()
    os.mkfifo(meta)


def meta_is_a_link(data: Path, meta: Path) -> None:
    meta.rename(f"{meta}.fill")
    meta.symlink_to(f"{meta.name}.fill")


TORN = [
    meta_only, data_only, uncommitted, half_a_meta, torn_meta, longer_meta, empty_meta, zeroed_meta, flipped_path,
    flipped_sum, wrong_magic, newer_format, other_chunks, header_is_a_list, header_lacks_a_field,
    header_has_other_types, identity_too_long, identity_of_another_size, sums_missing, data_shorter,
    data_as_long_again, data_is_a_pipe, meta_is_a_pipe, meta_is_a_link, data_is_a_link,
]  # fmt: skip


def swap(store: Store, copy: Copy) -> None:
    other = next(each for each in store.copies() if each is not copy)
    for old, new in ((copy.name, "tmp"), (other.name, copy.name), ("tmp", other.name)):
        os.rename(store.directory / old, store.directory / new)


def zero(store: Store, copy: Copy) -> None:
    path = store.directory / copy.name
    st = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(st.st_size))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def replace(store: Store, copy: Copy) -> None:
    """The same bytes and times in another file."""
    path = store.directory / copy.name
    shutil.copy2(path, path.with_name("tmp"))
    path.with_name("tmp").rename(path)


def make_fifo(store: Store, copy: Copy) -> None:
    (store.directory / copy.name).unlink()
    os.mkfifo(store.directory / copy.name)


def make_socket(store: Store, copy: Copy) -> None:
    (store.directory / copy.name).unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{store._dir_fd}/{copy.name}")


DAMAGES: dict[str, Callable[[Store, Copy], None]] = {
    "truncated": lambda store, copy: os.truncate(store.directory / copy.name, copy.identity.size - 1),
    "emptied": lambda store, copy: os.truncate(store.directory / copy.name, 0),
    "extended": lambda store, copy: os.truncate(store.directory / copy.name, copy.identity.size + 1),
    "flipped": lambda store, copy: flip(store.directory / copy.name, 1),
    "touched": lambda store, copy: os.utime(store.directory / copy.name),
    "deleted": lambda store, copy: os.unlink(store.directory / copy.name),
    "made a pipe": make_fifo,
    "made a socket": make_socket,
    "swapped": swap,
    "zeroed": zero,
    "replaced": replace,
}
