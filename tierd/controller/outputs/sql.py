"""The statements of generated outputs. Knows no steps; ages are judged by the database's clock.

Rows are locked in the order of their keys, so that two transactions wait for each other and never block each other.
"""

from __future__ import annotations

from typing import Final

_TOLD: Final = """
WITH given AS (
    SELECT output_id, user_id, filename, output_type, opens, ended,
           now() - access_us * interval '1 microsecond' AS accessed,
           now() - written_us * interval '1 microsecond' AS written,
           now() - removed_us * interval '1 microsecond' AS removed
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
                $9::int[])
         AS g (output_id, user_id, filename, output_type, opens, access_us, written_us, removed_us, ended)
)
"""

# No version of a UUID is used again while anybody may remember the objects of a deleted output that had it.
_VERSION_BEFORE: Final = "coalesce((SELECT max(t.version) FROM output_tombstones t WHERE t.output_id = g.output_id), 0)"

# What was written or read is there; what was only removed is nobody's any more. Of a deleted output only what was
# written after its deletion is news: a new output.
ADD_TOLD: Final = f"""{_TOLD}
INSERT INTO generated_outputs (output_id, user_id, filename, output_type, created_at, pending_since, version)
SELECT output_id, user_id, filename, output_type, coalesce(written, accessed), coalesce(written, now()),
       {_VERSION_BEFORE}
FROM given g
WHERE (written IS NOT NULL OR accessed IS NOT NULL) AND NOT EXISTS (
    SELECT FROM output_tombstones t JOIN output_erasures e ON e.id = t.erasure_id
    WHERE t.output_id = g.output_id AND t.user_id = g.user_id AND t.filename = g.filename
      AND (g.written IS NULL OR g.written <= e.asked_at))
ORDER BY output_id, user_id, filename
ON CONFLICT DO NOTHING
"""

# Only a read does not ask anybody to look at the file.
FOLD_TOLD: Final = f"""{_TOLD}, locked AS (
    SELECT output_id FROM generated_outputs WHERE output_id = ANY ($1::uuid[]) ORDER BY output_id FOR UPDATE
)
UPDATE generated_outputs o
SET access_count = least(2147483647, o.access_count::bigint + g.opens),
    last_accessed = greatest(o.last_accessed, g.accessed),
    removed_at = CASE WHEN g.written > greatest(o.removed_at, g.removed) THEN NULL
                      ELSE greatest(o.removed_at, g.removed) END,
    stub_version = nullif(o.stub_version, g.ended),
    loose = CASE WHEN o.stub_version = g.ended THEN o.loose ELSE array_remove(o.loose, g.ended) END,
    reads_since = CASE WHEN g.opens = 0 OR o.reads_since > now() - $10 * interval '1 second' THEN o.reads_since
                       ELSE g.accessed END,
    recent_reads = least(2147483647, g.opens
        + CASE WHEN o.reads_since > now() - $10 * interval '1 second' OR g.opens = 0 THEN o.recent_reads::bigint
               ELSE 0 END),
    news = o.news + CASE WHEN g.written IS NULL AND g.removed IS NULL THEN 0 ELSE 1 END,
    pending_since = CASE WHEN g.written IS NULL AND g.removed IS NULL THEN o.pending_since
                         ELSE coalesce(o.pending_since, g.written, g.removed) END,
    try_at = CASE WHEN g.written IS NULL AND g.removed IS NULL THEN o.try_at ELSE least(o.try_at, now()) END
FROM given g JOIN locked USING (output_id)
WHERE o.output_id = g.output_id AND o.user_id = g.user_id AND o.filename = g.filename
"""

ADD_CONFLICTS: Final = """
INSERT INTO output_faults (path, directory, reason)
SELECT convert_to(g.user_id || '/' || g.filename, 'UTF8'),
       convert_to(g.user_id || '/' || substr(g.filename, 1, 10), 'UTF8'),
       'its UUID is that of ' || o.user_id || '/' || o.filename
FROM unnest($1::uuid[], $2::text[], $3::text[]) AS g (output_id, user_id, filename)
JOIN generated_outputs o USING (output_id)
WHERE (o.user_id, o.filename) <> (g.user_id, g.filename)
ORDER BY 1
ON CONFLICT (path) DO UPDATE SET reason = excluded.reason, seen_at = now()
"""

# --- backup ---

# $2: those that are worked on already.
TAKE_PENDING: Final = """
SELECT output_id, user_id, filename, output_type, size_bytes, version, sha256, inode, mtime_ns, ctime_ns, cold_storage,
       news
FROM generated_outputs
WHERE pending_since IS NOT NULL AND try_at <= now() AND NOT output_id = ANY ($2::uuid[])
ORDER BY try_at LIMIT $1
"""

# The version is taken before the first byte is stored: no version is ever used for two contents.
BEGIN_COPY: Final = """
UPDATE generated_outputs
SET version = greatest(version, reserved) + 1, cold_storage = false, sha256 = NULL, hot_storage = true,
    vanished_at = NULL, size_bytes = $3, inode = $4, mtime_ns = $5, ctime_ns = $6,
    hot_since = CASE WHEN cold_storage OR NOT hot_storage THEN now() ELSE hot_since END,
    removed_at = NULL, stub_version = CASE WHEN stub_inode = $4 THEN NULL ELSE stub_version END
WHERE output_id = $1 AND news = $2
RETURNING version
"""

# How long that took is told by the moment since which it was waited for.
END_COPY: Final = """
WITH before AS (SELECT output_id, pending_since FROM generated_outputs WHERE output_id = $1 FOR UPDATE)
UPDATE generated_outputs o
SET cold_storage = true, sha256 = $3, attempts = 0, error = NULL, hot_storage = true, vanished_at = NULL,
    pending_since = CASE WHEN news = $4 THEN NULL ELSE o.pending_since END
FROM before
WHERE o.output_id = before.output_id AND version = $2
RETURNING extract(epoch FROM now() - before.pending_since)::float
"""

# It has the bytes that were copied. One that was brought back is new in the hot tier. Its stub is no longer one, if it
# is that itself or the file which that stood for.
STILL_COPIED: Final = """
UPDATE generated_outputs
SET inode = $3, mtime_ns = $4, ctime_ns = $5, attempts = 0, error = NULL, vanished_at = NULL, pending_since = NULL,
    hot_since = CASE WHEN hot_storage THEN hot_since ELSE now() END, hot_storage = true, removed_at = NULL,
    stub_version = CASE WHEN stub_inode = $3 OR (inode, mtime_ns) = ($3, $4) THEN NULL ELSE stub_version END
WHERE output_id = $1 AND news = $2
"""

# A stub stands for it ($3), or nothing does.
NOT_HOT: Final = """
UPDATE generated_outputs
SET hot_storage = false, vanished_at = CASE WHEN $3 THEN NULL ELSE coalesce(vanished_at, now()) END,
    removed_at = CASE WHEN $3 THEN NULL ELSE removed_at END,
    attempts = 0, error = NULL, pending_since = NULL
WHERE output_id = $1 AND news = $2
"""

# What there was of it in the object store is not there either: it was deleted, and the books are older than that.
LOST: Final = """
UPDATE generated_outputs
SET hot_storage = false, cold_storage = false, vanished_at = coalesce(vanished_at, now()), pending_since = NULL,
    attempts = 0, error = 'its object is gone, too: are the books older than its deletion?'
WHERE output_id = $1 AND news = $2
"""

# After 2, 4, 8 seconds and so on, an hour at most.
FAILED: Final = """
UPDATE generated_outputs
SET attempts = attempts + 1, error = $2,
    try_at = now() + least(3600, power(2, least(attempts + 1, 12))) * interval '1 second'
WHERE output_id = $1
"""

# --- scans ---

IS_KNOWN: Final = "SELECT EXISTS (SELECT FROM generated_outputs WHERE output_id = $1)"

ANY_KNOWN: Final = "SELECT EXISTS (SELECT FROM generated_outputs)"

KNOWN_DAYS: Final = "SELECT directory, inode, mtime_ns FROM output_days WHERE directory = ANY ($1::bytea[])"

SEEN_DAYS: Final = "UPDATE output_days SET seen_at = now() WHERE directory = ANY ($1::bytea[])"

SET_DAY: Final = """
INSERT INTO output_days (directory, inode, mtime_ns, faults) VALUES ($1, $2, $3, $4)
ON CONFLICT (directory) DO UPDATE
SET inode = excluded.inode, mtime_ns = excluded.mtime_ns, faults = excluded.faults, seen_at = now()
"""

# Later than the start of a scan that met all: they are gone.
GONE_DAYS: Final = """
SELECT directory FROM output_days WHERE seen_at < $1 AND directory > $2 ORDER BY directory LIMIT $3
"""

COUNT_DAYS: Final = "SELECT count(*) FILTER (WHERE seen_at < $1), count(*) FROM output_days"

DROP_DAYS: Final = "DELETE FROM output_days WHERE directory = ANY ($1::bytea[])"

_FOUND: Final = """
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[],
                         $8::bigint[])
         AS g (output_id, user_id, filename, output_type, size_bytes, inode, mtime_ns, ctime_ns)
)
"""

# A file that was deleted, as it was then: one that is about to be, or that came back with the source's own books.
_DELETED: Final = """
    t.output_id = g.output_id AND t.user_id = g.user_id AND t.filename = g.filename
    AND (t.inode, t.size_bytes, t.mtime_ns, t.ctime_ns) = (g.inode, g.size_bytes, g.mtime_ns, g.ctime_ns)
"""

# It is deleted again.
ERASE_AGAIN: Final = f"""{_FOUND}
UPDATE output_erasures e SET state = 'planned', try_at = now()
WHERE state <> 'planned' AND id IN (SELECT t.erasure_id FROM output_tombstones t JOIN given g ON {_DELETED})
RETURNING id
"""

# Its age is that of the file; a time in the future is none.
ADD_FOUND: Final = f"""{_FOUND}
INSERT INTO generated_outputs (output_id, user_id, filename, output_type, created_at, version)
SELECT output_id, user_id, filename, output_type, least(now(), to_timestamp(greatest(0, mtime_ns) / 1e9)),
       {_VERSION_BEFORE}
FROM given g WHERE NOT EXISTS (SELECT FROM output_tombstones t WHERE {_DELETED})
ORDER BY output_id, user_id, filename
ON CONFLICT DO NOTHING
RETURNING output_id
"""

# Written beside the overlay, or come back: somebody must look. One that waits already does.
FOLD_FOUND: Final = f"""{_FOUND}, locked AS (
    SELECT output_id FROM generated_outputs WHERE output_id = ANY ($1::uuid[]) ORDER BY output_id FOR UPDATE
)
UPDATE generated_outputs o
SET news = o.news + 1, pending_since = now(), try_at = now()
FROM given g JOIN locked USING (output_id)
WHERE o.output_id = g.output_id AND o.user_id = g.user_id AND o.filename = g.filename AND o.pending_since IS NULL
  AND (o.vanished_at IS NOT NULL OR NOT o.hot_storage
       OR (o.size_bytes, o.inode, o.mtime_ns) IS DISTINCT FROM (g.size_bytes, g.inode, g.mtime_ns))
"""

NAMES_OF_DAY: Final = """
SELECT filename FROM generated_outputs
WHERE user_id = $1 AND filename COLLATE "C" > $2 AND filename COLLATE "C" < $3 AND vanished_at IS NULL
ORDER BY filename COLLATE "C" LIMIT $4
"""

# What is not in its place: whoever looks finds out whether a stub stands for it.
MISSED: Final = """
UPDATE generated_outputs
SET news = news + 1, pending_since = coalesce(pending_since, now()), try_at = least(try_at, now())
WHERE user_id = $1 AND filename = ANY ($2::text[])
"""

DROP_FAULTS: Final = """
DELETE FROM output_faults WHERE directory = ANY ($1::bytea[]) AND seen_at < $2 AND NOT starts_with(reason, 'its UUID')
"""

ADD_FAULTS: Final = """
INSERT INTO output_faults (path, directory, reason)
SELECT path, $2, reason FROM unnest($1::bytea[], $3::text[]) AS g (path, reason) ORDER BY path
ON CONFLICT (path) DO UPDATE SET reason = excluded.reason, seen_at = now()
"""

# --- how they stand ---

STANDING: Final = """
SELECT count(*) FILTER (WHERE hot) AS hot, coalesce(sum(size_bytes) FILTER (WHERE hot), 0)::bigint AS hot_bytes,
       count(*) FILTER (WHERE cold) AS cold, coalesce(sum(size_bytes) FILTER (WHERE cold), 0)::bigint AS cold_bytes,
       count(*) FILTER (WHERE bare) AS unbacked,
       coalesce(sum(size_bytes) FILTER (WHERE bare), 0)::bigint AS unbacked_bytes,
       count(*) FILTER (WHERE gone) AS vanished,
       coalesce(sum(size_bytes) FILTER (WHERE gone), 0)::bigint AS vanished_bytes,
       coalesce(extract(epoch FROM now() - min(created_at) FILTER (WHERE bare)), 0)::float AS oldest_s,
       (SELECT coalesce(sum(faults), 0) FROM output_days)::bigint
       + (SELECT count(*) FROM output_faults f WHERE NOT EXISTS (
             SELECT FROM output_days d WHERE d.directory = f.directory)) AS faults
FROM (
    SELECT size_bytes, created_at, vanished_at IS NOT NULL AS gone, hot_storage AND vanished_at IS NULL AS hot,
           cold_storage AS cold, NOT cold_storage AND vanished_at IS NULL AS bare
    FROM generated_outputs
) o
"""
