"""What the tests of the command line share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.house import House

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Only root has mount namespaces to itself."""
    if os.geteuid() != 0:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root: commands run in a mount namespace of their own"))


@pytest.fixture(scope="session")
def house(scratch: Path) -> Iterator[House]:
    """One namespace for all tests that leave nothing behind in it."""
    home = scratch / "home"
    home.mkdir()
    with House(home) as made:
        yield made
