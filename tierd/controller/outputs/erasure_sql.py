"""The statements of deletions of outputs. Knows no steps; ages are judged by the database's clock."""

from __future__ import annotations

from typing import Final

# --- what people ask for ---

ASK: Final = "INSERT INTO output_delete_wishes (user_id, output_id, requested_by) VALUES ($1, $2, $3) RETURNING id"

ASKED: Final = """
SELECT id, user_id, output_id FROM output_delete_wishes WHERE planned_at IS NULL ORDER BY id LIMIT 1
"""

PLANNED: Final = "UPDATE output_delete_wishes SET planned_at = now() WHERE id = $1 AND planned_at IS NULL"

# Those that were deleted are of no interest once nothing is left to be done for them.
PURGE_WISHES: Final = """
DELETE FROM output_delete_wishes w
WHERE planned_at < now() - $1 * interval '1 second'
  AND NOT EXISTS (SELECT FROM output_erasures e WHERE e.wish_id = w.id)
"""

FORESEE: Final = """
SELECT count(*), coalesce(sum(size_bytes), 0)::bigint FROM generated_outputs
WHERE user_id = $1 AND ($2::uuid IS NULL OR output_id = $2)
"""

# Of all that is or was asked for of the same outputs: who asks again hears of what goes on. Nodes: those of which
# nobody knows that they have nothing of it.
STANDING: Final = """
WITH mine AS (
    SELECT e.id, e.state, e.date, e.error FROM output_erasures e JOIN output_delete_wishes w ON w.id = $1
    WHERE e.user_id = w.user_id AND (w.output_id IS NULL OR EXISTS (
        SELECT FROM output_tombstones t WHERE t.erasure_id = e.id AND t.output_id = w.output_id))
), waiting AS (
    SELECT n.node_id FROM nodes n WHERE n.registered AND EXISTS (
        SELECT FROM mine m WHERE m.date <> '' AND NOT EXISTS (
            SELECT FROM output_erasure_nodes c WHERE c.erasure_id = m.id AND c.node_id = n.node_id))
    ORDER BY node_id
)
SELECT (SELECT planned_at IS NOT NULL FROM output_delete_wishes WHERE id = $1) AS planned,
       count(t.output_id) AS outputs,
       count(t.output_id) FILTER (WHERE m.state <> 'planned') AS hidden,
       count(t.output_id) FILTER (WHERE m.state = 'deleted') AS deleted,
       (SELECT count(*) FROM mine WHERE state <> 'deleted') AS unfinished,
       (SELECT coalesce(array_agg(node_id), '{}') FROM waiting) AS nodes,
       (SELECT min(error) FROM mine WHERE state <> 'deleted') AS error
FROM mine m LEFT JOIN output_tombstones t ON t.erasure_id = m.id
"""

# By how far they are. Those that wait for the last node only count as deleted.
UNDER_WAY: Final = """
SELECT count(t.output_id) FILTER (WHERE e.state = 'planned') AS planned,
       count(t.output_id) FILTER (WHERE e.state = 'hidden') AS hidden,
       count(t.output_id) FILTER (WHERE e.state = 'deleted') AS deleted,
       (SELECT coalesce(extract(epoch FROM now() - min(asked_at)), 0)::float FROM (
            SELECT asked_at FROM output_erasures WHERE state <> 'deleted'
            UNION ALL SELECT requested_at FROM output_delete_wishes WHERE planned_at IS NULL) unfinished) AS oldest_s
FROM output_erasures e LEFT JOIN output_tombstones t ON t.erasure_id = e.id
"""

# Also one that is being deleted.
HAS: Final = """
SELECT EXISTS (SELECT FROM generated_outputs WHERE user_id = $1 AND output_id = $2)
    OR EXISTS (SELECT FROM output_tombstones WHERE user_id = $1 AND output_id = $2)
"""

# --- planning ---

# Of one day, the first that there is. What was made after somebody asked is none of it.
OF_WISH: Final = """
SELECT o.output_id, o.user_id, o.filename, o.news FROM generated_outputs o JOIN output_delete_wishes w ON w.id = $1
WHERE o.user_id = w.user_id AND (w.output_id IS NULL OR o.output_id = w.output_id) AND o.created_at <= w.requested_at
ORDER BY o.filename COLLATE "C" LIMIT $2
"""

# A node told that the name was removed, and somebody looked since: nothing is there.
REMOVED: Final = """
SELECT output_id, user_id, filename, news FROM generated_outputs
WHERE removed_at IS NOT NULL AND vanished_at IS NOT NULL AND pending_since IS NULL
ORDER BY user_id, filename COLLATE "C" LIMIT $1
"""

ADD_ERASURE: Final = """
INSERT INTO output_erasures (wish_id, user_id, date, epoch) VALUES ($1, $2, $3, $4) RETURNING id
"""


def _was(column: str) -> str:
    """Of the file that is there, or comes back from the trash. Of one that was removed none may be there."""
    return f"CASE WHEN $8 THEN NULL WHEN g.inode IS NULL THEN o.{column} ELSE g.{column} END"


# Not one of which there are news since somebody looked: a restore may have put it back. He looks again.
# $8: removed by somebody who did not ask for the objects: of those some may be needed elsewhere.
BURY: Final = f"""
WITH given AS (
    SELECT * FROM unnest($2::uuid[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $9::bigint[])
         AS g (output_id, inode, size_bytes, mtime_ns, ctime_ns, stub_inode, news)
), gone AS (
    DELETE FROM generated_outputs o USING given g
    WHERE o.output_id = g.output_id AND o.news = g.news
      AND (NOT $8 OR o.removed_at IS NOT NULL AND o.vanished_at IS NOT NULL AND o.pending_since IS NULL)
    RETURNING o.*
)
INSERT INTO output_tombstones (erasure_id, output_id, user_id, filename, version, keep, inode, size_bytes, mtime_ns,
                               ctime_ns, stub_inode)
SELECT $1, g.output_id, o.user_id, o.filename, greatest(o.version, o.reserved),
       CASE WHEN $8 THEN array_remove(o.loose || o.stub_version, NULL) ELSE '{{}}' END,
       {_was("inode")}, {_was("size_bytes")}, {_was("mtime_ns")}, {_was("ctime_ns")}, g.stub_inode
FROM gone o JOIN given g USING (output_id)
RETURNING output_id
"""

# The next scan reads it: what was written again since is to be found.
FORGET_DAY: Final = "DELETE FROM output_days WHERE directory = convert_to($1::text || '/' || $2::text, 'UTF8')"

# --- steps ---

_CONFIRMED: Final = """
    (e.date = '' OR NOT EXISTS (
        SELECT FROM nodes n WHERE n.registered AND NOT EXISTS (
            SELECT FROM output_erasure_nodes c WHERE c.erasure_id = e.id AND c.node_id = n.node_id)))
"""

# $1: how long objects wait for nodes, $2: how long tombstones stay.
_KEPT: Final = f"e.deleted_at < clock_timestamp() - $2 * interval '1 second' AND {_CONFIRMED}"
_MAY_GO: Final = f"(e.hidden_at < clock_timestamp() - $1 * interval '1 second' OR {_CONFIRMED})"

TO_DO: Final = f"""
SELECT e.id FROM output_erasures e
WHERE e.try_at <= now()
  AND CASE e.state WHEN 'planned' THEN true WHEN 'hidden' THEN {_MAY_GO} ELSE {_KEPT} END
ORDER BY e.state = 'deleted', e.asked_at, e.id LIMIT $3
"""

READ: Final = f"""
SELECT e.id, e.wish_id, e.user_id, e.date, e.state, {_MAY_GO} AS may_go, {_KEPT} AS kept
FROM output_erasures e WHERE e.id = $3
"""

HOLD: Final = "SELECT state FROM output_erasures WHERE id = $1 FOR UPDATE"

TOMBSTONES: Final = """
SELECT output_id, user_id, filename, version, keep, inode, size_bytes, mtime_ns, stub_inode, gone
FROM output_tombstones WHERE erasure_id = $1 ORDER BY output_id
"""

MOVE_OF_DAY: Final = "SELECT id FROM moves WHERE subject = $1 AND finished_at IS NULL FOR UPDATE"

FILES_OF_MOVE: Final = "SELECT path, version FROM move_files WHERE move_id = $1 AND path = ANY ($2::bytea[])"

LEAVE_MOVE: Final = "DELETE FROM move_files WHERE move_id = $1 AND path = ANY ($2::bytea[])"

HIDDEN: Final = """
UPDATE output_erasures SET state = 'hidden', hidden_at = now(), attempts = 0, error = NULL, epoch = $2 WHERE id = $1
"""

# Those that were confirmed of an earlier turn count no more.
UNCONFIRM: Final = "DELETE FROM output_erasure_nodes WHERE erasure_id = $1"

GONE: Final = "UPDATE output_tombstones SET gone = true WHERE erasure_id = $1 AND output_id = ANY ($2::uuid[])"

DELETED: Final = """
UPDATE output_erasures SET state = 'deleted', deleted_at = now(), attempts = 0, error = NULL, epoch = $2 WHERE id = $1
"""

OTHERS_UNDER_WAY: Final = """
SELECT EXISTS (SELECT FROM output_erasures WHERE user_id = $1 AND date <> '' AND state <> 'deleted')
"""

LIVING: Final = """
SELECT filename FROM generated_outputs WHERE user_id = $1 AND filename = ANY ($2::text[])
"""

LIVING_DAYS: Final = """
SELECT d FROM unnest($2::text[]) AS d WHERE EXISTS (
    SELECT FROM generated_outputs WHERE user_id = $1
      AND filename COLLATE "C" > d || '/' AND filename COLLATE "C" < d || '0')
   OR EXISTS (SELECT FROM moves WHERE finished_at IS NULL AND subject = $3::text || '/' || $1::text || '/' || d)
"""

DROP: Final = "DELETE FROM output_erasures WHERE id = $1"

# After 2, 4, 8 seconds and so on, ten minutes at most.
FAILED: Final = """
UPDATE output_erasures
SET attempts = attempts + 1, error = $2,
    try_at = now() + least(600, power(2, least(attempts + 1, 10))) * interval '1 second'
WHERE id = $1
"""

WAIT: Final = "UPDATE output_erasures SET try_at = now() + $2 * interval '1 second', error = $3 WHERE id = $1"

# --- what nodes are told ---

# Not before every cache of names has forgotten them: whoever opened one until then is counted as its reader.
TO_TELL: Final = """
SELECT id FROM output_erasures e
WHERE state <> 'planned' AND hidden_at < now() - interval '5 seconds' AND date <> '' AND EXISTS (
    SELECT FROM nodes n WHERE n.registered AND NOT EXISTS (
        SELECT FROM output_erasure_nodes c WHERE c.erasure_id = e.id AND c.node_id = n.node_id))
ORDER BY state = 'deleted', hidden_at, id LIMIT $1
"""

PATHS: Final = "SELECT user_id || '/' || filename AS path FROM output_tombstones WHERE erasure_id = $1 ORDER BY 1"
