"""What people ask of the node tier: names, warm, pin, evict, plan, check."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.copies import WAIT_SECONDS, content, flip, forge_seal, identity_of, read_copy
from tests.unit.node import SIZE, Node, count_walks
from tierd.errors import UsageError
from tierd.node import tier_control as control_module
from tierd.node.catalog import walk
from tierd.node.store import Copy

# --- names ---


def test_full_names_and_last_parts(node: Node) -> None:
    for name in ("llama-7b/x.bin", "meta-llama/Llama-3-8B/deep/x.bin", "org/name/sub/x.bin"):
        node.write(name)
    resolve = node.control.resolve
    assert resolve(["models/llama-7b"]) == [b"models/llama-7b"]
    assert resolve(["models/llama-7b/", "llama-7b"]) == [b"models/llama-7b"]
    assert resolve([]) == []
    known = sorted(walk(node.posix, (b"models",)).size_bytes)
    assert resolve([os.fsdecode(name).rsplit("/", 1)[-1] for name in known]) == known


def test_names_that_are_only_held_or_pinned_are_known(node: Node) -> None:
    node.fill("held/x.bin")
    os.unlink(node.source / "models/held/x.bin")
    node.parts.usage.pin(b"models/pinned", True)
    assert node.control.resolve(["held", "pinned"]) == [b"models/held", b"models/pinned"]


def test_names_that_are_not_utf8(node: Node) -> None:
    node.write(b"m\xff/x.bin")
    assert node.control.resolve(["models/m\udcff"]) == [b"models/m\xff"]
    assert node.control.resolve(["m\udcff"]) == [b"models/m\xff"]
    assert node.control.progress(b"models/m\xff")["model"] == "models/m\udcff"


def test_ambiguous_names_are_told_apart(node: Node) -> None:
    node.fill("a/llama/x.bin")
    node.fill("b/llama/x.bin")
    assert node.refusal("llama") == ("llama is ambiguous", "did you mean models/a/llama, models/b/llama?")
    assert node.control.resolve(["a/llama"]) == [b"models/a/llama"]


def test_unknown_names_get_near_ones(node: Node) -> None:
    node.write("llama-7b/x.bin")
    node.write("mistral/x.bin")
    message, hint = node.refusal("models/lama-7b")
    assert message == "no model is named models/lama-7b"
    assert hint.startswith("did you mean models/llama-7b")
    assert node.refusal("lama-7b")[1].startswith("did you mean models/llama-7b")
    assert node.refusal("zzz") == ("no model is named zzz", "`tierd models` lists the models")
    assert node.refusal("mistral", "zzz")[0] == "no model is named zzz"


@pytest.mark.parametrize(
    "name",
    ["", "/", "/models/m", "models/../../etc", "..", ".", "models/./m", "models//m", "m\0", "models/m/..", "\ud800"],
)
def test_names_that_lead_elsewhere_are_refused(node: Node, name: str) -> None:
    node.write("m/x.bin")
    message, hint = node.refusal(name)
    assert "is no model name" in message
    assert "tierd models" in hint
    with pytest.raises(UsageError):
        node.control.progress_of([name])


@pytest.mark.parametrize(
    "name", ["models", "models/m/x.bin/y", "y" * 5000, "models/" + "y" * 300, "models/link", "m/x.bin", "*", "-", "%"]
)
def test_names_that_are_no_models(node: Node, tmp_path: Path, name: str) -> None:
    node.write("m/x.bin")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x.bin").write_bytes(b"secret")
    (node.source / "models/link").symlink_to(tmp_path / "outside")
    message, _ = node.refusal(name)
    assert message.startswith("no model is named") or message.endswith("is no model name")


# --- warm, pin, evict ---


def test_warm(node: Node) -> None:
    for number in range(3):
        node.write(f"m/{number}.bin")
    told = node.control.warm(["m"])["models"]
    assert [(row["model"], row["bytes_total"]) for row in told] == [("models/m", 3 * SIZE)]
    node.await_complete("models/m")
    (row,) = node.control.warm(["models/m"])["models"]
    assert (row["state"], row["bytes_done"], row["reason"]) == ("complete", 3 * SIZE, "")


def test_a_model_is_walked_once_for_a_request(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m", "other"):
        for shard in range(3):
            node.write(f"{name}/{shard}.bin")
    walks = count_walks(node, monkeypatch)
    node.control.warm(["models/m", "models/other"])
    assert walks == {b"models/m": 1, b"models/other": 1}
    node.control.pin(["models/other"], pinned=True)
    assert walks.pop(b"models/other") == 2
    node.control.warm(["m"])
    assert walks == {b"m": 1, b"models/m": 2}, "there is no model of the short name"


def test_progress_walks_no_model_whose_files_are_on_their_way(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for several times a second; that a model is there is told by what the source has then."""
    node.write("m/x.bin")
    held = node.parts.store.begin
    go_on = threading.Event()

    def begin(*arguments: Any) -> Any:
        assert go_on.wait(WAIT_SECONDS)
        return held(*arguments)

    monkeypatch.setattr(node.parts.store, "begin", begin)
    walks = count_walks(node, monkeypatch)
    node.control.warm(["models/m"])
    for _ in range(5):
        assert node.control.progress_of(["models/m"])["models"][0]["state"] == "filling"
    assert walks == {b"models/m": 1}
    go_on.set()
    node.await_complete("models/m")
    assert walks == {b"models/m": 2}


def test_warm_what_left_the_source(node: Node) -> None:
    node.fill("m/x.bin")
    os.unlink(node.source / "models/m/x.bin")
    with pytest.raises(UsageError, match="not in the source"):
        node.control.warm(["m"])


def test_a_model_that_does_not_fit_says_why(tmp_path: Path) -> None:
    node = Node(tmp_path, cache_size=SIZE)
    node.write("m/x.bin", 2 * SIZE)
    node.control.warm(["models/m"])
    filler = node.parts.tier.filler
    with filler._change:
        assert filler._change.wait_for(lambda: not filler._active and not filler._opening and not filler.dropped
                                       and not filler.queued(), WAIT_SECONDS)  # fmt: skip
    row = node.control.progress(b"models/m")
    assert (row["state"], row["bytes_done"]) == ("absent", 0)
    node.close()
    assert "more than the node tier may ever hold" in node.parts.tier.reason(b"models/m")


def test_pins_outlive_the_daemon(node: Node) -> None:
    node.write("m/x.bin")
    assert node.control.pin(["m"], pinned=True) == {"models": [{"model": "models/m", "pinned": True}]}
    assert node.index.pins() == {b"models/m"}
    assert node.parts.usage.pinned(b"models/m")
    node.control.pin(["m"], pinned=False)
    assert (node.index.pins(), node.parts.usage.pins()) == (frozenset(), set())


def test_evict_says_what_stays(node: Node) -> None:
    for name in "abc":
        node.fill(f"{name}/x.bin")
    node.parts.tier.leases.take(b"models/a")
    node.control.pin(["b"], pinned=True)
    rows = node.control.evict(["a", "b", "c"])["models"]
    assert [(row["model"], row["bytes"], row["kept"]) for row in rows] == [
        ("models/a", 0, "open"),
        ("models/b", 0, "pinned"),
        ("models/c", SIZE, ""),
    ]
    assert set(node.control.held_by_model()) == {b"models/a", b"models/b"}


def test_evict_until_free(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("abcd"):
        node.fill(f"{name}/x.bin")
        node.parts.usage.note(f"models/{name}".encode(), 1, number + 1)
    node.parts.tier.leases.take(b"models/a")
    node.parts.usage.pin(b"models/b", True)
    real = node.parts.tier.space()
    monkeypatch.setattr(
        node.parts.tier,
        "space",
        lambda: type(real)(1 << 30, 100_000 - node.parts.store.held_bytes, node.parts.store.held_bytes, 0, 1 << 40),
    )
    told = node.control.evict_until_free(100_000 - 3 * SIZE)
    assert [(row["model"], row["bytes"]) for row in told["models"]] == [("models/c", SIZE)]
    told = node.control.evict_until_free(1 << 40)
    assert [(row["model"], row["bytes"]) for row in told["models"]] == [("models/d", SIZE)]
    assert told["free_bytes"] == 100_000 - 2 * SIZE
    assert set(node.control.held_by_model()) == {b"models/a", b"models/b"}


# --- plan and describe ---


def test_plan_says_what_would_happen(tmp_path: Path) -> None:
    node = Node(tmp_path, cache_size=2 * SIZE)
    for number, name in enumerate("abc"):
        node.fill(f"{name}/x.bin")
        node.parts.usage.note(f"models/{name}".encode(), 1, number + 1)
    node.parts.tier.leases.take(b"models/c")
    node.write("hot/x.bin")
    node.parts.usage.note(b"models/hot", 5, node.parts.usage.now_ns())
    plan = node.control.plan()
    assert (plan["surplus_bytes"], plan["held_bytes"], plan["limit_bytes"]) == (SIZE, 3 * SIZE, 2 * SIZE)
    assert [row["model"] for row in plan["evict"]] == ["models/a"]
    assert plan["keep"] == [{"model": "models/c", "bytes": SIZE, "reason": "open"}]
    (choice,) = [row for row in plan["prefetch"] if row["model"] == "models/hot"]
    assert (choice["take"], choice["victims"]) == (True, ["models/a", "models/b"])
    assert len(node.parts.store) == 3, "nothing was done"
    node.close()


def test_describe(node: Node) -> None:
    node.fill("m/x.bin")
    told = node.control.describe(b"models/m", SIZE, SIZE)
    assert (told["state"], told["node_bytes"], told["memory_bytes"], told["pinned"]) == (
        "complete", SIZE, SIZE, False,
    )  # fmt: skip
    assert node.control.describe(b"models/m", SIZE + 1, SIZE)["state"] == "partial"
    assert node.control.describe(b"models/n", SIZE, 0)["state"] == "absent"


# --- check ---


def test_a_check_finds_what_was_changed(node: Node) -> None:
    assert node.control.tell_check() == {"state": "never"}
    by_hand, below, whole = (node.fill(f"m/{number}.bin") for number in range(3))
    flip(node.base / "cache" / by_hand.name)
    flip(node.base / "cache" / below.name)
    forge_seal(node.parts.store, below)
    (node.base / "cache" / "1-2-3.fill").write_bytes(b"left")
    node.control.start_check(deep=False, repair=False)
    told = node.await_check()
    assert (told["files_done"], told["problems_total"], told["leftovers"]) == (3, 1, 1)
    assert told["problems"][0]["path"] == "models/m/0.bin"
    node.control.start_check(deep=True, repair=False)
    told = node.await_check()
    assert (told["files_total"], told["problems_total"]) == (2, 1)
    assert told["problems"][0]["problem"] == "chunk 0 has the wrong checksum"
    assert told["bytes_done"] == told["bytes_total"] == 2 * SIZE
    assert node.parts.store.copies() == [whole]
    node.parts.store.remove_leftovers()


def test_a_check_that_repairs_brings_it_back(node: Node) -> None:
    copies = [node.fill(f"m/{number}.bin") for number in range(3)]
    for copy in copies[:2]:
        flip(node.base / "cache" / copy.name)
    forge_seal(node.parts.store, copies[1])
    (node.base / "cache" / "1-2-3.fill").write_bytes(b"left")
    node.control.start_check(deep=True, repair=True)
    told = node.await_check()
    assert (told["problems_total"], told["leftovers"]) == (2, 1)
    node.await_complete("models/m")
    for number in range(3):
        copy = node.parts.store.find(identity_of(node.source / f"models/m/{number}.bin").inode)
        assert copy is not None
        assert read_copy(node.parts.store, copy) == content(f"m/{number}.bin", SIZE)


def test_a_second_check_joins_the_first(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.fill("m/x.bin")
    began, go_on = threading.Event(), threading.Event()
    real = node.parts.store.verify
    runs = []

    def verify(copy: Copy, **more: Any) -> str | None:
        runs.append(copy)
        began.set()
        assert go_on.wait(WAIT_SECONDS)
        return real(copy, **more)

    monkeypatch.setattr(node.parts.store, "verify", verify)
    node.control.start_check(deep=True, repair=False)
    assert began.wait(WAIT_SECONDS)
    told = node.control.start_check(deep=False, repair=True)
    assert (told["state"], told["deep"], told["repair"]) == ("running", True, False)
    go_on.set()
    node.await_check()
    assert len(runs) == 1


def test_a_deep_check_leaves_the_pages_of_open_models_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    open_one, closed = node.fill("open/x.bin"), node.fill("closed/x.bin")
    node.parts.tier.leases.take(b"models/open")
    cached: dict[str, bool] = {}
    real = node.parts.store.verify

    def verify(copy: Copy, **how: Any) -> str | None:
        cached[copy.name] = how["cached"]
        return real(copy, **how)

    monkeypatch.setattr(node.parts.store, "verify", verify)
    for deep in (True, False):
        node.control.start_check(deep=deep, repair=False)
        assert node.await_check()["files_open"] == int(deep)
        assert cached == {open_one.name: deep, closed.name: False}


def test_a_copy_evicted_during_the_check_is_no_problem(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = node.fill("m/x.bin")
    real = node.parts.store.verify

    def verify(copy: Copy, **more: Any) -> str | None:
        node.parts.store.remove(copy)
        return real(copy, **more)

    monkeypatch.setattr(node.parts.store, "verify", verify)
    node.control.start_check(deep=True, repair=True)
    told = node.await_check()
    assert (told["problems_total"], told["files_done"], copy.removed) == (0, 1, True)
    assert node.parts.tier.filler.queued() == []
    assert node.parts.tier.filler.active() == []


def test_a_check_whose_directory_cannot_be_listed_ends(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.fill("m/x.bin")

    def fail() -> list[str]:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(node.parts.store, "leftovers", fail)
    node.control.start_check(deep=False, repair=False)
    told = node.await_check()
    assert told["problems_total"] == 1
    assert told["problems"][0]["problem"] == "Input/output error"
    monkeypatch.undo()


def test_problems_told_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "_PROBLEMS_MAX", 2)
    for number in range(4):
        flip(node.base / "cache" / node.fill(f"m/{number}.bin").name)
    node.control.start_check(deep=False, repair=False)
    told = node.await_check()
    assert (told["problems_total"], len(told["problems"])) == (4, 2)
