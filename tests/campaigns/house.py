"""What all campaigns share: a seed that is printed and can be given again, and a line that says what came out."""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

SEED_VARIABLE = "TIERD_CAMPAIGN_SEED"
REPORT_VARIABLE = "TIERD_CAMPAIGN_REPORT"
"""A file that each campaign appends its line to; docs/RELIABILITY.md is written from it."""


def seed() -> int:
    """The seed of this run: a new one, or the one given. pytest shows it when the test fails."""
    chosen = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED_VARIABLE}={chosen}")
    return chosen


def report(campaign: str, **figures: Any) -> None:
    """Say what was done and what came out, as one line of JSON."""
    line = json.dumps({"campaign": campaign, **figures}, default=str)
    print(line)
    sys.stdout.flush()
    where = os.environ.get(REPORT_VARIABLE)
    if where:
        with open(where, "a", encoding="utf-8") as file:
            file.write(line + "\n")
