"""The library and its jobs against a dictionary: any order of calls, with dates that pass, crashes, and exports.

Time is virtual: instead of waiting, everything in the database becomes so many days older.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.contexts.house import House
from tierd.contexts import VersionConflict
from tierd.controller.contexts.archive import archive_old_contexts
from tierd.controller.contexts.months import months
from tierd.controller.contexts.purge import PurgeRules, purge_expired_contexts
from tierd.controller.contexts.restore import restore_contexts
from tierd.objects.directory import DirectoryStore
from tierd.postgres import Database

USERS = st.sampled_from(["u", "u:", "안"])
NAMES = st.sampled_from(["c", ":c", "'"])
RULES = PurgeRules(grace_days=0, months_max=100, share_max=1.0)
AGE = """
SELECT make_context_month(archived_at - $1::interval) FROM (SELECT DISTINCT archived_at FROM context_archive_keys) a
"""
OLDER = (
    "UPDATE user_contexts_archive SET archived_at = archived_at - $1::interval, updated_at = updated_at - $1::interval,"
    " created_at = created_at - $1::interval",
    "UPDATE context_archive_keys SET archived_at = archived_at - $1::interval",
    "UPDATE user_contexts SET updated_at = updated_at - $1::interval, created_at = created_at - $1::interval",
    "UPDATE context_tombstones SET erased_at = erased_at - $1::interval",
)


class Machine(RuleBasedStateMachine):
    """`there` is what must be; `versions` what was last acknowledged of each."""

    house: House
    objects: Path

    @initialize()
    def begin(self) -> None:
        """An empty database, an empty Redis, a library."""
        self.runner = asyncio.Runner()
        self.there: dict[tuple[str, str], tuple[list[Any], int, datetime]] = {}
        self.exports: list[tuple[str, str, dict[tuple[str, str], tuple[list[Any], int, datetime]], set[Any]]] = []
        self.buckets = 0
        self.run(self._begin())

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(call, 60))

    async def _begin(self) -> None:
        self.house.postgres.start()
        assert self.house.redis is not None
        self.house.redis.start()
        assert self.house.client is not None
        self.house.client.flushall()
        self.stack = AsyncExitStack()
        await self._open()
        async with self.database.connection() as connection:
            for month in await months(connection):
                await connection.execute(f"DROP TABLE {month.table}")
            await connection.execute(
                "TRUNCATE user_contexts, context_archive_keys, context_tombstones, context_cache_debts, context_exports"
            )
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(dir=self.objects))
        self.store = DirectoryStore(Path(directory))

    async def _open(self) -> None:
        self.library = AsyncExitStack()
        self.contexts = await self.library.enter_async_context(self.house.contexts(redis_timeout=10.0))
        self.database: Database = await self.library.enter_async_context(self.house.database())

    def teardown(self) -> None:
        """Close everything."""
        if not hasattr(self, "runner"):
            return
        try:
            self.run(self.library.aclose())
            self.run(self.stack.aclose())
        finally:
            self.runner.close()

    @rule(user=USERS, name=NAMES, stale=st.booleans(), message=st.integers())
    def save(self, user: str, name: str, stale: bool, message: int) -> None:
        """With the version that is there, or with another one."""
        _, version, created = self.there.get((user, name), ([], 0, None))
        call = self.contexts.save(user, name, [{"n": message}], version=version + 1 if stale else version)
        if stale:
            with pytest.raises(VersionConflict) as caught:
                self.run(call)
            assert caught.value.current == version
            return
        saved = self.run(call)
        self._written(user, name, [{"n": message}], saved, created)

    @rule(user=USERS, name=NAMES, message=st.integers())
    def append(self, user: str, name: str, message: int) -> None:
        """To whatever is there."""
        messages, _, created = self.there.get((user, name), ([], 0, None))
        saved = self.run(self.contexts.append(user, name, [{"n": message}]))
        self._written(user, name, [*messages, {"n": message}], saved, created)

    def _written(self, user: str, name: str, messages: list[Any], saved: Any, created: datetime | None) -> None:
        version = self.there.get((user, name), ([], 0, None))[1]
        assert saved.version > version
        assert created is None or saved.created_at == created, "a conversation begins once"
        self.there[user, name] = (messages, saved.version, saved.created_at)

    @rule(user=USERS, name=NAMES)
    def get(self, user: str, name: str) -> None:
        """From wherever it is."""
        found = self.run(self.contexts.get(user, name))
        wanted = self.there.get((user, name))
        assert (found and (found.messages, found.version)) == (wanted and wanted[:2])

    @rule(user=USERS)
    def list(self, user: str) -> None:
        """All of a user's."""
        found = self.run(self.contexts.list(user))
        assert sorted(each.conversation_id for each in found) == sorted(name for who, name in self.there if who == user)

    @rule(user=USERS, name=NAMES)
    def delete(self, user: str, name: str) -> None:
        """One."""
        assert self.run(self.contexts.delete(user, name)) == ((user, name) in self.there)
        self.there.pop((user, name), None)
        for *_, rows, gone in self.exports:
            gone.update({(user, name)} & set(rows))

    @rule(user=USERS)
    def delete_user(self, user: str) -> None:
        """All of one's."""
        mine = {key for key in self.there if key[0] == user}
        erased = self.run(self.contexts.delete_user(user))
        assert erased.warm + erased.archive == len(mine)
        for key in mine:
            del self.there[key]
        for *_, rows, gone in self.exports:
            gone.update(key for key in rows if key[0] == user)

    @rule(days=st.sampled_from([1, 20, 31, 200, 400]))
    def time_passes(self, days: int) -> None:
        """Redis forgets; everything else grows older. But exports do not, so these are forgotten, too."""
        self.exports.clear()
        self.run(self._age(timedelta(days=days)))
        self.there = {
            key: (messages, version, created - timedelta(days=days))
            for key, (messages, version, created) in self.there.items()
        }

    async def _age(self, by: timedelta) -> None:
        assert self.house.client is not None
        self.house.client.flushall()
        async with self.database.transaction() as connection:
            await connection.fetch(AGE, by)
            for statement in OLDER:
                await connection.execute(statement, by)
            await connection.execute("DELETE FROM context_exports WHERE state = 'done'")

    @rule()
    def a_year_passes(self) -> None:
        """In which nobody writes, so that much of it is over."""
        self.time_passes(31)
        self.archive(4)
        self.time_passes(400)
        self.purge()

    @rule(batch=st.integers(1, 4))
    def archive(self, batch: int) -> None:
        """What is 30 days old."""
        self.run(archive_old_contexts(self.database, batch_rows_max=batch))

    @rule()
    def purge(self) -> None:
        """Export what is over, then drop it."""
        self.buckets += 1
        bucket = f"bucket-{self.buckets}"
        self.run(purge_expired_contexts(self.database, self.store, RULES, bucket=bucket))
        over = self.run(self._over())
        steps = self.run(purge_expired_contexts(self.database, self.store, RULES, bucket=bucket))
        assert self.house.client is not None
        self.house.client.flushall()  # a year later nothing of it would be there
        for step in steps:
            if step.action == "drop":
                rows = {key: self.there.pop(key) for key in over.get(step.month, ())}
                self.exports.append((bucket, step.month, rows, set()))
                event("dropped")

    async def _over(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        async with self.database.connection() as connection:
            for user, name, month in await connection.fetch(
                "SELECT user_id, conversation_id, to_char(archived_at, 'YYYY-MM') FROM context_archive_keys"
            ):
                found.setdefault(month, []).append((user, name))
        return found

    @rule(which=st.integers(0, 100))
    def restore(self, which: int) -> None:
        """An export: what is missing, and was not deleted since."""
        if not self.exports:
            return
        bucket, month, rows, gone = self.exports[which % len(self.exports)]
        done = self.run(restore_contexts(self.database, self.store, month, bucket=bucket))
        missing = {key for key in rows if key not in gone and key not in self.there}
        assert (done.rows, done.restored) == (len(rows), len(missing))
        event(f"restored {min(len(missing), 1)}, deleted {min(len(gone), 1)}")
        for key in missing:
            messages, version, created = rows[key]
            self.there[key] = (messages, version, created)

    @rule(what=st.sampled_from(["process", "redis", "postgres"]))
    def crash(self, what: str) -> None:
        """And start again."""
        self.run(self._crash(what))

    async def _crash(self, what: str) -> None:
        assert self.house.redis is not None
        await self.library.aclose()
        server = {"redis": self.house.redis, "postgres": self.house.postgres}.get(what)
        if server is not None:
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        await self._open()

    @invariant()
    def everything_is_in_one_place(self) -> None:
        """Past the library: each conversation once, as it was acknowledged."""
        if hasattr(self, "library"):
            rows = self.run(self._rows())
            assert sorted(rows) == sorted((*key, version) for key, (_, version, _) in self.there.items())

    async def _rows(self) -> list[tuple[str, str, int]]:
        async with self.database.connection() as connection:
            found = await connection.fetch(
                "SELECT user_id, conversation_id, version FROM user_contexts"
                " UNION ALL SELECT a.user_id, a.conversation_id, a.version FROM user_contexts_archive a"
            )
            return [tuple(row) for row in found]


@pytest.fixture
def machine(house: House, tmp_path: Path) -> Iterator[type[Machine]]:
    """The machine over this test's servers."""
    Machine.house, Machine.objects = house, tmp_path
    yield Machine
    house.postgres.start()


def test_any_order_of_calls(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=10, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    )


@pytest.mark.campaign
def test_any_order_of_calls_many_times(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=100, derandomize=False, suppress_health_check=list(HealthCheck)
        ),
    )
