"""What all tests share: real mounts of tierd over real sources, and what every one of them is held to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from bench.juicefs import JuiceFS
from tests.mounts import OverlayMount
from tests.servers import PostgresServer, RedisServer

settings.register_profile(
    "ci",
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the same examples each time; the campaign looks for new ones
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """A machine that cannot mount is an error, not a reason to skip what matters most."""
    config.addinivalue_line("markers", "sources(*kinds): over which of SOURCES a test on a shared mount runs")
    if not Path("/dev/fuse").is_char_device():
        raise pytest.UsageError(
            "/dev/fuse is missing: the tests mount real file systems. Load the module (modprobe fuse), or start"
            " the container with --device /dev/fuse --cap-add SYS_ADMIN."
        )


MountFactory = Callable[..., OverlayMount]
DirectoryFactory = Callable[[str], Path]


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory that other users may pass through; pytest's own temporary directories are private."""
    path = Path(tempfile.mkdtemp(prefix="tierd-tests-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def new_directory(scratch: Path) -> DirectoryFactory:
    """Makes directories below `scratch`."""

    def make(name: str) -> Path:
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
        path.chmod(0o755)
        return path

    return make


@contextmanager
def _mounts(new_directory: DirectoryFactory) -> Iterator[MountFactory]:
    """Mounts for the length of a `with`; fails if anything was wrong with one of them."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def mount(source: Path | None = None, **options: Any) -> OverlayMount:
            made = OverlayMount(source or new_directory("source"), new_directory("mount"), options)
            stack.callback(lambda: complaints.extend(made.close()))
            made.start()
            return made

        yield mount
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture
def overlay_mount(new_directory: DirectoryFactory) -> Iterator[MountFactory]:
    """`overlay_mount(source, attr_timeout=0, ...)` mounts until the end of the test; without a source, a new one."""
    with _mounts(new_directory) as mount:
        yield mount


@pytest.fixture(scope="module")
def module_overlay_mount(new_directory: DirectoryFactory) -> Iterator[MountFactory]:
    """The same, until the last test of the module."""
    with _mounts(new_directory) as mount:
        yield mount


@pytest.fixture(scope="session")
def juicefs_volume() -> Iterator[JuiceFS]:
    """A JuiceFS volume, formatted and not mounted: SQLite metadata, file objects; in memory where there is /dev/shm."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tierd-tests-", dir=memory) as directory, JuiceFS(directory) as volume:
        volume.format()
        yield volume


@pytest.fixture(scope="session")
def juicefs(juicefs_volume: JuiceFS, new_directory: DirectoryFactory) -> Iterator[Path]:
    """A mount of that volume, where other users get in."""
    where = new_directory("jfs")
    yield juicefs_volume.mount(where, extra=["--enable-xattr"]).mountpoint
    juicefs_volume.umount(where)


SOURCES = ("directory", "juicefs")
"""What the overlay lies over: a plain directory, a JuiceFS mount. `daemon-reads`: a directory, and no passthrough."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test on a shared mount runs over each source that it, its module or `SOURCES` names."""
    if "source_kind" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("sources")
        kinds = marker.args if marker else SOURCES
        metafunc.parametrize("source_kind", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def source_kind(request: pytest.FixtureRequest) -> str:
    """One of `SOURCES`."""
    kind: str = request.param
    return kind


@pytest.fixture(scope="session")
def shared_mount(
    source_kind: str, request: pytest.FixtureRequest, new_directory: DirectoryFactory
) -> Iterator[OverlayMount]:
    """One mount for all tests that do not need one of their own."""
    if source_kind == "juicefs":
        source = Path(tempfile.mkdtemp(prefix="source-", dir=request.getfixturevalue("juicefs")))
        source.chmod(0o755)
    else:
        source = new_directory("source")
    with _mounts(new_directory) as mount:
        yield mount(source, passthrough="off" if source_kind == "daemon-reads" else "auto")


@dataclass(frozen=True)
class Tree:
    """A new, empty directory on a shared mount: `top` through the overlay, `beneath` in the source."""

    top: Path
    beneath: Path
    mount: OverlayMount
    on_juicefs: bool

    def scaled(self, count: int) -> int:
        """`count` names on a directory, a tenth on JuiceFS, where SQLite takes milliseconds for each."""
        return count // 10 if self.on_juicefs else count


@pytest.fixture
def tree(source_kind: str, shared_mount: OverlayMount) -> Iterator[Tree]:
    """A place of its own for one test; afterwards the kernel has given everything back and the log is quiet."""
    beneath = Path(tempfile.mkdtemp(dir=shared_mount.source))
    beneath.chmod(0o755)
    yield Tree(shared_mount.mountpoint / beneath.name, beneath, shared_mount, source_kind == "juicefs")
    complaints = shared_mount.ledger_complaints() + shared_mount.log_complaints()
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture(scope="module")
def other_node(juicefs_volume: JuiceFS, new_directory: DirectoryFactory) -> Iterator[Path]:
    """Another mount of the volume. It caches no attributes: JuiceFS's own readers may see old sizes for a second."""
    where = new_directory("other-node")
    options = [word for name in ("attr", "entry", "dir-entry") for word in (f"--{name}-cache", "0")]
    yield juicefs_volume.mount(where, extra=options).mountpoint
    juicefs_volume.umount(where)


@pytest.fixture(scope="session")
def postgres(new_directory: DirectoryFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test that stops it need not start it again for the next one (see `database`)."""
    with PostgresServer(new_directory("postgres")) as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of a new, empty database in it."""
    dsn = postgres.create_database()
    yield dsn
    postgres.drop_database(dsn)


@pytest.fixture(scope="session")
def redis_server(new_directory: DirectoryFactory) -> Iterator[RedisServer]:
    """A Redis server; `start()` it first where another test may have stopped it, and expect what others left."""
    with RedisServer(new_directory("redis")) as server:
        yield server
