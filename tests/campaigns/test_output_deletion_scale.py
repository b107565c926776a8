"""A user with many outputs is erased within bounded memory: in batches, whatever there is."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.controller.house import connected, migrated
from tests.controller.outputs import House
from tests.servers import run
from tierd.controller.outputs import deletion as output_deletion

OUTPUTS = 20_000
DAYS = 20
MEMORY_MAX = 100 << 20

# Registered as a backup leaves them; their objects are taken for deleted by somebody else.
FILL = """
INSERT INTO generated_outputs (output_id, user_id, filename, output_type, size_bytes, cold_storage, version, sha256,
                               pending_since)
SELECT id, 'u', to_char(date '2026-01-01' + (n % $2), 'YYYY/MM/DD') || '/' || id || '.png', 'image', 3, true, 1,
       sha256('png'), NULL
FROM (SELECT n, gen_random_uuid() AS id FROM generate_series(1, $1) AS n) AS g
RETURNING user_id || '/' || filename
"""


@pytest.mark.campaign
def test_a_user_is_erased_within_bounded_memory(tmp_path: Path, database: str) -> None:
    run(migrated(database))
    house = House(tmp_path, database)

    async def main() -> None:
        for (path,) in await house.rows(FILL, OUTPUTS, DAYS):
            file = house.outputs / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"png")
        async with house.leading() as leader:
            async with connected(house.dsn) as connection:
                wish = await output_deletion.ask(connection, "u", None, "test")
            before, began = psutil.Process().memory_info().rss, time.monotonic()
            peak = before
            while True:
                again = await leader.work.output_work.deletion.round()
                again |= await leader.work.output_work.erasure.round()
                peak = max(peak, psutil.Process().memory_info().rss)
                async with connected(house.dsn) as connection:
                    found = await output_deletion.standing(connection, wish)
                if found.gone:
                    break
                await house.rows("UPDATE output_erasures SET try_at = now() RETURNING 1")
            seconds = time.monotonic() - began
        print(f"{OUTPUTS} outputs in {seconds:.1f} s, {OUTPUTS / seconds:.0f}/s, {(peak - before) >> 20} MiB more")
        assert found.deleted == OUTPUTS
        assert peak - before < MEMORY_MAX

    run(main(), seconds=500)
    assert not (house.outputs / "u").exists()
