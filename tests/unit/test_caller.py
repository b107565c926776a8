"""Acting as the caller, and naming its pod."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tierd.node import caller
from tierd.node.caller import acting_as, pod_of

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")
POD = "0a1b2c3d-1111-2222-3333-444455556666"
POD_ = POD.replace("-", "_")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a directory that anybody may write to, wherever it lies."""
    tmp_path.chmod(0o777)
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def in_a_thread(function: Callable[[], None]) -> None:
    """As the daemon does it: setfsuid(2) is per thread, so whatever goes wrong stays in there."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def touch(directory: int, name: str) -> tuple[int, int]:
    """Make a file; whose it is."""
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory))
    found = os.stat(name, dir_fd=directory)
    return found.st_uid, found.st_gid


@needs_root
def test_what_is_created_belongs_to_the_caller(directory: int) -> None:
    def check() -> None:
        with acting_as(1234, 4321):
            assert touch(directory, "a") == (1234, 4321)
        assert touch(directory, "b") == (0, 0)
        with acting_as(0, 4321):
            assert touch(directory, "c") == (0, 4321)
        with acting_as(1234, 0):
            assert touch(directory, "d") == (1234, 0)
        assert touch(directory, "e") == (0, 0)

    in_a_thread(check)


@needs_root
def test_the_thread_is_root_again_after_an_error(directory: int) -> None:
    def check() -> None:
        with pytest.raises(FileNotFoundError), acting_as(1234, 4321):
            os.mkdir("missing/x", dir_fd=directory)
        assert touch(directory, "a") == (0, 0)

    in_a_thread(check)


@needs_root
def test_other_threads_stay_who_they_are(directory: int) -> None:
    def check() -> None:
        with acting_as(1234, 4321):
            in_a_thread(lambda: in_root(directory))

    def in_root(where: int) -> None:
        with acting_as(0, 0):
            touch(where, "by a thread started meanwhile")

    in_a_thread(check)
    assert touch(directory, "by the main thread") == (0, 0)


@needs_root
def test_capabilities_are_kept_where_only_they_help(tmp_path: Path) -> None:
    """The kernel has checked permission already; a directory that the caller's other groups open must not fail."""
    tmp_path.chmod(0o700)
    code = (
        "import os, sys\n"
        "from tierd.node.caller import acting_as, keep_capabilities\n"
        "if sys.argv[2] == 'keep': keep_capabilities()\n"
        "with acting_as(1234, 4321):\n"
        "    try: os.mkdir(sys.argv[1] + '/x')\n"
        "    except PermissionError: print('denied'); sys.exit()\n"
        "st = os.stat(sys.argv[1] + '/x')\n"
        "print(st.st_uid, st.st_gid)\n"
    )

    def run(how: str) -> str:
        repository = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", code, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
        return done.stdout.strip()

    assert run("drop") == "denied", "otherwise this test shows nothing"
    assert run("keep") == "1234 4321"


@pytest.mark.parametrize(
    ("lines", "pod"),
    [
        pytest.param(f"0::/kubepods/burstable/pod{POD}/{'c' * 64}", POD, id="v2, cgroupfs"),
        pytest.param(f"0::/kubepods/pod{POD}/{'c' * 64}", POD, id="v2, cgroupfs, guaranteed"),
        pytest.param(
            f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-x.scope",
            POD,
            id="v2, systemd",
        ),
        pytest.param(
            f"0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-{'c' * 64}.scope", POD, id="v2, systemd, guaranteed"
        ),
        pytest.param(
            f"12:hugetlb:/\n11:memory:/kubepods/besteffort/pod{POD}/{'c' * 64}\n1:name=systemd:/x",
            POD,
            id="v1, cgroupfs",
        ),
        pytest.param(
            f"11:memory:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice/docker-x.scope\n0::/",
            POD,
            id="v1, systemd",
        ),
        pytest.param(f"0::/../../kubepods-pod{POD_}.slice/x", POD, id="seen from another cgroup namespace"),
        pytest.param("0::/user.slice/user-1000.slice/session-1.scope", None, id="no pod"),
        pytest.param("0::/system.slice/podman-1234.service", None, id="podman"),
        pytest.param("0::/kubepods/burstable/pod0a1b2c3d", None, id="no UID"),
        pytest.param(f"0::/kubepods/pod{POD.upper()}/x", None, id="upper case is no UID"),
        pytest.param("0::/", None, id="own namespace"),
        pytest.param("", None, id="empty"),
    ],
)
def test_pod_by_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, pod: str | None) -> None:
    cgroup = tmp_path / "cgroup"
    cgroup.write_text(lines + "\n", encoding="ascii")
    monkeypatch.setattr(caller, "Path", lambda _: cgroup)
    assert pod_of(1234) == pod


def test_a_foreign_or_gone_process_has_no_pod() -> None:
    assert pod_of(0) is None
    assert pod_of(-1) is None
    assert pod_of(2**22 + 5) is None, "beyond pid_max"


def test_we_are_in_no_pod_or_know_which() -> None:
    cgroup = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    pod = pod_of(os.getpid())
    assert pod is None or pod in cgroup.replace("_", "-")
