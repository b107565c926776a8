"""Runs every block of the docs that is marked `<!-- run: NAME -->`, and every Python example of SEMANTICS.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_RUN = re.compile(r"<!-- run: (?P<name>\S+) -->\n```sh\n(?P<code>.*?)```", re.DOTALL)
_PYTHON = re.compile(r"```python\n(?P<code>.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]+)")
_BLOCK_SECONDS = 180


def _commands() -> list[tuple[str, str]]:
    return [(match["name"], match["code"]) for page in PAGES for match in _RUN.finditer(page.read_text())]


def _environment() -> dict[str, str]:
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.parametrize(("name", "code"), _commands())
def test_commands_of_the_docs_run(name: str, code: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    needs_database = name in ("controller", "moves", "outputs")
    database = {"TIERDCTL_POSTGRES": request.getfixturevalue("database")} if needs_database else {}
    env = _environment() | database
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=_BLOCK_SECONDS, check=False,
    )  # fmt: skip
    subprocess.run(["umount", "-l", str(tmp_path / "mnt")], capture_output=True, check=False)
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"


def test_there_are_commands_to_run() -> None:
    assert {"README", "configuration"} <= {name for name, _ in _commands()}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    base = tmp_path_factory.mktemp("semantics")
    paths = {name: base / name for name in ("source", "mnt")}
    for path in paths.values():
        path.mkdir()
    tierd = [sys.executable, "-m", "tierd"]
    options = ["--background", "--state-dir", str(base / "state"), "--metrics", "127.0.0.1:0"]
    subprocess.run([*tierd, "mount", str(paths["source"]), str(paths["mnt"]), *options], check=True, cwd=REPOSITORY)
    yield paths
    subprocess.run([*tierd, "umount", str(paths["mnt"])], check=True, cwd=REPOSITORY)


_EXAMPLES = [match["code"] for match in _PYTHON.finditer((REPOSITORY / "docs/SEMANTICS.md").read_text())]


@pytest.mark.parametrize("code", _EXAMPLES, ids=range(len(_EXAMPLES)))
def test_examples_of_the_semantics_hold(code: str, mounted: dict[str, Path]) -> None:
    exec(compile(code, "docs/SEMANTICS.md", "exec"), {"os": os, **mounted})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for match in _LINK.finditer(page.read_text()):
        assert (page.parent / match["target"]).exists(), f"{page.name} links to {match['target']}"


def test_every_setting_is_documented() -> None:
    from tierd.config import MountSettings

    text = (REPOSITORY / "docs/OPERATIONS.md").read_text()
    missing = [name for name in MountSettings.model_fields if f"`{name}`" not in text]
    assert missing in ([], ["source", "mountpoint"])


def test_every_setting_of_the_controller_is_documented() -> None:
    from tierd.controller.settings import ControllerSettings

    sections = re.split(r"^## ", (REPOSITORY / "docs/OPERATIONS.md").read_text(), flags=re.MULTILINE)
    lines = [line for part in sections if part.startswith("Controller: ") for line in part.splitlines()]
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    assert [name for name in ControllerSettings.model_fields if not any(f"`{name}`" in row for row in rows)] == []


def test_every_metric_is_documented() -> None:
    from prometheus_client import CollectorRegistry

    from tierd.metrics import ControllerMetrics, FoldMetrics, Metrics, PublishMetrics, TierMetrics
    from tierd.node import publish_setup, tier_setup
    from tierd.output_metrics import OutputMetrics

    text = (REPOSITORY / "docs/OPERATIONS.md").read_text()
    registry = CollectorRegistry()
    Metrics(registry), TierMetrics(registry), PublishMetrics(registry), FoldMetrics(registry)
    ControllerMetrics(other := CollectorRegistry())
    OutputMetrics(other)
    names = {family.name for family in (*registry.collect(), *other.collect()) if family.name.startswith("tierd_")}
    names |= {f"tierd_{name}" for name in (*tier_setup.GAUGES, *publish_setup.GAUGES)}
    assert names
    assert [name for name in sorted(names) if name not in text] == []
