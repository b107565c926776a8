"""Whatever is wrong with a request: one line that says what and where, one that says what to do, exit code 2.

And nothing happened: nothing is mounted, no file was made, no lock is held.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.house import Done, House

NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
"""A user who owns nothing; may look everywhere, because Python itself may lie where only root may look."""
REFUSED_SECONDS = 8.0


@dataclass
class Place:
    """What a request is made with; `arguments` follow `tierd`. Everything lies below `top`."""

    house: House
    top: Path
    env: dict[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    sockets: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in (self.source, self.mountpoint):
            path.mkdir()

    @property
    def source(self) -> Path:
        return self.top / "source"

    @property
    def mountpoint(self) -> Path:
        return self.top / "mnt"

    @property
    def state(self) -> Path:
        return self.top / "state"

    def mount(self, *flags: str | Path, source: Path | str = "", mountpoint: Path | str = "") -> list[str | Path]:
        """A request that is right but for what is given."""
        usual: list[str | Path] = ["--state-dir", self.state, "--metrics", "127.0.0.1:0"]
        return ["mount", source or self.source, mountpoint or self.mountpoint, *usual, *flags]

    def yaml(self, text: str) -> list[str | Path]:
        """A request with this configuration."""
        file = self.top / "tierd.yaml"
        file.write_text(text, encoding="utf-8")
        return self.mount("--config", file)

    def snapshot(self) -> dict[str, tuple[int, bytes]]:
        """Every file below `top` with its mode and content; directories that were made do not count."""
        found = {}
        for directory, _, names in os.walk(self.top):
            for name in names:
                path = Path(directory) / name
                st = path.lstat()
                content = path.read_bytes() if stat.S_ISREG(st.st_mode) else b""
                found[str(path.relative_to(self.top))] = (st.st_mode, content)
        return found

    def modes(self) -> dict[str, int]:
        """Modes of the directories that are there."""
        return {path: os.stat(path).st_mode for path, _, _ in os.walk(self.top)}


Prepare = Callable[[Place], list[str | Path]]


@dataclass(frozen=True)
class Case:
    """A request, what the first line must hold, and what one of the two must; `{}` is the place's directory."""

    prepare: Prepare
    says: str
    hints: str = ""


def file_at(path: Path) -> Path:
    path.write_bytes(b"content")
    return path


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def mkdir(path: Path, mode: int = 0o755) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def owned_by_nobody(path: Path) -> Path:
    os.chown(mkdir(path), 65534, 65534)
    return path


def with_env(place: Place, **env: str) -> list[str | Path]:
    place.env.update(env)
    return place.mount()


def busy(place: Place) -> list[str | Path]:
    place.house.shell("mount", "-t", "tmpfs", "tmpfs", place.mountpoint)
    return place.mount()


def port_taken(place: Place) -> list[str | Path]:
    taken = socket.create_server(("127.0.0.1", 0))
    place.sockets.append(taken)
    return place.mount("--metrics", f"127.0.0.1:{taken.getsockname()[1]}")


def as_nobody(place: Place) -> list[str | Path]:
    """With a FUSE device that anybody may open, as most distributions have it."""
    place.wrapper = NOBODY
    place.env["XDG_RUNTIME_DIR"] = str(mkdir(place.top / "runtime", 0o777))
    device = place.top / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    device.chmod(0o666)
    place.house.shell("mount", "--bind", device, "/dev/fuse")
    return place.mount()


CASES = {
    # paths
    "source missing": Case(
        lambda p: p.mount(source=p.top / "no"), "source {}/no: No such file or directory", "JuiceFS"
    ),
    "source a file": Case(lambda p: p.mount(source=file_at(p.top / "f")), "source {}/f: Not a directory"),
    "source empty": Case(lambda p: ["mount", "", p.mountpoint, "--state-dir", p.state], "SOURCE: "),
    "source a loop": Case(lambda p: p.mount(source=link(p.top / "l", p.top / "l")), "source {}/l: "),
    "mountpoint missing": Case(
        lambda p: p.mount(mountpoint=p.top / "no"), "mountpoint {}/no: No such file or directory", "mkdir -p {}/no"
    ),
    "mountpoint a file": Case(lambda p: p.mount(mountpoint=file_at(p.top / "f")), "mountpoint {}/f: Not a directory"),
    "mountpoint empty": Case(lambda p: ["mount", p.source, "", "--state-dir", p.state], "MOUNTPOINT: "),
    "same directory": Case(lambda p: p.mount(mountpoint=p.source), "{}/source"),
    "same directory by a link": Case(lambda p: p.mount(mountpoint=link(p.top / "l", p.source)), "{}/source"),
    "source below mountpoint": Case(
        lambda p: p.mount(source=mkdir(p.mountpoint / "a" / "b")), "source {}/mnt/a/b is below the mountpoint {}/mnt"
    ),
    "source below mountpoint by a link": Case(
        lambda p: p.mount(source=link(p.top / "l", mkdir(p.mountpoint / "a"))),
        "source {}/mnt/a is below the mountpoint {}/mnt",
    ),
    "mountpoint below source": Case(
        lambda p: p.mount(mountpoint=mkdir(p.source / "a")), "mountpoint {}/source/a is below the source {}/source"
    ),
    "mountpoint below source by ..": Case(
        lambda p: p.mount(mountpoint=mkdir(p.source / "a") / ".." / ".." / "mnt" / ".." / "source" / "a"),
        "mountpoint {}/source/a is below the source {}/source",
    ),
    "mountpoint busy": Case(busy, "mountpoint {}/mnt is busy: tmpfs is mounted there", "umount {}/mnt"),
    "a newline in a name": Case(
        lambda p: p.mount(source=p.top / "a\nb\x1b[31m:skull:[red]"),
        r"source {}/a\nb\x1b[31m:skull:[red]: No such file",
    ),
    # state and log
    "state below mountpoint": Case(
        lambda p: p.mount("--state-dir", p.mountpoint / "s"), "state directory {}/mnt/s is below the mountpoint"
    ),
    "state below mountpoint by a link": Case(
        lambda p: p.mount("--state-dir", link(p.top / "l", p.mountpoint) / "s"), "is below the mountpoint {}/mnt"
    ),
    "state a file": Case(
        lambda p: p.mount("--state-dir", file_at(p.top / "f")), "state directory {}/f: a file is in the way"
    ),
    "state below a file": Case(
        lambda p: p.mount("--state-dir", file_at(p.top / "f") / "s"), "state directory {}/f/s: Not a directory"
    ),
    "state empty": Case(lambda p: with_env(p, TIERD_STATE_DIR="")[:3], "TIERD_STATE_DIR: "),
    "state open to all": Case(lambda p: p.mount("--state-dir", mkdir(p.top / "tmp", 0o1777)), "state directory {}/tmp"),
    "state shared": Case(
        lambda p: p.mount("--state-dir", file_at(mkdir(p.top / "etc") / "passwd").parent), "state directory {}/etc"
    ),
    "log below mountpoint": Case(
        lambda p: p.mount("--log-file", p.mountpoint / "log"), "log file {}/mnt/log is below the mountpoint"
    ),
    "log in no directory": Case(
        lambda p: p.mount("--log-file", p.top / "no" / "log"), "log file {}/no/log: No such file or directory"
    ),
    "log a directory": Case(lambda p: p.mount("--log-file", p.source), "log file {}/source: Is a directory"),
    # the node tier
    "cache a file": Case(
        lambda p: p.mount("--cache-dir", file_at(p.top / "f")), "cache directory {}/f: a file is in the way"
    ),
    "cache below a file": Case(
        lambda p: p.mount("--cache-dir", file_at(p.top / "f") / "c"), "cache directory {}/f/c: Not a directory"
    ),
    "cache read-only": Case(
        lambda p: p.mount("--cache-dir", "/proc/tierd"), "cache directory /proc/tierd: ", "choose a writable directory"
    ),
    "cache shared": Case(
        lambda p: p.mount("--cache-dir", file_at(mkdir(p.top / "etc") / "passwd").parent),
        "cache directory {}/etc holds files of somebody else's",
    ),
    "cache open to all": Case(lambda p: p.mount("--cache-dir", mkdir(p.top / "tmp", 0o1777)), "cache directory {}/tmp"),
    "cache of somebody else": Case(
        lambda p: p.mount("--cache-dir", owned_by_nobody(p.top / "c")), "cache directory {}/c belongs to user 65534"
    ),
    "cache is the source": Case(
        lambda p: p.mount("--cache-dir", p.source), "cache directory {}/source is below the source {}/source"
    ),
    "cache below source": Case(
        lambda p: p.mount("--cache-dir", p.source / "c"), "cache directory {}/source/c is below the source {}/source"
    ),
    "cache below mountpoint by a link": Case(
        lambda p: p.mount("--cache-dir", link(p.top / "l", p.mountpoint) / "c"),
        "cache directory {}/mnt/c is below the mountpoint {}/mnt",
    ),
    "cache empty": Case(lambda p: with_env(p, TIERD_CACHE_DIR=""), "TIERD_CACHE_DIR: must not be empty"),
    "size no size": Case(
        lambda p: p.mount("--cache-size", "12XB"),
        "--cache-size: must be a size such as 200GiB, 1.5TB or 0 (got '12XB')",
    ),
    "size negative": Case(lambda p: p.mount("--cache-size", "-1"), "--cache-size: must be a size"),
    "size of a number too many": Case(
        lambda p: p.mount("--cache-size", "9" * 400), "--cache-size: must be less than 8 EiB"
    ),
    "size empty": Case(lambda p: p.mount("--cache-size", ""), "--cache-size: must be a size"),
    "size in yaml": Case(lambda p: p.yaml("cache_size: [1]\n"), "{}/tierd.yaml: cache_size: "),
    "size infinite in yaml": Case(lambda p: p.yaml("cache_size: .inf\n"), "{}/tierd.yaml: cache_size: "),
    "bandwidth no size": Case(lambda p: p.mount("--fill-bandwidth", "fast"), "--fill-bandwidth: must be a size"),
    "ratio out of range": Case(lambda p: p.mount("--free-space-ratio", "1"), "--free-space-ratio: "),
    "ratio negative": Case(lambda p: p.mount("--free-space-ratio", "-0.1"), "--free-space-ratio: "),
    "ratio nonsense": Case(lambda p: p.mount("--free-space-ratio", "nan"), "--free-space-ratio: "),
    "watermarks out of order": Case(
        lambda p: p.mount("--free-space-ratio", "0.3", "--free-space-target", "0.3"),
        "--free-space-target: must be above free_space_ratio, which is 0.3",
    ),
    "watermark below the default": Case(
        lambda p: p.mount("--free-space-target", "0.05"), "--free-space-target: must be above free_space_ratio"
    ),
    "no workers": Case(lambda p: p.mount("--fill-workers", "0"), "--fill-workers: "),
    "more memory than there is": Case(lambda p: p.mount("--read-ahead-memory", "1.5"), "--read-ahead-memory: "),
    "no time for the source": Case(lambda p: p.mount("--source-timeout", "0"), "--source-timeout: "),
    "evict what": Case(lambda p: ["evict"], "name models, or give --until-free SIZE", "tierd evict --help"),
    "evict both": Case(lambda p: ["evict", "m", "--until-free", "1"], "name models, or give --until-free SIZE"),
    "evict without daemons": Case(lambda p: ["evict", "m"], "no tierd daemon is running"),
    "warm what": Case(lambda p: ["warm"], "Missing argument 'models'", "tierd warm --help"),
    "pin what": Case(lambda p: ["pin"], "Missing argument 'models'", "tierd pin --help"),
    "unpin what": Case(lambda p: ["unpin"], "Missing argument 'models'", "tierd unpin --help"),
    "warm on no mount": Case(lambda p: ["warm", "m", "--mount", p.mountpoint], "no tierd daemon serves {}/mnt"),
    "plan without daemons": Case(lambda p: ["plan", "--json"], "no tierd daemon is running"),
    "check without daemons": Case(lambda p: ["check", "--deep"], "no tierd daemon is running"),
    # settings
    "metrics nonsense": Case(lambda p: p.mount("--metrics", "nonsense"), "--metrics: must be HOST:PORT"),
    "metrics port taken": Case(port_taken, "cannot serve metrics on 127.0.0.1:", "--metrics HOST:PORT"),
    "metrics elsewhere": Case(lambda p: p.mount("--metrics", "192.0.2.1:0"), "cannot serve metrics on 192.0.2.1:0: "),
    "metrics no host": Case(lambda p: p.mount("--metrics", "a..b:80"), "cannot serve metrics on a..b:80: "),
    "flag unknown": Case(lambda p: p.mount("--attr-timeot", "1"), "--attr-timeot", "--attr-timeout"),
    "flag ill-typed": Case(lambda p: p.mount("--attr-timeout", "soon"), "--attr-timeout"),
    "flag out of range": Case(lambda p: p.mount("--attr-timeout", "-1"), "--attr-timeout: "),
    "flag without value": Case(lambda p: p.mount("--attr-timeout"), "--attr-timeout"),
    "choice unknown": Case(lambda p: p.mount("--log-level", "loud"), "--log-level: "),
    "root absolute": Case(
        lambda p: p.mount("--models-root", "/models"), "--models-root: must be relative to the source"
    ),
    "env unknown": Case(lambda p: with_env(p, TIERD_FOO="1"), "TIERD_FOO: unknown setting"),
    "env near": Case(lambda p: with_env(p, TIERD_MODELS_ROOTS="x"), "TIERD_MODELS_ROOTS: ", "models_root"),
    "env ill-typed": Case(lambda p: with_env(p, TIERD_ATTR_TIMEOUT="soon"), "TIERD_ATTR_TIMEOUT: "),
    "yaml unknown": Case(lambda p: p.yaml("attr_timeot: 1\n"), "{}/tierd.yaml: attr_timeot: unknown", "attr_timeout"),
    "yaml ill-typed": Case(lambda p: p.yaml("attr_timeout: soon\n"), "{}/tierd.yaml: attr_timeout: "),
    "yaml broken": Case(lambda p: p.yaml("a: [\n"), "{}/tierd.yaml is not valid YAML: "),
    "yaml a list": Case(lambda p: p.yaml("- a\n"), "{}/tierd.yaml must hold settings"),
    "yaml missing": Case(lambda p: p.mount("--config", p.top / "no"), "cannot read configuration {}/no: No such file"),
    # the request itself
    "argument missing": Case(lambda p: ["mount", p.source], "MOUNTPOINT"),
    "argument too many": Case(lambda p: [*p.mount(), "more"], "more"),
    "command unknown": Case(lambda p: ["moutn"], "moutn", "mount"),
    "umount of nothing": Case(lambda p: ["umount", p.mountpoint], "{}/mnt is not a tierd mount", "tierd status"),
    "umount of another file system": Case(
        lambda p: busy(p) and ["umount", p.mountpoint], "{}/mnt is not a tierd mount"
    ),
    "umount of what is missing": Case(lambda p: ["umount", p.top / "no"], "{}/no is not a tierd mount"),
    "status of nothing": Case(lambda p: ["status", p.mountpoint], "no tierd daemon serves {}/mnt"),
    "status without daemons": Case(lambda p: ["status"], "no tierd daemon is running", "tierd mount SOURCE MOUNTPOINT"),
    "models without daemons": Case(lambda p: ["models", "--json"], "no tierd daemon is running"),
    "opens too many": Case(lambda p: ["opens", "--limit", "0"], "--limit"),
    # without root
    "nobody's state": Case(
        lambda p: [*as_nobody(p), "--state-dir", mkdir(p.top / "s", 0o755)], "state directory {}/s belongs to user 0"
    ),
    "nobody's state in root's": Case(
        lambda p: [*as_nobody(p), "--state-dir", mkdir(p.top / "s") / "t"], "state directory {}/s/t: Permission denied"
    ),
    "nobody lets others in": Case(lambda p: [*as_nobody(p), "--allow-other", "yes"], "allow_other needs root"),
}

IN_BACKGROUND = (
    "source missing",
    "mountpoint busy",
    "log below mountpoint",
    "flag ill-typed",
    "env unknown",
    "state a file",
    "cache a file",
    "cache below source",
    "watermarks out of order",
)
"""Found before the daemon is started, and by it: the same line either way."""
NAMES = [*CASES, *(f"{name} / background" for name in IN_BACKGROUND)]


@dataclass
class Outcome:
    """What came of a request."""

    done: Done
    changed: str


def attempt(place: Place, case: Case, *, background: bool) -> Outcome:
    house, arguments = place.house, case.prepare(place)
    if background:
        arguments.append("--background")
    before, modes, mounted = place.snapshot(), place.modes(), house.mounted(place.mountpoint)
    if place.wrapper:
        done = house.python(*arguments, env=place.env, cwd=place.top, wrapper=place.wrapper)
    else:
        done = house.tierd(*arguments, env=place.env, cwd=place.top, seconds=REFUSED_SECONDS)
    changed = []
    after = place.snapshot()
    if background:
        after.pop("state/daemon.log", None)  # where a daemon in the background tells its troubles
    if after != before:
        changed.append(f"files: {sorted(before.items() ^ after.items())}")
    if {path: mode for path, mode in place.modes().items() if path in modes} != modes:
        changed.append("modes of directories")
    if house.mounted(place.mountpoint) != mounted:
        changed.append("mounts")
    runtime = house.runtime(place.mountpoint)
    if runtime.exists():
        changed.append(f"runtime directory with {os.listdir(runtime)}")
    return Outcome(done, "; ".join(changed))


@pytest.fixture
def place(house: House, scratch: Path) -> Iterator[Place]:
    """Its directory is where the command is called, too: what goes to the working directory is seen."""
    top = Path(tempfile.mkdtemp(prefix="bad-", dir=scratch))
    top.chmod(0o755)
    made = Place(house, top)
    yield made
    for taken in made.sockets:
        taken.close()


@pytest.mark.parametrize("name", NAMES)
def test_refused(name: str, place: Place) -> None:
    case_name, _, background = name.partition(" / ")
    case = CASES[case_name]
    outcome = attempt(place, case, background=bool(background))
    done, top = outcome.done, str(place.top)
    lines = done.err.splitlines()
    assert done.code == 2, f"{done.code}: {lines[-1:]}"
    assert done.out == ""
    assert [line.partition(":")[0] for line in lines] == ["tierd", "hint"], done.err
    assert case.says.replace("{}", top) in lines[0]
    assert case.hints.replace("{}", top) in "\n".join(lines)
    assert all(line.isprintable() for line in lines)
    assert outcome.changed == ""


@pytest.mark.parametrize("background", [[], ["--background"]], ids=["foreground", "background"])
def test_refused_by_the_real_command(place: Place, background: list[str]) -> None:
    """`python -m tierd` itself, with a fault that only the daemon finds."""
    done = place.house.python(*port_taken(place), *background)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("tierd: cannot serve metrics on 127.0.0.1:")
    assert done.err.count("\n") == 2
