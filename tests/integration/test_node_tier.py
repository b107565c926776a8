"""Reading through the node tier: files come in by being read, hits come from there, and no byte is ever wrong.

Over a plain directory, over JuiceFS, and with the daemon serving all reads.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import DirectoryFactory, MountFactory
from tests.integration.tiered import MIB, Model, command, data_file, idle, make_model, metric, of_tier
from tests.mounts import OverlayMount, raises, wait_until

IDLE_SECONDS = 0.2
KINDS = ("directory", "juicefs", "daemon-reads")


@pytest.fixture(scope="module", params=KINDS)
def shared(
    request: pytest.FixtureRequest, module_overlay_mount: MountFactory, new_directory: DirectoryFactory
) -> OverlayMount:
    """A mount with a node tier, over each kind of source. Loads end soon."""
    juicefs = request.param == "juicefs"
    source = Path(tempfile.mkdtemp(dir=request.getfixturevalue("juicefs"))) if juicefs else new_directory("source")
    passthrough = "off" if request.param == "daemon-reads" else "auto"
    return module_overlay_mount(source, load_idle_gap=IDLE_SECONDS, passthrough=passthrough, prefetch="no")


@pytest.fixture
def mount(shared: OverlayMount) -> Iterator[OverlayMount]:
    """The same for each test, which takes names that no other takes; afterwards all is quiet."""
    yield shared
    idle(shared)
    complaints = shared.ledger_complaints() + shared.log_complaints()
    assert not complaints, "\n".join(complaints)
    assert shared.status()["queues"]["backings"] == 0
    assert of_tier(shared)["reserved_bytes"] == 0


def passes_through(mount: OverlayMount) -> bool:
    """Whether the kernel reads by itself on this mount."""
    return bool(mount.status()["data_path"] == "passthrough")


def forget_pages(fd: int) -> None:
    """What memory pressure does: the kernel drops its clean pages of a file."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


# --- misses, fills and hits ---


def test_the_first_load_fills_and_the_second_is_a_hit(mount: OverlayMount) -> None:
    model = make_model(mount, "llama", {"a.safetensors": 9 * MIB + 77, "b.safetensors": MIB, "config.json": 300})
    before = metric(mount, 'tierd_node_tier_opens_total{result="hit"}')
    model.read()
    model.await_state("complete")
    model.await_row(opens=3, loads=1, hits=0, node_bytes=model.size)
    mount.settled()
    time.sleep(2 * IDLE_SECONDS)  # the clock is what loads are told apart by
    model.read()
    model.await_row(loads=2, hits=1)
    assert metric(mount, 'tierd_node_tier_opens_total{result="hit"}') > before
    assert data_file(model).read_bytes() == model.files["a.safetensors"]


def test_a_hot_load_needs_no_read_request(mount: OverlayMount) -> None:
    model = make_model(mount, "hot", {"a.safetensors": 6 * MIB + 1, "b.safetensors": 200_000}).filled()
    before = mount.status()["counters"]["reads"]
    with model.through().open("rb", buffering=0) as one, mmap.mmap(one.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert bool(mount.status()["queues"]["backings"]) == passes_through(mount)
        assert view[:] == model.files["a.safetensors"]
    model.read()
    if passes_through(mount):
        assert mount.status()["counters"]["reads"] == before


def test_siblings_arrive_by_themselves(mount: OverlayMount) -> None:
    model = make_model(mount, "shards", {f"{n}.safetensors": MIB + n for n in range(4)} | {"deep/config.json": 10})
    with model.through("2.safetensors").open("rb") as reader:
        assert reader.read(1) == model.files["2.safetensors"][:1]
        model.await_state("complete")
    assert model.row()["node_bytes"] == model.size


def test_a_look_at_a_small_file_brings_nothing(mount: OverlayMount) -> None:
    """Every `grep -r` would fill the node."""
    model = make_model(mount, "looked-at", {"a.safetensors": MIB, "config.json": 300})
    assert model.through("config.json").read_bytes() == model.files["config.json"]
    idle(mount)
    assert model.row()["state"] == "absent"


def test_eight_processes_open_a_cold_model_at_once(mount: OverlayMount) -> None:
    model = make_model(mount, "crowd", {"a.safetensors": 17 * MIB + 5, "b.safetensors": 9 * MIB})
    before, read_before = of_tier(mount)["fill_source_bytes"], read_from_juicefs(mount)
    paths = [model.through(file) for file in model.files]
    readers = [subprocess.Popen(["sha256sum", *paths], stdout=subprocess.PIPE) for _ in range(8)]
    answers = {reader.communicate(timeout=60)[0] for reader in readers}
    hashes = [hashlib.sha256(data).hexdigest() for data in model.files.values()]
    assert answers == {b"".join(f"{digest}  {path}\n".encode() for digest, path in zip(hashes, paths, strict=True))}
    model.await_state("complete")
    assert model.size <= of_tier(mount)["fill_source_bytes"] - before <= 1.05 * model.size
    assert read_from_juicefs(mount) - read_before <= 1.05 * model.size + MIB


def read_from_juicefs(mount: OverlayMount) -> float:
    """Bytes that the kernel asked JuiceFS for; 0 for another source."""
    stats = mount.source.parent / ".stats"
    lines = stats.read_text().splitlines() if stats.exists() else []
    return sum(float(line.split()[-1]) for line in lines if line.startswith("juicefs_fuse_read_size_bytes_sum"))


# --- bytes while they are on their way ---


@pytest.fixture(scope="module")
def slow(juicefs: Path, module_overlay_mount: MountFactory) -> OverlayMount:
    """A mount on which nothing comes in that nobody waits for."""
    source = Path(tempfile.mkdtemp(dir=juicefs))
    return module_overlay_mount(source, fill_bandwidth=1, prefetch="no", load_idle_gap=IDLE_SECONDS)


def _by_pread(path: Path, data: bytes, rng: random.Random) -> None:
    with path.open("rb", buffering=0) as file:
        for _ in range(40):
            offset, size = rng.randrange(len(data) + 10), rng.choice((1, 7, 4096, 70_001, MIB + 1))
            assert os.pread(file.fileno(), size, offset) == data[offset : offset + size]


def _by_mmap(path: Path, data: bytes, rng: random.Random) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        for _ in range(60):
            offset = rng.randrange(len(data))
            assert view[offset : offset + 5000] == data[offset : offset + 5000]
        assert view[-1:] == data[-1:]


def _backwards(path: Path, data: bytes, rng: random.Random) -> None:
    with path.open("rb", buffering=0) as file:
        for offset in range(len(data) // 65_536 * 65_536, -1, -65_536):
            assert os.pread(file.fileno(), 65_536, offset) == data[offset : offset + 65_536]


def _direct(path: Path, data: bytes, rng: random.Random) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    block = mmap.mmap(-1, 1 << 16)
    try:
        for _ in range(40):
            offset = rng.randrange(len(data)) // 4096 * 4096
            got = os.preadv(fd, [block], offset)
            assert block[:got] == data[offset : offset + len(block)]
    finally:
        os.close(fd)


Pattern = Callable[[Path, bytes, random.Random], None]


@pytest.mark.parametrize("pattern", [_by_pread, _by_mmap, _backwards, _direct])
def test_bytes_of_a_file_on_its_way(slow: OverlayMount, pattern: Pattern) -> None:
    model = make_model(slow, f"slow{pattern.__name__}", 21 * MIB + 4097)
    with model.through().open("rb") as keeper:
        assert keeper.read(1) == model.files["a.safetensors"][:1]
        pattern(model.through(), model.files["a.safetensors"], random.Random(1))
    model.read()
    model.await_state("complete")
    model.read()


def test_all_patterns_at_once_while_it_comes(mount: OverlayMount) -> None:
    model = make_model(mount, "patterns", 21 * MIB + 11)
    wrong: list[str] = []

    def use(pattern: Pattern, seed: int) -> None:
        try:
            pattern(model.through(), model.files["a.safetensors"], random.Random(seed))
        except (AssertionError, OSError) as error:
            wrong.append(f"{pattern.__name__}: {str(error)[:200]}")

    patterns: list[Pattern] = [_by_pread, _by_mmap, _backwards, _direct]
    threads = [threading.Thread(target=use, args=(p, n)) for n, p in enumerate(patterns)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    model.await_state("complete")


# --- the source changes ---


def _in_place(model: Model, new: bytes) -> None:
    with model.beneath().open("r+b") as file:
        file.write(new)


def _in_place_and_back_in_time(model: Model, new: bytes) -> None:
    before = model.beneath().stat()
    _in_place(model, new)
    os.utime(model.beneath(), ns=(before.st_atime_ns, before.st_mtime_ns))


def _through_the_overlay(model: Model, new: bytes) -> None:
    with model.through().open("r+b") as file:
        file.write(new)


def _by_rename(model: Model, new: bytes) -> None:
    model.beneath("new").write_bytes(new)
    model.beneath("new").rename(model.beneath())


def _by_rename_through_the_overlay(model: Model, new: bytes) -> None:
    model.through("new").write_bytes(new)
    model.through("new").rename(model.through())


CHANGES = [_in_place, _in_place_and_back_in_time, _through_the_overlay, _by_rename, _by_rename_through_the_overlay]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("held", [False, True], ids=["closed", "open"])
def test_a_changed_file_is_never_served_old(
    mount: OverlayMount, change: Callable[[Model, bytes], None], held: bool
) -> None:
    model = make_model(mount, f"changed{change.__name__}-{held}", 5 * MIB).filled()
    new = inverted(model.files["a.safetensors"])
    reader = model.through().open("rb", buffering=0) if held else None
    change(model, new)
    if reader is None:
        assert not mount.ledger_complaints()  # the kernel forgets the file, and so does the overlay
    assert model.through().read_bytes() == new
    if reader is not None:
        with reader:
            if passes_through(mount):
                assert reader.read(9 * MIB) == model.files["a.safetensors"], "an old descriptor keeps its bytes"
            assert model.through().read_bytes() == new
    mount.settled()
    changed = Model(mount, model.name, {"a.safetensors": new})
    wait_until(lambda: _hot_again(changed), 20, "it is on the node again")


def _hot_again(model: Model) -> bool:
    model.read()
    return bool(model.row()["state"] == "complete")


@pytest.mark.parametrize(
    "through",
    [False, True],
    ids=["beneath", "through"],
)
def test_a_truncated_file_is_never_served_old(mount: OverlayMount, through: bool) -> None:
    model = make_model(mount, f"truncated-{through}", 5 * MIB).filled()
    path = model.through() if through else model.beneath()
    with model.through().open("rb", buffering=0) as reader:
        assert len(reader.read(100)) == 100
        os.truncate(path, MIB)
        assert model.through().read_bytes() == model.files["a.safetensors"][:MIB]
        idle(mount)
        os.truncate(path, 5 * MIB)
        assert model.through().read_bytes() == model.files["a.safetensors"][:MIB] + bytes(4 * MIB)
    assert model.through().read_bytes() == model.files["a.safetensors"][:MIB] + bytes(4 * MIB)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "first-load"])
def test_old_pages_do_not_come_back(mount: OverlayMount, hot: bool) -> None:
    """A reader of the old bytes goes on reading while new ones are written; the next open must not see what it read."""
    model = make_model(mount, f"pages-{hot}", 3 * MIB)
    data = model.files["a.safetensors"]
    new = inverted(data)
    if hot:
        model.filled()
    with model.through().open("rb", buffering=0) as reader:
        assert reader.read(10) == data[:10]
        if not hot:
            model.await_state("complete")
        with model.through().open("r+b", buffering=0) as writer:
            writer.write(new)
            forget_pages(writer.fileno())
        assert len(os.pread(reader.fileno(), 3 * MIB, 0)) == 3 * MIB
        assert model.through().read_bytes() == new
    assert model.through().read_bytes() == new


def inverted(data: bytes) -> bytes:
    """Other bytes, of the same number."""
    return data.translate(bytes(range(255, -1, -1)))


def test_only_attributes_changed(mount: OverlayMount) -> None:
    """The bytes are compared; then the copy is good again, without reading the source for it twice."""
    model = make_model(mount, "chmod", 5 * MIB).filled()
    before = of_tier(mount)["filled_bytes"]
    os.chmod(model.beneath(), 0o600)
    model.read()
    wait_until(lambda: _is_hit(model), 20, "the next open is a hit")
    assert of_tier(mount)["filled_bytes"] == before


def _is_hit(model: Model) -> bool:
    before = metric(model.mount, 'tierd_node_tier_opens_total{result="hit"}')
    model.read()
    model.mount.settled()
    model.row()  # flushes what was recorded
    return metric(model.mount, 'tierd_node_tier_opens_total{result="hit"}') > before


def test_a_file_that_changes_while_it_comes_is_discarded(slow: OverlayMount) -> None:
    model = make_model(slow, "unsteady", 9 * MIB)
    slow.expect_log("fill_ended")
    new = inverted(model.files["a.safetensors"])
    with model.through().open("rb", buffering=0) as reader:
        assert reader.read(10) == model.files["a.safetensors"][:10]
        model.beneath().write_bytes(new)
        reader.read()
        wait_until(lambda: of_tier(slow)["fills_active"] == 0, 20, "the fill ended")
        assert model.row()["state"] == "absent"
        assert model.through().read_bytes() == new
    assert model.through().read_bytes() == new
    assert not slow.log_complaints()


# --- readers that stay ---


def test_a_long_lived_mapping_of_the_first_load_beside_a_hit(mount: OverlayMount) -> None:
    model = make_model(mount, "mapped", 9 * MIB + 123)
    data = model.files["a.safetensors"]
    with model.through().open("rb") as first, mmap.mmap(first.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[:10] == data[:10]
        model.await_state("complete")
        hits = metric(mount, 'tierd_node_tier_opens_total{result="hit"}')
        with model.through().open("rb", buffering=0) as second:
            assert bool(mount.status()["queues"]["backings"]) == passes_through(mount)
            assert second.read(len(data)) == data
            assert view[:] == data
            with mmap.mmap(second.fileno(), 0, prot=mmap.PROT_READ) as other:
                assert other[:] == data
        model.row()
        assert metric(mount, 'tierd_node_tier_opens_total{result="hit"}') == hits + 1
        assert view[5 * MIB :] == data[5 * MIB :]


def test_a_hot_file_is_unlinked_while_open(mount: OverlayMount) -> None:
    model = make_model(mount, "unlinked", {"a.safetensors": 5 * MIB, "config.json": 100}).filled()
    data = model.files["a.safetensors"]
    with model.through().open("rb", buffering=0) as reader, model.through("config.json").open("rb") as small:
        for file in model.files:
            model.through(file).unlink()
        assert os.fstat(reader.fileno()).st_nlink == 0
        assert os.fstat(reader.fileno()).st_size == len(data)
        assert reader.read(9 * MIB) == data
        assert small.read() == model.files["config.json"]
        with raises(errno.ENOENT):
            model.through().read_bytes()
        assert os.pread(reader.fileno(), 100, MIB) == data[MIB : MIB + 100]


@pytest.mark.parametrize("shared", ["directory", "daemon-reads"], indirect=True)
def test_an_inode_number_is_used_anew_while_its_old_file_is_read(mount: OverlayMount) -> None:
    """Nothing holds the old inode in the source: its bytes are read from the copy."""
    assert any(_is_used_anew(mount, f"reused{number}") for number in range(10)), "the tests' file system reuses numbers"


def _is_used_anew(mount: OverlayMount, name: str) -> bool:
    """The number was had; other tests that run at the same time may be faster."""
    model = make_model(mount, name, 5 * MIB).filled()
    data, inode = model.files["a.safetensors"], model.beneath().stat().st_ino
    with model.through().open("rb", buffering=0) as reader:
        assert reader.read(10) == data[:10]
        model.through().unlink()
        for number in range(20):
            model.through(f"new{number}").write_bytes(b"another")
            if model.beneath(f"new{number}").stat().st_ino == inode:
                assert model.through(f"new{number}").read_bytes() == b"another"
                assert os.pread(reader.fileno(), 100, MIB) == data[MIB : MIB + 100]
                return True
    return False


def test_a_hot_file_is_unlinked_beneath_while_open(mount: OverlayMount) -> None:
    model = make_model(mount, "unlinked-beneath", 5 * MIB).filled()
    with model.through().open("rb", buffering=0) as reader:
        model.beneath().unlink()
        wait_until(lambda: not model.through().exists(), 5, "the name is gone")
        assert os.fstat(reader.fileno()).st_size == 5 * MIB
        assert reader.read(9 * MIB) == model.files["a.safetensors"]


@pytest.mark.parametrize("through", [False, True], ids=["beneath", "through"])
def test_a_hot_model_is_renamed_while_open(mount: OverlayMount, through: bool) -> None:
    model = make_model(mount, f"old-name-{through}", {"a.safetensors": 5 * MIB, "b.safetensors": MIB}).filled()
    renamed = Model(mount, f"models/new-name-{through}", model.files)
    before = of_tier(mount)["fill_source_bytes"]
    with model.through().open("rb", buffering=0) as reader:
        if through:
            (mount.mountpoint / model.name).rename(mount.mountpoint / renamed.name)
        else:
            (mount.source / model.name).rename(mount.source / renamed.name)
        wait_until(lambda: renamed.through().exists(), 5, "the new name is seen")
        assert os.fstat(reader.fileno()).st_size == 5 * MIB
        assert reader.read(9 * MIB) == model.files["a.safetensors"]
        renamed.read()
        renamed.through("b.safetensors").rename(renamed.through("c.safetensors"))
        assert renamed.through("c.safetensors").read_bytes() == model.files["b.safetensors"]
    idle(mount)
    assert of_tier(mount)["fill_source_bytes"] == before, "it was filled again"


def test_copies_of_a_renamed_model_are_filed_under_its_new_name(mount: OverlayMount) -> None:
    """Else its use counts for the one name and its bytes for the other: the hottest model would leave first."""
    model = make_model(mount, "moves", 2 * MIB).filled()
    renamed = Model(mount, "models/moved", model.files)
    (mount.mountpoint / model.name).rename(mount.mountpoint / renamed.name)
    renamed.read()
    wait_until(lambda: renamed.row().get("node_bytes") == 2 * MIB, 2, lambda: f"{renamed.row()}; {model.row()}")


# --- pods cannot write into a copy ---


def test_a_copy_cannot_be_written_through_the_overlay(mount: OverlayMount) -> None:
    model = make_model(mount, "attacked", 5 * MIB).filled()
    data, copy = model.files["a.safetensors"], data_file(model)
    with copy.open("rb", buffering=0) as kept, model.through().open("rb", buffering=0) as reader:
        with model.through().open("r+b", buffering=0) as writer:
            writer.write(b"written")
            with mmap.mmap(writer.fileno(), 0) as view:
                view[MIB : MIB + 6] = b"mapped"
                view.flush()
        if passes_through(mount):
            with raises(errno.ESTALE):
                os.open(f"/proc/self/fd/{reader.fileno()}", os.O_RDWR)
        with raises(errno.EACCES):
            mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with raises(errno.EBADF):
            os.write(reader.fileno(), b"x")
        os.lseek(kept.fileno(), 0, os.SEEK_SET)
        assert kept.read(9 * MIB) == data, "the copy was written to"
    changed = model.beneath().read_bytes()
    assert (changed[:7], changed[MIB : MIB + 6]) == (b"written", b"mapped")
    assert model.through().read_bytes() == changed


@pytest.mark.parametrize(
    "ways", [["rb", "map", "look"], ["rb", "rb", "rb", "map", "look", "r+b"]], ids=["look", "write"]
)
def test_readers_and_writers_of_hot_files_come_and_go(mount: OverlayMount, ways: list[str]) -> None:
    """Six threads open four hot files in all ways at once; not one call may fail."""
    model = make_model(mount, f"busy{len(ways)}", {f"{number}.safetensors": 200_000 for number in range(4)})
    model = Model(mount, model.name, dict.fromkeys(model.files, b"x" * 200000))
    for file, data in model.files.items():
        model.beneath(file).write_bytes(data)
    model.filled()
    wrong: list[str] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for step in range(40):
            path, how = model.through(rng.choice(list(model.files))), rng.choice(ways)
            try:
                with path.open({"map": "rb", "look": "r+b"}.get(how, how), buffering=0) as file:
                    if how == "map":
                        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                            assert view[-1:] == b"x"
                    elif how == "r+b":
                        file.write(b"x" * 10)
                    else:
                        assert set(file.read(200_000)) == {120}
            except OSError as error:
                wrong.append(f"step {step}, {how}: {errno.errorcode[error.errno or 0]}")

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    idle(mount)
    mount.log_complaints()  # files that change while they come in are discarded, and that is said


# --- the copy is damaged ---


def _truncate(path: Path) -> None:
    os.truncate(path, MIB)


def _flip(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        byte = file.read(1)[0]
        file.seek(2 * MIB)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _swap(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


def _delete(path: Path) -> None:
    path.unlink()


DAMAGES = [_truncate, _flip, _swap, _delete]


def test_a_damaged_copy_is_a_miss(mount: OverlayMount) -> None:
    models = [make_model(mount, f"damaged{damage.__name__}", 5 * MIB).filled() for damage in DAMAGES]
    for damage, model in zip(DAMAGES, models, strict=True):
        mount.expect_log("copy_damaged")
        damage(data_file(model))
        model.read()
        assert not mount.log_complaints()
    for model in models:
        model.filled()


def test_check_finds_damaged_copies_and_repair_brings_them_back(mount: OverlayMount) -> None:
    models = [make_model(mount, f"checked{damage.__name__}", 5 * MIB).filled() for damage in DAMAGES]
    mount.expect_log("copy_damaged")
    for damage, model in zip(DAMAGES, models, strict=True):
        damage(data_file(model))
    assert "4 damaged copies" in command(mount, "check", "--repair", code=1)
    for model in models:
        model.await_state("complete")
    assert " 0 damaged, 0 leftovers" in command(mount, "check", "--deep")
    assert not mount.log_complaints()


def test_only_a_deep_check_finds_what_the_disk_did(mount: OverlayMount) -> None:
    """A flip below the file system leaves no trace but in the bytes: here the checksums are what was changed."""
    model = make_model(mount, "rotten", 5 * MIB).filled()
    meta = data_file(model).with_name(data_file(model).name + ".meta")
    raw = bytearray(meta.read_bytes())
    raw[-20] ^= 1
    meta.write_bytes(raw)
    mount.expect_log("copy_damaged")
    command(mount, "check")
    assert "damaged" in command(mount, "check", "--deep", code=1)
    model.await_state("absent")
    model.filled()
    assert not mount.log_complaints()


def test_a_leftover_in_the_cache_directory_goes_and_a_foreign_file_stays(mount: OverlayMount) -> None:
    leftover, foreign = mount.cache_dir / "1-2-3.fill", mount.cache_dir / "something"
    leftover.write_bytes(b"?")
    foreign.write_bytes(b"?")
    assert "1 leftovers" in command(mount, "check")
    assert leftover.exists()
    command(mount, "check", "--repair")
    assert not leftover.exists()
    assert foreign.exists()
    foreign.unlink()


def test_a_name_that_means_another_file_by_now_beside_that_ones_first_reader(overlay_mount: MountFactory) -> None:
    """Sent back once for the name it must not be sent back again for the copy: open(2) forgives one ESTALE."""
    mount = overlay_mount(entry_timeout=60, prefetch="no")
    model = make_model(mount, "m", {"a.safetensors": MIB, "b.safetensors": MIB})
    assert model.through("a.safetensors").stat().st_size == MIB
    os.link(model.beneath("b.safetensors"), model.beneath("new"))
    model.beneath("new").rename(model.beneath("a.safetensors"))
    with model.through("b.safetensors").open("rb", buffering=0) as reader:
        assert reader.read(1) == model.files["b.safetensors"][:1]
        model.await_state("complete")
        assert model.through("a.safetensors").read_bytes() == model.files["b.safetensors"]
