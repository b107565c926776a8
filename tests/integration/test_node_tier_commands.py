"""warm, pin, unpin, evict, plan: what they do, what they say, and with which code they end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.integration.tiered import MIB, command, idle, make_model, of_tier
from tests.mounts import OverlayMount
from tierd import client


@pytest.fixture(scope="module")
def shared(juicefs: Path, module_overlay_mount: MountFactory) -> OverlayMount:
    """A mount with a node tier that brings nothing by itself."""
    return module_overlay_mount(Path(tempfile.mkdtemp(dir=juicefs)), prefetch="no", load_idle_gap=0.1)


@pytest.fixture
def mount(shared: OverlayMount) -> Iterator[OverlayMount]:
    """The same for each test, which takes names that no other takes."""
    yield shared
    complaints = shared.ledger_complaints() + shared.log_complaints()
    assert not complaints, "\n".join(complaints)


def test_warm_brings_whole_models(mount: OverlayMount) -> None:
    one = make_model(mount, "org/one", {"a.safetensors": 5 * MIB, "b.safetensors": MIB, "config.json": 10})
    two = make_model(mount, "two", {"deep/a.gguf": MIB, "config.json": 7})
    told = json.loads(command(mount, "warm", "models/org/one", "two", "--wait", "--json"))["models"]
    assert [(row["model"], row["state"], row["bytes_done"], row["bytes_total"]) for row in told] == [
        ("models/org/one", "complete", one.size, one.size),
        ("models/two", "complete", two.size, two.size),
    ]
    before = of_tier(mount)["fill_source_bytes"]
    assert "complete" in command(mount, "warm", "two")
    for model in (one, two):
        model.read()
        assert model.row()["state"] == "complete"
    assert of_tier(mount)["fill_source_bytes"] == before


def test_warm_waits_to_the_end(mount: OverlayMount) -> None:
    """Between a file's turn and its fill nothing may look as if it were over."""
    for number in range(15):
        make_model(mount, f"many{number}", {f"{shard}.safetensors": 300_000 for shard in range(6)})
        assert warmed(mount, f"many{number}") == "complete"


def warmed(mount: OverlayMount, name: str) -> str:
    """The state in which `warm --wait` would end, if it asked as often as it could."""
    told = client.post(mount.record, "/v1/warm", {"models": [name]})
    while told["models"][0]["state"] == "filling":
        told = client.get(mount.record, f"/v1/warm?model={told['models'][0]['model']}")
    state: str = told["models"][0]["state"]
    return state


def test_evict_removes_and_the_source_keeps(mount: OverlayMount) -> None:
    model = make_model(mount, "evicted", 5 * MIB).filled()
    held = of_tier(mount)["held_bytes"]
    assert json.loads(command(mount, "evict", "evicted", "--json"))["models"] == [
        {"model": "models/evicted", "bytes": 5 * MIB, "kept": ""}
    ]
    assert of_tier(mount)["held_bytes"] == held - 5 * MIB
    assert model.row()["state"] == "absent"
    model.read()
    model.await_state("complete")


def test_evict_leaves_the_open_and_the_pinned(mount: OverlayMount) -> None:
    model = make_model(mount, "kept", 5 * MIB).filled()
    with model.through().open("rb"):
        assert "models/kept stays: it is open" in command(mount, "evict", "kept", code=1)
    mount.settled()
    command(mount, "pin", "kept")
    assert "models/kept stays: it is pinned" in command(mount, "evict", "kept", code=1)
    assert model.row()["pinned"] is True
    command(mount, "evict", "--until-free", "1PiB", code=1)
    assert model.row()["state"] == "complete"
    command(mount, "unpin", "kept")
    assert model.row()["pinned"] is False
    command(mount, "evict", "kept")
    assert model.row()["state"] == "absent"


def test_evict_until_free(mount: OverlayMount) -> None:
    old, new = (make_model(mount, name, 5 * MIB).filled() for name in ("until-old", "until-new"))
    free = of_tier(mount)["free_bytes"]
    command(mount, "evict", "--until-free", "1")
    assert new.row()["state"] == old.row()["state"] == "complete"
    command(mount, "evict", "--until-free", "1000PB", code=1)
    assert new.row()["state"] == old.row()["state"] == "absent"
    assert of_tier(mount)["held_bytes"] == 0
    assert free > 0


def test_plan_changes_nothing_and_says_why(mount: OverlayMount) -> None:
    model = make_model(mount, "planned", 5 * MIB).filled()
    command(mount, "pin", "planned")
    told = json.loads(command(mount, "plan", "--json"))
    assert (told["surplus_bytes"], told["evict"]) == (0, [])
    assert {"model": "models/planned", "bytes": 5 * MIB, "reason": "pinned"} in told["keep"]
    assert "planned" in command(mount, "plan")
    command(mount, "unpin", "planned")
    command(mount, "evict", "planned")
    rows = {row["model"]: row for row in json.loads(command(mount, "plan", "--json"))["prefetch"]}
    assert (rows["models/planned"]["take"], rows["models/planned"]["bytes"]) == (True, 5 * MIB)
    assert model.row()["state"] == "absent"


NO_NAMES = [
    ("nothing-like-it", "no model is named nothing-like-it", "tierd models"),
    ("lama-7b", "no model is named lama-7b", "did you mean models/llama-7b?"),
    ("double", "double is ambiguous", "models/x/double"),
    ("../../etc", "'../../etc' is no model name", "models/llama-7b"),
    ("models/../..", "'models/../..' is no model name", ""),
    ("/etc/passwd", "'/etc/passwd' is no model name", ""),
    ("", "'' is no model name", ""),
    (".", "'.' is no model name", ""),
    ("models", "no model is named models", ""),
    ("a\nb\x1b[31m", r"no model is named a\nb\x1b[31m", ""),
    ("x" * 256, "x' is no model name", ""),
    ("/".join(["x" * 200] * 50), "' is no model name", ""),
    ("models/llama-7b/a.safetensors/x", "no model is named models/llama-7b/a.safetensors/x", ""),
]


@pytest.mark.parametrize("verb", ["warm", "pin", "unpin", "evict"])
def test_names_that_are_none(mount: OverlayMount, verb: str) -> None:
    for name in ("llama-7b", "x/double", "y/double"):
        make_model(mount, name, 1000)
    for name, says, hints in NO_NAMES:
        told = command(mount, verb, name, code=2)
        assert says in told.splitlines()[0]
        assert hints in told.splitlines()[1]
        assert all(line.isprintable() for line in told.splitlines())
    assert of_tier(mount)["pins"] == 0


def test_a_link_leads_nowhere(mount: OverlayMount, tmp_path: Path) -> None:
    """Neither out of the source nor to a second copy of what is inside."""
    (tmp_path / "secret.safetensors").write_bytes(b"secret" * 100)
    real = make_model(mount, "real", 1000)
    (mount.source / "models/out").symlink_to(tmp_path)
    (mount.source / "models/in").symlink_to("real")
    make_model(mount, "mixed", 1000)
    (mount.source / "models/mixed/b.safetensors").symlink_to(tmp_path / "secret.safetensors")
    held = of_tier(mount)["held_bytes"]
    for name in ("out", "in", "mixed"):
        command(mount, "warm", f"models/{name}", "--wait", code=0 if name == "mixed" else 2)
    idle(mount)
    assert of_tier(mount)["held_bytes"] == held + 1000
    assert (mount.mountpoint / "models/in/a.safetensors").read_bytes() == real.files["a.safetensors"]
    assert not any(b"secret" in path.read_bytes() for path in mount.cache_dir.iterdir() if path.is_file())


def test_all_commands_tell_people(mount: OverlayMount) -> None:
    make_model(mount, "people", 5000).filled()
    for words in (["warm", "people"], ["pin", "people"], ["plan"], ["unpin", "people"], ["check"], ["evict", "people"]):
        told = command(mount, *words)
        assert told.strip(), words
        assert all(line.isprintable() for line in told.splitlines())


def test_a_pin_brings_what_is_missing(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(load_idle_gap=0.1)
    model = make_model(mount, "wanted", {"a.safetensors": 2 * MIB, "b.safetensors": MIB})
    command(mount, "pin", "wanted")
    model.await_state("complete")
    command(mount, "unpin", "wanted")
    command(mount, "evict", "wanted")
    model.await_state("absent", 5)


def test_without_a_node_tier(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(cache_size=0)
    model = make_model(mount, "plain", MIB)
    model.read()
    for words in (["warm", "plain"], ["pin", "plain"], ["unpin", "plain"], ["evict", "plain"], ["plan"], ["check"]):
        assert "this mount has no node tier" in command(mount, *words, code=2)
    assert mount.status()["node_tier"] is None
    assert not mount.cache_dir.exists()
    assert model.row()["state"] == "absent"
