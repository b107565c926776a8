"""The message between nodes and controller: what travels comes back, and what is none is refused by name."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.statistics import (
    LEASES_MAX,
    MESSAGE_BYTES_MAX,
    MODELS_MAX,
    BadMessage,
    Message,
    ModelAccess,
    NumberedBatch,
    OpenReport,
    OutputNews,
    decode,
    decode_accesses,
    encode,
    encode_accesses,
    model_id_of,
    why_no_model_id,
)

BOOT = UUID("6f0c58a0-6f4a-4c1c-8f8e-0d8a8f6f7f11")
INT64 = 2**63 - 1

model_ids = (
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=255)
    .filter(lambda text: why_no_model_id(text) is None)
    .map(str)
)
accesses = st.builds(
    ModelAccess,
    model_id=model_ids,
    opens=st.integers(0, 2**40),
    loads=st.integers(0, 2**40),
    hits=st.integers(-(2**40), 2**40),
    bytes_read=st.integers(0, INT64),
    last_access_ns=st.integers(0, INT64),
    size_bytes=st.none() | st.integers(1, INT64),
)
batches = st.builds(
    NumberedBatch,
    sequence=st.integers(1, INT64),
    models=st.lists(accesses, max_size=5, unique_by=lambda access: access.model_id).map(tuple),
)
reports = st.builds(OpenReport, leases=st.none() | st.lists(model_ids, max_size=5).map(tuple))
messages = st.builds(
    Message,
    node_id=st.sampled_from(["gpu-1", "노드"]),
    boot=st.uuids(),
    version=st.just("0.1.0"),
    sent_ns=st.integers(0, INT64),
    oldest=st.integers(1, INT64),
    batch=st.none() | batches,
    report=st.none() | reports,
)


def access(model_id: str = "models/a", **more: Any) -> dict[str, Any]:
    """One model of a batch, as JSON has it."""
    counts = {"opens": 3, "loads": 1, "hits": -1, "bytes_read": 5, "last_access_ns": 7, "size_bytes": None}
    return {"model_id": model_id, **counts, **more}


def document(**more: Any) -> dict[str, Any]:
    """A message that is right, as JSON has it."""
    return {
        "format": 1,
        "node_id": "gpu-1",
        "boot": str(BOOT),
        "version": "0.1.0",
        "sent_ns": 9,
        "oldest": 1,
        "batch": {"sequence": 1, "models": [access()]},
        "report": {"leases": ["models/a"]},
        **more,
    }


@given(messages)
def test_what_is_sent_arrives(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.lists(accesses, max_size=5, unique_by=lambda access: access.model_id))
def test_what_is_kept_comes_back(models: list[ModelAccess]) -> None:
    assert list(decode_accesses(encode_accesses(models))) == models


def test_the_document_is_right() -> None:
    found = decode(json.dumps(document()).encode())
    assert (found.boot, found.batch, found.report) == (
        BOOT,
        NumberedBatch(sequence=1, models=(ModelAccess(**access()),)),
        OpenReport(leases=("models/a",)),
    )


def _batch(*models: dict[str, Any], sequence: Any = 1) -> dict[str, Any]:
    return document(batch={"sequence": sequence, "models": list(models)})


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("format", document(format=2)),
        ("format", {key: value for key, value in document().items() if key != "node_id"} | {"format": "1"}),
        ("node_id", {key: value for key, value in document().items() if key != "node_id"}),
        ("node_id", document(node_id="")),
        ("node_id", document(node_id="a\nb")),
        ("node_id", document(node_id="n" * 256)),
        ("boot", document(boot="6f0c")),
        ("sent_ns", document(sent_ns=1.5)),
        ("sent_ns", document(sent_ns=2**63)),
        ("sent_ns", document(sent_ns=-1)),
        ("oldest", document(oldest=0)),
        ("surprise", document(surprise=1)),
        ("batch.sequence", _batch(sequence=0)),
        ("batch.sequence", _batch(sequence="1")),
        ("batch.models.0.opens", _batch(access(opens=-1))),
        ("batch.models.0.opens", _batch(access(opens=True))),
        ("batch.models.0.hits", _batch(access(hits=2**41))),
        ("batch.models.0.size_bytes", _batch(access(size_bytes=0))),
        ("batch.models.1.last_access_ns", _batch(access(), access("models/b", last_access_ns=2**63))),
        ("batch.models", _batch(access(), access(opens=9))),
        ("batch.models", _batch(*(access(f"m/{number}") for number in range(MODELS_MAX + 1)))),
        ("batch.models.0.model_id", _batch(access("models/../../etc"))),
        ("batch.models.0.model_id", _batch(access("/models/a"))),
        ("batch.models.0.model_id", _batch(access("models//a"))),
        ("batch.models.0.model_id", _batch(access("models/a\x00"))),
        ("batch.models.0.model_id", _batch(access("m" * 256))),
        ("report.leases.0", document(report={"leases": [""]})),
        ("report.leases", document(report={"leases": [f"m/{number}" for number in range(LEASES_MAX + 1)]})),
        ("report", document(report=[])),
    ],
)
def test_a_fault_is_named_and_nothing_repeated(where: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadMessage) as caught:
        decode(json.dumps(wrong).encode())
    text = str(caught.value)
    assert text.startswith(f"{where}: "), text
    assert "\n" not in text
    assert "etc" not in text


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 1', b"1" * 100, b"[" * 5000])
def test_what_is_no_message_at_all(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)


def test_a_lone_surrogate_is_none() -> None:
    """PostgreSQL takes none, and Python would make one of this."""
    with pytest.raises(BadMessage):
        decode(json.dumps(_batch(access("models/\udcff"))).encode())


def test_what_is_too_large_is_not_even_parsed() -> None:
    data = encode(decode(json.dumps(document()).encode()))
    assert decode(data.ljust(MESSAGE_BYTES_MAX))
    with pytest.raises(BadMessage, match="bytes"):
        decode(data.ljust(MESSAGE_BYTES_MAX + 1))


@given(st.binary(max_size=300))
def test_no_path_makes_a_name_that_the_other_side_refuses(path: bytes) -> None:
    name = model_id_of(path)
    if name is not None:
        assert name.encode() == path
        message = Message(node_id="n", boot=BOOT, version="1", sent_ns=0, oldest=1, report=OpenReport(leases=(name,)))
        assert decode(encode(message)) == message


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"models/llama-7b", "models/llama-7b"),
        ("models/라마".encode(), "models/라마"),
        (b"models/\xff", None),
        (b"models/a\nb", None),
        (b"m" * 255, "m" * 255),
        (b"m" * 256, None),
        (b"", None),
    ],
)
def test_names_of_models(path: bytes, name: str | None) -> None:
    assert model_id_of(path) == name


def test_what_a_message_does_not_have_it_does_not_name() -> None:
    """An older controller refuses what it does not know."""
    news = OutputNews(path="u/2026/01/12/a1b2c3d4-e5f6-7890-abcd-ef1234567890.png", removed_ns=1)
    other = OutputNews(path=news.path.replace("a1b2", "b1b2"), removed_ns=1, ended=2)
    batch = NumberedBatch(sequence=1, models=(), outputs=(news, other))
    made = Message(node_id="n", boot=BOOT, version="1", sent_ns=0, oldest=1, batch=batch, report=OpenReport(leases=()))
    told = json.loads(encode(made))
    assert ["ended" in one for one in told["batch"]["outputs"]] == [False, True]
    assert "erased" not in told["report"]
    report = OpenReport(leases=(), erased=(7,))
    assert json.loads(encode(made.model_copy(update={"report": report})))["report"]["erased"] == [7]
