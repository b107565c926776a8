"""A keeper when things go wrong: daemons that die at once, its own death, other users, junk, and nobody who serves."""

from __future__ import annotations

import array
import concurrent.futures
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import guard
from tests.conftest import DirectoryFactory, MountFactory
from tests.faulty import FaultySource
from tests.integration.calls import outcome
from tests.integration.test_handover import start
from tests.mounts import REPOSITORY, STOP_SECONDS, OverlayMount, as_user, is_mounted, raises, tierd, wait_until
from tierd.node.peer import BEAT_SECONDS, DYING_SECONDS
from tierd.runtime import is_served, keeper_path, runtime_dir

HOPELESS_SECONDS = 30.0
KEEPER_BYTES_MAX = 20_000_000
WAITING_SECONDS = 0.3
"""How long a call must be unanswered to count as one that waits."""


def events(mount: OverlayMount) -> list[str]:
    return [line["event"] for line in mount.log()]


def keep_killing(mount: OverlayMount) -> None:
    """Kill each daemon as soon as there is one, until the keeper gives up for a while."""
    (template,) = psutil.Process(mount.record.keeper_pid).children()

    def given_up() -> bool:
        for daemon in template.children():
            daemon.kill()
        return "daemon_keeps_dying" in events(mount)

    wait_until(given_up, HOPELESS_SECONDS, "the keeper gives up")


def busy_seconds(pid: int, over: float) -> float:
    """CPU time that a process takes in so many seconds."""
    before = psutil.Process(pid).cpu_times()
    time.sleep(over)
    after = psutil.Process(pid).cpu_times()
    return after.user + after.system - before.user - before.system


# --- a daemon that cannot die ---


@pytest.fixture
def faulty(new_directory: DirectoryFactory) -> Iterator[FaultySource]:
    with FaultySource(new_directory("faulty")) as source:
        yield source


@contextmanager
def killed_in_unlink(mount: OverlayMount, faulty: FaultySource) -> Iterator[concurrent.futures.Future[None]]:
    """A daemon is killed while one of its threads waits for the source, which nothing can end but the source."""
    (faulty.backing / "file").write_bytes(b"data")
    with concurrent.futures.ThreadPoolExecutor() as pool, faulty.stalling("unlink"):
        call = pool.submit((mount.mountpoint / "file").unlink)
        wait_until(lambda: faulty.stalled("unlink") == 1, STOP_SECONDS, "the source is asked")
        mount.kill_daemon()
        yield call


def test_the_next_daemon_begins_when_the_last_thread_of_the_dead_one_has_ended(
    faulty: FaultySource, overlay_mount: MountFactory
) -> None:
    """Its call would take effect beside those of the next one: it removed a name that was made anew."""
    mount = overlay_mount(faulty.mountpoint, prefetch="no")
    dead = mount.pid
    with killed_in_unlink(mount, faulty) as call:
        time.sleep(DYING_SECONDS / 2)
        assert "daemon_died" not in events(mount)
        faulty.release()
        assert call.result(STOP_SECONDS) is None
    mount.succeeded(dead)
    assert not (faulty.backing / "file").exists()
    mount.expect_log("daemon_died")


def test_a_source_that_hangs_does_not_keep_the_next_daemon_from_serving(
    faulty: FaultySource, overlay_mount: MountFactory
) -> None:
    mount = overlay_mount(faulty.mountpoint, prefetch="no")
    dead = mount.pid
    with killed_in_unlink(mount, faulty) as call:
        mount.succeeded(dead)
        assert (mount.mountpoint / "file").read_bytes() == b"data"
        faulty.release()
        assert call.result(STOP_SECONDS) is None
    assert not (mount.mountpoint / "file").exists()
    mount.expect_log("daemon_died")


# --- daemons that die at once ---


def test_while_daemons_die_at_once_calls_fail_and_nothing_is_lost(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    keeper = mount.record.keeper_pid
    assert keeper is not None
    for name in ("file", "forgotten"):
        (mount.source / name).write_bytes(b"data")
    with (mount.mountpoint / "kept").open("w+b", buffering=0) as kept:
        with (mount.mountpoint / "file").open("rb"):
            kept.write(b"before ")
            (mount.mountpoint / "forgotten").stat()
            keep_killing(mount)
            started = time.monotonic()
            for call in (lambda: os.listdir(mount.mountpoint), lambda: os.statvfs(mount.mountpoint), kept.read):
                with raises(errno.EIO):
                    call()
            with raises(errno.EIO):
                kept.write(b"lost")
            mount.drop_unused()
            assert time.monotonic() - started < 5, "at once"
        assert busy_seconds(keeper, 1.0) < 0.3
        assert psutil.Process(keeper).memory_info().rss < KEEPER_BYTES_MAX
        tierd("upgrade", mount.mountpoint)
        mount.refresh()
        assert mount.record.keeper_pid == keeper
        wait_until(lambda: mount.status()["queues"]["open_files"] == 1, STOP_SECONDS, "one file is open")
        kept.write(b"after")
        kept.seek(0)
        assert kept.read() == b"before after"
    mount.expect_log("daemon_died", "daemon_keeps_dying")


def test_a_call_that_waited_for_a_daemon_gets_its_error_in_the_end(overlay_mount: MountFactory) -> None:
    """However often it was sent again."""
    mount = overlay_mount(prefetch="no")
    stalled = mount.mountpoint / "a"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        os.kill(mount.pid, signal.SIGSTOP)
        call = pool.submit(stalled.write_bytes, b"data")
        with pytest.raises(concurrent.futures.TimeoutError):
            call.result(WAITING_SECONDS)
        keep_killing(mount)
        answer = call.exception(STOP_SECONDS)
    assert answer is None or (isinstance(answer, OSError) and answer.errno == errno.EIO)
    tierd("upgrade", mount.mountpoint)
    stalled.write_bytes(b"new")
    assert (mount.source / "a").read_bytes() == b"new"
    mount.expect_log("daemon_died", "daemon_keeps_dying")


def test_an_upgrade_to_a_daemon_that_cannot_serve_says_so(overlay_mount: MountFactory) -> None:
    """It said nothing for a minute."""
    mount = overlay_mount(prefetch="no")
    with index_gone(mount.state_dir):
        done = tierd("upgrade", mount.mountpoint, check=False)
        assert (done.returncode, "the version before goes on" in done.stderr) == (1, True), done.stderr
    tierd("upgrade", mount.mountpoint)
    (mount.mountpoint / "file").write_bytes(b"data")
    mount.expect_log("daemon_died", "daemon_cannot_serve")
    mount.allow_log("daemon_keeps_dying")


@contextmanager
def index_gone(state_dir: Path) -> Iterator[None]:
    """No daemon can start with such an index."""
    index, aside = state_dir / "index.db", state_dir / "aside"
    if index.exists():
        index.rename(aside)
    index.mkdir()
    yield
    index.rmdir()
    if aside.exists():
        aside.rename(index)


def test_daemons_that_cannot_serve_do_not_end_the_mount(overlay_mount: MountFactory) -> None:
    """They did: a successor that found the disk of its index full took the mount of all pods with it."""
    mount = overlay_mount(prefetch="no")
    (mount.source / "file").write_bytes(b"data")
    with (mount.mountpoint / "file").open("rb", buffering=0) as held:
        with index_gone(mount.state_dir):
            mount.kill_daemon()
            wait_until(lambda: "daemon_keeps_dying" in events(mount), HOPELESS_SECONDS, "the keeper gives up")
            with raises(errno.EIO):
                (mount.mountpoint / "file").stat()
        tierd("upgrade", mount.mountpoint)
        assert held.read() == b"data"
    mount.expect_log("daemon_died", "daemon_cannot_serve", "daemon_keeps_dying")


def test_a_killed_template_is_replaced(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    (template,) = psutil.Process(mount.record.keeper_pid).children()
    with (mount.mountpoint / "file").open("w+b", buffering=0) as held:
        template.kill()
        mount.succeeded(mount.kill_daemon())
        assert held.write(b"data") == 4
    mount.expect_log("daemon_died")


def test_an_upgrade_to_what_does_not_work_leaves_everything_as_it_was(
    overlay_mount: MountFactory, new_directory: DirectoryFactory
) -> None:
    """The old daemon went on; but what came after its death was to be of the version that does not work."""
    mount = overlay_mount(prefetch="no")
    daemon, python = mount.pid, new_directory("bare") / "python"
    python.symlink_to(os.path.realpath(sys.executable))  # has none of the packages
    with connected(mount) as sock:
        sock.send(b"U" + json.dumps({"python": str(python), "root": str(REPOSITORY)}).encode())
        assert b"the version before goes on" in sock.recv(1000)
    python.unlink()
    with (mount.mountpoint / "file").open("w+b", buffering=0) as held:
        mount.succeeded(mount.kill_daemon())
        assert held.write(b"data") == 4
    assert mount.pid != daemon
    mount.expect_log("daemon_died")


def test_daemons_of_a_python_that_was_removed(overlay_mount: MountFactory, new_directory: DirectoryFactory) -> None:
    """The keeper ended of it. Whoever mounts by a wrapper, or moves a virtual environment, may have that."""
    mount = overlay_mount(prefetch="no")
    wrapper = new_directory("wrapper") / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    (mount.source / "file").write_bytes(b"data")
    with connected(mount) as sock:
        sock.send(b"U" + json.dumps({"python": str(wrapper), "root": str(REPOSITORY)}).encode())
        assert b"restarts" in sock.recv(1000)
    mount.refresh()
    for child in psutil.Process(mount.record.keeper_pid).children():
        child.kill()
    wrapper.unlink()
    mount.kill_daemon()
    wait_until(lambda: "daemon_keeps_dying" in events(mount), HOPELESS_SECONDS, "the keeper gives up")
    assert outcome((mount.mountpoint / "file").read_bytes) == "EIO"
    tierd("upgrade", mount.mountpoint)
    assert (mount.mountpoint / "file").read_bytes() == b"data"
    mount.expect_log("daemon_died", "no_daemon_started", "daemon_keeps_dying")


def test_a_stop_while_no_daemon_has_begun(overlay_mount: MountFactory) -> None:
    """There is nobody to wait for."""
    mount = overlay_mount(prefetch="no")
    (template,) = psutil.Process(mount.record.keeper_pid).children()
    template.suspend()
    try:
        mount.kill_daemon()
        wait_until(lambda: "daemon_died" in events(mount), STOP_SECONDS, "the keeper notices")
        tierd("umount", mount.mountpoint, "--timeout", "5")
        assert not is_mounted(mount.mountpoint)
    finally:
        template.resume()
    mount.expect_log("daemon_died")


@pytest.mark.campaign
def test_another_start_is_tried_by_itself(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    (mount.source / "file").write_bytes(b"data")
    keep_killing(mount)
    wait_until(lambda: outcome((mount.mountpoint / "file").read_bytes) == b"data", 60, "another daemon serves")
    mount.expect_log("daemon_died", "daemon_keeps_dying")


# --- the keeper's own death ---


def kill_keeper(mount: OverlayMount) -> None:
    end_keeper(mount)
    await_keeper_gone(mount)


def end_keeper(mount: OverlayMount) -> None:
    assert mount.record.keeper_pid is not None
    os.kill(mount.record.keeper_pid, signal.SIGKILL)


def await_keeper_gone(mount: OverlayMount) -> None:
    wait_until(lambda: "keeper_gone" in events(mount), STOP_SECONDS, "the daemon notices")
    mount.expect_log("keeper_gone")


def test_a_daemon_without_its_keeper_serves_on_and_keeps_others_out(
    overlay_mount: MountFactory, new_directory: DirectoryFactory
) -> None:
    """The locks were the keeper's: another mount could work in the same directories."""
    mount, other, elsewhere = overlay_mount(prefetch="no"), new_directory("other"), new_directory("elsewhere")
    with (mount.mountpoint / "file").open("w+b", buffering=0) as held:
        kill_keeper(mount)
        held.write(b"data")
        assert (mount.mountpoint / "file").read_bytes() == b"data"
        mount.refresh()
        assert (mount.record.keeper_pid, mount.status()["handover"]) == (None, "none")
        for taken in ("--state-dir", "--cache-dir"):
            private = {"--state-dir": other / "state", "--cache-dir": other / "cache", "--metrics": "127.0.0.1:0"}
            private[taken] = mount.state_dir if taken == "--state-dir" else mount.cache_dir
            words = [str(word) for pair in private.items() for word in pair]
            done = tierd("mount", mount.source, elsewhere, "--background", *words, check=False)
            assert (done.returncode, f"process {mount.pid}" in done.stderr) == (2, True), done.stderr
        assert held.read() == b""
    tierd("umount", mount.mountpoint)
    assert not is_mounted(mount.mountpoint)
    assert not runtime_dir(mount.mountpoint).exists()
    mount.start()
    assert (mount.mountpoint / "file").read_bytes() == b"data"


def test_a_mount_ends_with_its_daemon_if_there_is_no_keeper(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(prefetch="no")
    kill_keeper(mount)
    mount.refresh()
    mount.end(signal.SIGKILL)
    with raises(errno.ENOTCONN):
        os.statvfs(mount.mountpoint)
    assert not is_served(mount.mountpoint)
    mount.start()
    assert os.listdir(mount.mountpoint) == []


def test_a_daemon_whose_directory_was_taken_when_its_keeper_died_ends(overlay_mount: MountFactory) -> None:
    """Two that write to one cache are worse than a mount that ends."""
    mount = overlay_mount(prefetch="no")
    with (mount.cache_dir / "lock").open("r+b") as lock:
        os.kill(mount.pid, signal.SIGSTOP)
        end_keeper(mount)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.kill(mount.pid, signal.SIGCONT)
        await_keeper_gone(mount)
        wait_until(lambda: not mount.alive and not is_mounted(mount.mountpoint), STOP_SECONDS, "it ends in order")
    (told,) = (line for line in mount.log() if line["event"] == "keeper_gone")
    assert told["consequence"] == "this daemon ends"


# --- who may speak to it ---


def connected(mount: OverlayMount) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(os.fspath(keeper_path(mount.mountpoint)))
    sock.settimeout(STOP_SECONDS)
    return sock


def descriptors_of(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


SPEAK = """
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(20)
sock.connect(sys.argv[1])
sock.send(sys.argv[2].encode())
print(sock.recv(1000))
"""


def test_other_users_are_not_heard(overlay_mount: MountFactory) -> None:
    """By the mode of the socket; and by who they are, should somebody open its path."""
    mount = overlay_mount()
    path = keeper_path(mount.mountpoint)
    assert as_user(4711, 4711, SPEAK, path, "K") == "EACCES"
    path.parent.chmod(0o755)
    path.chmod(0o666)
    upgrade = f'U{{"python": "{sys.executable}", "root": "/nowhere"}}'
    for message in ("K", "P1", upgrade):
        assert as_user(4711, 4711, SPEAK, path, message) in ("b''", "EPIPE", "ECONNRESET")
    path.parent.chmod(0o700)
    serving = mount.record
    (mount.mountpoint / "file").write_bytes(b"data")
    mount.refresh()
    assert mount.record == serving


JUNK = (
    b"x", b"\0" * 100_000, b"U", b"U{", b"U[]", b'U{"python": 1}', b'U{"python": "/nowhere", "root": "/"}',
    b"h5", b"q2", b"d1", b"L", b"r1", b"l", b"K",
)  # fmt: skip


def test_junk_does_no_harm(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    keeper, daemon = mount.record.keeper_pid, mount.pid
    before = descriptors_of(keeper)
    rights = array.array("i", [0, 1, 2])
    for message in JUNK:
        with connected(mount) as sock:
            sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    (mount.mountpoint / "file").write_bytes(b"data")
    wait_until(lambda: descriptors_of(keeper) == before, STOP_SECONDS, "what came along is closed")
    told = tierd("upgrade", mount.mountpoint)
    mount.refresh()
    assert (mount.record.keeper_pid, mount.status()["restarts"]) == (keeper, 1), told
    assert mount.pid != daemon


def test_a_command_that_cannot_be_obeyed_is_answered(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    for message in (b"U", b'U{"python": "/nowhere", "root": "/"}'):
        with connected(mount) as sock:
            sock.send(message)
            assert b"cannot go on so" in sock.recv(1000)


def test_whoever_is_silent_holds_nobody_up(overlay_mount: MountFactory) -> None:
    """Each cost the keeper a second, in which no daemon was started."""
    mount = overlay_mount()
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(mount)) for _ in range(40)]
        started = time.monotonic()
        mount.succeeded(mount.kill_daemon())
        assert (mount.mountpoint / "file").write_bytes(b"data") == 4
        assert time.monotonic() - started < 3
        assert silent[0].recv(1) == b"", "they are not kept for ever"
        assert descriptors_of(mount.record.keeper_pid) < 60
    mount.expect_log("daemon_died")


def test_a_keeper_that_did_not_take_over_leaves_the_mount_to_the_one_before(overlay_mount: MountFactory) -> None:
    """It had ended before the other one had anything."""
    mount = overlay_mount()
    keeper = mount.record.keeper_pid
    with connected(mount) as sock:
        sock.send(b"K")
        assert sock.recv(1 << 18)[:1] == b"J"
    with connected(mount) as silent:
        silent.send(b"K")
        (mount.mountpoint / "file").write_bytes(b"data")
        tierd("upgrade", mount.mountpoint)
    mount.refresh()
    assert mount.record.keeper_pid == keeper


def test_a_daemon_that_attaches_and_dies_costs_a_wait(overlay_mount: MountFactory) -> None:
    mount = overlay_mount()
    for message in ("P1", "Pjunk"):
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import socket, sys\n{SPEAK}",
            keeper_path(mount.mountpoint),
            message,
        ]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=STOP_SECONDS)
        (mount.mountpoint / "file").write_bytes(b"data")
    wait_until(lambda: is_served(mount.mountpoint), STOP_SECONDS, "it is served")
    mount.refresh()
    assert (mount.mountpoint / "file").read_bytes() == b"data"
    mount.expect_log("daemon_died")


# --- a keeper of its own ---


class Kept:
    """A keeper that starts no daemons, and daemons that tests start; all end with the test."""

    def __init__(self, base: Path, source: Path, *, apart: bool = False) -> None:
        """`apart`: the keeper lives in a PID namespace of its own, as in a pod."""
        self.mountpoint, self.state = base / "mnt", base / "state"
        self.mountpoint.mkdir()
        (source / "file").write_bytes(b"data")
        private = ["--state-dir", self.state, "--cache-dir", base / "cache", "--metrics", "127.0.0.1:0"]
        self._arguments = [str(word) for word in (source, self.mountpoint, *private)]
        self._started: list[subprocess.Popen[bytes]] = []
        self.log_file = base / "log"
        self.keeper = self.start("keeper", under=("unshare", "--pid", "--fork", "--kill-child") if apart else ())
        wait_until(lambda: is_mounted(self.mountpoint), STOP_SECONDS, "it is mounted")
        self.pool = concurrent.futures.ThreadPoolExecutor()

    def start(self, command: str, *options: str, under: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        log = ("--log-file", str(self.log_file))
        self._started.append(start(command, *self._arguments, *log, *options, under=under))
        return self._started[-1]

    def attached(self) -> subprocess.Popen[bytes]:
        """A daemon that is on its way."""
        return self.start("mount", "--attach")

    def waiting(self, call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """A call that is not answered."""
        future = self.pool.submit(call)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(WAITING_SECONDS)
        return future

    def end(self) -> None:
        """However it went."""
        for process in self._started:
            process.kill()
            process.wait()
        guard.unmount(self.mountpoint, lazy=True)
        self.pool.shutdown()


@pytest.fixture
def kept(new_directory: DirectoryFactory) -> Iterator[Kept]:
    made = Kept(new_directory("kept"), new_directory("source"))
    yield made
    made.end()


def ended(process: subprocess.Popen[bytes]) -> int:
    return process.wait(STOP_SECONDS)


def test_calls_wait_until_a_daemon_is_started(kept: Kept) -> None:
    """The first one, and the next after a kill, whoever keeps the mount by then."""
    file = kept.mountpoint / "file"
    call = kept.waiting(file.read_bytes)
    first = kept.attached()
    assert call.result(STOP_SECONDS) == b"data"
    with file.open("rb", buffering=0) as held:
        first.kill()
        call = kept.waiting(file.with_name("new").touch)
        newer = kept.start("keeper", "--take-over")
        assert ended(kept.keeper) == 0
        assert not call.done()
        second = kept.attached()
        call.result(STOP_SECONDS)
        assert held.read() == b"data"
    newer.terminate()
    assert [ended(newer), ended(second)] == [0, 0]
    assert not is_mounted(kept.mountpoint)
    assert not runtime_dir(kept.mountpoint).exists()


def test_of_several_that_attach_at_once_one_serves(kept: Kept) -> None:
    """Calls hung: of two that waited one was forgotten, and when it ended, so was the other."""
    file = kept.mountpoint / "file"
    daemons = [kept.attached()]
    assert file.read_bytes() == b"data"
    daemons += [kept.attached() for _ in range(3)]
    wait_until(lambda: sum(one.poll() is None for one in daemons) == 1, STOP_SECONDS, "all but one end")
    assert kept.pool.submit(file.read_bytes).result(STOP_SECONDS) == b"data"
    assert {one.poll() for one in daemons} <= {None, 0, 1}
    assert daemons[0].poll() == 0
    kept.keeper.terminate()
    assert ended(kept.keeper) == 0


def test_an_attached_daemon_that_cannot_serve_does_not_end_the_mount(kept: Kept) -> None:
    """It did, with all that was open."""
    file = kept.mountpoint / "file"
    with index_gone(kept.state):
        assert ended(kept.attached()) == 2
        call = kept.waiting(file.read_bytes)
    first = kept.attached()
    assert call.result(STOP_SECONDS) == b"data"
    with file.open("rb", buffering=0) as held:
        first.kill()
        ended(first)
        with index_gone(kept.state):
            assert ended(kept.attached()) == 2
        kept.attached()
        assert held.read() == b"data"
    kept.keeper.terminate()
    assert ended(kept.keeper) == 0


@pytest.mark.campaign
def test_a_daemon_that_was_given_up_and_cannot_be_killed_leaves_the_mount_to_the_next(
    new_directory: DirectoryFactory,
) -> None:
    """It sees its keeper gone, and would have ended the mount."""
    kept = Kept(new_directory("kept"), new_directory("source"), apart=True)
    try:
        first, file = kept.attached(), kept.mountpoint / "file"
        assert kept.pool.submit(file.read_bytes).result(STOP_SECONDS) == b"data"
        first.send_signal(signal.SIGSTOP)
        wait_until(lambda: "daemon_died" in kept.log_file.read_text(), BEAT_SECONDS + STOP_SECONDS, "it is given up")
        kept.attached()
        assert kept.pool.submit(file.with_name("new").write_bytes, b"data").result(STOP_SECONDS) == 4
        first.send_signal(signal.SIGCONT)
        assert ended(first) == 1
        assert "given_up_by_keeper" in kept.log_file.read_text()
        assert file.with_name("new").read_bytes() == b"data"
    finally:
        kept.end()


def test_a_keeper_without_a_daemon_ends(kept: Kept) -> None:
    kept.keeper.terminate()
    assert ended(kept.keeper) == 0
    assert not is_mounted(kept.mountpoint)
    assert not runtime_dir(kept.mountpoint).exists()
