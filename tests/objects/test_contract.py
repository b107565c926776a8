"""What every object store does: the same tests over a directory, rclone and moto."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.objects.servers import LIMITS, Shop
from tierd.errors import UsageError
from tierd.objects import wire
from tierd.objects.keys import SUMS_PREFIX, object_key, parse_key
from tierd.objects.store import (
    FileRange,
    Listed,
    ObjectDamaged,
    ObjectMissing,
    ObjectStat,
    ObjectStore,
    ObjectStoreUnavailable,
    SourceChanged,
    Stored,
)
from tierd.objects.sums import CHUNK_BYTES

PART = LIMITS.part_bytes
SIZES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, PART, PART + 1, PART + CHUNK_BYTES + 7)
BIG = PART + CHUNK_BYTES + 7
KEY = "m/v1/weights"


def content_of(size: int, seed: int = 0) -> bytes:
    """The same bytes for the same arguments."""
    return random.Random(seed).randbytes(size)


def put(shop: Shop, tmp_path: Path, content: bytes, key: str = KEY) -> Stored:
    """Store it, from a file."""
    path = tmp_path / "source"
    path.write_bytes(content)
    return shop.store.put_file(shop.bucket, key, path, len(content))


def get(shop: Shop, stored: Stored, offset: int = 0, length: int | None = None, key: str = KEY) -> bytes:
    """Read it into memory."""
    buffer = bytearray(stored.size - offset if length is None else length)
    shop.store.get_range(shop.bucket, key, stored, offset, memoryview(buffer))
    return bytes(buffer)


# --- there and back ---


@pytest.mark.parametrize("size", SIZES)
def test_what_is_stored_comes_back(shop: Shop, tmp_path: Path, size: int) -> None:
    content = content_of(size)
    stored = put(shop, tmp_path, content)
    assert stored == Stored(size, hashlib.sha256(content).hexdigest())
    assert shop.beneath.get(shop.bucket, KEY) == content, "the object is the file's bytes and nothing else"
    assert get(shop, stored) == content
    assert shop.store.hash(shop.bucket, KEY) == stored
    assert shop.store.stat(shop.bucket, KEY) == ObjectStat(*stored)


def test_ranges_of_all_kinds(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    stored = put(shop, tmp_path, content)
    chance = random.Random(1)
    edges = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, PART - 1, PART, PART + 1, BIG - 1, BIG]
    for first in edges:
        end = chance.choice([edge for edge in edges if edge >= first])
        assert get(shop, stored, first, end - first) == content[first:end], (first, end)


def test_a_range_goes_into_a_part_of_a_file(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    stored = put(shop, tmp_path, content)
    target = tmp_path / "target"
    target.write_bytes(b"x" * (BIG + 20))
    first, length = CHUNK_BYTES - 3, BIG - CHUNK_BYTES
    with target.open("r+b") as file:
        shop.store.get_range(shop.bucket, KEY, stored, first, FileRange(file.fileno(), 10, length))
    expected = b"x" * 10 + content[first : first + length]
    assert target.read_bytes() == expected.ljust(BIG + 20, b"x")


def test_only_what_was_asked_for_is_written(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    stored = put(shop, tmp_path, content)
    buffer = bytearray(b"x" * 300)
    shop.store.get_range(shop.bucket, KEY, stored, CHUNK_BYTES - 50, memoryview(buffer)[100:200])
    assert buffer == b"x" * 100 + content[CHUNK_BYTES - 50 : CHUNK_BYTES + 50] + b"x" * 100


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 11), (10, 1), (11, 0)])
def test_a_range_outside_the_object_is_a_defect_of_the_caller(
    shop: Shop, tmp_path: Path, offset: int, length: int
) -> None:
    stored = put(shop, tmp_path, content_of(10))
    with pytest.raises(ValueError, match="of 10"):
        get(shop, stored, offset, length)


def test_from_a_descriptor_wherever_it_stands(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    path = tmp_path / "source"
    path.write_bytes(content + b"what was appended meanwhile")
    with path.open("rb") as file:
        file.seek(100)
        stored = shop.store.put_file(shop.bucket, KEY, file.fileno(), BIG)
        assert file.tell() == 100, "others may read by the same descriptor"
    assert get(shop, stored) == content


def test_putting_it_again_changes_nothing(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    first = put(shop, tmp_path, content)
    assert put(shop, tmp_path, content) == first
    assert get(shop, first) == content


def test_many_threads_at_once(shop: Shop, tmp_path: Path) -> None:
    contents = {f"m/v1/{number}": content_of(CHUNK_BYTES * number // 3, number) for number in range(8)}
    stored = {key: put(shop, tmp_path, content, key) for key, content in contents.items()}
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda key: get(shop, stored[key], key=key) == contents[key], [*contents] * 6))
    assert results == [True] * 48


# --- what is there ---


def test_what_is_not_there(shop: Shop) -> None:
    nobody = Stored(BIG, "0" * 64)
    assert shop.store.stat(shop.bucket, KEY) is None
    assert list(shop.store.list(shop.bucket)) == []
    for stored in (nobody, Stored(5, "0" * 64)):
        with pytest.raises(ObjectMissing, match=r"'m/v1/weights' in bucket .* is not there"):
            get(shop, stored, 0, 1)
    with pytest.raises(ObjectMissing):
        shop.store.hash(shop.bucket, KEY)
    with pytest.raises(ObjectMissing):
        shop.store.adopt(shop.bucket, KEY)
    shop.store.delete(shop.bucket, KEY)


def test_a_bucket_that_is_not_there(shop: Shop, tmp_path: Path) -> None:
    elsewhere = Shop(shop.kind, shop.store, "no-such-bucket", shop.beneath)
    with pytest.raises(ObjectMissing, match="no-such-bucket"):
        put(elsewhere, tmp_path, b"12345")
    with pytest.raises(ObjectMissing, match="no-such-bucket"):
        list(shop.store.list("no-such-bucket"))
    assert shop.store.stat("no-such-bucket", KEY) is None


def test_buckets_are_made_once_however_many_ask(shop: Shop, tmp_path: Path) -> None:
    put(shop, tmp_path, b"12345")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(shop.store.ensure_bucket, [shop.bucket, shop.bucket + "-2"] * 8))
    assert [entry.key for entry in shop.store.list(shop.bucket)] == [KEY]
    assert list(shop.store.list(shop.bucket + "-2")) == []


def test_listings_by_prefix(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_PAGE", 7)
    sizes = {f"m/v{version}/d{number % 3}/{number}": number for version in (1, 2) for number in range(15)}
    for key, size in sizes.items():
        put(shop, tmp_path, content_of(size), key)
    put(shop, tmp_path, content_of(BIG), "m/v10/big")
    sizes["m/v10/big"] = BIG
    for prefix in ("", "m/", "m/v1", "m/v1/", "m/v1/d2/", "m/v1/d2/1", "m/v10/big", "m/v1/d2/14/", "x", "../", "m//"):
        expected = {Listed(key, size) for key, size in sizes.items() if key.startswith(prefix)}
        found = list(shop.store.list(shop.bucket, prefix))
        assert set(found) == expected, prefix
        assert len(found) == len(expected), "each object once"


def test_deleting_leaves_nothing(shop: Shop, tmp_path: Path) -> None:
    put(shop, tmp_path, content_of(BIG))
    other = put(shop, tmp_path, content_of(BIG, 1), "m/v1/other")
    shop.store.delete(shop.bucket, KEY)
    shop.store.delete(shop.bucket, KEY)
    assert shop.store.stat(shop.bucket, KEY) is None
    assert shop.beneath.keys(shop.bucket) == {"m/v1/other", SUMS_PREFIX + "m/v1/other"}
    assert get(shop, other, key="m/v1/other") == content_of(BIG, 1)
    shop.store.delete(shop.bucket, "m/v1/other")
    assert shop.beneath.keys(shop.bucket) == set()
    assert put(shop, tmp_path, b"again") == shop.store.hash(shop.bucket, KEY)


NAMES = [
    b"plain",
    b"a b+c%20&=?#;:@",
    b"\xff\xfe",
    "가중치-최종.safetensors".encode(),
    b"v1",
    b".hidden",
    b"a\nb",
    b"~'()*!",
]


def test_names_of_any_bytes_are_keys(shop: Shop, tmp_path: Path) -> None:
    keys = {object_key("org/모델", 3, b"dir/" + name): name for name in NAMES}
    for key, name in keys.items():
        put(shop, tmp_path, name, key)
    found = {entry.key for entry in shop.store.list(shop.bucket, "org/")}
    assert found == set(keys)
    assert {parse_key(key).path for key in found} == {b"dir/" + name for name in NAMES}
    for key, name in keys.items():
        stored = shop.store.hash(shop.bucket, key)
        assert get(shop, stored, key=key) == name


# --- what must not be ---

HOSTILE_KEYS = [
    "", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "a/", "a/./b", "a\0b", "a\nb", "\ud800", "x" * 1020,
    ".tierd/sums/m", ".tierd/new/x", "가" * 341,
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=range(len(HOSTILE_KEYS)))
def test_hostile_keys_are_refused_with_one_line(shop: Shop, tmp_path: Path, key: str) -> None:
    stored = Stored(1, "0" * 64)
    calls = [
        lambda: put(shop, tmp_path, b"1", key),
        lambda: get(shop, stored, 0, 1, key),
        lambda: shop.store.stat(shop.bucket, key),
        lambda: shop.store.delete(shop.bucket, key),
        lambda: shop.store.hash(shop.bucket, key),
        lambda: shop.store.adopt(shop.bucket, key),
    ]
    for call in calls:
        with pytest.raises(UsageError) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 200
    assert shop.beneath.keys(shop.bucket) == set()


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "UPPER", "a", ".tierd", "a..b", "x" * 64, "a\0b"])
def test_hostile_buckets_are_refused(shop: Shop, name: str) -> None:
    for call in (shop.store.ensure_bucket, shop.store.list):
        with pytest.raises(UsageError, match="cannot be a bucket"):
            list(call(name) or [])
    with pytest.raises(UsageError, match="cannot be a bucket"):
        shop.store.stat(name, KEY)


@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_that_is_not_what_was_announced_makes_no_object(shop: Shop, tmp_path: Path, size: int) -> None:
    path = tmp_path / "source"
    path.write_bytes(content_of(size))
    with pytest.raises(SourceChanged, match="has SHA-256"):
        shop.store.put_file(shop.bucket, KEY, path, size, "0" * 64, tmp_path / "journal")
    with pytest.raises(SourceChanged, match="shorter"):
        shop.store.put_file(shop.bucket, KEY, path, size + 1, None, tmp_path / "journal")
    assert shop.store.stat(shop.bucket, KEY) is None
    assert shop.store.abort_abandoned(shop.bucket, "", -1000) == 0, "the parts are given back at once"
    assert not (tmp_path / "journal").exists()


def test_a_file_that_cannot_be_read_is_the_callers(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shop.store.put_file(shop.bucket, KEY, tmp_path / "nothing", 10)
    with pytest.raises(IsADirectoryError):
        shop.store.put_file(shop.bucket, KEY, tmp_path, BIG)
    stored = put(shop, tmp_path, content_of(10))
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            shop.store.get_range(shop.bucket, KEY, stored, 0, FileRange(fd, 0, 10))
    finally:
        os.close(fd)


# --- damages ---


def flipped(content: bytes, at: int) -> bytes:
    """One bit of it is another."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("size", "at"), [(10, 3), (CHUNK_BYTES, CHUNK_BYTES - 1), (BIG, 0), (BIG, CHUNK_BYTES), (BIG, BIG - 1)]
)
def test_a_flipped_bit_is_never_handed_on(shop: Shop, tmp_path: Path, size: int, at: int) -> None:
    content = content_of(size)
    stored = put(shop, tmp_path, content)
    shop.beneath.put(shop.bucket, KEY, flipped(content, at))
    with pytest.raises(ObjectDamaged, match=r"'m/v1/weights'.*do(es)? not match"):
        get(shop, stored, at, 1)
    with pytest.raises(ObjectDamaged):
        get(shop, stored)
    good = (at + CHUNK_BYTES) % max(size, 1)
    if good // CHUNK_BYTES != at // CHUNK_BYTES:
        assert get(shop, stored, good, 1) == content[good : good + 1], "other chunks can be read"


def test_damage_does_not_reach_a_file(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    stored = put(shop, tmp_path, content)
    shop.beneath.put(shop.bucket, KEY, flipped(content, 100))
    with (tmp_path / "target").open("w+b") as file, pytest.raises(ObjectDamaged):
        shop.store.get_range(shop.bucket, KEY, stored, 0, FileRange(file.fileno(), 0, CHUNK_BYTES))
    assert (tmp_path / "target").read_bytes() == b""


def test_hashing_finds_a_flipped_bit(shop: Shop, tmp_path: Path) -> None:
    content = content_of(BIG)
    put(shop, tmp_path, content)
    shop.beneath.put(shop.bucket, KEY, flipped(content, BIG - 5))
    with pytest.raises(ObjectDamaged):
        shop.store.hash(shop.bucket, KEY)


@pytest.mark.parametrize("size", [10, BIG])
@pytest.mark.parametrize("change", [-1, 1, -CHUNK_BYTES])
def test_another_length_is_damage(shop: Shop, tmp_path: Path, size: int, change: int) -> None:
    content = content_of(size)
    stored = put(shop, tmp_path, content)
    shop.beneath.put(shop.bucket, KEY, (content + b"x")[: max(0, size + change)])
    with pytest.raises(ObjectDamaged):
        get(shop, stored)
    with pytest.raises(ObjectDamaged):
        get(shop, stored, size - 1, 1)


def test_another_object_under_the_name_is_damage(shop: Shop, tmp_path: Path) -> None:
    stored = put(shop, tmp_path, content_of(BIG))
    other = put(shop, tmp_path, content_of(BIG, 1), "m/v1/other")
    for key in ("{}", SUMS_PREFIX + "{}"):
        shop.beneath.put(shop.bucket, key.format(KEY), shop.beneath.get(shop.bucket, key.format("m/v1/other")))
    with pytest.raises(ObjectDamaged, match=f"SHA-256 {other.sha256} is there, {stored.sha256} was stored"):
        get(shop, stored)


@pytest.mark.parametrize("damage", ["gone", "flipped", "cut", "empty"])
def test_without_its_checksums_nothing_is_handed_on(shop: Shop, tmp_path: Path, damage: str) -> None:
    stored = put(shop, tmp_path, content_of(BIG))
    sums = shop.beneath.get(shop.bucket, SUMS_PREFIX + KEY)
    changed = {"flipped": flipped(sums, len(sums) // 2), "cut": sums[:-1], "empty": b""}
    if damage == "gone":
        shop.beneath.remove(shop.bucket, SUMS_PREFIX + KEY)
    else:
        shop.beneath.put(shop.bucket, SUMS_PREFIX + KEY, changed[damage])
    with pytest.raises(ObjectDamaged):
        get(shop, stored)
    assert shop.store.adopt(shop.bucket, KEY) == stored
    assert get(shop, stored) == content_of(BIG)


@pytest.mark.parametrize("size", SIZES)
def test_an_object_of_somebody_else_is_adopted(shop: Shop, size: int) -> None:
    content = content_of(size)
    shop.beneath.put(shop.bucket, "their model/weights.bin", content)
    assert shop.store.stat(shop.bucket, "their model/weights.bin") == ObjectStat(size, None)
    stored = Stored(size, hashlib.sha256(content).hexdigest())
    assert shop.store.hash(shop.bucket, "their model/weights.bin") == stored
    assert shop.store.adopt(shop.bucket, "their model/weights.bin") == stored
    assert get(shop, stored, key="their model/weights.bin") == content


# --- the end ---


def test_a_closed_store_says_so(shop: Shop, tmp_path: Path) -> None:
    stored = put(shop, tmp_path, content_of(BIG))
    shop.store.close()
    for call in (
        lambda: get(shop, stored),
        lambda: put(shop, tmp_path, content_of(BIG)),
        lambda: get(shop, stored, 0, 1),
    ):
        with pytest.raises(ObjectStoreUnavailable, match="tierd stops using it"):
            call()


def test_closing_ends_calls_that_run(shop: Shop, tmp_path: Path, slow_store: Callable[[Shop], ObjectStore]) -> None:
    """At a byte a second it would last for months."""
    stored = put(shop, tmp_path, content_of(BIG))
    slow = slow_store(shop)
    failed: list[str] = []
    begun = threading.Barrier(3)

    def call(do: Callable[[], object]) -> None:
        begun.wait(10)
        try:
            do()
        except ObjectStoreUnavailable as error:
            failed.append(str(error))

    calls = [
        lambda: slow.get_range(shop.bucket, KEY, stored, 0, memoryview(bytearray(BIG))),
        lambda: slow.put_file(shop.bucket, "m/v1/new", tmp_path / "source", BIG),
    ]
    threads = [threading.Thread(target=call, args=(each,)) for each in calls]
    for thread in threads:
        thread.start()
    begun.wait(10)
    slow.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(failed) == 2
    assert all("tierd stops using it" in line for line in failed)
