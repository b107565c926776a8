"""The statements of a fold: each takes arrays, and is sent once, however many nodes and models there are.

Ages are microseconds before now(), the start of the transaction: no time of any other clock than the database's gets
in, and none lies in the future. Rows are locked in the order of their keys, so that two folds wait for each other and
never block each other.
"""

from __future__ import annotations

PLAN = "SET LOCAL plan_cache_mode = force_custom_plan"
"""For as many rows as the arrays have: a plan made for any number of them takes minutes for ten thousand."""

ADD_BOOTS = """
INSERT INTO statistics_applied (node_id, boot, sequence)
SELECT node_id, boot, 0 FROM unnest($1::text[], $2::uuid[]) AS given (node_id, boot)
ORDER BY node_id, boot
ON CONFLICT DO NOTHING
RETURNING node_id, boot
"""
"""Boots never heard of before."""

LOCK_BOOTS = """
SELECT a.node_id, a.boot, a.sequence, n.boot AS latest
FROM statistics_applied a
JOIN unnest($1::text[], $2::uuid[]) AS given (node_id, boot) ON a.node_id = given.node_id AND a.boot = given.boot
LEFT JOIN nodes n ON n.node_id = a.node_id
ORDER BY a.node_id, a.boot
FOR UPDATE OF a
"""
"""Until the end of the transaction nobody else applies batches of these boots."""

SET_APPLIED = """
UPDATE statistics_applied a SET sequence = given.sequence, applied_at = now()
FROM unnest($1::text[], $2::uuid[], $3::bigint[]) AS given (node_id, boot, sequence)
WHERE a.node_id = given.node_id AND a.boot = given.boot AND a.sequence < given.sequence
"""

FOLD_MODELS = """
WITH given AS (
    SELECT model_id, now() - age_us * interval '1 microsecond' AS last_access, hits, size_bytes
    FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) AS g (model_id, age_us, hits, size_bytes)
), locked AS (
    SELECT model_id FROM model_locations WHERE model_id = ANY ($1::text[]) ORDER BY model_id FOR UPDATE
), updated AS (
    UPDATE model_locations m
    SET last_access = greatest(m.last_access, given.last_access),
        hits = greatest(0, least(9223372036854775807, m.hits::numeric + given.hits))
    FROM given JOIN locked USING (model_id)
    WHERE m.model_id = given.model_id
)
INSERT INTO model_locations AS m (model_id, tier, size_bytes, last_access, hits)
SELECT model_id, 'hot', size_bytes, last_access, greatest(0, hits)
FROM given
WHERE size_bytes IS NOT NULL AND NOT EXISTS (SELECT FROM locked WHERE locked.model_id = given.model_id)
ORDER BY model_id
ON CONFLICT (model_id) DO UPDATE
SET last_access = greatest(m.last_access, excluded.last_access), hits = greatest(0, m.hits + excluded.hits)
"""
"""A model that the catalogue does not know was read from the source, so it is hot; its size is what the node found. One
whose size nobody could tell waits for its next access: 0 would be a lie. (It conflicts with who adds it right now.)"""

FOLD_NODES = """
INSERT INTO nodes AS n (node_id, boot, first_seen, last_seen, leases_at, version)
SELECT node_id, boot, now() - seen_us * interval '1 microsecond', now() - seen_us * interval '1 microsecond',
       CASE WHEN contested THEN 'epoch' ELSE now() - leases_us * interval '1 microsecond' END, version
FROM unnest($1::text[], $2::uuid[], $3::text[], $4::bigint[], $5::bigint[], $6::bool[])
     AS given (node_id, boot, version, seen_us, leases_us, contested)
ORDER BY node_id
ON CONFLICT (node_id) DO UPDATE
SET boot = excluded.boot,
    version = excluded.version,
    last_seen = excluded.last_seen,
    leases_at = CASE WHEN excluded.leases_at = 'epoch' THEN excluded.leases_at
                     ELSE greatest(n.leases_at, excluded.leases_at) END,
    registered = true
WHERE excluded.last_seen >= n.last_seen
RETURNING node_id, (extract(epoch FROM now() - leases_at) * 1000000)::bigint
"""
"""Older news than what is there changes nothing. No report leaves `leases_at` as it is, so that it grows old; of a
contested name it is 1970: too old for whoever asks. Who reports is not gone. Returns how old the latest report is."""

FOLD_LEASES = """
WITH held AS (
    SELECT node_id, model_id FROM unnest($2::text[], $3::text[]) AS given (node_id, model_id)
), ended AS (
    DELETE FROM node_leases l
    WHERE l.node_id = ANY ($1::text[])
      AND NOT EXISTS (SELECT FROM held WHERE held.node_id = l.node_id AND held.model_id = l.model_id)
)
INSERT INTO node_leases (node_id, model_id)
SELECT node_id, model_id FROM held ORDER BY node_id, model_id
ON CONFLICT DO NOTHING
"""
"""Replaces the leases of the nodes $1; writes only what changed."""

CONFIRM_ERASURES = """
INSERT INTO output_erasure_nodes (erasure_id, node_id)
SELECT e.id, node_id FROM unnest($1::text[], $2::bigint[]) AS given (node_id, id) JOIN output_erasures e USING (id)
WHERE e.state <> 'planned'
ORDER BY e.id, node_id
ON CONFLICT DO NOTHING
"""
"""Of deleted outputs a node has nothing any more."""
