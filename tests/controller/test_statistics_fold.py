"""Folding statistics: exact whatever is killed, lost, late or twice. Real servers, and the node's own side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis as SyncRedis
from structlog.testing import capture_logs

from tests.controller.house import connected
from tests.controller.reporting import (
    BOOT,
    OTHER_BOOT,
    Controller,
    Node,
    access,
    controller_of,
    fold,
    message,
    node_of,
    send,
)
from tests.servers import run
from tierd.controller.statistics import fold as fold_module
from tierd.statistics import (
    FIELD,
    STREAM,
    applied_key,
)

SECONDS = 5.0
"""Within which two times that should be one are taken for one."""


# --- what it writes ---


def test_accesses_arrive_and_are_acknowledged(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    node.leases = frozenset({b"models/a"})
    node.access("models/a")
    node.access("models/a", hits=0)
    node.access("models/b", ago_s=3600)
    node.round()

    async def look(controller: Controller) -> None:
        models = await controller.models()
        assert {name: row[:3] for name, row in models.items()} == {
            "models/a": ("hot", 1000, 1),
            "models/b": ("hot", 1000, 1),
        }
        assert 0 <= models["models/a"][3] < SECONDS
        assert 3600 <= models["models/b"][3] < 3600 + SECONDS
        assert await controller.leases() == {("gpu-1", "models/a")}
        age = await controller.leases_age_s()
        assert age is not None
        assert 0 <= age < SECONDS
        (row,) = await controller.rows("SELECT node_id, boot, version, registered, last_seen <= now() FROM nodes")
        assert row == ("gpu-1", node.exchange.outbox.boot, "0.1.0", True, True)

    fold(schema, url, look)
    assert client.xlen(STREAM) == 0, "what is dealt with leaves the stream"
    assert node.exchange.backlog == 1
    node.round()
    assert (node.exchange.backlog, node.exchange.acknowledged) == (0, 1)


def test_what_the_catalogue_knows_is_only_added_to(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller.rows(
                "INSERT INTO model_locations (model_id, tier, size_bytes, last_access, created_at, version, hits)"
                " VALUES"
                " ('models/cold', 'cold', 77, now() - interval '40 days', now() - interval '50 days', 2, 5),"
                " ('models/new', 'hot', 88, now(), now(), 0, 5)"
            )
            send(client, message(1, access("models/cold"), access("models/new", hits=-9, last_ns=0)))
            await controller()
            models = await controller.models()
            assert models["models/cold"][:3] == ("cold", 77, 6), "neither tier nor size is the node's to say"
            assert models["models/cold"][3] < SECONDS
            assert models["models/new"][:3] == ("hot", 88, 0), "never below 0"
            assert models["models/new"][3] < SECONDS, "nothing is ever made older"
            (row,) = await controller.rows(
                "SELECT now() - created_at > interval '49 days' FROM model_locations WHERE model_id = 'models/cold'"
            )
            assert row == (True,)

    run(main())


def test_a_model_of_unknown_size_is_not_invented(schema: str, url: str, client: SyncRedis) -> None:
    send(client, message(1, access("models/a", size=None), access("models/b")))
    assert fold(schema, url, Controller.hits) == {"models/b": 1}
    send(client, message(2, access("models/a", size=9), access("models/b", size=None)))
    assert fold(schema, url, Controller.hits) == {"models/a": 1, "models/b": 2}


def test_many_nodes_add_up_in_one_fold(schema: str, url: str, client: SyncRedis, tmp_path: Path) -> None:
    for number in range(5):
        with node_of(tmp_path, client, f"gpu-{number}", leases=frozenset({b"models/%d" % number})) as made:
            made.access("models/shared")
            made.access(f"models/{number}")
            made.round()

    async def look(controller: Controller) -> None:
        assert await controller.hits() == {"models/shared": 5, **{f"models/{number}": 1 for number in range(5)}}
        assert await controller.leases() == {(f"gpu-{number}", f"models/{number}") for number in range(5)}

    fold(schema, url, look)


# --- exactly once ---


def test_a_duplicate_counts_once(schema: str, url: str, client: SyncRedis, node: Node) -> None:
    node.access("models/a")
    node.round()
    node.resend()
    assert client.xlen(STREAM) == 4
    assert fold(schema, url, Controller.hits) == {"models/a": 1}
    node.exchange.hang_up()
    client.delete(applied_key(node.name))
    node.access("models/a")
    node.resend()

    async def look(controller: Controller) -> tuple[dict[str, int], float, float]:
        return await controller.hits(), controller.count("applied"), controller.count("duplicate")

    assert fold(schema, url, look) == ({"models/a": 2}, 1, 1)
    node.round()
    assert node.exchange.backlog == 0, "a duplicate is acknowledged anew"


def test_what_comes_out_of_order_is_neither_lost_nor_counted_twice(schema: str, url: str, client: SyncRedis) -> None:
    first, second, third = (message(number, access("models/a", hits=10**number)) for number in (1, 2, 3))

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, second)
            await controller()
            assert await controller.hits() == {}
            assert client.hget(applied_key("gpu-1"), str(BOOT)) == b"0"
            send(client, third, first)
            await controller()
            assert await controller.hits() == {"models/a": 10}
            assert controller.count("gap") == 2
            send(client, third, second, first)  # in one fold the order does not matter
            await controller()
            assert await controller.hits() == {"models/a": 1110}
            assert client.hget(applied_key("gpu-1"), str(BOOT)) == b"3"
            send(client, message(9, access("models/a", hits=5), oldest=8))
            await controller()
            send(client, message(8, access("models/a", hits=5), oldest=8))
            await controller()
            assert await controller.hits() == {"models/a": 1115}, "nothing older than 8 will come: a restored database"

    run(main())


def test_a_bad_message_is_counted_and_skipped(schema: str, url: str, client: SyncRedis) -> None:
    send(client, b"no message", message(1, access("models/a")), b'{"format": 2}')
    client.xadd(STREAM, {b"something": b"else"})
    with capture_logs() as logs:

        async def look(controller: Controller) -> tuple[dict[str, int], float]:
            return await controller.hits(), controller.count("bad")

        assert fold(schema, url, look) == ({"models/a": 1}, 3)
    assert [(line["event"], line["messages"]) for line in logs] == [("statistics_unreadable", 3)]
    assert client.xlen(STREAM) == 0


def test_what_the_database_refuses_does_not_stop_the_rest(schema: str, url: str, client: SyncRedis) -> None:
    """One batch cannot be written: the others are, and those that follow it from its node."""

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller.rows(
                "ALTER TABLE model_locations ADD CONSTRAINT refused CHECK (model_id <> 'models/poison')"
            )
            for number in range(7):
                send(client, message(1, access("models/a"), node_id=f"gpu-{number}", leases=("models/a",)))
            send(client, message(2, access("models/poison"), access("models/b"), node_id="gpu-3"))
            send(client, message(3, access("models/a", hits=100), node_id="gpu-3"))
            with capture_logs() as logs:
                await controller()
            assert [(line["event"], line["node"]) for line in logs] == [("statistics_refused", "gpu-3")]
            assert await controller.hits() == {"models/a": 107}
            assert (controller.count("bad"), controller.count("applied")) == (1, 8)
            assert client.hget(applied_key("gpu-3"), str(BOOT)) == b"3"
            assert client.xlen(STREAM) == 0

    run(main())


# --- clocks ---


@pytest.mark.parametrize("skew_s", [-20 * 365 * 86_400.0, -3600.0, 86_400.0, 20 * 365 * 86_400.0])
def test_a_clock_far_off_moves_nothing(schema: str, url: str, client: SyncRedis, tmp_path: Path, skew_s: float) -> None:
    """Neither into the future, which no retention would ever reach, nor into the past, which would demote at once."""
    with node_of(tmp_path, client, skew_s=skew_s) as made:
        made.access("models/a")
        made.access("models/b", ago_s=7200)
        made.round()
    models = fold(schema, url, Controller.models)
    assert 0 <= models["models/a"][3] < SECONDS
    assert 7200 <= models["models/b"][3] < 7200 + SECONDS


def test_an_access_after_its_own_message_is_now(schema: str, url: str, client: SyncRedis) -> None:
    """The node's clock was set back in between."""
    send(client, message(1, access("models/a", last_ns=2**63 - 1), sent_ns=5))

    async def look(controller: Controller) -> list[tuple[Any, ...]]:
        return await controller.rows("SELECT last_access <= now(), now() - last_access < '5s' FROM model_locations")

    assert fold(schema, url, look) == [(True, True)]


# --- leases ---


def test_leases_are_replaced_and_as_old_as_the_message(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, message(leases=("models/a", "models/b")))
            send(client, message(leases=("models/c",), node_id="gpu-2"))
            await controller()
            send(client, message(leases=("models/b", "models/d")))
            await controller()
            assert await controller.leases() == {
                ("gpu-1", "models/b"),
                ("gpu-1", "models/d"),
                ("gpu-2", "models/c"),
            }
            send(client, message(leases=()))
            await controller()
            assert await controller.leases() == {("gpu-2", "models/c")}

    run(main())


def old(client: SyncRedis, data: bytes, seconds: float) -> None:
    """Into the stream, as if it had lain there for so long."""
    client.xadd(STREAM, {FIELD: data}, id=f"{int((time.time() - seconds) * 1000)}-0")


def test_a_report_that_lay_about_is_not_fresh(schema: str, url: str, client: SyncRedis) -> None:
    old(client, message(leases=("models/a",)), 500)

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            await controller()
            age = await controller.leases_age_s()
            assert age is not None
            assert 500 - 1 <= age < 500 + SECONDS
            send(client, message(leases=("models/new",)))
            await controller()
            client.delete(STREAM)
            old(client, message(leases=("models/old",)), 100)  # delivered once more, after the newer one
            await controller()
            assert await controller.leases() == {("gpu-1", "models/new")}
            age = await controller.leases_age_s()
            assert age is not None
            assert age < SECONDS
            (row,) = await controller.rows("SELECT now() - last_seen < '5s', version FROM nodes")
            assert row == (True, "0.1.0"), "old news changes nothing else either"
            client.delete(STREAM)
            old(client, message(leases=("models/old",)), 50)
            send(client, message(1, access("models/a")))  # newer news of the same node
            await controller()
            assert await controller.leases() == {("gpu-1", "models/new")}

    run(main())


def test_a_node_that_does_not_know_grows_old(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            old(client, message(leases=("models/a",)), 500)
            await controller()
            send(client, message(report=True), message(1, access("models/a")))
            await controller()
            age = await controller.leases_age_s()
            assert age is not None
            assert age > 499
            assert await controller.leases() == {("gpu-1", "models/a")}
            (row,) = await controller.rows("SELECT now() - last_seen < '5s' FROM nodes")
            assert row == (True,), "but it lives"

    run(main())


def test_a_name_that_two_daemons_use_is_never_fresh(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            for boots in ((BOOT,), (BOOT, OTHER_BOOT), (BOOT,), (OTHER_BOOT,), (OTHER_BOOT, BOOT)):
                for boot in boots:
                    send(client, message(leases=(f"models/{boot.hex[:4]}",), boot=boot))
                with capture_logs() as logs:
                    await controller()
                age = await controller.leases_age_s()
                assert age is not None
                assert (age > 10**9) is (boots != (BOOT,) or bool(contested))
                contested.append([line["event"] for line in logs])
            assert contested == [[], ["node_name_contested"], [], [], []], "said once"

    contested: list[list[str]] = []
    run(main())


def test_a_new_index_is_nothing_unusual(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            for boot in (BOOT, OTHER_BOOT, OTHER_BOOT):
                send(client, message(1, access("models/a"), leases=("models/a",), boot=boot))
                with capture_logs() as logs:
                    await controller()
                assert logs == []
                age = await controller.leases_age_s()
                assert age is not None
                assert age < SECONDS
            assert await controller.hits() == {"models/a": 2}, "each boot counts its own"

    run(main())


def test_who_reports_is_registered(schema: str, url: str, client: SyncRedis) -> None:
    async def main() -> None:
        async with controller_of(schema, url) as controller:
            send(client, message(leases=()))
            await controller()
            await controller.rows("UPDATE nodes SET registered = false")
            send(client, message(leases=()))
            await controller()
            assert await controller.rows("SELECT registered FROM nodes") == [(True,)]

    run(main())


# --- bounds ---


def test_more_than_one_fold_holds(schema: str, url: str, client: SyncRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_module, "MESSAGES_MAX", 10)
    monkeypatch.setattr(fold_module, "_READ_MESSAGES", 4)
    for number in range(1, 31):
        send(client, message(number, access("models/a")))

    async def main() -> None:
        async with controller_of(schema, url) as controller:
            assert await controller.fold.fold()
            assert await controller.hits() == {"models/a": 12}
            await controller()
            assert await controller.hits() == {"models/a": 30}
            monkeypatch.setattr(fold_module, "BYTES_MAX", 1)
            send(client, *(message(number, access("models/a")) for number in range(31, 41)))
            assert await controller.fold.fold()
            assert await controller.hits() == {"models/a": 34}

    run(main())


def test_the_stream_is_bounded(url: str, client: SyncRedis, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.node.publish.STREAM_MESSAGES_MAX", 100)
    for _ in range(400):
        node.round()
    assert client.xlen(STREAM) <= 200, "cut off by whole nodes of 100 entries (stream-node-max-entries)"


async def _tables(dsn: str) -> int:
    async with connected(dsn) as connection:
        return int(await connection.fetchval("SELECT count(*) FROM statistics_applied"))


def test_hostile_names_are_only_names(schema: str, url: str, client: SyncRedis) -> None:
    name = "models/'; DROP TABLE nodes; --"
    send(client, message(1, access(name), leases=(name,), node_id="'; DROP TABLE nodes; --"))

    async def look(controller: Controller) -> tuple[dict[str, int], set[tuple[str, str]]]:
        return await controller.hits(), await controller.leases()

    assert fold(schema, url, look) == ({name: 1}, {("'; DROP TABLE nodes; --", name)})
    assert run(_tables(schema)) == 1


def test_boots_of_all_kinds_are_told_apart(schema: str, url: str, client: SyncRedis) -> None:
    for _ in range(3):
        send(client, message(1, access("models/a"), boot=uuid4()))
    assert fold(schema, url, Controller.hits) == {"models/a": 3}
