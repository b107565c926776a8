"""The keeper of a mount: holds what must outlive the daemon, and sees to it that there is one. Standard library only.

It mounts, and holds the FUSE device, the locks, the listening sockets, the ledger and the descriptors of the source
that are open; of a daemon's death pods notice a wait. Daemons are forked by a *template*, a process that has imported
everything (`template.py`), or connect to the keeper's socket. What they say to each other is in `packets.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn, cast

from tierd.node import handing
from tierd.node.board import Board, Door
from tierd.node.device import MountError
from tierd.node.packets import LEDGER, pair, pid_of, send, send_held
from tierd.node.peer import Peer, Succession
from tierd.node.vault import Vault

LEAVE_SECONDS, STOP_SECONDS, RETRY_SECONDS, TICK_MS = 2.0, 25.0, 30.0, 100


class Keeper:
    """`state` is all that it must know, as JSON, with descriptors as numbers: what another keeper's `export` says."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.succession, self.start_at = state, Succession(), 0.0
        self.daemon = self.newer = self.upgraded = cast(Peer | None, None)
        self.stop_by, self.exit_code = cast(float | None, None), cast(int | None, None)
        self.board = Board()
        self.door = Door(self.board, socket.socket(fileno=state["listener"]), self.meet)
        held = {int(key): fd for key, fd in state["held"].items()}
        self.vault = Vault(held, state["mountpoint"], allow_other=state["allow_other"])
        self.template = None if state["template"] is None else socket.socket(fileno=state["template"])
        if state["daemon"] is not None:
            fd, pid, ready_at = state["daemon"]
            sock = socket.socket(fileno=fd)
            self.daemon = self.attach(sock, pid if state["argv"] else pid_of(sock), ready_at)
            self.daemon.tell(b"k%d" % os.getpid())
        self.asker = None if state["asker"] is None else socket.socket(fileno=state["asker"])
        if self.asker is not None:
            self.upgrade()

    def log(self, event: str, level: str = "info", **facts: object) -> None:
        if level in self.state["log_levels"]:
            handing.log_plainly(event, level, facts, file=self.state["log_file"], as_json=self.state["log_json"])

    def run(self) -> int:
        """Keep the mount until it shall end; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        while self.exit_code is None:
            self.board.turn(TICK_MS)
            self.tick(time.monotonic())
        self.vault.unmount()
        handing.clean_up(self.state)
        return self.exit_code

    def stop(self, number: int, _frame: object) -> None:
        if self.stop_by is None:
            self.stop_by = time.monotonic() + STOP_SECONDS
            self.log("stopping", signal=signal.Signals(number).name)

    def tick(self, now: float) -> None:
        """What time brings: a death, the end, a beginning."""
        for peer in filter(None, (self.daemon, self.newer)):
            if peer.dead(now):
                self.gone(peer)
        if self.stop_by is not None and (self.daemon is None or self.daemon.pid is None):  # nobody who has anything
            self.exit_code = self.exit_code or 0
        elif self.daemon is not None and self.stop_by is not None and self.daemon.leave_by is None:
            self.daemon.leave_by = self.stop_by
            self.daemon.tell(b"s")
        elif self.daemon is None and self.exit_code is None and now >= self.start_at and self.state["argv"]:
            self.relieve()
            self.daemon = self.fork()

    def fork(self) -> Peer:
        """Have the template, a new one if it is gone, make a daemon. What comes to nothing ends its socket."""
        ours, theirs = pair()
        with theirs:
            if self.template is None or not handing.offer(self.template, theirs.fileno()):
                try:
                    self.template = handing.start_template(self.state["argv"])
                    handing.offer(self.template, theirs.fileno())
                except OSError as error:  # that Python was removed, or there is no memory
                    self.log("no_daemon_started", "error", reason=str(error))
        return self.attach(ours)

    def attach(self, sock: socket.socket, pid: int | None = None, ready_at: float = 0.0) -> Peer:
        peer = Peer(sock, pid, ready_at)
        self.board.listen(sock, lambda data, fds: self.heed(peer, data, fds))
        return peer

    def drop(self, peer: Peer) -> None:
        self.board.unwatch(peer.sock)
        peer.sock.close()

    def heed(self, peer: Peer, data: bytes, fds: list[int]) -> None:
        """One message of a daemon, or its end."""
        kind, body, peer.heard = data[:1], data[1:], time.monotonic()
        number = int(body) if body.isdigit() else 0
        if kind == b"P":
            peer.pid = number if peer.pid is None else peer.pid
            self.introduce(peer)
        elif kind in (b"h", b"L") and fds:
            self.vault.hold(LEDGER if kind == b"L" else number, fds.pop(0))
        elif kind == b"d":
            self.vault.drop(number)
        elif kind == b"r":
            self.ready(peer, resend=body == b"1")
        elif kind == b"l":
            peer.leaving = True
        elif kind == b"q":
            peer.code = number
        elif not kind:
            self.gone(peer)

    def introduce(self, peer: Peer) -> None:
        """Give everything to a daemon; if another one serves, once that has left."""
        if self.daemon is not None and self.daemon is not peer:
            if self.newer is not None and self.newer is not peer:  # the newest takes over; this one ends for it
                self.missed(self.newer)
                self.drop(self.newer)
            self.newer = peer
            self.daemon.leave_by, self.daemon.leaving = time.monotonic() + LEAVE_SECONDS, True
            return self.daemon.tell(b"l")
        self.relieve()
        self.daemon = peer
        told = {key: self.state[key] for key in ("told", "restarts", "resend")}
        try:
            send(peer.sock, b"J" + json.dumps({**told, "keeper_pid": os.getpid()}).encode())
            send_held(peer.sock, self.vault.for_daemons())
        except OSError:  # it has died, or does not listen
            self.gone(peer)
        return None

    def ready(self, peer: Peer, *, resend: bool) -> None:
        peer.ready_at, self.state["resend"], self.state["served"] = time.monotonic(), resend, True
        if self.state["quiet"] and self.template is not None:
            self.state["quiet"] = False
            handing.hush()
            with suppress(OSError):
                send(self.template, b"q")
        if peer is self.upgraded:
            self.answer(pid=peer.pid, keeper_pid=os.getpid(), restarts=self.state["restarts"])

    def gone(self, peer: Peer) -> None:
        """A daemon has ended; unless it meant to, another one takes over."""
        self.drop(peer)
        if peer.code is None:
            peer.kill()
        self.missed(peer)
        if peer is not self.daemon:
            self.newer = None if peer is self.newer else self.newer
            return None
        self.daemon, newer, self.newer = None, self.newer, None
        never_came_up = not self.state["served"] and self.state["argv"]
        if newer is None and (peer.code == 0 or self.stop_by is not None or never_came_up):
            self.exit_code = 1 if peer.code is None else peer.code
            return None
        self.state["restarts"] += 1
        if not self.state["resend"]:
            self.log("remounting", "warning", reason="this kernel cannot send requests again")
            self.vault.remount()
        return self.introduce(newer) if newer is not None else self.succeed(peer, time.monotonic())

    def succeed(self, peer: Peer, now: float) -> None:
        """When the next one starts; if there is no keeping one alive, callers get errors meanwhile."""
        delay = self.succession.died(now - peer.ready_at if peer.ready_at else 0.0)
        if self.succession.hopeless and self.state["resend"]:
            delay = RETRY_SECONDS
            stand_in = self.vault.stand_by()
            self.board.watch(stand_in, stand_in.answer)
            self.log("daemon_keeps_dying", "error", callers_get="EIO", next_start_in_seconds=delay)
        self.start_at = now + delay
        event, level = ("daemon_left", "info") if peer.leaving else ("daemon_died", "warning")
        self.log(event, level, pid=peer.pid, restarts=self.state["restarts"], quick_deaths=self.succession.quick_deaths)

    def relieve(self) -> None:
        if self.vault.stand_in is not None:
            self.board.unwatch(self.vault.stand_in)
        self.vault.relieve()

    def meet(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        """Somebody connected: a daemon, a command, or nothing of ours."""
        if data[:1] == b"P":
            return self.heed(self.attach(sock, pid_of(sock)), data, fds)
        if data[:1] == b"U":
            self.asker = sock
            return self.answer(error=f"the keeper cannot go on so: {handing.become_as_asked(data[1:], self.export())}")
        if data[:1] == b"K":
            handing.give(sock, self.export())
        return sock.close()

    def upgrade(self) -> None:
        """A daemon of the newest code takes over from the one that serves; those started elsewhere are not ours to."""
        if self.state["argv"]:
            self.template = None
            peer = self.fork()
            self.daemon, self.newer = (self.daemon, peer) if self.daemon is not None else (peer, None)
            self.upgraded = peer
        else:
            self.answer(pid=self.daemon and self.daemon.pid, keeper_pid=os.getpid(), restarts=self.state["restarts"])

    def missed(self, peer: Peer) -> None:
        """A daemon will not serve; if it was to be one of another version, the next ones are as before."""
        if peer is self.upgraded:
            self.template, self.state["argv"] = None, self.state["argv_before"]
            self.answer(error="the new daemon ended before it served; the version before goes on")

    def answer(self, **facts: object) -> None:
        self.upgraded = None
        if self.asker is not None:
            with self.asker, suppress(OSError):
                send(self.asker, json.dumps(facts).encode())
            self.asker = None

    def export(self) -> dict[str, Any]:
        """What another keeper needs to go on from here."""
        return {
            **self.state,
            "held": self.vault.held,
            "listener": self.door.listener.fileno(),
            "template": self.template.fileno() if self.template is not None else None,
            "daemon": self.daemon and [self.daemon.sock.fileno(), self.daemon.pid, self.daemon.ready_at],
            "asker": self.asker.fileno() if self.asker is not None else None,
        }


def main(argument: str) -> NoReturn:
    """Keep what the argument says (see `state_from`)."""
    with suppress(OSError):  # as the daemon, whose files it is to hold before the daemon may die
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    state = handing.state_from(argument)
    for fd in handing.descriptors(state):
        os.set_inheritable(fd, False)
    try:
        code = Keeper(state).run()
    except MountError as error:
        sys.stderr.write(f"tierd: {error}\n  hint: {error.hint}\n")
        handing.clean_up(state)
        code = 1
    sys.exit(code)
