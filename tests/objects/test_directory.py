"""A directory as object store: links in it lead nowhere, kills leave no half objects, neighbours do not disturb."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tierd.errors import UsageError
from tierd.objects.directory import DirectoryStore
from tierd.objects.store import ObjectError, ObjectMissing, ObjectStoreUnavailable, Place
from tierd.objects.sums import Sums

BUCKET = "cold-models"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where objects are; a treasure lies beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "treasure").write_bytes(b"treasure")
    (tmp_path / "objects").mkdir()
    (tmp_path / "source").write_bytes(b"12345")
    return tmp_path / "objects"


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    """An empty bucket in it."""
    made = DirectoryStore(root)
    made.ensure_bucket(BUCKET)
    return made


def outside(root: Path) -> dict[str, bytes]:
    """What lies beside the objects."""
    return {path.name: path.read_bytes() for path in (root.parent / "outside").iterdir()}


def test_links_lead_nowhere(root: Path, store: DirectoryStore) -> None:
    """Of directories, of files, of the bucket itself, and where checksums and new files lie."""
    beside = root.parent / "outside"
    (root / BUCKET / "dir").symlink_to(beside)
    (root / BUCKET / "file").symlink_to(beside / "treasure")
    (root / "linked").symlink_to(beside)
    source = root.parent / "source"
    for bucket, key in ((BUCKET, "dir/treasure"), (BUCKET, "dir/new"), ("linked", "treasure"), ("linked", "new")):
        for call in (
            lambda b, k: store.put_file(b, k, source, 5),
            store.hash,
            store.adopt,
        ):
            with pytest.raises(ObjectError):
                call(bucket, key)
    for call in (store.hash, store.adopt):
        with pytest.raises(ObjectError):
            call(BUCKET, "file")
    for bucket, key in ((BUCKET, "dir/treasure"), ("linked", "treasure")):
        store.delete(bucket, key)
    assert outside(root) == {"treasure": b"treasure"}
    assert list(store.list(BUCKET)) == []
    with pytest.raises(ObjectError):
        list(store.list("linked"))


@pytest.mark.parametrize("inside", [".tierd/sums", ".tierd/new", ".tierd"])
def test_links_where_tierd_keeps_its_own(root: Path, inside: str) -> None:
    store = DirectoryStore(root)
    link = root / BUCKET / inside
    link.parent.mkdir(parents=True)
    link.symlink_to(root.parent / "outside")
    with pytest.raises(ObjectError):
        store.put_file(BUCKET, "m/v1/x", root.parent / "source", 5)
    store.delete(BUCKET, "treasure")
    assert outside(root) == {"treasure": b"treasure"}


def test_putting_over_a_link_replaces_it(root: Path, store: DirectoryStore) -> None:
    (root / BUCKET / "file").symlink_to(root.parent / "outside" / "treasure")
    store.put_file(BUCKET, "file", root.parent / "source", 5)
    assert (root / BUCKET / "file").read_bytes() == b"12345"
    assert outside(root) == {"treasure": b"treasure"}


def test_what_is_no_plain_file_is_no_object(root: Path, store: DirectoryStore) -> None:
    os.mkfifo(root / BUCKET / "pipe")
    (root / BUCKET / "dir").mkdir()
    for key in ("pipe", "dir"):
        assert store.stat(BUCKET, key) is None
        with pytest.raises(ObjectMissing):
            store.hash(BUCKET, key)
    assert list(store.list(BUCKET)) == []


def test_files_and_directories_cannot_share_a_name(root: Path, store: DirectoryStore) -> None:
    source = root.parent / "source"
    store.put_file(BUCKET, "a/b", source, 5)
    with pytest.raises(ObjectStoreUnavailable, match="another object lies where it would"):
        store.put_file(BUCKET, "a", source, 5)
    with pytest.raises(ObjectStoreUnavailable, match="another object lies where it would"):
        store.put_file(BUCKET, "a/b/c", source, 5)
    assert [entry.key for entry in store.list(BUCKET)] == ["a/b"]


def test_names_that_no_file_can_have(root: Path, store: DirectoryStore) -> None:
    with pytest.raises(UsageError, match="more than 255 bytes"):
        store.put_file(BUCKET, "x" * 256, root.parent / "source", 5)
    assert list((root / BUCKET / ".tierd" / "new").iterdir()) == []


def test_leftovers_of_a_kill_are_removed_and_others_stay(root: Path, store: DirectoryStore) -> None:
    """A file that is being written is locked by who writes it, in whichever process that is."""
    new = root / BUCKET / ".tierd" / "new"
    (new / "leftover").write_bytes(b"half")
    with (new / "owned").open("wb") as owned:
        fcntl.flock(owned, fcntl.LOCK_EX)
        assert store.abort_abandoned(BUCKET, "", 3600) == 0, "it may just have been made, and not be locked yet"
        assert store.abort_abandoned(BUCKET, "", -1000) == 1
        assert [path.name for path in new.iterdir()] == ["owned"]


def test_whoever_writes_holds_a_lock(root: Path, store: DirectoryStore) -> None:
    """From when the file is made until it has its name."""
    source = root.parent / "source"
    locked: list[bool] = []

    class Watching(DirectoryStore):
        """Looks from outside when the bytes are there and the name is not."""

        def _put_sums(self, place: Place, sums: Sums) -> None:
            locked.append(store.abort_abandoned(BUCKET, "", -1000) == 0)
            super()._put_sums(place, sums)

    Watching(root).put_file(BUCKET, "m/v1/x", source, 5)
    assert locked == [True]
    assert store.hash(BUCKET, "m/v1/x").size == 5


def test_neighbours_come_and_go_at_the_same_time(root: Path, store: DirectoryStore) -> None:
    """Deleting the last object of a directory removes it, perhaps just when another is to be put there."""

    def come_and_go(number: int) -> None:
        for _ in range(30):
            store.put_file(BUCKET, f"a/b/c/{number}", root.parent / "source", 5)
            store.delete(BUCKET, f"a/b/c/{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert [path.name for path in (root / BUCKET).iterdir()] == [".tierd"]
