"""What is recorded of reads: opens, loads, bytes, users, pods; and how it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.mounts import OverlayMount, as_user, tierd, wait_until

MIB = 1 << 20
IDLE_SECONDS = 0.4


def make(path: Path, size: int) -> Path:
    """A file of `size` bytes, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def recorded(mount: OverlayMount, model: str, **expected: int) -> dict[str, Any]:
    """Wait until the row of a model says what is expected: closes are recorded some time after close(2)."""
    row: dict[str, Any] = {}

    def holds() -> bool:
        row.clear()
        row.update(mount.models().get(model, {}))
        return {key: row.get(key) for key in expected} == expected

    wait_until(holds, 5, lambda: f"{model} has {expected}; it is {row}")
    return row


@pytest.fixture(scope="module")
def shared(module_overlay_mount: MountFactory) -> OverlayMount:
    """A mount whose loads end soon, and whose daemon sees every byte."""
    return module_overlay_mount(load_idle_gap=IDLE_SECONDS, passthrough="off")


@pytest.fixture
def mount(shared: OverlayMount) -> Iterator[OverlayMount]:
    """The same for each test, which takes names that no other takes."""
    yield shared
    complaints = shared.ledger_complaints() + shared.log_complaints()
    assert not complaints, "\n".join(complaints)


def test_opens_loads_and_bytes_of_a_model(mount: OverlayMount) -> None:
    shards = [make(mount.source / f"models/llama/model-{n}.safetensors", MIB) for n in range(3)]
    make(mount.source / "models/llama/config.json", 100)
    assert mount.models()["models/llama"] == {
        "model": "models/llama", "size_bytes": 3 * MIB + 100, "opens": 0, "loads": 0, "hits": 0, "bytes_read": 0,
        "first_access": None, "last_access": None,
        "node_bytes": 0, "memory_bytes": 0, "pinned": False, "heat": 0.0, "state": "absent",
    }  # fmt: skip
    for _ in range(2):
        for shard in shards:
            (mount.mountpoint / shard.relative_to(mount.source)).read_bytes()
    mount.settled()
    row = recorded(mount, "models/llama", opens=6, loads=1)
    assert row["bytes_read"] == 3 * MIB, "the second pass comes from the page cache"
    assert row["first_access"] <= row["last_access"]
    seen = {row["path"]: row for row in mount.opens(model="models/llama")}
    assert sorted(seen) == [f"models/llama/model-{n}.safetensors" for n in range(3)]
    assert all(row["uid"] == 0 and row["pod"] is None for row in seen.values())


def test_a_load_ends_with_an_idle_gap(mount: OverlayMount) -> None:
    make(mount.source / "models/idle/a.bin", 1000)
    path = mount.mountpoint / "models/idle/a.bin"
    for _ in range(3):
        path.read_bytes()
    recorded(mount, "models/idle", opens=3, loads=1)
    mount.settled()
    time.sleep(1.5 * IDLE_SECONDS)  # the clock is what loads are told apart by
    with path.open("rb"):
        time.sleep(1.5 * IDLE_SECONDS)
        path.read_bytes()
        recorded(mount, "models/idle", opens=5, loads=2)


def test_writes_and_looks_are_not_opens(mount: OverlayMount) -> None:
    make(mount.source / "models/written/a.bin", 1000)
    before = mount.status()["counters"]["written_bytes"]
    os.listdir(mount.mountpoint / "models/written")
    (mount.mountpoint / "models/written/a.bin").stat()
    (mount.mountpoint / "models/written/b.bin").write_bytes(b"new")
    with (mount.mountpoint / "models/written/a.bin").open("r+b") as file:
        file.write(b"x")
    mount.settled()
    recorded(mount, "models/written", opens=1, size_bytes=1003)
    paths = [row["path"] for row in mount.opens(model="models/written")]
    assert paths == ["models/written/a.bin"], "read and write is a read, too"
    assert mount.status()["counters"]["written_bytes"] == before + 4


def test_who_reads_is_recorded(mount: OverlayMount) -> None:
    make(mount.source / "outputs/result.json", 10)
    as_user(12345, 54321, "open(sys.argv[1]).close()", mount.mountpoint / "outputs/result.json")
    mount.settled()
    newest = mount.opens()[0]
    assert (newest["path"], newest["model"], newest["uid"]) == ("outputs/result.json", None, 12345)


def test_a_hugging_face_tree_counts_once(mount: OverlayMount) -> None:
    tree = mount.source / "models/models--org--name"
    blob, small = make(tree / "blobs/0123abcd", MIB), make(tree / "blobs/4567", 200)
    make(tree / "refs/main", 40)
    snapshot = tree / "snapshots/0f0f0f"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    through = mount.mountpoint / "models/models--org--name/snapshots/0f0f0f"
    assert (through / "model.safetensors").read_bytes() == blob.read_bytes()
    assert (through / "config.json").read_bytes() == small.read_bytes()
    assert recorded(mount, "models/models--org--name", opens=2, loads=1)["size_bytes"] == MIB + 240
    assert [name for name in mount.models() if "org" in name] == ["models/models--org--name"]
    assert {row["path"] for row in mount.opens(model="models/models--org--name")} == {
        "models/models--org--name/blobs/0123abcd", "models/models--org--name/blobs/4567",
    }  # fmt: skip


def test_roots_of_ones_own(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(models_root=["weights", "deep/er"])
    for name in ("weights/a/x.bin", "deep/er/org/b/x.bin", "models/c/x.bin"):
        make(mount.source / name, 10)
        (mount.mountpoint / name).read_bytes()
    recorded(mount, "weights/a", opens=1)
    assert set(mount.models()) == {"weights/a", "deep/er/org/b"}
    assert {row["path"]: row["model"] for row in mount.opens()}["models/c/x.bin"] is None


ODD_NAMES = [b"new\nline", b"\xff\xfe", b"\x1b[31mred", "한국어".encode(), b"quote\"'`", b"sp ace", b"%41&=+#?"]


def test_odd_names_are_recorded_and_told(mount: OverlayMount) -> None:
    expected = {
        os.fsdecode(b"models/" + name): os.fsdecode(b"/".join((b"models", name, name + b".bin"))) for name in ODD_NAMES
    }
    for path in expected.values():
        make(mount.source / path, 1)
        (mount.mountpoint / path).read_bytes()
    mount.settled()
    models = {row["model"]: row for row in json.loads(tierd("models", mount.mountpoint, "--json").stdout)}
    assert {name: models[name]["opens"] for name in expected} == dict.fromkeys(expected, 1)
    opens = json.loads(tierd("opens", mount.mountpoint, "--json").stdout)
    assert {row["model"]: row["path"] for row in opens if row["model"] in expected} == expected
    for command in ("models", "opens"):
        assert "\x1b" not in tierd(command, mount.mountpoint).stdout, "escape codes must not reach a terminal"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_opens_of_an_odd_model(mount: OverlayMount, name: bytes) -> None:
    model = os.fsdecode(b"models/only-" + name)
    make(mount.source / model / "a.bin", 1)
    (mount.mountpoint / model / "a.bin").read_bytes()
    mount.settled()
    assert [row["path"] for row in mount.opens(model=model)] == [f"{model}/a.bin"]


def test_opens_are_told_newest_first_and_limited(mount: OverlayMount) -> None:
    for number in range(30):
        make(mount.source / f"models/many/{number:02}.bin", 1)
        (mount.mountpoint / f"models/many/{number:02}.bin").read_bytes()
    recorded(mount, "models/many", opens=30)
    assert [row["path"][-6:-4] for row in mount.opens(limit=5)] == ["29", "28", "27", "26", "25"]
    assert len(json.loads(tierd("opens", mount.mountpoint, "--json").stdout)) == 20


# --- pods ---


@pytest.fixture
def cgroups(new_directory: DirectoryFactory) -> Iterator[Path]:
    """The cgroup v2 tree, mounted once more, wherever this machine has it."""
    path = new_directory("cgroup")
    subprocess.run(["mount", "-t", "cgroup2", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize(
    ("directories", "uid"),
    [
        (["kubepods", "besteffort", "pod{}", "0123abcd"], "3f0c7a52-1111-4222-8333-444455556666"),
        (
            ["kubepods.slice", "kubepods-burstable.slice", "kubepods-burstable-pod{}.slice", "cri-containerd-01.scope"],
            "3f0c7a52_1111_4222_8333_444455556666",
        ),
    ],
    ids=["cgroupfs-driver", "systemd-driver"],
)
def test_the_pod_of_a_reader_is_recorded(cgroups: Path, mount: OverlayMount, directories: list[str], uid: str) -> None:
    make(mount.source / "models/pods/a.bin", 10)
    made = []
    path = cgroups
    try:
        for name in directories:
            path /= name.format(uid)
            if not path.exists():
                path.mkdir()
                made.append(path)
        code = (
            "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid())); open(sys.argv[2], 'rb')"
        )
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, path, mount.mountpoint / "models/pods/a.bin"], check=True
        )
        mount.settled()
    finally:
        for directory in reversed(made):
            wait_until(lambda directory=directory: _removed(directory), 5, f"{directory} is left")  # type: ignore[misc]
    assert mount.opens()[0]["pod"] == uid.replace("_", "-")


def _removed(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except OSError:
        return False
    return True


# --- metrics ---


def fetch(mount: OverlayMount, path: str) -> tuple[int, str]:
    """Status and text of a page of the metrics address."""
    try:
        with urllib.request.urlopen(f"http://{mount.record.metrics_address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def series(mount: OverlayMount) -> dict[str, float]:
    """Every series of /metrics, with its value."""
    lines = [line for line in fetch(mount, "/metrics")[1].splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_health_readiness_and_metrics(mount: OverlayMount) -> None:
    assert fetch(mount, "/healthz") == (200, "ok\n")
    assert fetch(mount, "/readyz") == (200, "ok\n")
    before = series(mount)
    make(mount.source / "models/metrics/a.bin", 1000)
    (mount.mountpoint / "models/metrics/a.bin").read_bytes()
    (mount.mountpoint / "out").write_bytes(b"12345")
    mount.settled()
    recorded(mount, "models/metrics", opens=1, bytes_read=1000)
    found = series(mount)
    assert found['tierd_opens_total{model="models/metrics"}'] == 1
    assert found['tierd_loads_total{model="models/metrics"}'] == 1
    assert found['tierd_read_bytes_total{model="models/metrics"}'] == 1000
    assert found["tierd_written_bytes_total"] == before["tierd_written_bytes_total"] + 5
    assert found["tierd_handler_failures_total"] == 0
    assert found['tierd_depth{what="open_files"}'] == 0
    assert found['tierd_request_seconds_count{operation="open"}'] >= 1
    assert found["process_open_fds"] > 0
    assert fetch(mount, "/v1/status")[0] == 404, "nothing but metrics and health over TCP"


def test_names_do_not_make_series(overlay_mount: MountFactory) -> None:
    """2,000 models of one file each; a model gets series of its own only within --metrics-models."""
    mount = overlay_mount(metrics_models=3)
    (mount.source / "models").mkdir()
    for number in range(2003):
        (mount.source / f"models/{number}.bin").touch()
    for number in range(3):
        (mount.mountpoint / f"models/{number}.bin").read_bytes()
    recorded(mount, "models/2.bin", opens=1)
    before = set(series(mount))
    for number in range(3, 2003):
        os.close(os.open(mount.mountpoint / f"models/{number}.bin", os.O_RDONLY))
    wait_until(lambda: mount.status()["counters"]["opens"] == 2003, 10, "all opens are recorded")
    found = series(mount)
    assert set(found) == before
    assert found['tierd_opens_total{model="other"}'] == 2000
