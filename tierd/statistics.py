"""What nodes tell the controller of accesses: message, limits, strict decoding. Pure, and shared by both sides.

A message says who sends it (node and boot) and when by its own clock, and carries a batch of accesses, or a report of
the models with open files, or both. Batches are numbered from 1 on within a boot and are sent again until they are
applied; `oldest` tells the controller that nothing older will come, so that it can tell a gap from a loss. Times are
only ever compared within one clock: an access is as old as the sender says it is, whatever its calendar.

Where it travels (the Redis stream) is named here, who reads and writes it is not: `node/publish.py`,
`controller/statistics/`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tierd.erasures import ERASURES_MAX
from tierd.errors import TierdError
from tierd.outputs import Fault, parse

FORMAT: Final = 1
STREAM: Final = "tierd:statistics"
GROUP: Final = "controller"
FIELD: Final = b"message"
MODELS_MAX: Final = 500
"""Models in one batch; what does not fit goes into the next one."""
OUTPUTS_MAX: Final = 1000
"""Outputs in one batch."""
LEASES_MAX: Final = 2000
"""Models with open files in one report; a node with more says that it does not know."""
MESSAGE_BYTES_MAX: Final = 4 << 20
MODEL_ID_CHARACTERS_MAX: Final = 255
"""As many as `model_locations.model_id` holds."""
_COUNT_MAX: Final = 1 << 40
_FAULT_CHARACTERS_MAX: Final = 200
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Neither PostgreSQL nor a log line takes all of these."""
_INT64_MAX: Final = (1 << 63) - 1
_INT32_MAX: Final = (1 << 31) - 1


class BadMessage(TierdError):
    """Not a message of this format, and why."""


def applied_key(node_id: str) -> str:
    """The Redis hash that holds, by boot, the sequence of the latest batch of a node that was applied."""
    return f"tierd:applied:{node_id}"


def why_no_model_id(text: str) -> str | None:
    """What keeps `text` from naming a model in the catalogue, or None."""
    if not 0 < len(text) <= MODEL_ID_CHARACTERS_MAX:
        return f"must have 1 to {MODEL_ID_CHARACTERS_MAX} characters"
    if _CONTROL.search(text):
        return "must not hold control characters"
    if any(part in ("", ".", "..") for part in text.split("/")):
        return "must be a plain relative path"
    return None


def model_id_of(path: bytes) -> str | None:
    """The catalogue's name of the model at `path`, or None if it cannot have one (not UTF-8, too long, ...)."""
    try:
        text = path.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if why_no_model_id(text) is None else None


def _model_id(text: str) -> str:
    reason = why_no_model_id(text)
    if reason is not None:
        raise ValueError(reason)
    return text


def _label(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("must not hold control characters")
    return text


ModelId = Annotated[str, AfterValidator(_model_id)]
"""As the catalogue may hold it."""
Label = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_label)]
"""A name for people and for the database."""
_Count = Annotated[int, Field(ge=0, le=_COUNT_MAX)]
_Nanoseconds = Annotated[int, Field(ge=0, le=_INT64_MAX)]


class Strict(BaseModel):
    """Takes nothing that it does not know, and converts nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ModelAccess(Strict):
    """What a batch adds to one model. `hits` may be below 0: a load counted as a hit before turned out to be none.

    `size_bytes` is the model's size as the node found it, None if it did not.
    """

    model_id: ModelId
    opens: _Count
    loads: _Count
    hits: Annotated[int, Field(ge=-_COUNT_MAX, le=_COUNT_MAX)]
    bytes_read: Annotated[int, Field(ge=0, le=_INT64_MAX)]
    last_access_ns: _Nanoseconds
    size_bytes: Annotated[int, Field(ge=1, le=_INT64_MAX)] | None


def _output_path(text: str) -> str:
    found = parse(text.encode("utf-8", "surrogateescape"))
    if isinstance(found, Fault):
        raise ValueError(f"must name an output, this is {found.value}")
    return text


class OutputNews(Strict):
    """What a batch says of one output, by its path below the outputs root. Times are None where nothing was.

    `written_ns`: it was closed after something was written to it, or renamed to there; `removed_ns`: its name was
    removed. Neither says what is there now. `ended`: the version of its object for which no cold file stands any more.
    """

    path: Annotated[str, AfterValidator(_output_path)]
    opens: _Count = 0
    last_access_ns: _Nanoseconds | None = None
    written_ns: _Nanoseconds | None = None
    removed_ns: _Nanoseconds | None = None
    ended: Annotated[int, Field(ge=1, le=_INT32_MAX)] | None = None


def _each_output_once(outputs: tuple[OutputNews, ...]) -> tuple[OutputNews, ...]:
    if len({news.path for news in outputs}) != len(outputs):
        raise ValueError("must name each output once")
    return outputs


Outputs = Annotated[tuple[OutputNews, ...], Field(max_length=OUTPUTS_MAX), AfterValidator(_each_output_once)]


def _each_once(models: tuple[ModelAccess, ...]) -> tuple[ModelAccess, ...]:
    if len({model.model_id for model in models}) != len(models):
        raise ValueError("must name each model once")
    return models


Accesses = Annotated[tuple[ModelAccess, ...], Field(max_length=MODELS_MAX), AfterValidator(_each_once)]


class NumberedBatch(Strict):
    """Accesses with the number under which they are sent, applied and acknowledged."""

    sequence: Annotated[int, Field(ge=1, le=_INT64_MAX)]
    models: Accesses
    outputs: Outputs = ()


class OpenReport(Strict):
    """The models with open files at the time of sending; None if the node cannot tell. `erased`: the erasures
    (`erasures.py`) of whose outputs the node has nothing, and nobody there reads one."""

    leases: Annotated[tuple[ModelId, ...], Field(max_length=LEASES_MAX)] | None
    erased: Annotated[tuple[Annotated[int, Field(ge=1, le=_INT64_MAX)], ...], Field(max_length=ERASURES_MAX)] = ()


class Message(Strict):
    """See the module. `sent_ns` is the sender's wall clock; `oldest` the lowest sequence that it still holds, or will
    give next; `version` is that of its tierd."""

    format: Literal[1] = FORMAT
    node_id: Label
    boot: UUID
    version: Label
    sent_ns: _Nanoseconds
    oldest: Annotated[int, Field(ge=1, le=_INT64_MAX)]
    batch: NumberedBatch | None = None
    report: OpenReport | None = None


_ACCESSES: Final[TypeAdapter[tuple[ModelAccess, ...]]] = TypeAdapter(Accesses)
_OUTPUTS: Final[TypeAdapter[tuple[OutputNews, ...]]] = TypeAdapter(Outputs)


def encode(message: Message) -> bytes:
    """A message as it travels. What it does not have it does not name: that is what an older controller understands."""
    without: dict[str, Any] = {}
    if message.batch is not None and not message.batch.outputs:
        without["batch"] = {"outputs"}
    elif message.batch is not None:
        without["batch"] = {"outputs": {i: {"ended"} for i, news in enumerate(message.batch.outputs) if not news.ended}}
    if message.report is not None and not message.report.erased:
        without["report"] = {"erased"}
    return message.model_dump_json(exclude=without).encode()


def decode(data: bytes) -> Message:
    """The message in `data`. Raises BadMessage that names the first fault, and none of the content."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"a message of {len(data)} bytes: at most {MESSAGE_BYTES_MAX} are read")
    try:
        return Message.model_validate_json(data)
    except ValidationError as error:
        raise BadMessage(first_fault(error), hint="does the node run a newer tierd than the controller?") from None


def encode_accesses(models: Sequence[ModelAccess]) -> bytes:
    """The content of a batch as a node keeps it."""
    return _ACCESSES.dump_json(tuple(models))


def decode_accesses(data: bytes) -> tuple[ModelAccess, ...]:
    """The content of a batch that a node kept. Raises BadMessage."""
    try:
        return _ACCESSES.validate_json(data)
    except ValidationError as error:
        raise BadMessage(first_fault(error)) from None


def encode_outputs(outputs: Sequence[OutputNews]) -> bytes:
    """The outputs of a batch as a node keeps them."""
    return _OUTPUTS.dump_json(tuple(outputs))


def decode_outputs(data: bytes) -> tuple[OutputNews, ...]:
    """The outputs of a batch that a node kept. Raises BadMessage."""
    try:
        return _OUTPUTS.validate_json(data)
    except ValidationError as error:
        raise BadMessage(first_fault(error)) from None


def first_fault(error: ValidationError) -> str:
    """What is wrong, and where, without the content."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "message"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"[:_FAULT_CHARACTERS_MAX]
