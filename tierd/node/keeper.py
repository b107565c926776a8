"""The keeper of a mount: holds what must outlive the daemon, and sees to it that there is one. Standard library only.

It mounts, and holds the FUSE device, the locks, the listening sockets, the ledger and the descriptors of the source
that are open; of a daemon's death pods notice a wait. Daemons are forked by a *template*, a process that has imported
everything (`template.py`), or connect to the keeper's socket. What they say to each other is in `packets.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, cast

from tierd.node.device import MountError
from tierd.node.handing import become, clean_up, descriptors, give, hush, log_plainly, offer, start_template, state_from
from tierd.node.packets import LEDGER, is_ours, pair, receive, send, send_held
from tierd.node.peer import Peer, Succession
from tierd.node.vault import Vault

LEAVE_SECONDS, STOP_SECONDS, RETRY_SECONDS, COMMAND_SECONDS, TICK_MS = 2.0, 25.0, 30.0, 1.0, 100


class Keeper:
    """`state` is all that it must know, as JSON, with descriptors as numbers: what another keeper's `export` says."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state, self.succession, self.start_at = state, Succession(), 0.0
        self.poll, self.handlers = select.poll(), dict[int, Callable[[], None]]()
        self.daemon = self.newer = cast(Peer | None, None)
        self.stop_by, self.exit_code = cast(float | None, None), cast(int | None, None)
        self.listener = socket.socket(fileno=state["listener"])
        self.watch(self.listener, self.accept)
        held = {int(key): fd for key, fd in state["held"].items()}
        self.vault = Vault(held, state["mountpoint"], allow_other=state["allow_other"])
        self.template = None if state["template"] is None else socket.socket(fileno=state["template"])
        if state["daemon"] is not None:
            fd, pid, ready_at = state["daemon"]
            self.daemon = self.attach(socket.socket(fileno=fd), pid, ready_at)
            self.daemon.tell(b"k%d" % os.getpid())
        self.asker = None if state["asker"] is None else socket.socket(fileno=state["asker"])
        if self.asker is not None:
            self.upgrade()

    def log(self, event: str, level: str = "info", **facts: object) -> None:
        if level in self.state["log_levels"]:
            log_plainly(event, level, facts, file=self.state["log_file"], as_json=self.state["log_json"])

    def watch(self, sock: socket.socket, handler: Callable[[socket.socket], None]) -> None:
        self.handlers[sock.fileno()] = lambda: handler(sock)
        self.poll.register(sock, select.POLLIN)

    def unwatch(self, sock: socket.socket) -> None:
        if self.handlers.pop(sock.fileno(), None):
            self.poll.unregister(sock)
        sock.close()

    def run(self) -> int:
        """Keep the mount until it shall end; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        while self.exit_code is None:
            for fd, _ in self.poll.poll(TICK_MS):
                self.handlers.get(fd, int)()
            self.tick(time.monotonic())
        self.vault.unmount()
        clean_up(self.state)
        return self.exit_code

    def stop(self, number: int, _frame: object) -> None:
        if self.stop_by is None:
            self.stop_by = time.monotonic() + STOP_SECONDS
            self.log("stopping", signal=signal.Signals(number).name)

    def tick(self, now: float) -> None:
        """What time brings: a death, the end, a beginning."""
        for peer in (self.daemon, self.newer):
            if peer is not None and peer.dead(now):
                self.gone(peer)
        if self.stop_by is not None and self.daemon is None:
            self.exit_code = self.exit_code or 0
        elif self.stop_by is not None and self.daemon is not None and self.daemon.leave_by is None:
            self.daemon.leave_by = self.stop_by
            self.daemon.tell(b"s")
        elif self.daemon is None and self.exit_code is None and now >= self.start_at and self.state["argv"]:
            self.relieve()
            self.daemon = self.fork()

    def fork(self) -> Peer:
        """Have the template, a new one if it is gone, make a daemon."""
        ours, theirs = pair()
        with theirs:
            if self.template is None or not offer(self.template, theirs.fileno()):
                self.template = start_template(self.state["argv"])
                offer(self.template, theirs.fileno())
        return self.attach(ours)

    def attach(self, sock: socket.socket, pid: int = 0, ready_at: float = 0.0) -> Peer:
        peer = Peer(sock, pid, ready_at)
        self.watch(sock, lambda _: self.hear(peer))
        return peer

    def hear(self, peer: Peer) -> None:
        """One message of a daemon, or its end."""
        try:
            data, fds = receive(peer.sock)
        except OSError:
            data, fds = b"", []
        kind, body, peer.heard = data[:1], data[1:], time.monotonic()
        if kind == b"P":
            peer.pid = int(body)
            self.introduce(peer)
        elif kind in (b"h", b"L") and fds:
            self.vault.hold(LEDGER if kind == b"L" else int(body), fds[0])
        elif kind == b"d":
            self.vault.drop(int(body))
        elif kind == b"r":
            self.ready(peer, resend=body == b"1")
        elif kind == b"l":
            peer.leaving = True
        elif kind == b"q":
            peer.code = int(body)
        elif not kind:
            self.gone(peer)

    def introduce(self, peer: Peer) -> None:
        """Give everything to a daemon; if another one serves, once that has left."""
        if self.daemon is not None and self.daemon is not peer:
            self.newer, self.daemon.leave_by, self.daemon.leaving = peer, time.monotonic() + LEAVE_SECONDS, True
            return self.daemon.tell(b"l")
        self.relieve()
        self.daemon = peer
        told = {key: self.state[key] for key in ("told", "restarts", "resend")}
        peer.tell(b"J" + json.dumps({**told, "keeper_pid": os.getpid()}).encode())
        with suppress(OSError):
            send_held(peer.sock, self.vault.for_daemons())
        return None

    def ready(self, peer: Peer, *, resend: bool) -> None:
        peer.ready_at, self.state["resend"], self.state["served"] = time.monotonic(), resend, True
        if self.state["quiet"] and self.template is not None:
            self.state["quiet"] = False
            hush()
            with suppress(OSError):
                send(self.template, b"q")
        self.answer(pid=peer.pid, keeper_pid=os.getpid(), restarts=self.state["restarts"])

    def gone(self, peer: Peer) -> None:
        """A daemon has ended; unless it meant to, another one takes over."""
        self.unwatch(peer.sock)
        if peer.code is None:
            peer.kill()
        if peer is not self.daemon:
            self.newer = None
            return self.answer(error="the new daemon ended before it took over; the old one serves on")
        self.daemon, newer, self.newer = None, self.newer, None
        hopeless = not self.state["served"] and self.state["argv"]
        if newer is None and (peer.code is not None or self.stop_by is not None or hopeless):
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
            self.handlers[stand_in.fileno()] = stand_in.answer
            self.poll.register(stand_in, select.POLLIN)
            self.log("daemon_keeps_dying", "error", callers_get="EIO", next_start_in_seconds=delay)
        self.start_at = now + delay
        event, level = ("daemon_left", "info") if peer.leaving else ("daemon_died", "warning")
        self.log(event, level, pid=peer.pid, restarts=self.state["restarts"], quick_deaths=self.succession.quick_deaths)

    def relieve(self) -> None:
        if self.vault.stand_in is not None:
            del self.handlers[self.vault.stand_in.fileno()]
            self.poll.unregister(self.vault.stand_in)
        self.vault.relieve()

    def accept(self, listener: socket.socket) -> None:
        sock = listener.accept()[0]
        sock.settimeout(COMMAND_SECONDS)
        kind = data = b""
        with suppress(OSError):
            kind = sock.recv(1, socket.MSG_PEEK) if is_ours(sock) else b""
            data = receive(sock)[0] if kind in (b"U", b"K") else b""
        sock.settimeout(None)
        if kind == b"P":
            self.attach(sock)
        elif data[:1] == b"U":
            request = json.loads(data[1:])
            self.asker, self.state["argv"][:1] = sock, [request["python"]] * bool(self.state["argv"])
            become(request["python"], request["root"], self.export())
        elif data[:1] == b"K":
            give(sock, self.export())
        else:
            sock.close()

    def upgrade(self) -> None:
        """A daemon of the newest code takes over from the one that serves; those started elsewhere are not ours to."""
        if self.state["argv"]:
            self.template = start_template(self.state["argv"])
            self.newer = self.fork()
        else:
            self.answer(pid=self.daemon and self.daemon.pid, keeper_pid=os.getpid(), restarts=self.state["restarts"])

    def answer(self, **facts: object) -> None:
        if self.asker is not None:
            with self.asker, suppress(OSError):
                send(self.asker, json.dumps(facts).encode())
            self.asker = None

    def export(self) -> dict[str, Any]:
        """What another keeper needs to go on from here."""
        return {
            **self.state,
            "held": self.vault.held,
            "listener": self.listener.fileno(),
            "template": self.template.fileno() if self.template is not None else None,
            "daemon": self.daemon and [self.daemon.sock.fileno(), self.daemon.pid, self.daemon.ready_at],
            "asker": self.asker.fileno() if self.asker is not None else None,
        }


def main(argument: str) -> NoReturn:
    """Keep what the argument says (see `state_from`)."""
    with suppress(OSError):  # as the daemon, whose files it is to hold before the daemon may die
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    state = state_from(argument)
    for fd in descriptors(state):
        os.set_inheritable(fd, False)
    try:
        code = Keeper(state).run()
    except MountError as error:
        sys.stderr.write(f"tierd: {error}\n  hint: {error.hint}\n")
        clean_up(state)
        code = 1
    sys.exit(code)
