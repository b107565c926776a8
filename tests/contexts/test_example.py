"""The example of docs/CONTEXTS.md runs, and every setting and metric of contexts is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from tests.contexts.house import House
from tests.controller.house import environment
from tierd.contexts.settings import ContextSettings
from tierd.controller.settings import ControllerSettings
from tierd.metrics import ContextMetrics

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example(house: House) -> None:
    assert house.redis is not None
    code = re.findall(r"```python\n(.*?)```", (DOCS / "CONTEXTS.md").read_text(), re.DOTALL)
    assert len(code) == 1
    env = environment({"TIERDCTX_POSTGRES": house.dsn, "TIERDCTX_REDIS": house.redis.url(1)})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code[0]],
        env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("first ")


def test_every_setting_is_documented() -> None:
    section = (DOCS / "OPERATIONS.md").read_text().partition("## Chat contexts")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    own = [name for name in ContextSettings.model_fields if not name.startswith("postgres")]
    assert [name for name in own if not any(f"`{name}`" in row for row in rows)] == []
    assert {name for name in ContextSettings.model_fields if name not in own} <= set(ControllerSettings.model_fields)


def test_every_metric_is_documented() -> None:
    text = (DOCS / "OPERATIONS.md").read_text()
    registry = CollectorRegistry()
    ContextMetrics(registry)
    names = [family.name for family in registry.collect()]
    assert len(names) > 5
    assert [name for name in names if f"`{name}" not in text] == []


def test_applications_import_no_controller() -> None:
    others = "('tierd.controller', 'tierd.node')"
    code = f"import sys, tierd.contexts; print([name for name in sys.modules if name.startswith({others})])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment({}), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
