-- Chat contexts in tiers: versions, so that no stale writer wins; an archive of which a month can be dropped; what was
-- deleted stays deleted; prompt templates. Why so: docs/decisions/0013-context-archive.md.

ALTER TABLE user_contexts ADD COLUMN version bigint NOT NULL DEFAULT 1 CHECK (version > 0);

-- The archive becomes one table for each month of archived_at (UTC). A unique index over these would have to contain
-- archived_at, so what holds a conversation to one place is context_archive_keys, written in the same transaction.
ALTER TABLE user_contexts_archive RENAME TO user_contexts_archive_before;
DROP INDEX idx_archive_user;

CREATE SEQUENCE user_contexts_archive_ids AS bigint CACHE 32;
CREATE TABLE user_contexts_archive (
    id              bigint       NOT NULL DEFAULT nextval('user_contexts_archive_ids'),
    user_id         varchar(255) NOT NULL,
    conversation_id varchar(255) NOT NULL,
    messages        jsonb        NOT NULL,
    created_at      timestamptz  NOT NULL,          -- of the conversation; no default, so that no move forgets it
    archived_at     timestamptz  NOT NULL DEFAULT now(),
    updated_at      timestamptz  NOT NULL DEFAULT now(),
    version         bigint       NOT NULL DEFAULT 1 CHECK (version > 0)
) PARTITION BY RANGE (archived_at);
CREATE INDEX idx_archive_user ON user_contexts_archive (user_id, conversation_id);

CREATE TABLE context_archive_keys (                 -- where in the archive a conversation is, at most once
    user_id         varchar(255) NOT NULL,
    conversation_id varchar(255) NOT NULL,
    archived_at     timestamptz  NOT NULL,          -- its month may have been dropped: then there is nothing any more
    PRIMARY KEY (user_id, conversation_id)
) WITH (autovacuum_vacuum_scale_factor = 0.05);     -- a dropped month is a twelfth of them: its room serves the next one

-- The table of the month that `at` is in, made if it is missing; its name. Attached and not created in place: that
-- lets readers and writers of the archive go on meanwhile.
CREATE FUNCTION make_context_month(at timestamptz, space text DEFAULT '') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    since timestamptz := date_trunc('month', at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
    until timestamptz := (date_trunc('month', at AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC';
    name text := 'user_contexts_archive_' || to_char(at AT TIME ZONE 'UTC', 'YYYY"m"MM');
begin
    PERFORM pg_advisory_xact_lock(hashtextextended('tierd context months', 0));
    if to_regclass(quote_ident(name)) IS NOT NULL then
        RETURN name;
    end if;
    EXECUTE format('CREATE TABLE %I (LIKE user_contexts_archive INCLUDING DEFAULTS INCLUDING CONSTRAINTS'
        ' INCLUDING STORAGE INCLUDING COMPRESSION)%s', name,
        case when space = '' then '' else format(' TABLESPACE %I', space) end);
    EXECUTE format('CREATE INDEX ON %I (user_id, conversation_id)%s', name,
        case when space = '' then '' else format(' TABLESPACE %I', space) end);
    EXECUTE format('ALTER TABLE user_contexts_archive ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name,
        since, until);
    RETURN name;
end $$;

-- lz4 takes a fraction of pglz's time; a server may have been built without.
DO $$ begin
    ALTER TABLE user_contexts ALTER COLUMN messages SET COMPRESSION lz4;
    ALTER TABLE user_contexts_archive ALTER COLUMN messages SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported OR invalid_parameter_value then
    RAISE NOTICE 'no lz4 here';
end $$;

-- Who wrote the archive before this kept no versions. Where a conversation is in both tables the recent one is newer.
DO $$ begin
    PERFORM make_context_month(month) FROM (
        SELECT DISTINCT date_trunc('month', archived_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' AS month
        FROM user_contexts_archive_before UNION SELECT now()
    ) months;
end $$;
INSERT INTO user_contexts_archive (id, user_id, conversation_id, messages, created_at, archived_at, updated_at)
SELECT id, user_id, conversation_id, messages, created_at, archived_at, created_at FROM user_contexts_archive_before;
INSERT INTO context_archive_keys (user_id, conversation_id, archived_at)
SELECT user_id, conversation_id, archived_at FROM user_contexts_archive_before;
SELECT setval('user_contexts_archive_ids', max(id)) FROM user_contexts_archive_before HAVING max(id) IS NOT NULL;
UPDATE user_contexts c SET version = 2 FROM user_contexts_archive_before a
WHERE a.user_id = c.user_id AND a.conversation_id = c.conversation_id;
DROP TABLE user_contexts_archive_before;

-- What was deleted, so that neither a restored export nor a slow cache brings it back. SHA-256 of who or what it was:
-- a list of all who asked to be forgotten would be no way to forget them.
CREATE TABLE context_tombstones (
    digest    bytea       PRIMARY KEY CHECK (octet_length(digest) = 32),
    version   bigint      NOT NULL,                 -- the last one that there was; the next one is above
    erased_at timestamptz NOT NULL DEFAULT now()
);

-- Conversations that Redis could not be told of when they changed. It may hold older ones: whoever reaches it again
-- removes these there, and then here. conversation_id '': all of that user's.
CREATE TABLE context_cache_debts (
    user_id         varchar(255) NOT NULL,
    conversation_id varchar(255) NOT NULL,
    id              bigint       NOT NULL GENERATED ALWAYS AS IDENTITY,  -- another one each time it changes
    PRIMARY KEY (user_id, conversation_id)
);

CREATE TABLE context_exports (                      -- months that are over: from the wish to export them to their end
    month       text        PRIMARY KEY CHECK (month ~ '^[0-9]{4}-[0-9]{2}$'),
    state       text        NOT NULL CHECK (state IN ('exporting', 'verified', 'dropped', 'done')),
    attempt     int         NOT NULL DEFAULT 1 CHECK (attempt > 0),  -- objects are written once: each try has its own key
    rows        bigint      CHECK (rows >= 0),
    size_bytes  bigint      CHECK (size_bytes >= 0),
    sha256      text        CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    verified_at timestamptz,
    dropped_at  timestamptz
);

CREATE TABLE prompt_templates (
    user_id    varchar(255) NOT NULL,
    name       varchar(255) NOT NULL,
    version    int          NOT NULL CHECK (version > 0),
    template   text         NOT NULL,
    created_at timestamptz  NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, name, version)
);
