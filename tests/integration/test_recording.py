"""What is recorded of reads: opens, loads, bytes, users, pods; and how it is told."""

from __future__ import annotations

import json
import os
import subprocess
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


@pytest.fixture
def mount(overlay_mount: MountFactory) -> OverlayMount:
    """A mount whose loads end soon."""
    return overlay_mount(load_idle_gap=IDLE_SECONDS)


def test_opens_loads_and_bytes_of_a_model(mount: OverlayMount) -> None:
    shards = [make(mount.source / f"models/llama/model-{n}.safetensors", MIB) for n in range(3)]
    make(mount.source / "models/llama/config.json", 100)
    assert mount.models()["models/llama"] == {
        "model": "models/llama", "size_bytes": 3 * MIB + 100, "opens": 0, "loads": 0, "hits": 0, "bytes_read": 0,
        "first_access": None, "last_access": None,
    }  # fmt: skip
    for _ in range(2):
        for shard in shards:
            (mount.mountpoint / shard.relative_to(mount.source)).read_bytes()
    row = recorded(mount, "models/llama", opens=6, loads=1)
    assert row["bytes_read"] >= 3 * MIB, "the second pass comes from the page cache"
    assert row["first_access"] <= row["last_access"]
    seen = {row["path"]: row for row in mount.opens(model="models/llama")}
    assert sorted(seen) == [f"models/llama/model-{n}.safetensors" for n in range(3)]
    assert all(row["uid"] == 0 and row["pod"] is None for row in seen.values())


def test_a_load_ends_with_an_idle_gap(mount: OverlayMount) -> None:
    make(mount.source / "models/m/a.bin", 1000)
    path = mount.mountpoint / "models/m/a.bin"
    for _ in range(3):
        path.read_bytes()
    recorded(mount, "models/m", opens=3, loads=1)
    with path.open("rb"):
        _pass(2 * IDLE_SECONDS)
        path.read_bytes()
    recorded(mount, "models/m", opens=5, loads=2)
    mount.settled()
    _pass(2 * IDLE_SECONDS)
    path.read_bytes()
    recorded(mount, "models/m", opens=6, loads=3)


def _pass(seconds: float) -> None:
    """The wall clock is what loads are told apart by, so there is nothing else to wait for."""
    time.sleep(seconds)


def test_writes_and_looks_are_not_opens(mount: OverlayMount) -> None:
    make(mount.source / "models/m/a.bin", 1000)
    os.listdir(mount.mountpoint / "models/m")
    (mount.mountpoint / "models/m/a.bin").stat()
    (mount.mountpoint / "models/m/b.bin").write_bytes(b"new")
    with (mount.mountpoint / "models/m/a.bin").open("r+b") as file:
        file.write(b"x")
    mount.settled()
    recorded(mount, "models/m", opens=1, size_bytes=1003)
    assert [row["path"] for row in mount.opens()] == ["models/m/a.bin"], "read and write is a read, too"
    assert mount.status()["counters"]["written_bytes"] == 4


def test_who_reads_is_recorded(mount: OverlayMount) -> None:
    make(mount.source / "outputs/result.json", 10)
    as_user(12345, 54321, "open(sys.argv[1]).close()", mount.mountpoint / "outputs/result.json")
    wait_until(lambda: bool(mount.opens()), 5, "the open is recorded")
    assert [(row["path"], row["model"], row["uid"]) for row in mount.opens()] == [("outputs/result.json", None, 12345)]


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
    assert list(mount.models()) == ["models/models--org--name"]
    assert {row["path"] for row in mount.opens()} == {
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
    for name in ODD_NAMES:
        path = os.path.join(os.fsencode(mount.source), b"models", name)
        os.makedirs(path)
        for base in (mount.source, mount.mountpoint):
            file = os.path.join(os.fsencode(base), b"models", name, name + b".bin")
            with open(file, "ab+") as opened:
                opened.write(b"x")
    expected = {os.fsdecode(b"models/" + name) for name in ODD_NAMES}
    wait_until(lambda: len(mount.opens()) == len(ODD_NAMES), 5, "all opens are recorded")
    told = json.loads(tierd("models", mount.mountpoint, "--json").stdout)
    assert {row["model"] for row in told} == expected
    assert all(row["opens"] == 1 for row in told)
    paths = {row["path"] for row in json.loads(tierd("opens", mount.mountpoint, "--json").stdout)}
    assert paths == {os.fsdecode(b"models/" + name + b"/" + name + b".bin") for name in ODD_NAMES}
    for command in ("models", "opens"):
        table = tierd(command, mount.mountpoint).stdout
        assert "\x1b" not in table, "escape codes of names must not reach a terminal"
    for name in ODD_NAMES:
        model = os.fsdecode(b"models/" + name)
        found = json.loads(tierd("opens", mount.mountpoint, "--model", model, "--json").stdout)
        assert [row["model"] for row in found] == [model]


def test_all_opens_are_told_newest_first_and_limited(mount: OverlayMount) -> None:
    for number in range(30):
        make(mount.source / f"models/m/{number:02}.bin", 1)
        (mount.mountpoint / f"models/m/{number:02}.bin").read_bytes()
    recorded(mount, "models/m", opens=30)
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
    make(mount.source / "models/m/a.bin", 10)
    made = []
    path = cgroups
    try:
        for name in directories:
            path /= name.format(uid)
            if not path.exists():
                path.mkdir()
                made.append(path)
        code = (
            "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid())); open(sys.argv[2]).read()"
        )
        subprocess.run(["python3", "-I", "-S", "-c", code, path, mount.mountpoint / "models/m/a.bin"], check=True)
        wait_until(lambda: bool(mount.opens()), 5, "the open is recorded")
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
    make(mount.source / "models/m/a.bin", 1000)
    (mount.mountpoint / "models/m/a.bin").read_bytes()
    (mount.mountpoint / "out").write_bytes(b"12345")
    recorded(mount, "models/m", opens=1, bytes_read=1000)
    found = series(mount)
    assert found['tierd_opens_total{model="models/m"}'] == 1
    assert found['tierd_loads_total{model="models/m"}'] == 1
    assert found['tierd_read_bytes_total{model="models/m"}'] == 1000
    assert found["tierd_written_bytes_total"] == 5
    assert found["tierd_handler_failures_total"] == 0
    assert found['tierd_depth{what="open_files"}'] == 0
    assert found['tierd_request_seconds_count{operation="open"}'] >= 1
    assert found["process_open_fds"] > 0
    assert fetch(mount, "/v1/status")[0] == 404, "nothing but metrics and health over TCP"


def test_names_do_not_make_series(overlay_mount: MountFactory) -> None:
    """2,000 names of models and files; a model gets a series of its own only within --metrics-models."""
    mount = overlay_mount(metrics_models=3)
    for number in range(3):
        make(mount.source / f"models/m{number}/a.bin", 1)
        (mount.mountpoint / f"models/m{number}/a.bin").read_bytes()
    recorded(mount, "models/m2", opens=1)
    before = set(series(mount))
    for number in range(2000):
        make(mount.source / f"models/n{number}/{number}.bin", 1)
    for number in range(2000):
        fd = os.open(mount.mountpoint / f"models/n{number}/{number}.bin", os.O_RDONLY)
        os.close(fd)
    wait_until(lambda: mount.status()["counters"]["opens"] == 2003, 10, "all opens are recorded")
    found = series(mount)
    assert set(found) == before
    assert found['tierd_opens_total{model="other"}'] == 2000
