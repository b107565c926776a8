"""Messages as JSON: what can be stored so that the same comes back, whichever tier it comes from. Pure.

PostgreSQL's jsonb keeps no order of keys, and a number for its value (1e3 comes back as 1000); nothing else changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from tierd.contexts.errors import InvalidContext

Message = dict[str, Any]
DEPTH_MAX: Final = 64
"""Of lists and objects in each other; Python and PostgreSQL give up at some depth, and not at the same one."""
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""An escaped NUL: jsonb has none."""
_HINT: Final = "a list of JSON objects, such as {'role': 'user', 'content': '…'}"


def encode(messages: Sequence[Message], bytes_max: int) -> str:
    """`messages` as JSON. Raises InvalidContext, for more than `bytes_max` bytes, too."""
    given: Any = messages  # whoever calls may not check types
    if not isinstance(given, Sequence) or not all(isinstance(message, dict) for message in given):
        raise InvalidContext("messages are not a list of objects", hint=_HINT)
    fault = _fault(messages)
    if fault:
        raise InvalidContext(f"messages {fault}", hint=_HINT)
    try:
        text = json.dumps(list(messages), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidContext("messages have text that is not UTF-8", hint="a lone surrogate is no character") from None
    except (TypeError, ValueError) as error:
        raise InvalidContext(f"messages are no JSON: {error}", hint=_HINT) from None
    if _NUL.search(text):
        raise InvalidContext("messages have a NUL in them", hint="PostgreSQL stores none: remove it")
    check_size(size, bytes_max)
    return text


def check_size(size: int, bytes_max: int) -> None:
    """Raises InvalidContext if a conversation of `size` bytes is too large."""
    if size > bytes_max:
        hint = "begin a new conversation, drop old messages, or raise max_bytes"
        raise InvalidContext(f"messages have {size} bytes as JSON, {bytes_max} are allowed", hint=hint)


def decode(text: str | bytes) -> list[Message]:
    """What `encode` or PostgreSQL made text of."""
    messages: list[Message] = json.loads(text)
    return messages


def _fault(messages: Sequence[Message]) -> str:
    """What json.dumps would let pass: it makes text of other keys, and goes down without end."""
    waiting: list[tuple[Any, int]] = [(message, 1) for message in messages]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEPTH_MAX:
            return f"are nested more than {DEPTH_MAX} deep"
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                return "have a key that is not text"
            inside = value.values()
        else:
            inside = value
        waiting += [(each, depth + 1) for each in inside if isinstance(each, dict | list | tuple)]
    return ""
