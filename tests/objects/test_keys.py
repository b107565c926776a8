"""Names in the object store: every name has one key, no two share one, and none leads elsewhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tierd.errors import UsageError
from tierd.objects.keys import (
    KEY_BYTES_MAX,
    check_bucket,
    check_key,
    manifest_key,
    object_key,
    parse_key,
    path_parts,
    shown,
    validate_model_id,
)

PARTS = st.binary(min_size=1, max_size=30).filter(
    lambda part: not {0, ord("/")} & set(part) and part not in (b".", b"..", b".tierd")
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(b"/".join)
MODEL_IDS = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1, max_size=12).filter(
        lambda part: part not in (".", "..", ".tierd")
    )
    | st.sampled_from(["v1", "v22", ".hidden", "%2E", "한국어", "a b"]),
    min_size=1,
    max_size=3,
).map("/".join)
VERSIONS = st.integers(1, (1 << 31) - 1)
MANY = settings(max_examples=200)


def key_unless_too_long(model_id: str, version: int, path: bytes) -> str | None:
    """The only reason why what is a name has no key."""
    try:
        return object_key(model_id, version, path)
    except UsageError as error:
        if "bytes, the object store takes" in str(error):
            return None
        raise


# --- keys ---


@pytest.mark.parametrize(
    ("model_id", "version", "path", "key"),
    [
        ("models/llama-7b", 1, b"config.json", "models/llama-7b/v1/config.json"),
        ("org/Model_1.5~x", 12, b"a/b c.bin", "org/Model_1.5~x/v12/a/b%20c.bin"),
        ("가중치", 2, "모델/최종.bin".encode(), "가중치/v2/모델/최종.bin"),
        ("м", 2, b"\xff%", "%D0%BC/v2/%FF%25"),
        ("a/v1", 2, b"v3/.x", "a/%761/v2/%763/%2Ex"),
        ("v", 1, b"v/v1x/V1", "v/v1/v/v1x/V1"),
    ],
)
def test_keys_are_what_they_were_in_every_release(model_id: str, version: int, path: bytes, key: str) -> None:
    """Objects that lie in buckets are found by these: a change here loses them."""
    assert object_key(model_id, version, path) == key
    assert parse_key(key) == (model_id, version, path)


@MANY
@given(MODEL_IDS, VERSIONS, PATHS)
@example("a", 1, b"v2/x")
@example("a/v1", 2, b"x")
def test_a_key_says_what_it_stands_for(model_id: str, version: int, path: bytes) -> None:
    key = key_unless_too_long(model_id, version, path)
    if key is None:
        return
    assert parse_key(key) == (model_id, version, path)
    assert check_key(key) == key
    assert len(key.encode()) <= KEY_BYTES_MAX
    assert not any(part.startswith(".") for part in key.split("/")), "what begins with a dot is tierd's own"


def test_a_version_in_the_path_is_not_taken_for_the_version() -> None:
    assert object_key("a", 1, b"v2/x") != object_key("a/v1", 2, b"x")


def test_the_manifest_is_no_file() -> None:
    key = manifest_key("org/m", 3)
    assert key == "org/m/v3/.manifest"
    assert check_key(key) == key
    with pytest.raises(UsageError, match=r"written in another way"):
        parse_key(key)
    assert object_key("org/m", 3, b".manifest") != key


@pytest.mark.parametrize(
    "key",
    ["", "a", "v1", "v1/x", "a/v1", "a/v0/x", "a/v01/x", "a/v1/", "a/v1//x", "a/v1/../x", "a/v1/%2e%2e/x", "a/v1/%41",
     "a/v1/a b", "a/v1/%2F", "a/v1/%00", "a/v1/%2E%2E", "../v1/x", "a/v99999999999/x", "a/v1/\ud800", "a/v1/м",
     "a/v1/.tierd/x", ".tierd/sums/a/v1/x", "a/v1/%2ed", "a/v1/x%", "a/v4294967296/x"],
)  # fmt: skip
def test_what_is_no_key_of_ours(key: str) -> None:
    with pytest.raises(UsageError, match="is not one of tierd's"):
        parse_key(key)


@MANY
@given(st.text(max_size=40) | st.from_regex(r"[a/v1.%2E~]{1,12}", fullmatch=True))
def test_whatever_parses_is_the_only_way_to_write_it(key: str) -> None:
    try:
        name = parse_key(key)
    except UsageError:
        return
    assert object_key(*name) == key
    path_parts(name.path)


def test_keys_that_are_too_long_are_refused_with_their_length() -> None:
    with pytest.raises(UsageError, match="has 2302 bytes, the object store takes 1012") as raised:
        object_key("m", 1, b"/".join([b"\xff" * 255] * 3))
    assert raised.value.hint
    assert len(object_key("m" * 200, 1, b"/".join([b"x" * 200] * 4)).encode()) == 1007
    with pytest.raises(UsageError, match="1012"):
        object_key("m" * 206, 1, b"/".join([b"x" * 200] * 4))


def test_long_korean_names_stay_names() -> None:
    """255 bytes is what a file name may have; nine times 85 letters would be too many for any file system."""
    name = ("가" * 85).encode()
    assert object_key("m", 1, name) == "m/v1/" + "가" * 85


@pytest.mark.parametrize("version", [-1, 1 << 31])
def test_versions_that_cannot_be(version: int) -> None:
    with pytest.raises(UsageError, match="is not between 1 and"):
        object_key("m", version, b"x")


@pytest.mark.parametrize(
    "path",
    [b"", b"/x", b"x/", b"x//y", b".", b"..", b"x/../y", b"x/./y", b"x\0y", b".tierd", b"x/.tierd/y", b"x" * 256],
)
def test_paths_that_lead_elsewhere(path: bytes) -> None:
    with pytest.raises(UsageError):
        path_parts(path)
    with pytest.raises(UsageError):
        object_key("m", 1, path)


# --- model IDs ---

NASTY = ["..", ".", "", "/", "\0", "\n", "\r\n", "\x1b[31m", "\u2028", "\u202e", "\ud800", "\udc2f", ".tierd", "%2e%2e",
         "%2F", "..%2f", "\\", "..\\", "~", "$HOME", "`id`", "|", "a", "models", "v1", " ", "한", "x" * 300, "\x7f",
         "\ufeff", "\uff1a", "\u2024\u2024", "\uff0e\uff0e", "\uff0f"]  # fmt: skip
HOSTILE = st.one_of(
    st.lists(st.sampled_from(NASTY), min_size=1, max_size=5).map("/".join),
    st.lists(st.sampled_from(NASTY), min_size=1, max_size=5).map("".join),
    st.text(max_size=10),
)


def hostile_ids(count: int, seed: int) -> Iterator[str]:
    """Ids made of what has broken others, of parts of them, and of any characters at all."""
    chance = random.Random(seed)
    for _ in range(count):
        parts = [chance.choice(NASTY) for _ in range(chance.randint(1, 6))]
        model_id = chance.choice(["/", "", "//", "\\"]).join(parts)
        if chance.random() < 0.3:
            model_id += chr(chance.choice([chance.randrange(0x100), chance.randrange(0x110000)]))
        yield model_id


def test_five_thousand_hostile_model_ids_never_escape() -> None:
    refused = sum(not stays_inside(model_id) for model_id in hostile_ids(5000, seed=1))
    assert 2000 < refused < 5000, "and some are odd, but names"


@given(HOSTILE)
def test_hostile_model_ids_never_escape(model_id: str) -> None:
    stays_inside(model_id)


def stays_inside(model_id: str) -> bool:
    """Refused with one line (False); or a relative path, and a key, below which everything of theirs lies."""
    root = "/models"
    try:
        assert validate_model_id(model_id) == model_id
    except UsageError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 250
        message.encode()
        with pytest.raises(UsageError):
            object_key(model_id, 1, b"x")
        return False
    path = os.path.normpath(os.path.join(root, model_id))
    assert path == root + "/" + model_id, "it is where it says"
    assert 0 < len(model_id) <= 255
    assert model_id.encode().decode() == model_id
    assert not any(ord(char) < 32 for char in model_id)
    key = key_unless_too_long(model_id, 1, b"x")
    if key is not None:
        assert os.path.normpath("/bucket/" + key) == "/bucket/" + key
        assert parse_key(key).model_id == model_id
    return True


def test_model_ids_that_people_use() -> None:
    for model_id in ("llama-7b", "meta-llama/Llama-3-8B", "models--org--name", "한국어/모델 1", "v1", "x" * 255):
        assert validate_model_id(model_id) == model_id


@pytest.mark.parametrize(
    ("model_id", "reason"),
    [("", "is empty"), ("/etc", "is absolute"), ("a/../b", "has a part '..'"), ("a\0b", "control"), ("a\nb", "control"),
     ("x" * 256, "256 characters"), ("\ud800", "not UTF-8"), ("a//b", "has a part ''"), ("a/.tierd", "tierd's own"),
     ("가" * 86, "258 bytes"), ("a\u202eb", "control")],
)  # fmt: skip
def test_why_a_model_id_is_refused(model_id: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as raised:
        validate_model_id(model_id)
    assert raised.value.hint


# --- buckets, and names in messages ---


@pytest.mark.parametrize("bucket", ["cold-models", "generated-outputs", "abc", "a.b-c", "x" * 63, "127.x"])
def test_buckets(bucket: str) -> None:
    assert check_bucket(bucket) == bucket


@pytest.mark.parametrize("bucket", ["", "ab", "A-b", "a_b", "-abc", "abc-", "a..b", "a.-b", "x" * 64, "ab\n", "a/b"])
def test_no_buckets(bucket: str) -> None:
    with pytest.raises(UsageError, match="cannot be a bucket"):
        check_bucket(bucket)


@given(st.text() | st.binary())
def test_names_are_shown_on_one_line(name: str | bytes) -> None:
    text = shown(name)
    assert text.isprintable()
    assert len(text) < 1000
    text.encode()
