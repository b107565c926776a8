"""The statements of moves. Knows no steps; ages are judged by the database's clock."""

from __future__ import annotations

from typing import Final

LOCK_MODEL: Final = """
SELECT tier, size_bytes, version, pinned, last_access FROM model_locations WHERE model_id = $1 FOR UPDATE
"""

# A model within another, or around it, is the same files.
UNFINISHED_NEAR: Final = """
SELECT id, kind, subject FROM moves
WHERE finished_at IS NULL
  AND (subject = $1::text OR starts_with(subject, $1::text || '/') OR starts_with($1::text, subject || '/'))
ORDER BY id LIMIT 1
"""

STALE_NODES: Final = """
SELECT node_id FROM nodes
WHERE registered AND (leases_at IS NULL OR leases_at < clock_timestamp() - $1 * interval '1 second')
ORDER BY node_id LIMIT 4
"""

COUNT_NODES: Final = "SELECT count(*) FROM nodes WHERE registered"

LEASES: Final = """
SELECT node_id FROM node_leases JOIN nodes USING (node_id)
WHERE registered
  AND (model_id = $1::text OR starts_with(model_id, $1::text || '/') OR starts_with($1::text, model_id || '/'))
ORDER BY node_id LIMIT 4
"""

# No version is ever used twice, whatever became of it: an object is written once.
ADD_MOVE: Final = """
INSERT INTO moves (kind, subject, version, epoch, size_bytes, reason, by_hand, last_access, detail)
VALUES ($1, $2::text, 1 + greatest((SELECT version FROM model_locations WHERE model_id = $2::text),
                             (SELECT max(version) FROM moves WHERE subject = $2::text)),
        $3, $4, $5, $6, $7, $8::jsonb)
RETURNING id
"""

ADD_MOVE_OF_VERSION: Final = """
INSERT INTO moves (kind, subject, version, epoch, size_bytes, reason, by_hand, last_access, detail)
VALUES ($1, $2::text, $9, $3, $4, $5, $6, $7, $8::jsonb)
RETURNING id
"""

ADD_FILES: Final = """
INSERT INTO move_files (move_id, path, links, size_bytes, mtime_ns, ctime_ns, inode, mode)
SELECT $1, f.* FROM unnest($2::bytea[], $3::bytea[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::int[])
     AS f (path, links, size_bytes, mtime_ns, ctime_ns, inode, mode)
"""

MOVE: Final = """
SELECT id, kind, subject, state, version, attempts, size_bytes, done_bytes, by_hand, last_access, grace_until,
       grace_until <= clock_timestamp() AS grace_is_over, abandoning, reason, detail
FROM moves WHERE id = $1
"""

UNFINISHED: Final = "SELECT id FROM moves WHERE finished_at IS NULL ORDER BY created_at, id"

FILES: Final = """
SELECT path, links, size_bytes, mtime_ns, ctime_ns, inode, mode, sha256, state, stub, trash_ctime_ns, version
FROM move_files WHERE move_id = $1 ORDER BY path
"""

HOLD: Final = "SELECT state, abandoning FROM moves WHERE id = $1 FOR UPDATE"

SET_STATE: Final = """
UPDATE moves
SET state = $3, epoch = $4, updated_at = now(), attempts = 0, error = NULL,
    finished_at = CASE WHEN $3 IN ('done', 'abandoned', 'failed') THEN now() END
WHERE id = $1 AND state = $2
RETURNING id
"""

BEGIN_GRACE: Final = "UPDATE moves SET grace_until = now() + $2 * interval '1 second' WHERE id = $1"

BEGIN_ABANDONING: Final = """
UPDATE moves SET abandoning = $3, epoch = $4, updated_at = now()
WHERE id = $1 AND state = $2 AND abandoning IS NULL
RETURNING id
"""

NOTE_ERROR: Final = """
UPDATE moves SET error = $2, attempts = attempts + $3, epoch = $4, updated_at = now()
WHERE id = $1 AND finished_at IS NULL
RETURNING attempts
"""

NOTE_DETAIL: Final = "UPDATE moves SET detail = detail || $2::jsonb WHERE id = $1"

SET_FILES: Final = """
UPDATE move_files m
SET state = coalesce(f.state, m.state), sha256 = coalesce(f.sha256, m.sha256), stub = coalesce(f.stub, m.stub),
    trash_ctime_ns = coalesce(f.trash_ctime_ns, m.trash_ctime_ns)
FROM unnest($2::bytea[], $3::text[], $4::bytea[], $5::bigint[], $6::bigint[])
     AS f (path, state, sha256, stub, trash_ctime_ns)
WHERE m.move_id = $1 AND m.path = f.path
"""

# What was kept in the trash is still to be found here.
FORGET_FILES: Final = "DELETE FROM move_files WHERE move_id = $1 AND state <> 'kept'"

SET_PROGRESS: Final = """
UPDATE moves SET updated_at = now(), done_bytes = (
    SELECT coalesce(sum(size_bytes), 0) FROM move_files WHERE move_id = $1 AND state <> 'planned')
WHERE id = $1
"""

SET_DONE_BYTES: Final = "UPDATE moves SET done_bytes = $2, updated_at = now() WHERE id = $1"

# created_at is not among what changes: age goes on.
SET_COLD: Final = """
UPDATE model_locations SET tier = 'cold', version = $2, files = $3, size_bytes = $4 WHERE model_id = $1
"""

PLANNED_NS: Final = "SELECT (extract(epoch FROM created_at) * 1000000000)::bigint FROM moves WHERE id = $1"

# One that is hot keeps what is known of it: the files that came are beside its own.
ADD_IMPORTED: Final = """
INSERT INTO model_locations (model_id, tier, size_bytes, files, imported) VALUES ($1, 'cold', $2, $3, true)
ON CONFLICT (model_id) DO UPDATE SET imported = true
"""

SET_HOT: Final = "UPDATE model_locations SET tier = 'hot' WHERE model_id = $1"

KNOWN_MOVES: Final = "SELECT id FROM moves WHERE id = ANY ($1::bigint[])"

# Numbers up to this one are not given out any more.
SKIP_NUMBERS: Final = """
SELECT setval(sequence, greatest($1::bigint, nextval(sequence)))
FROM pg_get_serial_sequence('moves', 'id') AS sequence
"""

NOTE_EVENT: Final = """
INSERT INTO move_events (move_id, subject, event, reason, detail) VALUES ($1, $2::text, $3, $4, $5::jsonb)
"""

LATEST_DEMOTION: Final = """
SELECT id, state FROM moves WHERE subject = $1 AND kind = 'demote' ORDER BY id DESC LIMIT 1 FOR UPDATE
"""

# Nothing was switched in these, so no stub stands for any of their objects; and there were none when they began: a
# database that is older than the store gives versions out again. Those of outputs are their backup. Bounded: the rest
# goes next time.
WASTED_VERSIONS: Final = """
SELECT id, subject, version FROM moves m
WHERE kind = 'demote' AND state IN ('abandoned', 'failed') AND version > 0
  AND detail ? 'began' AND NOT (detail ? 'switched') AND NOT (detail ? 'cleaned') AND NOT (detail ? 'outputs')
  AND finished_at < now() - $1 * interval '1 second'
  AND NOT EXISTS (SELECT FROM model_locations l WHERE l.model_id = m.subject AND l.version = m.version)
ORDER BY id LIMIT $2
"""
