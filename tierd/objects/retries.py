"""When a request is made again, and when not. Pure: the clock's reading and the random number are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WORTH_IT: Final = frozenset({408, 429})
"""Request Timeout and Too Many Requests; all others of 400 to 499 say that the request is wrong."""
_NEVER: Final = frozenset({501, 505})
"""Not Implemented, HTTP Version Not Supported: will not be otherwise a second later."""
_BROKEN_ON_THE_WAY: Final = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})
"""Codes that S3 sends with status 400 for requests that were right when they left us ("Error responses")."""
_SERVER_ERROR: Final = 500


@dataclass(frozen=True)
class Schedule:
    """At most `attempts_max` tries of one request within `total_s` seconds, the pauses between them ever longer.

    Each pause is a random part of its bound, which doubles from `base_s` up to `cap_s`: clients that were sent away
    together do not come back together ("full jitter", Exponential Backoff And Jitter, AWS Architecture Blog 2015).
    """

    attempts_max: int = 8
    base_s: float = 0.05
    cap_s: float = 5.0
    total_s: float = 300.0

    def delay_s(self, failures: int, elapsed_s: float, random: float) -> float | None:
        """How long to wait after so many failures, so long after the first try began; None to give up.

        `random` is from [0, 1).
        """
        if failures >= self.attempts_max:
            return None
        # A float would overflow at some thousand failures; the bound is reached long before.
        bound_s = min(self.cap_s, self.base_s * 2 ** min(failures - 1, 64))
        delay_s = bound_s * random
        return delay_s if elapsed_s + delay_s < self.total_s else None


def worth_another_try(status: int | None, code: str | None = None) -> bool:
    """True if the same request may succeed later, after this HTTP status (None: no answer came) and S3 error code."""
    if status is None or status in _WORTH_IT or code in _BROKEN_ON_THE_WAY:
        return True
    return status >= _SERVER_ERROR and status not in _NEVER
