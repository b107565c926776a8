"""`tierd contexts`: what the tiers hold, and restoring an export; as an operator runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from tests.contexts.house import HELLO, House
from tests.controller.house import tierd
from tests.servers import run
from tierd.contexts import Contexts
from tierd.controller.contexts.purge import PurgeRules, purge_expired_contexts
from tierd.controller.contexts.stats import tell_metrics
from tierd.metrics import ContextMetrics
from tierd.objects.directory import DirectoryStore


def fill(house: House) -> None:
    async def scene(contexts: Contexts) -> None:
        for name in ("a", "b", "c"):
            await contexts.save("u", name, HELLO, version=0)
        await house.archive()
        for name in ("a", "b"):
            await contexts.append("u", name, HELLO)
        await house.sql("UPDATE user_contexts SET updated_at = now() - interval '40 days' WHERE conversation_id = 'a'")

    house.play(scene)


def told(house: House, *words: str, **env: str) -> Any:
    done = tierd("contexts", *words, "--json", TIERDCTL_POSTGRES=house.dsn, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_stats(house: House) -> None:
    fill(house)
    assert house.redis is not None
    found = told(house, "stats", TIERDCTX_REDIS=house.redis.url(1))
    assert {name: tier["rows"] for name, tier in found["tiers"].items() if name != "redis"} == {"warm": 2, "archive": 1}
    assert found["tiers"]["redis"]["rows"] in (4, 5), "sessions, a fence, and maybe the mark that it is trusted"
    assert found["tiers"]["warm"]["oldest_s"] // 86_400 == 40
    assert (found["due"], found["owed"]) == (1, 0)
    assert found["due_bytes"] > 0
    assert all(tier["size_bytes"] > 0 for tier in found["tiers"].values())
    assert len(found["months"]) == 1
    assert "redis" not in told(house, "stats")["tiers"]
    shown = tierd("contexts", "stats", TIERDCTL_POSTGRES=house.dsn)
    assert "1 wait for the archive" in shown.stdout


def test_stats_without_redis(house: House) -> None:
    assert house.redis is not None
    house.redis.stop()
    found = told(house, "stats", TIERDCTX_REDIS=house.redis.url(1))
    house.redis.start()
    assert list(found["tiers"]) == ["warm", "archive"]


def test_stats_are_metrics(house: House) -> None:
    fill(house)
    registry = CollectorRegistry()

    async def main() -> None:
        async with house.database() as database:
            async with database.connection() as connection:
                await connection.execute("ANALYZE")
            await tell_metrics(database, ContextMetrics(registry))

    run(main())
    assert registry.get_sample_value("tierd_context_rows", {"tier": "warm"}) == 2
    assert (registry.get_sample_value("tierd_context_oldest_seconds", {"tier": "warm"}) or 0) > 39 * 86_400
    assert registry.get_sample_value("tierd_context_rows", {"tier": "archive"}) == 1
    assert 0 < (registry.get_sample_value("tierd_context_oldest_seconds", {"tier": "archive"}) or 0) < 32 * 86_400


def test_restore(house: House, tmp_path: Path) -> None:
    fill(house)
    store = DirectoryStore(tmp_path)

    async def main() -> str:
        async with house.database() as database:
            rules = PurgeRules(retention_days=-60, grace_days=0, share_max=1.0)
            for _ in range(2):
                steps = await purge_expired_contexts(database, store, rules)
        return steps[0].month

    month = run(main())
    words = ("contexts", "restore", month, "--objects", str(tmp_path))
    bad = tierd(*words, TIERDCTL_POSTGRES=house.dsn, TIERDCTL_CONTEXTS_TABLESPACE="nowhere")
    assert bad.returncode == 1
    assert "CREATE TABLESPACE first" in bad.stderr, "restored months lie where all do"
    found = told(house, "restore", month, "--objects", str(tmp_path))
    assert found == {"rows": 1, "restored": 1, "replaced": 0, "erased": 0, "present": 0, "later": []}
    bad = tierd("contexts", "restore", "2020-01", "--objects", str(tmp_path), TIERDCTL_POSTGRES=house.dsn)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "2020-01 was never exported" in bad.stderr
