"""Uploads that were cut off: kill -9 in the middle, a power cut of the journal, a server that forgot, another file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import s3
from tests.faulty_s3 import Request
from tests.objects.house import BUCKET, PATIENT, House, house, random_file
from tests.objects.servers import MIB
from tierd.objects.journal import Journal, Progress
from tierd.objects.retries import Schedule
from tierd.objects.store import ObjectStoreUnavailable

KEY = "m/v1/weights"
PARTS = 6
SIZE = (PARTS - 1) * PATIENT.part_bytes + 5
WAIT_S = 60
ONE_BY_ONE = PATIENT._replace(schedule=Schedule(attempts_max=1), parallel=1)
"""Gives up at once, so that a test knows where; one part after the other."""


def recorded(journal: Path) -> Progress:
    """What the journal says."""
    found = Journal(journal).read()
    assert found is not None
    return found[1]


def child_process(at: House, url: str, source: Path, journal: Path, bytes_per_s: int) -> subprocess.Popen[bytes]:
    """A process that uploads the file, hashes the object, and says how much memory it took."""
    command = [
        sys.executable,
        "-m",
        "tests.objects.upload_child",
        url,
        KEY,
        str(source),
        str(journal),
        str(bytes_per_s),
    ]
    keys = {"AWS_ACCESS_KEY_ID": at.server.access_key, "AWS_SECRET_ACCESS_KEY": at.server.secret_key}
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, env={**os.environ, **keys, **path}, stdout=subprocess.PIPE)


def upload_until_killed(at: House, source: Path, journal: Path, parts: int) -> Progress:
    """A process of its own, killed once so many parts are on their way; what its journal says."""
    with child_process(at, at.proxy.url, source, journal, 64 * MIB) as child:
        try:
            assert at.proxy.await_parts(parts, WAIT_S)
        finally:
            child.send_signal(signal.SIGKILL)
            assert child.wait(WAIT_S) == -signal.SIGKILL
    assert at.proxy.await_silence(WAIT_S), "what it sent last is still on its way"
    return recorded(journal)


def cut_off(at: House, source: Path, journal: Path, parts: int) -> Progress:
    """The same within this process: the server goes away after so many parts."""
    at.proxy.script = lambda request: "reset" if (request.part or 0) > parts else None
    with pytest.raises(ObjectStoreUnavailable):
        at.far.put_file(BUCKET, KEY, source, SIZE, None, journal)
    at.proxy.script = lambda _: None
    at.proxy.forget()
    return recorded(journal)


def assert_stored(at: House, source: Path, journal: Path) -> None:
    """Everything is as if nothing had happened."""
    content = source.read_bytes()
    stored = at.far.put_file(BUCKET, KEY, source, len(content), None, journal)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert at.near.hash(BUCKET, KEY) == stored
    buffer = bytearray(stored.size)
    at.near.get_range(BUCKET, KEY, stored, 0, memoryview(buffer))
    assert buffer == content
    assert not journal.exists()
    assert at.near.abort_abandoned(BUCKET, "", -1000) == 0


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_killed_in_the_middle_it_goes_on(tmp_path: Path, parts: int) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    with house(tmp_path) as at:
        before = upload_until_killed(at, source, journal, parts)
        assert len(before.parts) >= parts - 2, "all but those that were on their way"
        assert at.near.stat(BUCKET, KEY) is None
        at.proxy.forget()
        assert_stored(at, source, journal)
        again = at.proxy.parts()
        assert set(again) == set(range(1, PARTS + 1)) - set(before.parts), "what the server has is not sent again"
        assert set(again.values()) == {1}


def test_killed_again_and_again(tmp_path: Path) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    with house(tmp_path) as at:
        progress: list[int] = []
        for _ in range(3):
            at.proxy.forget()
            progress.append(len(upload_until_killed(at, source, journal, 2).parts))
        assert progress == sorted(progress)
        assert_stored(at, source, journal)


@pytest.fixture
def at(tmp_path: Path) -> Iterator[House]:
    """A server, and a client that goes on step by step."""
    with house(tmp_path, limits=ONE_BY_ONE) as found:
        yield found


def change_third_part(source: Path) -> None:
    """A few bytes in it."""
    with source.open("r+b") as file:
        file.seek(2 * PATIENT.part_bytes + 77)
        file.write(b"changed")


def test_a_part_whose_file_changed_is_sent_again(tmp_path: Path, moto_server: s3.Server) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    with house(tmp_path, limits=ONE_BY_ONE, other=moto_server) as at:
        at.near.ensure_bucket(BUCKET)
        before = cut_off(at, source, journal, 4)
        assert set(before.parts) == {1, 2, 3, 4}
        change_third_part(source)
        assert_stored(at, source, journal)
        assert set(at.proxy.parts()) == {3, 5, 6}


def test_a_server_that_replaces_no_part_gets_all_of_them(tmp_path: Path, at: House) -> None:
    """rclone answers 501 to other bytes for a part that it has."""
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 4)
    change_third_part(source)
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == set(range(1, PARTS + 1))


def test_a_part_that_the_server_has_otherwise_is_sent_again(tmp_path: Path, at: House) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 4)
    lines = journal.read_text().splitlines()
    other = json.loads(lines[2]) | {"etag": "0123"}
    journal.write_text("\n".join([*lines[:2], json.dumps(other), *lines[3:]]) + "\n")
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == {2, 5, 6}


def test_a_torn_journal_costs_a_part(tmp_path: Path, at: House) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 4)
    journal.write_bytes(journal.read_bytes()[:-9])
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == {4, 5, 6}


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"{}\n", b'{"format":2}\n', b"[]\n", b'{"format":1,"task":{}}\n']
)
def test_a_journal_that_makes_no_sense_is_begun_anew(tmp_path: Path, at: House, content: bytes) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    journal.write_bytes(content)
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == set(range(1, PARTS + 1))


def test_an_upload_that_the_server_forgot_is_begun_anew(tmp_path: Path, at: House) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 4)
    assert at.near.abort_abandoned(BUCKET, KEY, -1000) == 1
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == set(range(1, PARTS + 1))


def test_an_upload_that_vanishes_meanwhile_is_begun_anew(tmp_path: Path) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    aborted: list[int] = []

    def abort_once(request: Request) -> str | None:
        if request.part == 3 and not aborted:
            aborted.append(at.near.abort_abandoned(BUCKET, KEY, -1000))
        return None

    with house(tmp_path, script=abort_once) as at:
        assert_stored(at, source, journal)
    assert aborted == [1]


def test_the_journal_of_another_upload_gives_its_parts_back(tmp_path: Path, at: House) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 4)
    source.write_bytes(source.read_bytes() + b"more")
    assert_stored(at, source, journal)


def test_without_a_journal_the_parts_are_given_back_at_once(tmp_path: Path, at: House) -> None:
    source = random_file(tmp_path / "source", SIZE)
    at.proxy.script = lambda request: "reset" if request.part == 4 else None
    with pytest.raises(ObjectStoreUnavailable):
        at.far.put_file(BUCKET, KEY, source, SIZE)
    assert at.near.abort_abandoned(BUCKET, "", -1000) == 0
    assert at.near.stat(BUCKET, KEY) is None


def test_only_what_was_abandoned_long_enough_ago_is_aborted(tmp_path: Path, at: House) -> None:
    source, journal = random_file(tmp_path / "source", SIZE), tmp_path / "journal"
    cut_off(at, source, journal, 2)
    assert at.near.abort_abandoned(BUCKET, "", 3600) == 0
    assert at.near.abort_abandoned(BUCKET, "other/", -1000) == 0
    assert_stored(at, source, journal)
    assert set(at.proxy.parts()) == {3, 4, 5, 6}


def test_memory_does_not_grow_with_the_file(tmp_path: Path, at: House) -> None:
    """An upload slower than the disk, and a hash: parts in flight are held, and no more."""
    peaks = []
    for size in (4 * PATIENT.part_bytes, 16 * PATIENT.part_bytes):
        source = tmp_path / "sparse"
        with source.open("wb") as file:
            file.truncate(size)
        child = child_process(at, at.server.url, source, tmp_path / "journal", 48 * MIB)
        peaks.append(int(child.communicate(timeout=WAIT_S)[0]))
        assert child.returncode == 0
    assert peaks[1] - peaks[0] < 2 * PATIENT.part_bytes, peaks
