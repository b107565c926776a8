"""Prompt templates: texts with a name, of which every version is kept. In PostgreSQL alone; small and read seldom."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

import asyncpg  # type: ignore[import-untyped]

from tierd.contexts.errors import InvalidContext, VersionConflict
from tierd.contexts.names import check_id
from tierd.postgres import Database

TEMPLATE_BYTES_MAX: Final = 1 << 20
LIST_MAX: Final = 1000

_LATEST: Final = "SELECT coalesce(max(version), 0) FROM prompt_templates WHERE user_id = $1 AND name = $2"
_INSERT: Final = """
INSERT INTO prompt_templates (user_id, name, version, template) VALUES ($1, $2, $3, $4) RETURNING created_at
"""
_LOCK: Final = "SELECT pg_advisory_xact_lock_shared(hashtextextended($1, 7))"  # nobody erases the user meanwhile
_GET: Final = """
SELECT name, version, template, created_at FROM prompt_templates
WHERE user_id = $1 AND name = $2 AND ($3::int IS NULL OR version = $3) ORDER BY version DESC LIMIT 1
"""
_LIST: Final = """
SELECT DISTINCT ON (name) name, version, template, created_at FROM prompt_templates
WHERE user_id = $1 AND ($2::text IS NULL OR name > $2) ORDER BY name, version DESC LIMIT $3
"""


class Template(NamedTuple):
    """One version of a template."""

    name: str
    version: int
    template: str
    created_at: datetime


class Templates:
    """Contract: any number of tasks and processes. Raises DatabaseError if the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, user_id: str, name: str, template: str, *, version: int | None = None) -> Template:
        """Add a version. `version` is the one that it was made from, 0 for a new template; None: whatever is there.

        Raises VersionConflict, InvalidContext.
        """
        _check(user_id, name)
        _check_text(template)
        what = f"template {name!r} of {user_id!r}"
        async with self._database.transaction() as connection:
            await connection.execute(_LOCK, user_id)
            latest: int = await connection.fetchval(_LATEST, user_id, name)
            if version is not None and version != latest:
                raise VersionConflict(what, version, latest)
            try:
                created_at = await connection.fetchval(_INSERT, user_id, name, latest + 1, template)
            except asyncpg.UniqueViolationError:
                raise VersionConflict(what, latest, latest + 1) from None
        return Template(name, latest + 1, template, created_at)

    async def get(self, user_id: str, name: str, version: int | None = None) -> Template | None:
        """A version, by default the latest; None if there is none."""
        _check(user_id, name)
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_GET, user_id, name, version)
        return Template(*row) if row is not None else None

    async def list(self, user_id: str, *, limit: int = 100, after: str | None = None) -> list[Template]:
        """The latest version of each template, by name; `after` is the last name of the page before. 1000 at most."""
        check_id("user ID", user_id)
        async with self._database.connection() as connection:
            return [Template(*row) for row in await connection.fetch(_LIST, user_id, after, min(limit, LIST_MAX))]


def _check(user_id: str, name: str) -> None:
    check_id("user ID", user_id)
    check_id("template name", name)


def _check_text(template: str) -> None:
    try:
        size = len(template.encode())
    except UnicodeEncodeError:
        raise InvalidContext("template is not UTF-8", hint="a lone surrogate is no character") from None
    if "\0" in template or size > TEMPLATE_BYTES_MAX:
        fault = "has a NUL in it" if "\0" in template else f"has {size} bytes, {TEMPLATE_BYTES_MAX} are allowed"
        raise InvalidContext(f"template {fault}", hint="shorten it, or take the NUL out")
