"""What nodes ask the controller for: that cold models which are being loaded become hot again. Message and limits.

Pure, and shared by both sides. Best effort: a wish that is lost is repeated by the next load. Nothing in a message is
believed: what is named is a model in the source, with cold files, or the name is ignored.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from tierd.statistics import BadMessage, Label, ModelId, Strict, first_fault

STREAM: Final = "tierd:promote"
STREAM_MESSAGES_MAX: Final = 1000
"""What Redis keeps of the stream, about: a second of a thousand nodes that each load a cold model, and 1 MB or so."""
MODELS_MAX: Final = 64
"""Models in one message."""
MESSAGE_BYTES_MAX: Final = 64 << 10


class PromoteWish(Strict):
    """These models are being loaded from their objects on that node."""

    format: Literal[1] = 1
    node_id: Label
    models: Annotated[tuple[ModelId, ...], Field(min_length=1, max_length=MODELS_MAX)]


def encode(wish: PromoteWish) -> bytes:
    """A wish as it travels."""
    return wish.model_dump_json().encode()


def decode(data: bytes) -> PromoteWish:
    """The wish in `data`. Raises BadMessage that names the first fault, and none of the content."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"a message of {len(data)} bytes: at most {MESSAGE_BYTES_MAX} are read")
    try:
        return PromoteWish.model_validate_json(data)
    except ValidationError as error:
        raise BadMessage(first_fault(error), hint="does the node run a newer tierd than the controller?") from None
