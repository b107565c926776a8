"""Months of the archive: made ahead, once, where they shall lie; planned; and written down as lines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.contexts.house import House
from tests.servers import run
from tierd.controller.contexts import files
from tierd.controller.contexts.files import ExportDamaged, Row
from tierd.controller.contexts.months import Month, make_months, months, span
from tierd.controller.contexts.purge import PurgeRules, plan_purge
from tierd.errors import TierdError


def test_months_are_made_ahead_and_once(house: House) -> None:
    async def main() -> None:
        async with house.database() as database:
            await asyncio.gather(*(make_months(database, 14) for _ in range(4)))
            async with database.connection() as connection:
                found = await months(connection)
        assert len(found) == 15
        for before, after in itertools.pairwise(found):
            assert before.ends == after.begins
        assert found[0].begins <= found[0].now < found[0].ends

    run(main())


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Los_Angeles", "Asia/Seoul"])
def test_a_month_is_one_of_utc_wherever_a_session_is(house: House, zone: str) -> None:
    """As of somebody at a psql, or of a pooler that keeps no settings: a month has one table, and none has a gap."""
    first = datetime(2040, 1, 1, tzinfo=UTC)

    async def main() -> None:
        async with house.database() as database, database.transaction() as connection:
            await connection.execute(f"SET LOCAL TIME ZONE '{zone}'")
            for at in (first, first - timedelta(microseconds=1), first + timedelta(days=30, hours=23)):
                table = await connection.fetchval("SELECT make_context_month($1)", at)
                assert table == f"user_contexts_archive_{at:%Ym%m}"
                await connection.execute(
                    "INSERT INTO user_contexts_archive (user_id, conversation_id, messages, created_at, archived_at)"
                    " VALUES ('u', 'c', '[]', $1, $1)",
                    at,
                )
                assert await connection.fetchval(f"SELECT count(*) FROM {table} WHERE archived_at = $1", at) == 1

    run(main())


def test_months_on_a_tablespace(house: House, new_directory: Callable[[str], Path]) -> None:
    path = new_directory("space")
    house.postgres._own(path)

    async def main() -> None:
        async with house.database() as database:
            with pytest.raises(TierdError, match=r"^cannot make months of the archive: tablespace"):
                await make_months(database, 1, "none")
            async with database.connection() as connection:
                await connection.execute(f"CREATE TABLESPACE slow LOCATION '{path}'")
            await make_months(database, 1, "slow")
            async with database.connection() as connection:
                table = (await months(connection))[-1].table
                spaces = await connection.fetch("SELECT tablespace FROM pg_tables WHERE tablename = $1", table)
                assert [row["tablespace"] for row in spaces] == ["slow"]
                await connection.execute(f"DROP TABLE {table}")
                await connection.execute("DROP TABLESPACE slow")

    run(main())


def test_months_that_the_role_may_not_make(house: House) -> None:
    async def main() -> None:
        await house.sql("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        try:
            own = house.dsn.split("//")[1].split("@")[0]
            async with replace(house, dsn=house.dsn.replace(own, "plain:plain")).database() as database:
                with pytest.raises(TierdError, match=r"^cannot make months of the archive: permission denied"):
                    await make_months(database, 14)
        finally:
            await house.sql("DROP ROLE plain")

    run(main())


def test_the_plan_of_a_year() -> None:
    now = datetime(2026, 11, 15, tzinfo=UTC)
    names = [f"{year}-{month:02}" for year in (2025, 2026) for month in range(1, 13)][6:-1]
    found = [Month(f"t{name}", name, *span(name), 10, 100, now) for name in names]
    steps = plan_purge(found, {}, PurgeRules(export=False))
    assert [step.month for step in steps if step.action != "keep"] == ["2025-07", "2025-08", "2025-09", "2025-10"]
    assert [step.action for step in steps][:4] == ["drop", "refuse", "refuse", "refuse"]
    assert plan_purge(found, {}, PurgeRules())[0].action == "export"


def test_lines_keep_what_is_in_them(tmp_path: Path) -> None:
    at = datetime(2026, 11, 15, 1, 2, 3, 4, tzinfo=UTC)
    given = [Row("u\n\u2028", '"', '[{"a": "\\n\u2028"}]', at, at, at, n) for n in range(1, 8)]

    async def pages() -> Any:
        yield given[:3]
        yield given[3:]

    path = tmp_path / "lines"
    count, _ = run(files.write_lines(pages(), path))
    assert count == 7
    assert [row for page in files.pages(path, 2) for row in page] == given
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportDamaged):
        list(files.pages(path, 2))
