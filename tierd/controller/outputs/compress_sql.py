"""The statements of compressions of outputs. Knows no steps; ages are judged by the database's clock."""

from __future__ import annotations

from typing import Final

# What has left the hot tier, by steps that are at their end, and was not looked at in this version.
_MAY_BE: Final = """
    o.cold_storage AND NOT o.hot_storage AND o.pending_since IS NULL AND o.vanished_at IS NULL
    AND lower(right(o.filename, 4)) = '.png' AND o.size_bytes BETWEEN 1 AND $1
    AND o.created_at < now() - $2 * interval '1 day' AND NOT o.version = ANY (o.loose)
    AND NOT EXISTS (SELECT FROM output_compressions c WHERE c.output_id = o.output_id
                    AND (c.finished_at IS NULL OR o.version IN (c.old_version, c.version)))
    AND NOT EXISTS (SELECT FROM moves m WHERE m.finished_at IS NULL
                    AND m.subject = $3::text || '/' || o.user_id || '/' || left(o.filename, 10))
"""

CANDIDATES: Final = f"""
SELECT o.output_id, o.created_at FROM generated_outputs o
WHERE {_MAY_BE} AND (o.created_at, o.output_id) > ($4, $5)
ORDER BY o.created_at, o.output_id LIMIT $6
"""

COUNT_CANDIDATES: Final = f"""
SELECT count(*), coalesce(sum(o.size_bytes), 0)::bigint FROM generated_outputs o WHERE {_MAY_BE}
"""

# The version is taken before the first byte is stored: no version is ever used for two contents.
BEGIN: Final = f"""
WITH taken AS (
    UPDATE generated_outputs o SET reserved = greatest(o.version, o.reserved) + 1
    WHERE o.output_id = $4 AND {_MAY_BE}
    RETURNING o.output_id, o.user_id, o.filename, o.version, o.size_bytes, o.sha256, o.reserved
)
INSERT INTO output_compressions (output_id, user_id, filename, old_version, old_size, old_sha256, version)
SELECT * FROM taken
RETURNING id
"""

_COLUMNS: Final = """
id, output_id, user_id, filename, old_version, old_size, old_sha256, version, size_bytes, sha256, old_stub, state
"""
ONE: Final = f"SELECT {_COLUMNS} FROM output_compressions WHERE id = $1"

HOLD: Final = "SELECT state FROM output_compressions WHERE id = $1 FOR UPDATE"

UNFINISHED: Final = """
SELECT id FROM output_compressions WHERE finished_at IS NULL AND try_at <= now() AND id > $1 ORDER BY id LIMIT $2
"""

# Whose object is the one of a version ($2, $3), and nobody must look at it first.
STILL: Final = """
SELECT version = $2 AND sha256 = $3 AND cold_storage AND NOT hot_storage AND pending_since IS NULL
       AND vanished_at IS NULL
FROM generated_outputs WHERE output_id = $1 FOR UPDATE
"""

# Another cold file may stand for it: one that users took elsewhere.
IS_LOOSE: Final = "SELECT $2::int = ANY (loose) FROM generated_outputs WHERE output_id = $1"

BEGIN_SWITCH: Final = """
UPDATE output_compressions SET state = 'switching', size_bytes = $2, sha256 = $3 WHERE id = $1
"""

# Whoever renames or links the stub from now on may take this one with him, and nobody know of it: `rm` keeps it.
ADD_LOOSE: Final = "UPDATE generated_outputs SET loose = array_append(loose, $2::int) WHERE output_id = $1"

# The stub that stood for $5 is gone, and had no other name: the one that took its place stands for $2.
SET_VERSION: Final = """
UPDATE generated_outputs
SET version = $2, size_bytes = $3, sha256 = $4,
    stub_version = CASE WHEN stub_version = $5::int THEN $2 ELSE stub_version END,
    stub_inode = $6,
    loose = array_remove(loose, $2)
WHERE output_id = $1
"""

BEGIN_GRACE: Final = """
UPDATE output_compressions
SET state = 'in_grace', reason = '', try_at = now() + $2 * interval '1 second', old_stub = $3
WHERE id = $1
"""

SET_DELETING: Final = "UPDATE output_compressions SET state = 'deleting', reason = '' WHERE id = $1"

FINISH: Final = "UPDATE output_compressions SET state = $2, reason = $3, finished_at = now() WHERE id = $1"

POSTPONE: Final = """
UPDATE output_compressions SET reason = $2, try_at = now() + $3 * interval '1 second'
WHERE id = $1 AND finished_at IS NULL
"""

FORGET: Final = "DELETE FROM output_compressions WHERE id = $1"

# Who a picture was of, nobody keeps in mind once it is deleted.
FORGET_GONE: Final = """
DELETE FROM output_compressions WHERE id IN (
    SELECT id FROM output_compressions c
    WHERE finished_at IS NOT NULL AND NOT EXISTS (SELECT FROM generated_outputs o WHERE o.output_id = c.output_id)
    ORDER BY id LIMIT 10000)
"""
