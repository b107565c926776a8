"""Which files below the outputs root are outputs, and what keeps others from being taken for one."""

from __future__ import annotations

from datetime import date
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.objects.keys import object_key
from tierd.outputs import ROOT_CHARS_MAX, USER_CHARS_MAX, Fault, Output, below, day_of, parse, user_of

ID = "a1b2c3d4-e5f6-7890-abcd-ef1234567890"


def test_a_path_tells_user_day_identity_and_kind() -> None:
    assert parse(f"user123/2026/01/12/{ID}.png".encode()) == Output(
        UUID(ID), "user123", date(2026, 1, 12), f"2026/01/12/{ID}.png", "image"
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("png", "image"), ("JPG", "image"), ("mp3", "audio"), ("wav", "audio"), ("mp4", "video")]
)
def test_the_ending_tells_the_kind(name: str, kind: str) -> None:
    found = parse(f"u/2026/01/12/{ID}.{name}".encode())
    assert isinstance(found, Output)
    assert found.kind == kind


def test_one_uuid_in_any_case_is_one_output() -> None:
    lower, upper = (parse(f"u/2026/01/12/{name}.png".encode()) for name in (ID, ID.upper()))
    assert isinstance(lower, Output)
    assert isinstance(upper, Output)
    assert (lower.output_id, lower.filename != upper.filename) == (upper.output_id, True)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (f"u/2026/01/{ID}.png", Fault.PLACE),
        (f"u/2026/01/12/more/{ID}.png", Fault.PLACE),
        (f"{ID}.png", Fault.PLACE),
        (f"u/2026/02/30/{ID}.png", Fault.DATE),
        (f"u/0000/01/01/{ID}.png", Fault.DATE),
        (f"u/2026/1/12/{ID}.png", Fault.DATE),
        (f"u/2026/01/1\uff12/{ID}.png", Fault.DATE),  # a digit to str.isdigit, not to a calendar
        ("u/2026/01/12/cat.png", Fault.NAME),
        (f"u/2026/01/12/{ID}", Fault.NAME),
        (f"u/2026/01/12/{ID}.png\n", Fault.NAME),
        (f"u/2026/01/12/{ID[:-1]}.png", Fault.NAME),
        (f"u/2026/01/12/{ID.replace('-', '')}.png", Fault.NAME),
        (f"u/2026/01/12/.{ID}.png", Fault.NAME),
        (f"u/2026/01/12/{ID}.png.tmp", Fault.NAME),
        (f"u/2026/01/12/{ID}.json", Fault.KIND),
        (f"../2026/01/12/{ID}.png", Fault.USER),
        (f"./2026/01/12/{ID}.png", Fault.USER),
        (f"/2026/01/12/{ID}.png", Fault.USER),
        (f".tierd/2026/01/12/{ID}.png", Fault.USER),
        (f"a\nb/2026/01/12/{ID}.png", Fault.USER),
        (f"a\u202eb/2026/01/12/{ID}.png", Fault.USER),
        (f"{'u' * (USER_CHARS_MAX + 1)}/2026/01/12/{ID}.png", Fault.USER),
    ],
)
def test_what_is_no_output_says_why(path: str, fault: Fault) -> None:
    assert parse(path.encode()) is fault


def test_a_user_that_is_not_utf8_is_none() -> None:
    assert parse(b"\xff\xfe/2026/01/12/%s.png" % ID.encode()) is Fault.USER


def test_a_user_whose_encoded_name_no_file_system_holds_is_none() -> None:
    assert user_of("é".encode() * 60) is None
    assert user_of("é".encode() * 40) == "é" * 40


@given(st.binary(max_size=80))
def test_whatever_a_name_is_the_path_of_an_output_is_what_was_parsed(name: bytes) -> None:
    path = name + b"/2026/01/12/%s.png" % ID.encode()
    found = parse(path)
    if isinstance(found, Output):
        assert found.path == path
        root = "r" * ROOT_CHARS_MAX
        assert object_key(f"{root}/{found.user}/2026/01/12", 1, b"x")


def test_a_day_is_a_directory_four_names_deep() -> None:
    assert day_of(b"u/2026/01/12") == ("u", date(2026, 1, 12))
    assert day_of(b"u/2026/13/12") is Fault.DATE
    assert day_of(b"u/2026/01") is Fault.PLACE


def test_the_root_is_taken_off_and_nothing_else() -> None:
    assert below(b"outputs/u/x", b"outputs") == b"u/x"
    assert below(b"outputs2/u/x", b"outputs") is None
    assert below(b"outputs", b"outputs") is None
    assert below(b"u/x", b"") == b"u/x"
