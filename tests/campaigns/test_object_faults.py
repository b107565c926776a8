"""Ten thousand small fetches and a hundred large ones from an object store that fails every tenth time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faulty_s3 import KINDS
from tests.objects.house import PATIENT, fetch_all, house

pytestmark = pytest.mark.campaign

SMALL, LARGE = 10_000, 100


def test_no_fetch_is_corrupt_and_none_is_asked_for_too_often(tmp_path: Path) -> None:
    with house(tmp_path, rate=0.1, seed=20) as at:
        fetch_all(at, SMALL, LARGE, seed=20)
        assert set(at.proxy.faults) == {*KINDS}
        small = [count for request, count in at.proxy.seen.items() if "/small/" in request.path]
        assert len(small) == SMALL
        assert max(small) <= PATIENT.schedule.attempts_max
        assert sum(small) < SMALL * 1.2, "a tenth of them again, a tenth of those once more"
        # A large one is two spans of two chunks and one of the rest; a wrong chunk is asked for by itself.
        large = sum(count for request, count in at.proxy.seen.items() if "/large/" in request.path)
        assert large < LARGE * 3 * 1.3
        assert at.proxy.requests <= SMALL + LARGE * 3 + 4 + at.far.repeated, "nothing is asked without being counted"
        print(f"{at.proxy.requests} requests, {at.far.repeated} of them again; faults {dict(at.proxy.faults)}")
