"""Cold models that are loaded: each is asked for once, as long as there is room."""

from __future__ import annotations

import pytest

from tierd.node.wishes import WAITING_MAX, Wishes
from tierd.promote_wishes import MODELS_MAX, PromoteWish, decode, encode
from tierd.statistics import BadMessage


def model_of(path: bytes) -> bytes | None:
    """The directory; none for what lies at the top."""
    return path.rpartition(b"/")[0] or None


def test_the_files_of_a_model_are_one_wish() -> None:
    wishes = Wishes(model_of)
    for path in (b"m/a", b"m/b", b"n/a", b"top", b"\xff/a"):
        wishes.loaded(path)
    assert wishes.due() == ("m", "n")
    assert wishes.due() == ("m", "n"), "until it was sent"
    wishes.sent(("m",))
    assert (wishes.due(), wishes.sent_count, len(wishes)) == (("n",), 1, 1)


def test_they_are_bounded() -> None:
    wishes = Wishes(model_of)
    for number in range(WAITING_MAX + 5):
        wishes.loaded(b"%d/a" % number)
    assert (len(wishes), wishes.dropped, len(wishes.due())) == (WAITING_MAX, 5, MODELS_MAX)


def test_what_is_said_is_heard() -> None:
    wish = PromoteWish(node_id="gpu-1", models=("models/m",))
    assert decode(encode(wish)) == wish


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"\xff\xfe", b"[" * 100_000, b"x" * 70_000,
        b'{"format":1,"node_id":"n","models":[]}',
        b'{"format":2,"node_id":"n","models":["m"]}',
        b'{"format":1,"node_id":"n","models":["../../etc"]}',
        b'{"format":1,"node_id":"n","models":["/etc"]}',
        b'{"format":1,"node_id":"n","models":["a\\u0000b"]}',
        b'{"format":1,"node_id":"n","models":["m"],"more":1}',
        b'{"format":1,"node_id":"\\n","models":["m"]}',
        b'{"format":1,"node_id":"n","models":[' + b",".join([b'"m"'] * (MODELS_MAX + 1)) + b"]}",
    ],
)  # fmt: skip
def test_hostile_content_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)
