"""Commands that talk to running daemons: two of them, one with names that no terminal should see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.house import Done, House, alive
from tests.mounts import COMMAND_SECONDS, wait_until
from tierd.runtime import default_cache_dir

ODD_NAMES = [b"new\nline", b"esc\x1b[31mred", b"not\xffutf8", b":skull:", b"[bold]x[/]", b"\xe2\x80\xaertl", b"back\\"]
MODEL_KEYS = {"model", "size_bytes", "opens", "loads", "hits", "last_access"}
OPEN_KEYS = {"at", "path", "model", "uid", "pod"}
STATUS_KEYS = {
    "mountpoint",
    "source",
    "daemon_pid",
    "data_path",
    "kernel",
    "passthrough",
    "counters",
    "queues",
    "versions",
}


@dataclass(frozen=True)
class Mount:
    """A daemon's places."""

    source: Path
    mountpoint: Path
    state: Path
    started: Done

    @staticmethod
    def make(house: House, top: Path) -> Mount:
        """Lay an overlay over `top/source`."""
        source, mountpoint, state = top / "source", top / "mnt", top / "state"
        for path in (source, mountpoint):
            path.mkdir(exist_ok=True, parents=True)
        return Mount(source, mountpoint, state, house.start(source, mountpoint, "--state-dir", state))


@dataclass(frozen=True)
class Pair:
    """Two daemons in one namespace; `odd` serves the names."""

    house: House
    odd: Mount
    plain: Mount


@pytest.fixture(scope="module")
def pair(scratch: Path) -> Iterator[Pair]:
    tops = [scratch / "odd [red] 모델", scratch / "plain"]
    for name in ODD_NAMES:
        model = os.fsencode(tops[0]) + b"/source/models/" + name
        os.makedirs(model)
        Path(os.fsdecode(model + b"/model.gguf")).write_bytes(b"x" * 1536)
    (tops[1] / "mnt").mkdir(parents=True)
    (tops[1] / "mnt" / "hidden").touch()
    with House(scratch) as house:
        odd, plain = (Mount.make(house, top) for top in tops)
        seen = os.fsencode(house.inside(odd.mountpoint))
        for name in ODD_NAMES:
            Path(os.fsdecode(seen + b"/models/" + name + b"/model.gguf")).read_bytes()
        yield Pair(house, odd, plain)


def lines_of(done: Done) -> list[str]:
    """Output for people, of a command that must have succeeded: printable, whatever the names."""
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
    return lines


def test_background_tells_what_it_did(pair: Pair) -> None:
    for mount in (pair.odd, pair.plain):
        pid, log = pair.house.record(mount.mountpoint)["keeper_pid"], mount.state / "daemon.log"
        assert mount.started.out == f"mounted {mount.source} at {mount.mountpoint} (process {pid}, log {log})\n"


def test_a_mountpoint_that_is_not_empty_is_a_warning(pair: Pair) -> None:
    assert pair.odd.started.err == ""
    assert "mountpoint_not_empty" in pair.plain.started.err
    assert pair.plain.started.err.count("\n") == 1
    log = [json.loads(line) for line in (pair.plain.state / "daemon.log").read_text(encoding="utf-8").splitlines()]
    assert [line["mountpoint"] for line in log if line["event"] == "mountpoint_not_empty"] == [
        str(pair.plain.mountpoint)
    ]
    assert not (pair.house.inside(pair.plain.mountpoint) / "hidden").exists()
    assert (pair.plain.mountpoint / "hidden").exists()


def test_which_one(pair: Pair) -> None:
    done = pair.house.tierd("status")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0] == "tierd: several tierd daemons are running"
    for mount in (pair.odd, pair.plain):
        assert str(mount.mountpoint) in done.err.splitlines()[1]


@pytest.mark.parametrize("detour", ["{}", "{}/", "{}/../mnt", "{}/models/.."])
def test_a_mountpoint_by_any_of_its_names(pair: Pair, detour: str) -> None:
    done = pair.house.tierd("status", detour.format(pair.odd.mountpoint), "--json")
    assert done.json()["mountpoint"] == str(pair.odd.mountpoint)


def test_status_as_json(pair: Pair) -> None:
    told = pair.house.tierd("status", "--json", pair.plain.mountpoint).json()
    assert told.keys() >= STATUS_KEYS
    assert (told["mountpoint"], told["source"]) == (str(pair.plain.mountpoint), str(pair.plain.source))
    assert told["daemon_pid"] == pair.house.record(pair.plain.mountpoint)["pid"]
    assert told["data_path"] in ("daemon", "passthrough")
    assert told["kernel"] == os.uname().release
    assert told["passthrough"].keys() >= {"kernel", "privileged", "enabled"}
    assert told["versions"].keys() >= {"tierd", "python", "pyfuse3"}
    assert told["counters"]["handler_failures"] == 0
    assert all(isinstance(count, int) for count in told["counters"].values())
    assert all(isinstance(depth, int) for depth in told["queues"].values())


def test_status_for_people(pair: Pair) -> None:
    text = "\n".join(lines_of(pair.house.tierd("status", pair.odd.mountpoint, env={"COLUMNS": "300"})))
    assert str(pair.odd.mountpoint) in text
    assert str(pair.odd.source) in text
    assert all(key in text for key in STATUS_KEYS)


def test_models_as_json(pair: Pair) -> None:
    told = pair.house.tierd("models", pair.odd.mountpoint, "--json").json()
    assert all(row.keys() >= MODEL_KEYS for row in told)
    assert {row["model"].encode("utf-8", "surrogateescape") for row in told} == {
        b"models/" + name for name in ODD_NAMES
    }
    for row in told:
        assert (row["size_bytes"], row["opens"], row["loads"], row["hits"]) == (1536, 1, 1, 0)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["last_access"])


def test_json_is_ascii(pair: Pair) -> None:
    assert pair.house.tierd("models", pair.odd.mountpoint, "--json").out.isascii()
    assert pair.house.tierd("models", pair.plain.mountpoint, "--json").json() == []


@pytest.mark.parametrize("columns", ["300", ""])
def test_models_for_people(pair: Pair, columns: str) -> None:
    """Also where nobody said how wide the terminal is: a name that is cut off cannot be given to `--model`."""
    lines = lines_of(pair.house.tierd("models", pair.odd.mountpoint, env={"COLUMNS": columns} if columns else {}))
    for shown in (
        r"models/new\nline",
        r"models/esc\x1b[31mred",
        "models/:skull:",
        "models/[bold]x[/]",
        "models/back\\",
    ):
        assert any(shown in line and "1.5 KiB" in line for line in lines), shown
    assert len([line for line in lines if "1.5 KiB" in line]) == len(ODD_NAMES)


def test_opens_as_json(pair: Pair) -> None:
    told = pair.house.tierd("opens", pair.odd.mountpoint, "--json").json()
    assert len(told) == len(ODD_NAMES)
    assert all(row.keys() >= OPEN_KEYS for row in told)
    assert [row["at"] for row in told] == sorted((row["at"] for row in told), reverse=True)
    assert {row["uid"] for row in told} == {os.getuid()}
    assert len(pair.house.tierd("opens", pair.odd.mountpoint, "--json", "--limit", "3").json()) == 3


@pytest.mark.parametrize("name", [b"not\xffutf8", b"new\nline", b":skull:"])
def test_opens_of_one_model(pair: Pair, name: bytes) -> None:
    model = os.fsdecode(b"models/" + name)
    told = pair.house.tierd("opens", pair.odd.mountpoint, "--json", "--model", model).json()
    assert [row["model"] for row in told] == [model]


def test_opens_for_people(pair: Pair) -> None:
    lines = lines_of(pair.house.tierd("opens", pair.odd.mountpoint, env={"COLUMNS": "300"}))
    assert any(r"models/new\nline/model.gguf" in line for line in lines)


def test_a_second_daemon_on_a_mountpoint(pair: Pair, scratch: Path) -> None:
    done = pair.house.tierd("mount", pair.odd.source, pair.plain.mountpoint, "--metrics", "127.0.0.1:0")
    assert (done.code, done.out) == (2, "")
    assert f"mountpoint {pair.plain.mountpoint} is busy: fuse.tierd is mounted there" in done.err
    assert f"hint: tierd umount {pair.plain.mountpoint}" in done.err


def test_a_second_daemon_on_a_state_directory(pair: Pair, scratch: Path) -> None:
    (scratch / "another").mkdir()
    arguments = ["mount", pair.odd.source, scratch / "another", "--metrics", "127.0.0.1:0", "--state-dir"]
    done = pair.house.tierd(*arguments, pair.plain.state)
    assert (done.code, done.out) == (2, "")
    pid = pair.house.record(pair.plain.mountpoint)["keeper_pid"]
    assert f"state directory {pair.plain.state} is in use by another tierd (process {pid})" in done.err
    assert pair.house.mounted(scratch / "another") is None
    assert not pair.house.runtime(scratch / "another").exists()


def test_a_second_daemon_on_a_cache_directory(pair: Pair, scratch: Path) -> None:
    cache = default_cache_dir(pair.plain.mountpoint)
    (scratch / "beside").mkdir()
    arguments = ["mount", pair.odd.source, scratch / "beside", "--metrics", "127.0.0.1:0", "--cache-dir", cache]
    done = pair.house.tierd(*arguments)
    assert (done.code, done.out) == (2, "")
    pid = pair.house.record(pair.plain.mountpoint)["keeper_pid"]
    assert done.err.splitlines() == [
        f"tierd: cache directory {cache} is in use by another tierd (process {pid})",
        "hint: stop that one, or choose another",
    ]
    assert pair.house.mounted(scratch / "beside") is None


def test_a_cache_in_memory_is_a_warning(pair: Pair, scratch: Path) -> None:
    """The house's /run is a tmpfs."""
    third, state = scratch / "in-memory", scratch / "in-memory-state"
    third.mkdir()
    options = ["--state-dir", state, "--cache-dir", "/run/cache", "--metrics", "127.0.0.1:0", "--background"]
    assert pair.house.tierd("mount", pair.odd.source, third, *options).code == 0
    assert pair.house.tierd("umount", third).code == 0
    log = [json.loads(line) for line in (state / "daemon.log").read_text(encoding="utf-8").splitlines()]
    (said,) = (line for line in log if line["event"] == "cache_in_memory")
    assert (said["level"], said["fstype"], said["directory"]) == ("warning", "tmpfs", "/run/cache")


@pytest.mark.parametrize("words", [["evict", "--until-free", "12XB"], ["evict", "--until-free", "-1"]])
def test_a_size_that_is_none(pair: Pair, words: list[str]) -> None:
    done = pair.house.tierd(*words, "--mount", pair.plain.mountpoint)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("tierd: --until-free: must be a size")


def test_metrics_of_a_running_daemon_are_a_taken_port(pair: Pair, scratch: Path) -> None:
    (scratch / "third").mkdir()
    address = pair.house.record(pair.plain.mountpoint)["metrics_address"]
    done = pair.house.tierd("mount", pair.odd.source, scratch / "third", "--background", "--metrics", address)
    assert done.code == 2
    assert done.err.startswith(f"tierd: cannot serve metrics on {address}: Address already in use\nhint: ")
    assert pair.house.mounted(scratch / "third") is None


# --- the end of a daemon ---


def test_umount_leaves_nothing_behind(house: House, scratch: Path) -> None:
    mount = Mount.make(house, scratch / "ends")
    pid = house.record(mount.mountpoint)["pid"]
    assert house.tierd("umount", mount.mountpoint) == Done(0, "", "")
    wait_until(lambda: not alive(pid), COMMAND_SECONDS, f"process {pid} ends")
    assert house.mounted(mount.mountpoint) is None
    assert not house.runtime(mount.mountpoint).exists()
    assert {"daemon.log", "index.db"} <= set(os.listdir(mount.state)) <= {"daemon.log", "index.db", "lock"}
    assert house.tierd("status", mount.mountpoint).code == 2


def test_a_killed_daemon_is_cleared_away(house: House, scratch: Path) -> None:
    mount = Mount.make(house, scratch / "killed")
    house.kill(mount.mountpoint)
    assert house.mounted(mount.mountpoint) == "fuse.tierd"
    done = house.tierd("status", mount.mountpoint)
    assert done.code in (1, 2)
    assert done.err.startswith("tierd: ")
    assert house.tierd("umount", mount.mountpoint) == Done(0, "", "")
    assert house.mounted(mount.mountpoint) is None
    assert not house.runtime(mount.mountpoint).exists()


def test_a_killed_daemon_may_be_started_again(house: House, scratch: Path) -> None:
    mount = Mount.make(house, scratch / "revived")
    house.kill(mount.mountpoint)
    again = Mount.make(house, scratch / "revived")
    assert house.tierd("status", again.mountpoint, "--json").json()["daemon_pid"]
    house.tierd("umount", mount.mountpoint)


def test_a_process_that_got_the_number_of_a_dead_daemon_is_left_alone(house: House, scratch: Path) -> None:
    """A killed daemon leaves its record; its number may be anybody's by now."""
    mount = Mount.make(house, scratch / "recycled")
    house.kill(mount.mountpoint)
    record = house.runtime(mount.mountpoint) / "mount.json"
    with subprocess.Popen(["sleep", "infinity"]) as bystander:
        try:
            record.write_text(json.dumps({**json.loads(record.read_text("utf-8")), "pid": bystander.pid}), "utf-8")
            done = house.tierd("umount", mount.mountpoint, "--timeout", "1")
            assert bystander.poll() is None, "killed"
            assert done == Done(0, "", "")
            assert house.mounted(mount.mountpoint) is None
        finally:
            bystander.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground(house: House, scratch: Path, number: signal.Signals) -> None:
    top = scratch / f"foreground-{number}"
    for name in ("source", "mnt"):
        (top / name).mkdir(parents=True)
    arguments = ["mount", top / "source", top / "mnt", "--state-dir", top / "state", "--metrics", "[::1]:0"]
    if not Path("/proc/net/if_inet6").exists():
        arguments[-1] = "127.0.0.1:0"
    daemon = subprocess.Popen(
        house.command(sys.executable, "-m", "tierd", *arguments),
        env=house.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until((house.runtime(top / "mnt") / "mount.json").exists, COMMAND_SECONDS, "it is mounted")
    os.kill(house.record(top / "mnt")["pid"], number)
    out, err = daemon.communicate(timeout=COMMAND_SECONDS)
    assert (daemon.returncode, out) == (0, b"")
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert events == ["node_tier", "mounted", "stopping", "stopped"]
    assert house.mounted(top / "mnt") is None


def test_arguments_after_two_dashes(house: House, scratch: Path) -> None:
    """`--` ends the options; the process in the background gets its own all the same."""
    top = scratch / "dashes"
    for name in ("source", "mnt"):
        (top / name).mkdir(parents=True)
    flags = ["--background", "--state-dir", top / "state", "--metrics", "127.0.0.1:0"]
    done = house.tierd("mount", *flags, "--", top / "source", top / "mnt")
    assert (done.code, done.err) == (0, "")
    house.tierd("umount", top / "mnt")
