"""How a keeper becomes, or hands everything to, a keeper of another version. Standard library only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

from tierd.node.packets import pair, receive, receive_held, send, send_held


def descriptors(state: dict[str, Any]) -> list[int]:
    """Every descriptor that a state names."""
    daemon = state["daemon"] or [None]
    found = [*state["held"].values(), state["listener"], state["template"], daemon[0], state["asker"]]
    return [fd for fd in found if fd is not None]


GIVE_SECONDS: Final = 2.0


def give(sock: socket.socket, state: dict[str, Any]) -> None:
    """Hand everything to the keeper that asked for it, and end; return if it did not take it."""
    sock.settimeout(GIVE_SECONDS)
    with suppress(OSError):
        send(sock, b"J" + json.dumps(state).encode())
        send_held(sock, {fd: fd for fd in descriptors(state)})
        if receive(sock)[0] == b".":
            os._exit(0)


def take(path: str) -> dict[str, Any]:
    """The state of the keeper that listens at `path`, which ends then. Raises OSError, EOFError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        send(sock, b"K")
        state: dict[str, Any] = json.loads(receive(sock)[0][1:])
        ours = receive_held(sock)
        send(sock, b".")
    daemon = state["daemon"]
    return {
        **state,
        "held": {key: ours[fd] for key, fd in state["held"].items()},
        "daemon": daemon and [ours[daemon[0]], *daemon[1:]],
        **{name: state[name] and ours[state[name]] for name in ("listener", "template", "asker")},
    }


_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from tierd.node.keeper import main; main(sys.argv[2])"


def become(python: str, root: str, state: dict[str, Any]) -> NoReturn:
    """Go on as a keeper, in this process and with all its descriptors: by the code that lies below `root`.

    Raises OSError, and has changed nothing then.
    """
    memory = os.memfd_create("tierd-keeper")
    with open(memory, "wb", closefd=False) as file:
        file.write(json.dumps(state).encode())
    try:
        for fd in (memory, *descriptors(state)):
            os.set_inheritable(fd, True)
        become_by(python, root, str(memory))
    finally:  # there is no such Python
        for fd in descriptors(state):
            os.set_inheritable(fd, False)
        os.close(memory)


def become_as_asked(asked: bytes, state: dict[str, Any]) -> str:
    """Go on as the Python and the code that the JSON of a command names; why not, if that cannot be."""
    try:
        told = json.loads(asked)
        python, root = str(told["python"]), str(told["root"])
        argv = state["argv"]
        become(python, root, {**state, "argv": argv and [python, *argv[1:]], "argv_before": argv})
    except (OSError, ValueError, LookupError, TypeError) as error:
        return repr(error)


def become_by(python: str, root: str, argument: str) -> NoReturn:
    """Go on as the keeper that `argument` says (see `state_from`)."""
    os.execv(python, [python, "-I", "-S", "-c", _PROGRAM, root, argument])


def state_from(argument: str) -> dict[str, Any]:
    """What a keeper was told to keep: the number of a descriptor, or the socket of the keeper to take over from."""
    if argument.startswith("/"):
        return take(argument)
    with open(int(argument), "rb", buffering=0) as file:
        file.seek(0)
        state: dict[str, Any] = json.loads(file.read())
    return state


def clean_up(state: Mapping[str, Any]) -> None:
    """Remove what a mount leaves: `remove` in any case, `remove_if_alone` if nothing else lies beside it."""
    for path in state["remove"]:
        with suppress(OSError):  # a directory that is not empty stays
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    for path in state["remove_if_alone"]:
        with suppress(OSError):
            if os.listdir(os.path.dirname(path)) == [os.path.basename(path)]:
                os.unlink(path)


def start_template(argv: list[str]) -> socket.socket:
    """Our end of a new template of daemons, by the newest code."""
    ours, theirs = pair()
    with theirs:
        command = [*argv, "--template-fd", str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return ours


def offer(template: socket.socket, fd: int) -> bool:
    """Have a template make a daemon that is connected to the other end of `fd`; False if it is gone."""
    try:
        send(template, b"f", [fd])
    except OSError:
        return False
    return True


def hush() -> None:
    """Whoever waits for the end of our standard error shall see it."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)


def log_plainly(event: str, level: str, facts: Mapping[str, object], *, file: str | None, as_json: bool) -> None:
    """One line as the daemon logs them, to a file or standard error; never an error of its own."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 1000 % 10**6:06d}Z"
    line = {**facts, "event": event, "level": level, "logger": "tierd.node.keeper", "timestamp": stamp}
    text = json.dumps(line) if as_json else f"{stamp} [{level}] {event} {dict(facts)}"
    with suppress(OSError), open(file or 2, "a", closefd=bool(file), encoding="utf-8") as target:
        target.write(text + "\n")
