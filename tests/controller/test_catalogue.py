"""The catalogue follows the source: what is new, grown, cold or gone, and what a scan must not conclude."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cold import freeze, stub_of
from tests.controller.house import settings_for
from tests.servers import run
from tierd.controller.models import catalogue, catalogue_scan
from tierd.controller.models.catalogue import Scanned
from tierd.controller.models.catalogue_scan import Seen
from tierd.errors import UsageError
from tierd.postgres import Connection, Database

ROOTS = (b"models", b"hot-models")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    (made / "models").mkdir(parents=True)
    return made


def fill(source: Path, **sizes: int) -> None:
    """`llama__a=10`: a file of so many bytes, a.safetensors, of models/llama."""
    for name, size in sizes.items():
        model, file = name.split("__")
        path = source / "models" / model / f"{file}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)


class Books:
    """A catalogue over a source, between which tests change things."""

    def __init__(self, dsn: str, source: Path) -> None:
        self._dsn = dsn
        self._source = source

    def refresh(self, **more: Any) -> Scanned:
        """Scan."""
        options = {"drop_max": 1.0, **more}
        return self._with(lambda database: catalogue.refresh(database, self._source, ROOTS, **options))

    def ask(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Rows."""

        async def fetch(database: Database) -> list[dict[str, Any]]:
            async with database.connection() as connection:
                return [dict(row) for row in await connection.fetch(query, *values)]

        return self._with(fetch)

    def rows(self, *columns: str) -> list[tuple[Any, ...]]:
        """Some columns of all models, by name."""
        named = (f"{column} AS column_{number}" for number, column in enumerate(columns))
        rows = self.ask(f"SELECT {', '.join(named)} FROM model_locations ORDER BY model_id")
        return [tuple(row.values()) for row in rows]

    def _with(self, work: Callable[[Database], Any]) -> Any:
        async def main() -> Any:
            async with Database(settings_for(self._dsn)) as database:
                return await work(database)

        return run(main())


@pytest.fixture
def books(schema: str, source: Path) -> Books:
    return Books(schema, source)


def test_models_are_registered_with_their_real_size_and_as_read_just_now(books: Books, source: Path) -> None:
    fill(source, llama__a=10, llama__b=20, tiny__a=5)
    os.link(source / "models/llama/a.safetensors", source / "models/llama/again.safetensors")
    (source / "models/llama/config.json").touch()
    (source / "models/llama/link").symlink_to("/etc/passwd")
    assert books.refresh() == Scanned(models=2, size_bytes=35, registered=2, vanished=0, refused=0)
    fresh = "last_access = created_at AND created_at = registered_at AND now() - created_at < interval '1 minute'"
    assert books.rows("model_id", "tier", "size_bytes", "files", "version", fresh) == [
        ("models/llama", "hot", 30, 2, 0, True),
        ("models/tiny", "hot", 5, 1, 0, True),
    ]
    assert books.refresh().registered == 0


def test_a_dry_run_writes_nothing(books: Books, source: Path) -> None:
    fill(source, llama__a=10)
    assert books.refresh(dry_run=True).registered == 1
    assert books.rows("model_id") == []
    books.refresh()
    (source / "models/llama/a.safetensors").unlink()
    assert books.refresh(dry_run=True).vanished == 1
    assert books.rows("vanished_at") == [(None,)]


def test_what_a_node_told_is_corrected_and_keeps_its_age_and_hits(books: Books, source: Path) -> None:
    books.ask(
        "INSERT INTO model_locations (model_id, tier, size_bytes, last_access, created_at, hits)"
        " VALUES ('models/llama', 'hot', 1, now() - interval '50 days', now() - interval '60 days', 7)"
    )
    fill(source, llama__a=10)
    assert books.refresh().registered == 0
    ages = ("extract(day FROM now() - last_access)::int", "extract(day FROM now() - created_at)::int")
    assert books.rows("size_bytes", "files", "hits", *ages) == [(10, 1, 7, 50, 60)]


def test_a_model_that_was_written_or_that_came_back_was_used(books: Books, source: Path) -> None:
    fill(source, grown__a=10, same__a=10, back__a=10)
    books.refresh()
    (source / "models/back/a.safetensors").rename(source / "kept")
    books.refresh()
    books.ask("UPDATE model_locations SET last_access = now() - interval '50 days'")
    (source / "kept").rename(source / "models/back/a.safetensors")
    fill(source, grown__a=11)
    books.refresh()
    recent = "now() - last_access < interval '1 minute'"
    assert books.rows("model_id", recent) == [("models/back", True), ("models/grown", True), ("models/same", False)]


# --- cold ones ---


def freeze_model(source: Path, model: str, version: int = 3, names: Sequence[str] | None = None) -> None:
    directory = source / model
    files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    freeze({path: None for path in files if names is None or path.name in names}, model, version)


def test_a_model_whose_files_are_all_stubs_is_cold(books: Books, source: Path) -> None:
    """As after the database was lost: version and size come from what lies beside the stubs."""
    fill(source, all__a=10, all__b=20, some__a=10, some__b=20)
    freeze_model(source, "models/all")
    freeze_model(source, "models/some", names=["a.safetensors"])
    assert books.refresh().size_bytes == 60
    assert books.rows("model_id", "tier", "size_bytes", "files", "version") == [
        ("models/all", "cold", 30, 2, 3),
        ("models/some", "hot", 30, 2, 0),
    ]


def test_an_imported_model_is_found_again(books: Books, source: Path) -> None:
    """After the database was lost: its objects are of no version."""
    fill(source, imported__a=10, mixed__a=10, mixed__b=10)
    freeze_model(source, "models/imported", version=0)
    freeze_model(source, "models/mixed", version=0, names=["a.safetensors"])
    freeze_model(source, "models/mixed", version=4, names=["b.safetensors"])
    for _ in range(2):
        books.refresh()
        assert books.rows("model_id", "tier", "size_bytes", "version", "imported") == [
            ("models/imported", "cold", 10, 0, True),
            ("models/mixed", "cold", 20, 4, True),
        ]


def test_a_cold_model_that_nobody_can_read_is_not_registered(books: Books, source: Path) -> None:
    fill(source, m__a=10)
    freeze_model(source, "models/m")
    for file in (source / "models/m/.tierd/origins").iterdir():
        file.unlink()
    books.refresh()
    assert books.rows("model_id") == []


def test_a_model_that_is_renamed_while_cold_keeps_its_age(books: Books, source: Path) -> None:
    fill(source, old__a=10)
    books.refresh()
    books.ask("UPDATE model_locations SET created_at = now() - interval '90 days', version = 3")
    freeze_model(source, "models/old")
    (source / "models/old").rename(source / "models/new")
    books.refresh()
    age = "extract(day FROM now() - created_at)::int"
    assert books.rows("model_id", "tier", "version", "vanished_at IS NULL", age) == [
        ("models/new", "cold", 3, True, 90),
        ("models/old", "hot", 3, False, 90),
    ]


LOOKED_AT = ("models/one.gguf", "models/llama", "models/org/m", "models/cold", "models/hub/models--a--b")


@pytest.mark.parametrize("model", LOOKED_AT)
def test_one_model_is_found_as_a_scan_finds_it(model: str, source: Path) -> None:
    _make_looked_at(source)
    assert catalogue_scan.look(source, ROOTS, model) == catalogue_scan.scan(source, ROOTS).models[model]


NO_MODELS = ("models", "models/org", "models/llama/unet", "models/link", "elsewhere/m", "models/none", "models/./llama")


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_not_looked_at(name: str, source: Path) -> None:
    _make_looked_at(source)
    assert catalogue_scan.look(source, ROOTS, name) is None


def _make_looked_at(source: Path) -> None:
    names = ("models/one.gguf", "models/llama/a.bin", "models/llama/unet/b.bin", "models/org/m/a.bin", "models/org/m/x")
    for name in (*names, "models/cold/a.bin", "elsewhere/m/a.bin", "models/hub/models--a--b/blobs/0"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    os.link(source / "models/org/m/x", source / "models/org/m/again")
    (source / "models/link").symlink_to("llama")
    freeze_model(source, "models/cold")


def test_a_stub_that_has_its_bytes_again_is_hot(books: Books, source: Path) -> None:
    fill(source, m__a=10)
    freeze_model(source, "models/m")
    stub = stub_of(source / "models/m/a.safetensors")
    stub.write_bytes(b"x" * 12)
    stub.chmod(0o644)
    books.refresh()
    assert books.rows("tier", "size_bytes") == [("hot", 12)]


def test_tiers_follow_the_files_unless_a_move_knows_better(books: Books, source: Path) -> None:
    fill(source, m__a=10)
    books.refresh()
    freeze_model(source, "models/m")
    books.ask("INSERT INTO moves (kind, subject, state) VALUES ('demote', 'models/m', 'switching')")
    books.refresh()
    assert books.rows("tier", "version") == [("hot", 0)]
    books.ask("UPDATE moves SET state = 'done', finished_at = now()")
    books.refresh()
    assert books.rows("tier", "version") == [("cold", 3)]
    stub_of(source / "models/m/a.safetensors").unlink()
    fill(source, m__a=99)
    books.refresh()
    assert books.rows("tier", "version", "size_bytes") == [("hot", 3, 99)]


def test_a_move_that_ended_while_the_source_was_scanned_knows_better(
    books: Books, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, m__a=10)
    freeze_model(source, "models/m")
    books.refresh()

    def promoted_meanwhile(*args: Any) -> Any:
        found = real(*args)
        books_beside(books)
        return found

    def books_beside(books: Books) -> None:
        books.ask("INSERT INTO moves (kind, subject, state, finished_at) VALUES ('promote', 'models/m', 'done', now())")
        books.ask("UPDATE model_locations SET tier = 'hot'")

    real = catalogue_scan.scan
    monkeypatch.setattr(catalogue_scan, "scan", promoted_meanwhile)
    books.refresh()
    assert books.rows("tier") == [("hot",)]


# --- what is gone ---


def test_a_model_that_is_gone_is_marked_and_never_deleted(books: Books, source: Path) -> None:
    fill(source, gone__a=10, cold__a=10, stays__a=10)
    books.refresh()
    freeze_model(source, "models/cold")
    books.refresh()
    (source / "models/gone/a.safetensors").unlink()  # its directory stays
    stub_of(source / "models/cold/a.safetensors").unlink()
    assert books.refresh().vanished == 2
    gone = "vanished_at IS NOT NULL"
    assert books.rows("model_id", "tier", gone) == [
        ("models/cold", "cold", True),
        ("models/gone", "hot", True),
        ("models/stays", "hot", False),
    ]
    assert books.refresh().vanished == 0
    fill(source, gone__a=10)
    books.refresh()
    assert books.rows(gone) == [(True,), (False,), (False,)]


def test_a_cold_model_whose_stubs_are_there_has_not_vanished(books: Books, source: Path) -> None:
    fill(source, m__a=10)
    freeze_model(source, "models/m")
    books.refresh()
    assert books.refresh().vanished == 0


@pytest.mark.parametrize("what", ["no roots", "most are gone", "unreadable", "too many"])
def test_nothing_is_concluded_from_a_source_that_is_not_there(
    books: Books, source: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, **{f"m{number}__a": 1 for number in range(12)})
    books.refresh()
    if what == "no roots":
        (source / "models").rename(source / "elsewhere")
    elif what == "most are gone":
        for number in range(7):
            (source / f"models/m{number}/a.safetensors").unlink()
    elif what == "too many":
        (source / "models/m0/a.safetensors").unlink()
        real = catalogue_scan.scan
        monkeypatch.setattr(catalogue_scan, "scan", lambda *args: real(*args, files_max=10))
    else:
        real_walk = os.walk
        (source / "models/m0/a.safetensors").unlink()

        def failing(top: Any, **options: Any) -> Any:
            options.get("onerror", print)(PermissionError(13, "Permission denied"))
            return real_walk(top, **options)

        monkeypatch.setattr(os, "walk", failing)
    found = books.refresh(drop_max=0.5)
    assert found.problem
    assert found.vanished == 0
    assert books.ask("SELECT count(*) FROM model_locations WHERE vanished_at IS NOT NULL") == [{"count": 0}]


def test_names_that_no_catalogue_can_hold_are_told(source: Path) -> None:
    for name in (b"\xff", b"x" * 250, b"ok"):
        path = os.fsencode(source) + b"/models/" + name
        os.mkdir(path)
        with open(path + b"/a.safetensors", "wb") as file:
            file.write(b"x")
    found = catalogue_scan.scan(source, ROOTS)
    assert found.models == {"models/ok": Seen(size_bytes=1, files=1)}
    assert found.refused_total == len(found.refused) == 2


def test_a_scan_is_bounded(source: Path) -> None:
    fill(source, **{f"m{number}__a": 1 for number in range(5)})
    found = catalogue_scan.scan(source, ROOTS, models_max=3)
    assert (len(found.models), found.complete) == (3, False)


# --- pins ---


def test_pins(books: Books, source: Path) -> None:
    fill(source, m__a=1)
    books.refresh()

    async def pin(connection: Connection, model_id: str) -> None:
        await catalogue.set_pinned(connection, model_id, pinned=True)

    def pinned(model_id: str) -> None:
        async def work(database: Database) -> None:
            async with database.connection() as connection:
                await pin(connection, model_id)

        books._with(work)

    pinned("models/m")
    assert books.rows("pinned") == [(True,)]
    with pytest.raises(UsageError, match="has no model models/none"):
        pinned("models/none")


def test_times_are_the_databases(books: Books, source: Path) -> None:
    fill(source, m__a=1)
    books.refresh()
    seen = books.rows("seen_at")[0][0]
    assert abs(seen - datetime.now(UTC)) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("left", "there"),
    [("file", True), ("stub", True), ("empty directories", False), ("nothing", False), ("single stub", True)],
)
def test_what_a_scan_did_not_look_at_is_looked_at_before_it_is_called_gone(
    source: Path, left: str, there: bool
) -> None:
    """As after models_root was changed: the scan finds nothing of it, and it is there all the same."""
    fill(source, m__a=1)
    (source / "models/m/sub").mkdir()
    if left in ("stub", "empty directories", "nothing"):
        freeze_model(source, "models/m")
    if left in ("empty directories", "nothing"):
        stub_of(source / "models/m/a.safetensors").unlink()
    if left == "nothing":
        shutil.rmtree(source / "models/m")
    if left == "single stub":
        (source / "models/m.gguf").write_bytes(b"x")
        freeze({source / "models/m.gguf": None}, "models/m.gguf")
    assert catalogue_scan.is_there(source, "models/m.gguf" if left == "single stub" else "models/m") is there
