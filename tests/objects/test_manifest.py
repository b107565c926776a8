"""Manifests: the same text for the same model, and nothing that cannot be is ever read from one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objects.test_keys import MODEL_IDS, PARTS, VERSIONS
from tierd.objects.keys import ObjectName
from tierd.objects.manifest import (
    Attributes,
    DirectoryEntry,
    Entry,
    FileEntry,
    LinkEntry,
    Manifest,
    ManifestDamaged,
    manifest_of,
)
from tierd.objects.manifest_text import decode, encode

AT = datetime(2026, 3, 1, 2, 0, 0, 123456, UTC)
MODE = Attributes(0o644, 1000, 1000, 1_700_000_000_123_456_789, -1, ((b"user.a", b"\0\xff"), (b"user.b", b"")))
SHA = "ab" * 32
SMALL = (
    DirectoryEntry(b"", MODE),
    DirectoryEntry(b"dir", MODE),
    DirectoryEntry(b"dir/empty", MODE),
    FileEntry(b"config.json", MODE, 10, SHA, None, 7),
    FileEntry(b"dir/a", MODE, 1 << 40, SHA, 1, 8),
    FileEntry(b"dir/b\xff\n", MODE, 1 << 40, SHA, 1, 8),
    FileEntry(b"dir/cold", MODE, 11, SHA, elsewhere=ObjectName("org/other", 2, b"\xff/x")),
    LinkEntry(b"dir/link", MODE, b"../../../etc/passwd"),
)
"""A link may lead anywhere: it is only ever made, never followed."""


def small() -> Manifest:
    """One of everything."""
    return manifest_of("org/model", 3, AT, reversed(SMALL))


def text_of(change: Callable[[dict[str, Any]], object]) -> bytes:
    """`small()` as text, changed by somebody who knows how to write the last line."""
    content = json.loads(encode(small()).split(b"\n")[0])
    change(content)
    return sealed(json.dumps(content).encode())


def sealed(line: bytes) -> bytes:
    """With the right last line."""
    return line + b"\nsha256 " + hashlib.sha256(line + b"\n").hexdigest().encode() + b"\n"


# --- there and back ---


def test_one_of_everything_comes_back() -> None:
    manifest = small()
    assert decode(encode(manifest)) == manifest
    assert list(manifest.entries()) == [*SMALL]


def test_a_file_whose_object_is_elsewhere_says_where() -> None:
    content = json.loads(encode(small()).split(b"\n")[0])["files"][-1]
    assert content["elsewhere"] == {"model_id": "org/other", "version": 2, "path": "\udcff/x"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_id": "../x"}, "elsewhere of 'dir/cold' cannot be"),
        ({"version": 0}, "elsewhere of 'dir/cold' cannot be"),
        ({"path": "a/../b"}, "elsewhere of 'dir/cold' cannot be"),
        ({"version": "1"}, r"files\[3\].elsewhere.version is str"),
        ({"key": "x"}, r"files\[3\].elsewhere.'key' is unknown"),
    ],
)
def test_elsewhere_can_only_be_an_object(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ManifestDamaged, match=match):
        decode(text_of(lambda content: content["files"][3]["elsewhere"].update(change)))


def test_the_text_is_what_it_was_in_every_release() -> None:
    """Manifests that lie in sources and buckets are read by later releases."""
    manifest = manifest_of(
        "m", 1, AT, [FileEntry(b"w\xff", Attributes(0o600, 1, 2, 3, 4, ((b"user.x", b"y"),)), 5, SHA)]
    )
    assert encode(manifest) == sealed(
        b'{"created_at":"2026-03-01T02:00:00.123456+00:00","directories":[],"files":[{"atime_ns":3,"gid":2,'
        b'"group":null,"mode":384,"mtime_ns":4,"path":"w\\udcff","sha256":"' + SHA.encode() + b'","size":5,'
        b'"stub":null,"uid":1,"xattrs":[["user.x","eQ=="]]}],"format":1,"links":[],"model_id":"m","version":1}'
    )


INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
ATTRIBUTES = st.builds(
    Attributes,
    st.integers(0, 0o7777),
    st.integers(0, (1 << 32) - 2),
    st.integers(0, (1 << 32) - 2),
    INTEGERS,
    INTEGERS,
    st.dictionaries(
        st.binary(min_size=1, max_size=20).filter(lambda name: 0 not in name), st.binary(max_size=40), max_size=3
    ).map(lambda found: tuple(sorted(found.items()))),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any tree with any names."""
    directories = [b""]
    entries: dict[bytes, Entry] = {b"": DirectoryEntry(b"", draw(ATTRIBUTES))}
    groups = {
        group: (draw(ATTRIBUTES), draw(st.integers(0, 1 << 62)), draw(st.none() | st.just(group))) for group in (1, 2)
    }
    for part in draw(st.lists(PARTS, max_size=8)):
        above = draw(st.sampled_from(directories))
        path = above + b"/" + part if above else part
        if path in entries:
            continue
        kind = draw(st.sampled_from(["directory", "file", "link", "name"]))
        if kind == "directory":
            entries[path] = DirectoryEntry(path, draw(ATTRIBUTES))
            directories.append(path)
        elif kind == "file":
            sha256 = draw(st.binary(min_size=32, max_size=32)).hex()
            stub = draw(st.none() | st.just(100 + len(entries)))
            entries[path] = FileEntry(path, draw(ATTRIBUTES), draw(st.integers(0, 1 << 62)), sha256, None, stub)
        elif kind == "link":
            target = draw(st.binary(min_size=1, max_size=50).filter(lambda target: 0 not in target))
            entries[path] = LinkEntry(path, draw(ATTRIBUTES), target)
        else:
            group = draw(st.sampled_from([1, 2]))
            attributes, size, stub = groups[group]
            entries[path] = FileEntry(path, attributes, size, SHA, group, stub)
    at = draw(st.datetimes(timezones=st.just(UTC)))
    return manifest_of(draw(MODEL_IDS), draw(VERSIONS), at, entries.values())


@settings(max_examples=100)
@given(manifests())
def test_any_model_comes_back(manifest: Manifest) -> None:
    text = encode(manifest)
    assert decode(text) == manifest
    assert encode(decode(text)) == text
    assert text.isascii()
    assert text.count(b"\n") == 2


@given(manifests(), st.randoms(use_true_random=False))
def test_the_order_of_what_is_given_does_not_matter(manifest: Manifest, chance: random.Random) -> None:
    entries = list(manifest.entries())
    chance.shuffle(entries)
    assert manifest_of(manifest.model_id, manifest.version, manifest.created_at, entries) == manifest


# --- torn and changed ---


def test_every_cut_and_every_flipped_byte_is_noticed() -> None:
    text = encode(small())
    for at in range(len(text)):
        with pytest.raises(ManifestDamaged):
            decode(text[:at])
        with pytest.raises(ManifestDamaged):
            decode(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
    for addition in (b"\n", b"x", text):
        with pytest.raises(ManifestDamaged, match="torn"):
            decode(text + addition)


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b"{", b'"x"', b"[" * 100_000, b"1" * 10_000, b'{"format":1,"format":1}', b"\xff", b"{}"],
)
def test_text_that_is_no_manifest(line: bytes) -> None:
    with pytest.raises(ManifestDamaged):
        decode(sealed(line))


def set_in(where: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets a field of the first entry of a list, or of the whole."""
    return lambda content: (content[where][0] if where else content).__setitem__(key, value)


WRONG: list[tuple[str, str, Any, str]] = [
    ("", "format", 2, "format is 2"),
    ("", "format", True, "format is bool"),
    ("", "format", "1", "format is str"),
    ("", "model_id", "../x", "model_id"),
    ("", "model_id", "a\0", "model_id"),
    ("", "model_id", 5, "model_id is int"),
    ("", "version", 0, "version is 0"),
    ("", "version", 1.0, "version is float"),
    ("", "created_at", "2026-03-01", "created_at"),
    ("", "created_at", "2026-03-01T02:00:00.123456Z", "created_at"),
    ("", "created_at", "2026-03-01T04:00:00.123456+02:00", "created_at"),
    ("", "created_at", "yesterday", "created_at is no time"),
    ("", "files", {}, "files is dict"),
    ("", "files", [5], r"files\[0\] is no JSON object"),
    ("", "key", "x", "'key' is unknown"),
    ("", "a\nb", "x", r"'a\\nb' is unknown"),
    ("files", "key", "x", r"files\[0\].'key' is unknown"),
    ("files", "path", "../x", "path"),
    ("files", "path", "/etc/passwd", "path"),
    ("files", "path", "", "path"),
    ("files", "path", "a/../../b", "path"),
    ("files", "path", "a\0b", "path"),
    ("files", "path", ".tierd/x", "path"),
    ("files", "path", "x" * 256, "path"),
    ("files", "path", "\ud800", r"files\[0\].path"),
    ("files", "path", "\udcea\udcb0\udc80", r"files\[0\].path is written in another way"),
    ("files", "path", None, r"files\[0\].path is NoneType"),
    ("files", "path", "nowhere/x", "lies in no directory"),
    ("files", "path", "dir/link/passwd", "lies in no directory"),
    ("files", "path", "dir", "there twice"),
    ("files", "path", "zzz", "not in the order"),
    ("files", "size", -1, "size of b'config.json'|size of 'config.json'"),
    ("files", "size", 1 << 63, "size"),
    ("files", "size", True, r"files\[0\].size is bool"),
    ("files", "size", 1.5, "size"),
    ("files", "sha256", "AB" * 32, "sha256"),
    ("files", "sha256", "ab", "sha256"),
    ("files", "mode", 0o10000, "mode"),
    ("files", "uid", (1 << 32) - 1, "uid"),
    ("files", "gid", -1, "gid"),
    ("files", "atime_ns", 1 << 63, "atime_ns"),
    ("files", "mtime_ns", "0", "mtime_ns"),
    ("files", "stub", 0, "stub"),
    ("files", "stub", 8, "stands for different files"),
    ("files", "group", 1, "names of different files"),
    ("files", "group", -1, "group"),
    ("files", "xattrs", [["user.b", ""], ["user.a", ""]], "xattrs"),
    ("files", "xattrs", [["user.a", ""], ["user.a", ""]], "xattrs"),
    ("files", "xattrs", [["user.a", "!"]], "base64"),
    ("files", "xattrs", [["user.a", "eR=="]], "written in another way"),
    ("files", "xattrs", [["", ""]], "xattrs"),
    ("files", "xattrs", [["user.a"]], "names and values"),
    ("files", "xattrs", [5], "names and values"),
    ("links", "target", "", "target"),
    ("links", "target", "a\0b", "target"),
    ("links", "target", "x" * 4096, "target"),
    ("links", "path", "dir/a", "there twice"),
    ("directories", "path", "..", "path"),
    ("directories", "size", 5, r"directories\[0\].'size' is unknown"),
]


@pytest.mark.parametrize(("where", "key", "value", "match"), WRONG, ids=range(len(WRONG)))
def test_a_field_that_cannot_be_is_named(where: str, key: str, value: Any, match: str) -> None:
    with pytest.raises(ManifestDamaged, match=match) as raised:
        decode(text_of(set_in(where, key, value)))
    assert str(raised.value).isprintable()
    assert raised.value.field


@pytest.mark.parametrize("where", ["", "files", "links", "directories"])
def test_a_field_that_is_missing_is_named(where: str) -> None:
    content = json.loads(encode(small()).split(b"\n")[0])
    for key in content[where][0] if where else content:
        with pytest.raises(ManifestDamaged, match=f"{key} is missing"):
            decode(text_of(lambda found, key=key: (found[where][0] if where else found).pop(key)))


def test_what_could_not_be_read_is_not_written() -> None:
    def changed(**fields: Any) -> Manifest:
        return dataclasses.replace(small(), **fields)

    for manifest in (
        changed(model_id="../x"),
        changed(version=0),
        changed(created_at=AT.replace(tzinfo=None)),
        changed(created_at=AT.astimezone(timezone(timedelta(hours=9)))),
        changed(files=(*reversed(small().files),)),
        changed(directories=()),
    ):
        with pytest.raises(ManifestDamaged):
            encode(manifest)


def test_a_model_that_is_a_single_file() -> None:
    manifest = manifest_of("models/x.gguf", 1, AT, [FileEntry(b"x.gguf", MODE, 5, SHA)])
    assert decode(encode(manifest)) == manifest
