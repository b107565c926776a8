"""What looks like a load of a cold file, and what does not."""

from __future__ import annotations

import threading

import pytest

from tierd.load_signs import LOAD_BYTES, LoadSigns

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "read", "is_load"),
    [
        (1 << 30, 31 * MIB, False), (1 << 30, 32 * MIB, True), (40 * MIB, 19 * MIB, False), (40 * MIB, 20 * MIB, True),
        (5 * MIB, 4 * MIB, False), (5 * MIB, 5 * MIB, True), (12 * MIB, 7 * MIB, False), (12 * MIB, 8 * MIB, True),
    ],
)  # fmt: skip
def test_how_much_is_a_load(size: int, read: int, is_load: bool) -> None:
    signs = LoadSigns(size, weights=True, program="python")
    assert sum(signs.read(MIB) for _ in range(read // MIB)) == is_load


def test_it_is_told_once() -> None:
    signs = LoadSigns(LOAD_BYTES, weights=True, program="")
    assert sum(signs.read(LOAD_BYTES) for _ in range(5)) == 1


@pytest.mark.parametrize("program", ["grep", "file", "tar", "sha256sum"])
def test_scanners_load_nothing(program: str) -> None:
    assert not LoadSigns(MIB, weights=True, program=program).read(MIB)


def test_small_files_that_are_no_weights_are_no_load() -> None:
    assert not LoadSigns(MIB, weights=False, program="python").read(MIB)


def test_no_read_is_lost_among_threads() -> None:
    count, each = 8, 20_000
    signs = LoadSigns(count * each, weights=True, program="python")
    told: list[bool] = []
    threads = [threading.Thread(target=lambda: told.extend(signs.read(1) for _ in range(each))) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == 1
