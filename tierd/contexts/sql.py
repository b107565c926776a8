"""The statements by which conversations are read and written: $1 is the user, $2 the conversation. Runs nothing."""

from __future__ import annotations

from typing import Final

# Who creates, promotes or deletes a conversation does it alone; who erases a user waits for all of these. Who writes
# over a row in user_contexts, or archives it, needs no more than the row's lock: it is there, or it is not.
LOCK: Final = """
SELECT pg_advisory_xact_lock_shared(hashtextextended($1, 7)),
       pg_advisory_xact_lock(hashtextextended($2, hashtextextended($1, 8)))
"""
LOCK_USER: Final = "SELECT pg_advisory_xact_lock(hashtextextended($1, 7))"

# One statement, one snapshot: a conversation that is moved meanwhile is seen in one of the two.
READ: Final = """
SELECT messages::text AS text, version, created_at, updated_at, NULL::timestamptz AS archived_at
FROM user_contexts WHERE user_id = $1 AND conversation_id = $2
UNION ALL
SELECT NULL, NULL, NULL, NULL, archived_at FROM context_archive_keys WHERE user_id = $1 AND conversation_id = $2
"""
WRITE: Final = """
UPDATE user_contexts SET messages = $3::text::jsonb, version = version + 1, updated_at = now()
WHERE user_id = $1 AND conversation_id = $2 AND ($4::bigint IS NULL OR version = $4)
RETURNING version, created_at, updated_at
"""
APPEND: Final = """
UPDATE user_contexts SET messages = messages || $3::text::jsonb, version = version + 1, updated_at = now()
WHERE user_id = $1 AND conversation_id = $2 AND ($4::bigint IS NULL OR version = $4)
RETURNING version, created_at, updated_at, messages::text AS text
"""
WARM: Final = """
SELECT messages::text AS text, version, created_at, updated_at FROM user_contexts
WHERE user_id = $1 AND conversation_id = $2 FOR UPDATE
"""
# A conversation leaves the archive: its key, then its row, of whose month the key tells.
TAKE_KEY: Final = """
DELETE FROM context_archive_keys WHERE user_id = $1 AND conversation_id = $2 RETURNING archived_at
"""
TAKE_ARCHIVED: Final = """
DELETE FROM user_contexts_archive WHERE user_id = $1 AND conversation_id = $2 AND archived_at = $3
RETURNING messages::text AS text, version, created_at, updated_at
"""
INSERT: Final = """
INSERT INTO user_contexts (user_id, conversation_id, messages, version, created_at, updated_at)
VALUES ($1, $2, $3::text::jsonb, $4, coalesce($5, now()), coalesce($6, now()))
RETURNING version, created_at, updated_at
"""
# $1: digests of the user and of the conversation.
FLOOR: Final = "SELECT coalesce(max(version), 0) FROM context_tombstones WHERE digest = ANY($1::bytea[])"
BURY: Final = """
INSERT INTO context_tombstones (digest, version) VALUES ($1, $2)
ON CONFLICT (digest) DO UPDATE
SET version = greatest(context_tombstones.version, EXCLUDED.version), erased_at = now()
"""
DELETE_WARM: Final = "DELETE FROM user_contexts WHERE user_id = $1 AND conversation_id = $2 RETURNING version"

# Erasure of a user: the order is that in which conversations are archived; what is promoted waits for LOCK_USER.
ERASE_WARM: Final = """
WITH gone AS (DELETE FROM user_contexts WHERE user_id = $1 RETURNING version)
SELECT count(*), coalesce(max(version), 0) FROM gone
"""
ERASE_KEYS: Final = """
WITH gone AS (DELETE FROM context_archive_keys WHERE user_id = $1 RETURNING archived_at)
SELECT count(*) FROM gone
"""
ERASE_ARCHIVED: Final = """
WITH gone AS (DELETE FROM user_contexts_archive WHERE user_id = $1 RETURNING version)
SELECT count(*), coalesce(max(version), 0) FROM gone
"""
ERASE_TEMPLATES: Final = """
WITH gone AS (DELETE FROM prompt_templates WHERE user_id = $1 RETURNING 1) SELECT count(*) FROM gone
"""
ERASE_DEBTS: Final = "DELETE FROM context_cache_debts WHERE user_id = $1"

# $2, $3: the last entry of the page before, or NULL.
LIST: Final = """
SELECT conversation_id, version, created_at, updated_at, tier FROM (
    SELECT conversation_id, version, created_at, updated_at, 'warm' AS tier FROM user_contexts WHERE user_id = $1
    UNION ALL
    SELECT a.conversation_id, a.version, a.created_at, a.updated_at, 'archive'
    FROM context_archive_keys k JOIN user_contexts_archive a
        ON a.user_id = k.user_id AND a.conversation_id = k.conversation_id AND a.archived_at = k.archived_at
    WHERE k.user_id = $1 AND NOT EXISTS (
        SELECT FROM user_contexts w WHERE w.user_id = k.user_id AND w.conversation_id = k.conversation_id)
) every
WHERE $2::timestamptz IS NULL OR (updated_at, conversation_id) < ($2, $3::text)
ORDER BY updated_at DESC, conversation_id DESC LIMIT $4
"""

OWE: Final = """
INSERT INTO context_cache_debts (user_id, conversation_id) VALUES ($1, $2)
ON CONFLICT (user_id, conversation_id) DO UPDATE SET id = DEFAULT RETURNING id
"""
OWED: Final = "SELECT id, user_id, conversation_id FROM context_cache_debts ORDER BY id LIMIT $1"
PAID: Final = "DELETE FROM context_cache_debts WHERE id = ANY($1::bigint[])"
"""One that was owed again meanwhile has another ID, and stays."""
